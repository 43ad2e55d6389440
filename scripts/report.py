"""The equilibrium report of one run, or of several beside each other: one HTML file that opens by double click.

python scripts/report.py [RUN ...] [output=FILE.html] [pictures=6]
Mean score, sampling probability, EBL margin and AP of every class, over time; losses; causes of lost objects, largest
confusions, worst misses; predictions; what produced it. Without RUN: the newest below runs/. Pictures need the data
where the run found them.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from loce.config import UserError, read_options, run_script
from loce.report.tables.steps import folders_of
from loce.utils.files import require_writable, write_text
from loce.utils.options import Natural


@dataclass(frozen=True, kw_only=True)
class Options:
    """Report on run folders."""

    output: str = ""  # the HTML file; empty: report.html in the run folder, or of several in the folder of the first
    pictures: Natural = 6  # validation images that predictions are drawn on; 0: no pictures at all


def main() -> None:
    folders, words = folders_of(sys.argv[1:])
    options = read_options(Options, words)
    if not folders:
        raise UserError("no run with a checkpoint below runs/; give run folders: report.py RUN [RUN ...]")

    from loce.report.page import page, predictions  # imports torch, after the options are known to be right
    from loce.report.reading import read_run

    runs = [read_run(folder) for folder in folders]
    titles = Counter(run.title for run in runs)
    for run in runs:
        run.title = str(run.folder) if titles[run.title] > 1 else run.title
        for what in run.missing:
            print(f"{run.title} lacks {what}")
    where = runs[0].folder if len(runs) == 1 else runs[0].folder.parent
    output = Path(options.output) if options.output else where / "report.html"
    require_writable(output.parent)
    write_text(output, page(runs, *predictions(runs, options.pictures)))
    print(f"wrote {output} ({output.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    run_script(main)
