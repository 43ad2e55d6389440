"""Tables of the paper and their rows (configs/tables.yaml): one run for every seed, and where each run goes."""

import json
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from loce.config import (
    GONE,
    MAY_CHANGE,
    Config,
    UserError,
    diff,
    find_config,
    images_per_rank,
    load_config,
    raise_problems,
    to_dict,
)
from loce.utils.files import inside
from loce.utils.options import Conflict, Count, Natural, build, flatten
from loce.utils.yaml_text import differing, dotted, load_yaml

COLUMNS = ("box AP", "AP", "APr", "APc", "APf")
PROTOCOLS = ("fixed", "pool")  # further ones that a run may be evaluated by
MEASURES = {  # further columns, where runs have them: key and name in metrics.json
    **{
        f"{column}-{protocol}": (f"{'bbox' if column == 'box AP' else 'segm'}_{protocol}", column.removeprefix("box "))
        for protocol in PROTOCOLS
        for column in COLUMNS
    },
    **{f"ECE{group}": ("segm", f"ECE{group}") for group in ("", "r", "c", "f")},
    "accuracy": ("true_boxes", "accuracy"),
    **{f"accuracy {group}": ("true_boxes", f"accuracy_{group}") for group in ("r", "c", "f")},
}
ACCURACIES = tuple(name for name in MEASURES if name.startswith("accuracy"))
SHOWN = ("AP-fixed", "AP-pool", "ECE", "ECEr", "ECEc", "ECEf", *ACCURACIES)  # of MEASURES, in tables
UNKNOWN = -1.0  # among the published numbers
PEERS = (5, 8)  # the tables of methods
Records = list[dict[str, Any]]  # of a row, one of each seed


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of all tables: what to train, on which data, and where it goes."""

    data: Literal["glyphs", "glyph100", "glyph1203", "lvis"] = (
        "glyphs"  # the first two: for CPU cores; all but lvis: drawn
    )
    seeds: Count = 1  # trainings of every row, stage 1 included: seeds 0, 1, ...
    first_seed: Natural = 0  # instead of 0
    gpus: Natural = 0  # processes of a training; 0 or 1: one
    runs: str = "runs/tables"  # folder of the tables, of other seeds, and of the rows that change a recipe
    records: str = "runs/tables/records"  # a file of numbers for every finished run: what has one is not trained again
    words: tuple[str, ...] = ()  # key=value for every training, such as where the images are

    @property
    def all_seeds(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)


@dataclass(frozen=True, kw_only=True)
class RowText:
    """Row of configs/tables.yaml."""

    name: str
    recipe: str  # one of `recipes`, or a file in the folder of the methods
    words: tuple[str, ...] = ()
    last: str = ""  # commit of the last version that has all options of `words`: the row is as recorded, never trained
    post_hoc: tuple[str, ...] = ()  # the run of `recipe`, evaluated anew with these words
    start: str = ""  # the row above whose run it starts from, instead of the recipe's stage 1
    processes: Natural = 0  # of its training; 0: as many as GPUs
    question: str = ""  # that the difference to the row `against` answers
    against: str = "LOCE"
    year: Natural = 0  # of its publication
    paper: tuple[float, ...] = (UNKNOWN,) * len(COLUMNS)  # as COLUMNS; -1: not published
    over: tuple[float, ...] = ()  # what `paper` is compared with there; none: the softmax row's `paper`
    source: str = ""  # of the published numbers, and what was trained for them


NUMBERS = f"must be {len(COLUMNS)} numbers: {', '.join(COLUMNS)}"
ROW_CONFLICTS: tuple[Conflict, ...] = (
    (("paper",), lambda row: len(row.paper) != len(COLUMNS), NUMBERS),
    (("over",), lambda row: len(row.over) not in (0, len(COLUMNS)), NUMBERS),
)


@dataclass(frozen=True)
class Recipes:
    """Recipes of a data set in configs/tables.yaml."""

    stages: list[str]
    named: dict[str, str]
    methods: str
    note: str
    glyphs: tuple[str, ...] = ()
    one_stage: str = ""
    two_stages: str = ""
    words: dict[str, list[str]] = field(default_factory=dict)

    def command(self, recipe: str) -> list[str]:
        """The first words of the command of a recipe's command: its file, and what the data set changes."""
        file = recipe if recipe.endswith(".yaml") else self.named.get(recipe, f"{self.methods}/{recipe}.yaml")
        if self.two_stages and recipe != file and recipe not in self.named:
            file += "," + (self.two_stages if alone((file,), str(Path.cwd())).train.init else self.one_stage)
        return [file, *self.words.get(recipe, [])]


