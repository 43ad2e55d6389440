"""All tables over all seeds, the paper's claims judged by them, and a figure: python scripts/results.py data=glyphs.

Reads the records of what is trained (scripts/tables.py); docs/benchmark.md says beforehand what is judged and how.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from loce.config import read_options, run_script
from loce.report.tables.prediction import leaderboard, prediction
from loce.report.tables.results import (
    PAGES,
    between_marks,
    figure_of,
    first_screen,
    methods_of_drawn_sets,
    page,
    read_tables,
    write_figure,
)
from loce.report.tables.rows import RunOptions
from loce.utils.files import write_text


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Write what the records of all tables show."""

    out: str = ""  # folder of results.md (of glyphs: results_v1.md), leaderboard.md, prediction.md; empty: the tables'
    readme: str = ""  # a page whose part between marks becomes Table 1 and what LOCE gains by Table 10; empty: none


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    tables = read_tables(options)
    folder = Path(options.out or Path(options.runs, options.data))
    text = page(tables, options)
    write_figure(tables, folder / figure_of(options.data))
    file = folder / f"{PAGES[options.data]}.md"
    write_text(file, text)
    print(f"{text}\nwrote {file}")
    methods = methods_of_drawn_sets(options)
    for name, write in (("leaderboard.md", leaderboard), ("prediction.md", prediction)):
        write_text(folder / name, write(methods, options))
        print(f"wrote {folder / name}")
    if options.readme:
        readme = Path(options.readme)
        write_text(readme, between_marks(readme.read_text(encoding="utf-8"), first_screen(tables, options.data)))
        print(f"wrote {readme}")


if __name__ == "__main__":
    run_script(main)
