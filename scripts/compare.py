"""Is B better than A, and where? Paired bootstrap over images of two runs, or output folders of scripts/evaluate.py.

python scripts/compare.py A B [resamples=1000] [top=10] [output=CLASSES.csv]
AP, calibration errors, accuracy on the true boxes (class-balanced), and both for every category, with 95% intervals.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from loce.config import Count, UserError, read_options, run_script
from loce.evaluation.comparison import compare_folders
from loce.utils.files import require_writable


@dataclass(frozen=True, kw_only=True)
class Options:
    """Two folders, then options."""

    resamples: Count = 1000  # of the bootstrap
    top: Count = 10  # categories shown that gained and that lost most
    output: str = ""  # CSV file for the differences of all categories; empty: none


def main() -> None:
    words = sys.argv[1:]
    folders = [word for word in words if Path(word).is_dir() or ("=" not in word and not word.startswith("-"))]
    options = read_options(Options, [word for word in words if word not in folders])
    if len(folders) != 2:
        raise UserError(f"two folders are needed, {len(folders)} were given: {__doc__.splitlines()[2]}")
    if options.output:
        require_writable(Path(options.output).parent)
    print(compare_folders(folders[0], folders[1], options.resamples, options.top, options.output), end="")
    if options.output:
        print(f"\nwrote {options.output}: every category")


if __name__ == "__main__":
    run_script(main)
