"""Tables 1 to 5 of the paper, ours beside the paper's numbers: python scripts/tables.py table=1 data=glyphs|lvis.

configs/tables.yaml lists the rows. Stage 1 and each row are trained unless they are finished; what was stopped goes on.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from steps import average_precisions, percent, run, step

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
from loce.files import inside, write_text
from loce.options import Conflict, Count, Natural, build, flatten
from loce.yaml_text import load_yaml

COLUMNS = ("box AP", "AP", "APr", "APc", "APf")
UNKNOWN = -1.0  # among the published numbers


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train the rows of a table of the paper, and print it."""

    table: Count  # 1 to 5
    data: Literal["glyphs", "lvis"] = "glyphs"  # glyphs: drawn here, a small model on CPU cores
    seeds: Count = 1  # trainings of every row, stage 1 included: seeds 0, 1, ...
    gpus: Natural = 0  # processes of a training; 0 or 1: one
    runs: str = "runs/tables"  # folder of the tables, of other seeds, and of the rows that change a recipe
    rows: tuple[str, ...] = ()  # train these rows only, by name; the others stand in the table if they are finished
    words: tuple[str, ...] = ()  # key=value for every training, such as where the images are


@dataclass(frozen=True, kw_only=True)
class RowText:
    """A row as configs/tables.yaml has it."""

    name: str
    recipe: str  # one of `recipes`, or a file in the folder of the methods
    words: tuple[str, ...] = ()
    post_hoc: tuple[str, ...] = ()  # the run of `recipe`, evaluated anew with these words
    paper: tuple[float, ...]  # as COLUMNS; -1: not published
    source: str = ""  # of the published numbers, and what was trained for them


ROW_CONFLICTS: tuple[Conflict, ...] = (
    (("paper",), lambda row: len(row.paper) != len(COLUMNS), f"must be {len(COLUMNS)} numbers: {', '.join(COLUMNS)}"),
)


@dataclass(frozen=True)
class Recipes:
    """What configs/tables.yaml says of a data set: the stages that rows start from, and where recipes are."""

    stages: list[str]
    named: dict[str, str]
    methods: str
    note: str

    def file(self, recipe: str) -> str:
        """The path, below configs/, of a row's recipe."""
        return self.named.get(recipe, f"{self.methods}/{recipe}.yaml")


@dataclass(frozen=True)
class Run:
    """One training, and the folder of its evaluation; `words` begin with the recipe, config is what they mean."""

    words: list[str]
    config: Config
    evaluation: Path

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output)

    @property
    def done(self) -> bool:
        """Whether it is trained to its end and evaluated."""
        return (self.evaluation / "metrics.json").exists()


@dataclass(frozen=True)
class Row:
    """A row, ready to be trained: one run for each seed."""

    text: RowText
    runs: list[Run]

    @property
    def done(self) -> list[Run]:
        """The runs that are finished."""
        return [run for run in self.runs if run.done]


def read_rows(options: Options) -> tuple[str, Recipes, list[Row]]:
    """The title of the table, where recipes are, and the rows. UserError with what is wrong in any of them."""
    file = find_config("tables.yaml")
    content = load_yaml(file.read_text(encoding="utf-8"), str(file))
    name = f"table{options.table}"
    if name not in content:
        raise UserError(f"table = {options.table}: {file} has {', '.join(n for n in content if n != 'recipes')}")
    recipes = Recipes(**content["recipes"][options.data])
    rows, problems = [], []
    for position, values in enumerate(content[name]["rows"], start=1):
        source = f"{file}, {name}, row {position}"
        try:
            text = build(RowText, flatten(RowText, values, source), ROW_CONFLICTS)
            rows.append(Row(text, [make_run(options, recipes, text, seed) for seed in range(options.seeds)]))
        except UserError as error:
            problems.append(f"{source}: {error}")
    names = [row.text.name for row in rows]
    problems += [f"rows: there is no {name!r}; there are: {', '.join(names)}" for name in set(options.rows) - {*names}]
    raise_problems(problems)
    return content[name]["title"], recipes, rows


def make_run(options: Options, recipes: Recipes, text: RowText, seed: int) -> Run:
    """The run of a row: in the recipe's own folder where nothing is changed, else below `options.runs`."""
    recipe = recipes.file(text.recipe)
    words = [recipe, *text.words, *options.words]
    if any(word.startswith("output=") for word in words):
        raise UserError("output: every row has its own run folder; runs=... chooses where")
    plain = load_config([recipe])
    if seed:
        words += [f"seed={seed}"]
        stages = {load_config([stage]).output: stage for stage in recipes.stages}
        if plain.train.init in stages:
            words.append(f"train.init={stage_run(options, stages[plain.train.init], seed).config.output}")
    config = load_config(words)
    images_per_rank(config.train, max(options.gpus, 1))
    folder = plain.output
    if replace(config, output=folder) != plain:
        folder = str(inside(seed_folder(options, seed), "+".join([Path(recipe).stem, *text.words])))
        words.append(f"output={folder}")
    name = "+".join(["eval", *text.post_hoc])
    return Run(words, replace(config, output=folder), inside(folder, name))


def seed_folder(options: Options, seed: int) -> Path:
    """Where the runs of a seed go."""
    return Path(options.runs, options.data, *([f"seed{seed}"] if seed else []))