@dataclass(frozen=True)
class Run:
    """Training run: the words of its command, which begin with the recipe, and the config that they mean."""

    words: list[str]
    config: Config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output)


@dataclass(frozen=True)
class RowRun(Run):
    """Run of a row with one seed: processes, the folder of its evaluation, the file of its record (records.py)."""

    processes: int
    evaluation: Path
    record: Path
    trainable: bool = True  # False: it needs options that went; its record stands
    post_hoc: tuple[str, ...] = ()  # words that it is evaluated anew with

    @property
    def done(self) -> bool:
        """Whether it is trained and evaluated, here or wherever its record comes from."""
        return self.record.exists()

    @property
    def options(self) -> dict[str, Any]:
        """What decides its numbers, besides the code: the options that are not their defaults."""
        config = replace(self.config, output="", train=replace(self.config.train, init=""))
        values = dotted(to_dict(config))
        changed = {key: values[key] for key in diff(Config(), config) if key not in MAY_CHANGE}
        return {**changed, "evaluation": self.evaluation.name, "init": Path(self.config.train.init).name}

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The record of a run that is done. UserError where it is one of other options."""
        found: dict[str, Any] = json.loads(self.record.read_text(encoding="utf-8"))
        keys = [key for key in differing(found["options"], self.options) if key not in MAY_CHANGE]
        if keys and self.trainable:
            raise UserError(f"{self.record}: is of a run with another {', '.join(keys)}; delete it")
        return found


@dataclass(frozen=True)
class Row:
    """Row of a table, ready to be trained: one run for each seed."""

    text: RowText
    runs: list[RowRun]

    @property
    def records(self) -> Records:
        """The records of the runs that are finished."""
        return [run.facts for run in self.runs if run.done]


@dataclass(frozen=True)
class Table:
    """Table of the paper: number, title, where its recipes are, rows."""

    number: int
    title: str
    recipes: Recipes
    rows: list[Row]

    def records(self, name: str) -> Records:
        """The records of the row of this name; none where there is no such row."""
        return next((row.records for row in self.rows if row.text.name == name), [])

    @property
    def measures(self) -> list[str]:
        """Those of SHOWN that a record has: older ones lack some."""
        records = [record for row in self.rows for record in row.records]
        return [name for name in SHOWN if any(name in record["resamples"] for record in records)]


def read_table(options: RunOptions, number: int) -> Table:
    """A table of configs/tables.yaml. UserError with what is wrong in any of its rows."""
    file = find_config("tables.yaml")
    content = load_yaml(file.read_text(encoding="utf-8"), str(file))
    name = f"table{number}"
    if name not in content:
        raise UserError(f"table = {number}: {file} has {', '.join(n for n in content if n != 'recipes')}")
    if options.data not in content[name].get("data", [options.data]):
        raise UserError(f"data = {options.data}: table {number} is of {' or '.join(content[name]['data'])}")
    table = Table(number, content[name]["title"], Recipes(**content["recipes"][options.data]), [])
    problems = []
    # A table may have the rows of another, too: then all stand by year.
    other = content[name].get("also")
    names = [other, name] if other else [name]
    lines = [(f"{file}, {n}, row {at}", row) for n in names for at, row in enumerate(content[n]["rows"], start=1)]
    for source, values in lines:
        try:
            text = build(RowText, flatten(RowText, values, source), ROW_CONFLICTS)
            # A row may start from the run, of the same seed, of a row above.
            starts = next((row.runs for row in table.rows if row.text.name == text.start), [])
            if text.start and not starts:
                raise UserError(f"start = {text.start}: no row above has this name")
            runs = [
                make_run(options, table.recipes, text, seed, starts[seed - options.first_seed] if starts else None)
                for seed in options.all_seeds
            ]
            table.rows.append(Row(text, runs))
        except UserError as error:
            problems.append(f"{source}: {str(error).replace(f'{source}: ', '')}")
    raise_problems(problems)
    if other:
        table.rows.sort(key=lambda row: row.text.year)
    return table


def make_run(
    options: RunOptions,
    recipes: Recipes,
    text: RowText,
    seed: int,
    start: Run | None = None,
) -> RowRun:
    """The run of a row: in the recipe's own folder where nothing is changed, else below `options.runs`."""
    recipe = recipes.command(text.recipe)
    words = [*recipe, *text.words, *options.words]
    if any(word.startswith("output=") for word in words):
        raise UserError("output: every row has its own run folder; runs=... chooses where")
    here = str(Path.cwd())
    plain, name = alone(tuple(recipe), here), stem(recipe[0])
    # A further seed, and the stage of the same seed to start from.
    if seed:
        words += [f"seed={seed}"]
        stages = {alone(tuple(recipes.command(stage)), here).output: stage for stage in recipes.stages}
        if plain.train.init in stages and not start:
            stage = stage_run(options, recipes, stages[plain.train.init], seed)
            words = [word for word in words if not word.startswith("train.init=")]
            words.append(f"train.init={stage.config.output}")
    words += [f"train.init={start.folder}"] if start else []
    # Where a closed row started and what it trained; without the memory, whose options may not be allowed any more.
    still = [word for word in words if word.partition("=")[0] not in GONE]
    config = load_config([*still, "memory.enabled=false"] if text.last else words)
    processes = text.processes or options.gpus
    images_per_rank(config.train, max(processes, 1))
    # Folders and the record are named by what changes the recipe; words that it has anyway evaluate nothing anew.
    post_hoc = tuple(word for word in text.post_hoc if load_config([*words, word]) != config)
    changes = [*text.words, *([f"processes={processes}"] if text.processes else [])]
    changes += [f"init={start.folder.name}"] if start else []
    folder = plain.output
    if text.processes or replace(config, output=folder) != plain:
        folder = str(inside(seed_folder(options, seed), "+".join([name, *changes])))
        words.append(f"output={folder}")
    evaluation = inside(folder, "+".join(["eval", *post_hoc]))
    record = "+".join([name, *changes, *post_hoc]) + ".json"
    record_file = inside(Path(options.records, options.data, f"seed{seed}"), record)
    trainable = not text.last
    return RowRun(words, replace(config, output=folder), processes, evaluation, record_file, trainable, post_hoc)


@cache
def alone(command: tuple[str, ...], folder: str) -> Config:
    """The options of a recipe without a row's words, read once for all rows; folder: where this process works."""
    return load_config(command)


def stem(recipes: str) -> str:
    """The name of a recipe, of several with commas between that of the first."""
    return Path(recipes.partition(",")[0]).stem


def seed_folder(options: RunOptions, seed: int) -> Path:
    """Where the runs of a seed go."""
    return Path(options.runs, options.data, *([f"seed{seed}"] if seed else []))


def stage_run(
    options: RunOptions,
    recipes: Recipes,
    stage: str,
    seed: int,
) -> Run:
    """A stage that rows start from: seed 0 in the recipe's own folder, as `make demo` and users train it."""
    words = [*recipes.command(stage), *options.words]
    if seed:
        words += [f"seed={seed}", f"output={seed_folder(options, seed) / stem(words[0])}"]
    return Run(words, load_config(words))
