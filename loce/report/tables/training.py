"""Training of a table's rows, and the table as far as it is trained."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from loce.engine.passes import passes
from loce.report.tables.cells import markdown_table, percent, published, schedule, speed
from loce.report.tables.rows import ACCURACIES, COLUMNS, UNKNOWN, RowRun, RowText, RunOptions, Table, stage_run
from loce.report.tables.steps import finetune_together, is_evaluated, run, step


def prepare(options: RunOptions, table: Table, runs: list[RowRun]) -> None:
    """Draw the glyphs and train the stages that are missing, where one of the runs needs them."""
    recipes, waiting = table.recipes, [row_run for row_run in runs if not row_run.done]
    if not waiting:
        return
    data = waiting[0].config.data
    if recipes.glyphs and not Path(data.train_annotations).exists():
        run("make_glyphs.py", f"out={data.train_images}", *recipes.glyphs)
    # Stages that runs start from; a forest is built from the features of the first.
    first = stage_run(options, recipes, recipes.stages[0], 0)
    forests = {r.config.head.forest.trees: r for r in waiting if r.config.head.name == "forest"}
    starts = {r.config.train.init for r in waiting} | ({first.config.output} if forests else set())
    for seed in options.all_seeds:
        for stage in (stage_run(options, recipes, name, seed) for name in recipes.stages):
            if stage.config.output in starts and not is_evaluated(stage.folder):
                step(stage.folder, "train.py", *stage.words, processes=options.gpus)
    for trees, row_run in forests.items():
        if not Path(trees).exists():
            words = f"words=[{', '.join(map(json.dumps, row_run.words[1:]))}]"
            run("build_forest.py", f"config={row_run.words[0]}", words, f"checkpoint={first.folder}")


def one_pass(row_run: RowRun, runs: Sequence[RowRun]) -> list[RowRun]:
    """The run and those of `runs` that train in one pass with it (docs/together.md); none where it is trained."""
    if row_run.done or is_evaluated(row_run.folder):
        return []
    found, started = {row_run.folder: row_run}, _started(row_run)
    for other in runs:
        alike = other.processes == row_run.processes and _started(other) == started
        missing = not other.done and not is_evaluated(other.folder)
        if alike and missing and len(passes([row_run.config, other.config])) == 1:
            found.setdefault(other.folder, other)
    return list(found.values())


def _started(row_run: RowRun) -> bool:
    return any((row_run.folder / "checkpoints").glob("*"))


def planned(runs: Sequence[RowRun]) -> list[str]:
    """Lines on what will be trained: passes, and how many runs each has."""
    waiting = [row_run for row_run in runs if not row_run.done and not is_evaluated(row_run.folder)]
    counts, seen = [], set()
    for row_run in waiting:
        if row_run.folder not in seen:
            group = one_pass(row_run, runs)
            seen |= {each.folder for each in group}
            counts.append(len(group))
    return [f"to train: {len(seen)} runs in {len(counts)} passes of {', '.join(map(str, counts))}"] if counts else []


def train_row(text: RowText, row_run: RowRun, runs: Sequence[RowRun] = ()) -> None:
    """Train and evaluate one run, with those of `runs` that can share its pass, then evaluate it anew where the row
    says so; what is finished is not done again."""
    if row_run.done:
        print(f"{text.name}: {row_run.record}: finished before, used as it is", flush=True)
        return
    group = one_pass(row_run, runs)
    if len(group) > 1:
        finetune_together({each.folder: shlex.join(each.words) for each in group}, row_run.processes)
    else:
        script = "finetune.py" if row_run.config.train.init else "train.py"
        step(row_run.folder, script, *row_run.words, processes=row_run.processes)
    if row_run.post_hoc:
        words = (f"checkpoint={row_run.folder}", *row_run.post_hoc, f"output={row_run.evaluation}")
        run("evaluate.py", *words, processes=row_run.processes)


def markdown(options: RunOptions, table: Table) -> str:
    """The table as far as it is trained, and what its numbers are of."""
    cells, measured = [], [name for name in table.measures if name in ACCURACIES]
    for row in table.rows:
        values = [record["values"] for record in row.records]
        ours = [percent([value[name] for value in values]) if values else "not run" for name in COLUMNS]
        more = [percent([value.get(name, UNKNOWN) for value in values] or [UNKNOWN]) for name in measured]
        first = row.runs[0]
        cells.append(
            [
                row.text.name,
                *ours,
                *more,
                *published(row.text.paper),
                schedule(first.config),
                speed(row.records),
                str(first.evaluation.parent),
            ]
        )
    head = ["", *COLUMNS, *measured, *(f"paper's {name}" for name in COLUMNS), "training", "speed, memory", "run"]
    lines = [f"**Table {table.number}: {table.title}**", "", *markdown_table(head, cells)]
    # What the numbers are of.
    lines += ["", "AP is mask AP where it does not say box; without masks it is -, and the groups are of boxes."]
    lines.append(table.recipes.note)
    if options.seeds > 1:
        lines.append(f"Mean ± standard deviation over the seeds that are trained, at most {options.seeds}.")
    sources = [f"{row.text.name}: {row.text.source}" for row in table.rows if row.text.source]
    lines += [f"Published numbers: {', '.join(sources)}."] if sources else []
    records = [record for row in table.rows for record in row.records]
    for name in ("data", "protocol", "code", "device"):
        lines.append(f"{name}: {'; '.join(dict.fromkeys(r[name] for r in records)) or 'no row is trained'}")
    return "\n".join(lines) + "\n"