def stage_run(options: Options, stage: str, seed: int) -> Run:
    """A stage that rows start from: seed 0 in the recipe's own folder, as `make demo` and users train it."""
    words = [stage, *options.words]
    if seed:
        words += [f"seed={seed}", f"output={seed_folder(options, seed) / Path(stage).stem}"]
    config = load_config(words)
    return Run(words, config, Path(config.output, "eval"))


def prepare(options: Options, recipes: Recipes, jobs: list[Run]) -> None:
    """Draw the glyphs and train the stages that are missing, where one of the runs needs them."""
    waiting = [job for job in jobs if not job.done]
    if not waiting:
        return
    data = waiting[0].config.data
    if options.data == "glyphs" and not Path(data.train_annotations).exists():
        run("make_glyphs.py", f"out={data.train_images}")
    first = stage_run(options, recipes.stages[0], 0)
    forests = {job.config.head.forest.trees: job for job in waiting if job.config.head.name == "forest"}
    starts = {job.config.train.init for job in waiting} | ({first.config.output} if forests else set())
    for seed in range(options.seeds):
        for stage in (stage_run(options, name, seed) for name in recipes.stages):
            if stage.config.output in starts and not stage.done:
                step(stage.folder, "train.py", *stage.words, processes=options.gpus)
    for trees, job in forests.items():
        if not Path(trees).exists():
            words = f"words=[{', '.join(map(json.dumps, job.words[1:]))}]"
            run("build_forest.py", f"config={job.words[0]}", words, f"checkpoint={first.folder}")


def train_row(options: Options, text: RowText, job: Run) -> None:
    """Train and evaluate one run, then evaluate it anew where the row says so; what is finished is not done again."""
    if job.done:
        print(f"{text.name}: {job.evaluation}: finished before, used as it is", flush=True)
        return
    script = "finetune.py" if job.config.train.init else "train.py"
    step(job.folder, script, *job.words, processes=options.gpus)
    if text.post_hoc:
        words = (f"checkpoint={job.folder}", *text.post_hoc, f"output={job.evaluation}")
        run("evaluate.py", *words, processes=options.gpus)


def markdown(options: Options, title: str, recipes: Recipes, rows: list[Row]) -> str:
    """The table as far as it is trained, and what its numbers are of."""
    done = [job for row in rows for job in row.done]
    names = [*COLUMNS, *(f"paper's {name}" for name in COLUMNS), "training", "run"]
    lines = [f"**Table {options.table}: {title}**", "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        published = ["-" if value == UNKNOWN else f"{value:.1f}" for value in row.text.paper]
        cells = [
            row.text.name,
            *ours(row),
            *published,
            training(row.runs[0].config),
            str(row.runs[0].evaluation.parent),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "AP is mask AP where it does not say box.", recipes.note]
    if options.seeds > 1:
        lines.append(f"Mean ± standard deviation over the seeds that are trained, at most {options.seeds}.")
    sources = [f"{row.text.name}: {row.text.source}" for row in rows if row.text.source]
    lines += [f"Published numbers: {', '.join(sources)}."] if sources else []
    for name, find in (("data", data_of), ("protocol", protocol_of), ("code", code_of)):
        lines.append(f"{name}: {'; '.join(dict.fromkeys(find(job) for job in done)) or 'no row is trained'}")
    return "\n".join(lines) + "\n"


def ours(row: Row) -> list[str]:
    """COLUMNS of a row in percent, the mean over its finished runs; "-" of no classes."""
    columns = list(zip(*(average_precisions(job.evaluation) for job in row.done), strict=True))
    return [percent(values) for values in columns] or ["not run"] * len(COLUMNS)


def training(config: Config) -> str:
    """Where a run starts, what it trains and for how long."""
    train = config.train
    if not train.init:
        return f"end to end, {train.epochs} epochs"
    parts = {"none": "all", "backbone": "all but backbone", "trunk": "all but trunk", "detector": "classifier only"}
    return f"{train.init} + {train.epochs} epochs, {parts[train.freeze]}"


def facts(job: Run) -> dict[str, Any]:
    """What the numbers of a run are of."""
    found: dict[str, Any] = json.loads((job.evaluation / "evaluation.json").read_text(encoding="utf-8"))
    return found


def data_of(job: Run) -> str:
    """The data that a run was evaluated on."""
    found = facts(job)
    return f"{found['annotations']}, {found['images']:,} images, {found['categories']:,} categories"


def protocol_of(job: Run) -> str:
    """How a run was evaluated."""
    return str(facts(job)["rules"])


def code_of(job: Run) -> str:
    """Version and commit of loce that a run was trained with, the last where it was resumed."""
    file = job.folder / "env.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line.removeprefix("code: ") for line in reversed(lines) if line.startswith("code: ")), "unknown")


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    title, recipes, rows = read_rows(options)
    chosen = [row for row in rows if not options.rows or row.text.name in options.rows]
    if started := [job for row in rows for job in row.runs if job.folder.exists()]:
        from loce.runlog import check_run_folder  # imports torch, after the options are known to be right

        for job in started:
            check_run_folder(job.folder, dump(job.config), dump(Config()))
    prepare(options, recipes, [job for row in chosen for job in row.runs])
    file = Path(options.runs, options.data, f"table{options.table}.md")
    for row in chosen:
        for job in row.runs:
            train_row(options, row.text, job)
            write_text(file, markdown(options, title, recipes, rows))
    print(f"\n{file.read_text(encoding='utf-8')}\nwrote {file}")


if __name__ == "__main__":
    run_script(main)
