"""Tables 1 to 4 of the paper, ours beside the paper's numbers: python scripts/tables.py table=1 data=glyphs|lvis.

configs/tables.yaml lists the rows. Stage 1 and each row are trained unless they are finished; what was stopped goes on.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from steps import average_precisions, is_evaluated, run, step

from loce.config import (
    Config,
    UserError,
    dump,
    find_config,
    images_per_rank,
    load_config,
    raise_problems,
    read_options,
    run_script,
)
from loce.files import write_text
from loce.options import Conflict, Count, Natural, build, flatten
from loce.yaml_text import load_yaml

COLUMNS = ("box AP", "AP", "APr", "APc", "APf")
NOTES = {
    "glyphs": (
        "The paper's numbers are of LVIS v1, ours of Glyph-LVIS, which is far smaller: differences between rows can be "
        "compared, numbers cannot. The baseline here goes on from stage 1 with plain softmax and a frozen trunk, for "
        "as many epochs as LOCE does; the paper's trains everything for 30 epochs."
    ),
    "lvis": "The paper does not give the baseline's drops of the learning rate; configs/baseline.yaml says ours.",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train the rows of a table of the paper, and print it."""

    table: Count  # 1 to 4
    data: Literal["glyphs", "lvis"] = "glyphs"  # glyphs: drawn here, a small model on CPU cores
    gpus: Natural = 0  # processes of a training; 0 or 1: one
    runs: str = "runs/tables"  # folder of the tables and of the rows that change a recipe
    words: tuple[str, ...] = ()  # key=value for every training, such as where the images are


@dataclass(frozen=True, kw_only=True)
class RowText:
    """A row as configs/tables.yaml has it."""

    name: str
    recipe: Literal["baseline", "loce"]
    words: tuple[str, ...] = ()
    paper: tuple[float, ...]  # as COLUMNS


ROW_CONFLICTS: tuple[Conflict, ...] = (
    (("paper",), lambda row: len(row.paper) != len(COLUMNS), f"must be {len(COLUMNS)} numbers: {', '.join(COLUMNS)}"),
)


@dataclass(frozen=True)
class Row:
    """A row, ready to be trained: `words` begin with the recipe; config is what they mean."""

    text: RowText
    words: list[str]
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.output)


def read_rows(options: Options) -> tuple[str, str, list[Row]]:
    """The title of the table, the recipe of stage 1, and the rows. UserError with what is wrong in any of them."""
    file = find_config("tables.yaml")
    content = load_yaml(file.read_text(encoding="utf-8"), str(file))
    name = f"table{options.table}"
    if name not in content:
        raise UserError(f"table = {options.table}: {file} has {', '.join(n for n in content if n != 'recipes')}")
    recipes = content["recipes"][options.data]
    rows, problems = [], []
    for position, values in enumerate(content[name]["rows"], start=1):
        source = f"{file}, {name}, row {position}"
        try:
            text = build(RowText, flatten(RowText, values, source), ROW_CONFLICTS)
            rows.append(make_row(options, text, recipes[text.recipe]))
        except UserError as error:
            problems.append(f"{source}: {error}")
    raise_problems(problems)
    return content[name]["title"], recipes["stage1"], rows


def make_row(options: Options, text: RowText, recipe: str) -> Row:
    """The run of a row: in the recipe's own folder where nothing is changed, else below `options.runs`."""
    words = [recipe, *text.words, *options.words]
    if any(word.startswith("output=") for word in words):
        raise UserError("output: every row has its own run folder; runs=... chooses where")
    config = load_config(words)
    images_per_rank(config.train, max(options.gpus, 1))
    folder = load_config([recipe]).output
    if replace(config, output=folder) != load_config([recipe]):
        folder = str(Path(options.runs, options.data, "+".join([Path(recipe).stem, *text.words])))
        words.append(f"output={folder}")
    return Row(text, words, replace(config, output=folder))


def prepare(options: Options, recipe: str, rows: list[Row]) -> None:
    """Draw the glyphs and train stage 1 where they are missing and a row needs them."""
    waiting = [row for row in rows if not is_evaluated(row.folder)]
    stage1 = load_config([recipe, *options.words])
    if waiting and options.data == "glyphs" and not Path(stage1.data.train_annotations).exists():
        run("make_glyphs.py", f"out={stage1.data.train_images}")
    starts = {row.config.train.init for row in waiting}
    if stage1.output in starts and not is_evaluated(Path(stage1.output)):
        step(Path(stage1.output), "train.py", recipe, *options.words, processes=options.gpus)


def markdown(options: Options, title: str, rows: list[Row]) -> str:
    """The table as far as it is trained, and what its numbers are of."""
    done = [row for row in rows if is_evaluated(row.folder)]
    names = [*COLUMNS, *(f"paper's {name}" for name in COLUMNS), "run"]
    lines = [f"**Table {options.table}: {title}**", "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        ours = average_precisions(row.folder) if row in done else ["not run"] * len(COLUMNS)
        cells = [row.text.name, *ours, *(f"{value:.1f}" for value in row.text.paper), str(row.folder)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "AP is mask AP where it does not say box.", NOTES[options.data]]
    for name, find in (("data", data_of), ("protocol", protocol_of), ("code", code_of)):
        lines.append(f"{name}: {'; '.join(dict.fromkeys(find(row.folder) for row in done)) or 'no row is trained'}")
    return "\n".join(lines) + "\n"


def facts(folder: Path) -> dict[str, Any]:
    """What the numbers of a run are of."""
    found: dict[str, Any] = json.loads((folder / "eval/evaluation.json").read_text(encoding="utf-8"))
    return found


def data_of(folder: Path) -> str:
    """The data that a run was evaluated on."""
    found = facts(folder)
    return f"{found['annotations']}, {found['images']:,} images, {found['categories']:,} categories"


def protocol_of(folder: Path) -> str:
    """How a run was evaluated."""
    return str(facts(folder)["rules"])


def code_of(folder: Path) -> str:
    """Version and commit of loce that a run was trained with, the last where it was resumed."""
    file = folder / "env.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line.removeprefix("code: ") for line in reversed(lines) if line.startswith("code: ")), "unknown")


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    title, stage1, rows = read_rows(options)
    if started := [row for row in rows if row.folder.exists()]:
        from loce.runlog import check_run_folder  # imports torch, after the options are known to be right

        for row in started:
            check_run_folder(row.folder, dump(row.config))
    prepare(options, stage1, rows)
    file = Path(options.runs, options.data, f"table{options.table}.md")
    for row in rows:
        if is_evaluated(row.folder):
            print(f"{row.text.name}: {row.folder}: finished before, used as it is", flush=True)
        else:
            script = "finetune.py" if row.config.train.init else "train.py"
            step(row.folder, script, *row.words, processes=options.gpus)
        write_text(file, markdown(options, title, rows))
    print(f"\n{file.read_text(encoding='utf-8')}\nwrote {file}")


if __name__ == "__main__":
    run_script(main)
