"""The paper's Tables 1 to 5, ours beside its numbers, and five of ours (6 to 10): python scripts/tables.py table=1.

configs/tables.yaml lists the rows. Stage 1 and each row are trained unless they are finished; what was stopped goes on.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from loce.config import Count, UserError, read_options, run_script
from loce.report.tables.records import write_record
from loce.report.tables.rows import RunOptions, read_table
from loce.report.tables.training import markdown, planned, prepare, train_row
from loce.utils.files import write_text


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Train the rows of a table of the paper, and print it."""

    table: Count  # 1 to 5, as the paper; 6: what it leaves open; 7: longer; 8: newer; 9: recipe of today; 10: measures
    also: tuple[Count, ...] = ()  # tables that are trained with it, so that more rows share a pass
    rows: tuple[str, ...] = ()  # train these rows only, by name; the others stand in the table if they are finished


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    tables = [read_table(options, number) for number in dict.fromkeys((options.table, *options.also))]
    # Mistakes first: rows that are not there, run folders of other options.
    trainable = [row for table in tables for row in table.rows if not row.text.last]
    names = list(dict.fromkeys(row.text.name for row in trainable))
    if unknown := sorted(set(options.rows) - set(names)):
        raise UserError("\n".join(f"rows: there is no {name!r}; there are: {', '.join(names)}" for name in unknown))
    if started := [run for row in trainable for run in row.runs if run.folder.exists()]:
        from loce.engine.preflight import check_run_folder  # imports torch, after the options are known to be right

        for run in started:
            check_run_folder(run.folder, run.config)
    # What is missing, pass by pass; the tables are written anew after each.
    chosen = [row for row in trainable if not options.rows or row.text.name in options.rows]
    runs = [run for row in chosen for run in row.runs]
    for line in planned(runs):
        print(line, flush=True)
    prepare(options, tables[0], runs)
    files = {table.number: Path(options.runs, options.data, f"table{table.number}.md") for table in tables}
    for row in chosen:
        for run in row.runs:
            train_row(row.text, run, runs)
            if not run.done:
                write_record(run)
            for table in tables:
                write_text(files[table.number], markdown(options, table))
    for file in files.values():
        print(f"\n{file.read_text(encoding='utf-8')}\nwrote {file}")


if __name__ == "__main__":
    run_script(main)
