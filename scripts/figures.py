"""The paper's Figures 1 and 4 as PNG and PDF, of runs or of evaluated results.

python scripts/figures.py [RUN_OR_EVALUATION ...] [output=figures]
figure1: mean score and accuracy of every class on its true boxes, sorted by training instances, for each run; figure4:
these and AP. Of results of another program (scripts/evaluate.py results=...) figure4 has AP only. Without words: the
newest run below runs/.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from loce.config import UserError, raise_problems, read_options, run_script
from loce.report.tables.steps import folders_of
from loce.utils.files import require_writable

FIGURES = {"figure1": ("score", "accuracy"), "figure4": ("score", "accuracy", "ap")}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw figures of run folders or folders of evaluations."""

    output: str = "figures"  # folder for figure1.png, figure1.pdf, figure4.png and figure4.pdf


def evaluations(paths: list[Path]) -> dict[str, Path]:
    """Title -> evaluation folder. UserError with everything that is missing."""
    folders = [path / "eval" if (path / "config.yaml").is_file() else path for path in paths]
    raise_problems(
        [
            f"{folder}: no per_category.csv: not evaluated"
            for folder in folders
            if not (folder / "per_category.csv").is_file()
        ]
    )
    names = [path.resolve().name for path in paths]
    titles = names if len(set(names)) == len(names) else [str(path) for path in paths]
    return dict(zip(titles, folders, strict=True))


def main() -> None:
    named, words = folders_of(sys.argv[1:])
    options = read_options(Options, words)
    if not named:
        raise UserError("no run with a checkpoint below runs/; give folders: figures.py RUN_OR_EVALUATION ...")
    folders = evaluations(named)
    require_writable(options.output)

    from loce.report.figures import equilibrium_figure

    scored = all((folder / "mean_scores.csv").is_file() for folder in folders.values())
    if not scored:
        print("AP only: not every evaluation is of a checkpoint of ours, which has mean_scores.csv")
    for name, rows in FIGURES.items() if scored else [("figure4", ("ap",))]:
        for suffix in ("png", "pdf"):
            path = Path(options.output, f"{name}.{suffix}")
            equilibrium_figure(folders, path, rows)
            print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
