"""The paper's Tables 1 to 5, ours beside its numbers, and two of ours (6, 7): python scripts/tables.py table=1.

configs/tables.yaml lists the rows. Stage 1 and each row are trained unless they are finished; what was stopped goes on.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from loce.config import Config, Count, UserError, dump, read_options, run_script
from loce.report.tables.records import speed_in_words, write_record
from loce.report.tables.rows import COLUMNS, UNKNOWN, Recipes, Row, RowRun, RowText, RunOptions, read_rows, stage_run
from loce.report.tables.steps import percent, run, step
from loce.utils.files import write_text


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Train the rows of a table of the paper, and print it."""

    table: Count  # 1 to 5, as the paper; 6: what it leaves open; 7: more epochs (glyphs only)
    rows: tuple[str, ...] = ()  # train these rows only, by name; the others stand in the table if they are finished


def prepare(options: Options, recipes: Recipes, jobs: list[RowRun]) -> None:
    """Draw the glyphs and train the stages that are missing, where one of the runs needs them."""
    waiting = [job for job in jobs if not job.done]
    if not waiting:
        return
    data = waiting[0].config.data
    if recipes.glyphs and not Path(data.train_annotations).exists():
        run("make_glyphs.py", f"out={data.train_images}", *recipes.glyphs)
    first = stage_run(options, recipes.stages[0], 0)
    forests = {job.config.head.forest.trees: job for job in waiting if job.config.head.name == "forest"}
    starts = {job.config.train.init for job in waiting} | ({first.config.output} if forests else set())
    for seed in range(options.seeds):
        for stage in (stage_run(options, name, seed) for name in recipes.stages):
            if stage.config.output in starts and not stage.trained:
                step(stage.folder, "train.py", *stage.words, processes=options.gpus)
    for trees, job in forests.items():
        if not Path(trees).exists():
            words = f"words=[{', '.join(map(json.dumps, job.words[1:]))}]"
            run("build_forest.py", f"config={job.words[0]}", words, f"checkpoint={first.folder}")


def train_row(text: RowText, job: RowRun) -> None:
    """Train and evaluate one run, then evaluate it anew where the row says so; what is finished is not done again."""
    if job.done:
        print(f"{text.name}: {job.record}: finished before, used as it is", flush=True)
        return
    script = "finetune.py" if job.config.train.init else "train.py"
    step(job.folder, script, *job.words, processes=job.processes)
    if text.post_hoc:
        words = (f"checkpoint={job.folder}", *text.post_hoc, f"output={job.evaluation}")
        run("evaluate.py", *words, processes=job.processes)


def markdown(options: Options, title: str, recipes: Recipes, rows: list[Row]) -> str:
    """The table as far as it is trained, and what its numbers are of."""
    done = [job for row in rows for job in row.done]
    names = [*COLUMNS, *(f"paper's {name}" for name in COLUMNS), "training", "speed, memory", "run"]
    lines = [f"**Table {options.table}: {title}**", "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        published = ["-" if value == UNKNOWN else f"{value:.1f}" for value in row.text.paper]
        cells = [
            row.text.name,
            *ours(row),
            *published,
            training(row.runs[0].config),
            speed_in_words([job.facts for job in row.done]),
            str(row.runs[0].evaluation.parent),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "AP is mask AP where it does not say box.", recipes.note]
    if options.seeds > 1:
        lines.append(f"Mean ± standard deviation over the seeds that are trained, at most {options.seeds}.")
    sources = [f"{row.text.name}: {row.text.source}" for row in rows if row.text.source]
    lines += [f"Published numbers: {', '.join(sources)}."] if sources else []
    facts = [job.facts for job in done]
    for name in ("data", "protocol", "code", "device"):
        lines.append(f"{name}: {'; '.join(dict.fromkeys(fact[name] for fact in facts)) or 'no row is trained'}")
    return "\n".join(lines) + "\n"


def ours(row: Row) -> list[str]:
    """COLUMNS of a row in percent, the mean over its finished runs; "-" of no classes."""
    values = [job.facts["values"] for job in row.done]
    return [percent([value[name] for value in values]) if values else "not run" for name in COLUMNS]


def training(config: Config) -> str:
    """Where a run starts, what it trains and for how long."""
    train = config.train
    if not train.init:
        return f"end to end, {train.epochs} epochs"
    parts = {"none": "all", "backbone": "all but backbone", "trunk": "all but trunk", "detector": "classifier only"}
    return f"{train.init} + {train.epochs} epochs, {parts[train.freeze]}"


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    title, recipes, rows = read_rows(options, options.table)
    unknown = set(options.rows) - {row.text.name for row in rows}
    if unknown:
        there = ", ".join(row.text.name for row in rows)
        raise UserError("\n".join(f"rows: there is no {name!r}; there are: {there}" for name in sorted(unknown)))
    chosen = [row for row in rows if not options.rows or row.text.name in options.rows]
    if started := [job for row in rows for job in row.runs if job.folder.exists()]:
        from loce.engine.log import check_run_folder  # imports torch, after the options are known to be right

        for job in started:
            check_run_folder(job.folder, dump(job.config), dump(Config()))
    prepare(options, recipes, [job for row in chosen for job in row.runs])
    file = Path(options.runs, options.data, f"table{options.table}.md")
    for row in chosen:
        for seed, job in enumerate(row.runs):
            train_row(row.text, job)
            if not job.done:
                write_record(job, seed)
            write_text(file, markdown(options, title, recipes, rows))
    print(f"\n{file.read_text(encoding='utf-8')}\nwrote {file}")


if __name__ == "__main__":
    run_script(main)
