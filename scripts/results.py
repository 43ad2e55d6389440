"""All tables over all seeds, the paper's claims judged by them, and a figure: python scripts/results.py data=glyphs.

Reads the records of what is trained (scripts/tables.py); docs/benchmark.md says beforehand what is judged and how.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from result_statistics import Estimate, difference, metric, score_tracks_accuracy
from table_rows import COLUMNS, UNKNOWN, Row, RunOptions, read_rows
from tables import training

from loce.config import read_options, run_script
from loce.files import write_text

TABLES = (1, 2, 3, 4, 5, 6)
TRACKS = 0.7  # rank correlation from which on the mean score tracks accuracy
LITTLE = 1.0  # box AP: what matters less matters little
MARKS = ("<!-- Table 1: begin -->\n", "<!-- Table 1: end -->\n")
ENOUGH_SEEDS = 3  # for a verdict without a word of warning
Records = list[dict[str, Any]]
NAMES = {  # of the rows of Table 1, for readers who have not seen the paper
    "baseline": "softmax",
    "s, EBL": "Equilibrium Loss (EBL)",
    "s, MFS": "feature sampling (MFS)",
    "s, EBL + MFS": "**LOCE** = EBL + MFS",
    "P(y), EBL + MFS": "LOCE with class counts in place of scores",
}


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Write what the records of all tables show."""

    out: str = ""  # folder of results.md and its figure; empty: beside the tables
    readme: str = ""  # a page whose part between MARKS becomes Table 1; empty: none


@dataclass(frozen=True)
class Table:
    """A table and the records of each row, by name."""

    number: int
    title: str
    rows: list[Row]
    records: dict[str, Records]


def read_tables(options: Options) -> list[Table]:
    """All tables with what is trained of them."""
    tables = []
    for number in TABLES:
        title, _, rows = read_rows(options, number)
        tables.append(Table(number, title, rows, {row.text.name: [job.facts for job in row.done] for row in rows}))
    return tables


def page(tables: list[Table], note: str) -> str:
    """All of it in Markdown."""
    softmax, loce = tables[0].records["baseline"], tables[0].records["s, EBL + MFS"]
    lines = [
        "# Results",
        "",
        note,
        "",
        *claims(tables),
        "",
        "![Mean score and AP of every class](images/score_accuracy.png)",
        "",
        *answers(tables[5]),
    ]
    for table in tables:
        lines += ["", f"## Table {table.number}: {table.title}", ""]
        names = ["seeds", *COLUMNS, "AP, 95%", "AP - softmax", "AP - LOCE", f"paper: {', '.join(COLUMNS)}", "training"]
        lines += [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        lines += [line(row, table.records[row.text.name], softmax, loce) for row in table.rows]
    every = [record for table in tables for rows in table.records.values() for record in rows]
    return "\n".join([*lines, "", *origin(list({record["command"]: record for record in every}.values()))]) + "\n"


def line(row: Row, records: Records, softmax: Records, loce: Records) -> str:
    """One row of a table."""
    whole = metric(records, "AP")
    cells = [
        row.text.name,
        str(len(records)),
        *(mean(metric(records, name)) if records else "not run" for name in COLUMNS),
        f"{whole.low:.1f} to {whole.high:.1f}" if whole else "-",
        *(str(difference(records, others, "AP") or "-") if others != records else "-" for others in (softmax, loce)),
        " / ".join("-" if value == UNKNOWN else f"{value:.1f}" for value in row.text.paper),
        training(row.runs[0].config),
    ]
    return f"| {' | '.join(cells)} |"


def short_table(table: Table) -> str:
    """Table 1 for a first page: our means beside the paper's numbers."""
    seeds = max(map(len, table.records.values()))
    head = f"Glyph-50, {seeds} seed{'s' * (seeds > 1)}"
    lines = [f"| box AP / mask AP (rare, common, frequent) | {head} | the paper, LVIS v1 |", "|---|---|---|"]
    for row in table.rows:
        found = [metric(table.records[row.text.name], name) for name in COLUMNS]
        ours = in_short([value.mean if value else UNKNOWN for value in found])
        lines.append(f"| {NAMES[row.text.name]} | {ours} | {in_short(row.text.paper)} |")
    return "\n".join(lines) + "\n"


def in_short(values: Sequence[float]) -> str:
    """The numbers of COLUMNS: "28.1 / 17.0 (0.7, 17.9, 29.4)"."""
    box, mask, *groups = ("-" if value == UNKNOWN else f"{value:.1f}" for value in values)
    return f"{box} / {mask} ({', '.join(groups)})"


def between_marks(page: str, text: str) -> str:
    """`page` with `text` between MARKS. ValueError where it does not have them."""
    before, begin, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (begin and end):
        raise ValueError(f"no {MARKS[0].strip()} ... {MARKS[1].strip()}")
    return before + begin + text + end + after


def mean(found: Estimate | None) -> str:
    """ "28.1 ± 0.3"; without a deviation where there is one seed, "-" of no classes."""
    if found is None:
        return "-"
    return f"{found.mean:.1f} ± {found.deviation:.1f}" if found.seeds > 1 else f"{found.mean:.1f}"


def claims(tables: list[Table]) -> list[str]:
    """The paper's claims, each with numbers and a verdict."""
    one, five = tables[0].records, tables[4].records
    base, ebl, mfs, loce, prior = (one[row.text.name] for row in tables[0].rows)
    lines = ["| claim of the paper | here | verdict |", "|---|---|---|"]
    rows = [
        tracking({"softmax": base, "RFS": five["RFS"], "LOCE": loce}),
        better("EBL helps rare, common and frequent classes (Table 1)", ebl, base, ("APr", "APc", "APf")),
        better("MFS lifts the rare classes (Table 1)", mfs, base, ("APr",)),
        better("both together beat EBL alone (Table 1)", loce, ebl, ("box AP", "AP")),
        better("both together beat MFS alone (Table 1)", loce, mfs, ("box AP", "AP")),
        better("the mean score beats counts for frequent classes (Table 1)", loce, prior, ("APf",)),
        *(
            little(f"{what} matters little (Table {table.number})", table, loce)
            for what, table in zip(
                ("alpha", "the background's score", "the choice of k and m"), tables[1:4], strict=True
            )
        ),
        *(
            better(f"LOCE beats {name} (Table 5)", loce, five.get(name, []), ("box AP",))
            for name in ("EQL", "RFS", "Forest R-CNN", "Seesaw", "EQL v2", "BAGS")
        ),
    ]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def better(claim: str, ours: Records, others: Records, columns: Sequence[str]) -> tuple[str, str, str]:
    """Confirmed where the intervals of all these differences are above 0, not confirmed where one is below."""
    found = {name: difference(ours, others, name) for name in columns}
    known = {name: value for name, value in found.items() if value is not None}
    if len(known) < len(columns):
        return claim, "not run", "-"
    text = ", ".join(f"{name} {value}" for name, value in known.items())
    return claim, text, verdict([v.low > 0 for v in known.values()], [v.high < 0 for v in known.values()], ours)


def little(claim: str, table: Table, loce: Records) -> tuple[str, str, str]:
    """Confirmed where no row is further than LITTLE from LOCE, not confirmed where an interval is outside of that."""
    others = {name: records for name, records in table.records.items() if records != loce}
    found = {name: difference(records, loce, "box AP") for name, records in others.items()}
    known = {name: value for name, value in found.items() if value is not None}
    if not known or len(known) < len(found):
        return claim, "not run", "-"
    text = "box AP " + ", ".join(f"{name}: {value}" for name, value in known.items())
    within = [abs(value.mean) <= LITTLE for value in known.values()]
    return claim, text, verdict(within, [v.low > LITTLE or v.high < -LITTLE for v in known.values()], loce)


def tracking(rows: dict[str, Records]) -> tuple[str, str, str]:
    """Confirmed where mean score and AP are correlated by TRACKS or more in every row's mean."""
    claim = "the mean score tracks accuracy (Figure 1)"
    if not all(rows.values()):
        return claim, "not run", "-"
    means = {name: sum(map(score_tracks_accuracy, records)) / len(records) for name, records in rows.items()}
    text = "rank correlation " + ", ".join(f"{name} {value:.2f}" for name, value in means.items())
    above = [value >= TRACKS for value in means.values()]
    return claim, text, verdict(above, [not value for value in above], rows["LOCE"])


def answers(table: Table) -> list[str]:
    """What the paper leaves open, each with numbers and the answer of mask AP."""
    lines = ["| what the paper leaves open | here | answer |", "|---|---|---|"]
    for row in table.rows:
        if question := row.text.question:
            ours, others = table.records[row.text.name], table.records[row.text.against]
            found = {name: difference(ours, others, name) for name in ("box AP", "AP", "APr", "APf")}
            text = ", ".join(f"{name} {value}" for name, value in found.items() if value) or "not run"
            ap = found["AP"]
            word = "-" if ap is None else "better" if ap.low > 0 else "worse" if ap.high < 0 else "no difference shown"
            lines.append(f"| {question} | {text} | {word}{few_seeds(ours) if ap else ''} |")
    return lines


def few_seeds(records: Records) -> str:
    """A word of warning where these are too few to say much."""
    return "" if len(records) >= ENOUGH_SEEDS else f", by {len(records)} seed{'s' * (len(records) > 1)} only"


def verdict(holds: list[bool], fails: list[bool], records: Records) -> str:
    """In a word, and of how many seeds where these are too few to say much."""
    word = "confirmed" if all(holds) else "not confirmed" if any(fails) else "within noise"
    return word + few_seeds(records)


def origin(records: Records) -> list[str]:
    """What the numbers are of: data, protocol, machines, code, time."""
    lines = []
    for name in ("data", "protocol", "device", "code"):
        counted = Counter(record[name] for record in records)
        lines.append(f"- {name}: " + "; ".join(f"{value} ({count} runs)" for value, count in counted.items()))
    days = sorted(record["started"][:10] for record in records)
    hours = sum(record["minutes"] for record in records) / 60
    span = f"{days[0]} to {days[-1]}" if days else "-"
    return [*lines, f"- time: {hours:.1f} hours of training and evaluation in {len(records)} runs, {span}"]


def note(options: Options) -> str:
    """What the page is."""
    return (
        f"Written by `make results DATA={options.data} SEEDS={options.seeds}` from records in `{options.records}`;\n"
        "[the benchmark](benchmark.md) says what is trained, on what, and how the claims are judged. All numbers are\n"
        "in percent; AP is mask AP where it does not say box. Mean ± standard deviation over seeds; intervals are 95%\n"
        "over seeds and images (of images alone where there is one seed); differences pair both. Softmax and LOCE,\n"
        "which the others are compared with, are those of Table 1. The paper's numbers are of LVIS v1."
    )


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    tables = read_tables(options)
    folder = Path(options.out or Path(options.runs, options.data))
    text = page(tables, note(options))

    from loce.plots import score_figure  # imports matplotlib

    rows = {"softmax": tables[0].records["baseline"], "RFS": tables[4].records["RFS"]}
    rows |= {"LOCE": tables[0].records["s, EBL + MFS"]}
    first = {name: records[0] for name, records in rows.items() if records}
    titles = {f"{name}: rank correlation {score_tracks_accuracy(r):.2f}": r["classes"] for name, r in first.items()}
    if titles:
        score_figure(titles, folder / "images/score_accuracy.png")
    write_text(folder / "results.md", text)
    print(f"{text}\nwrote {folder / 'results.md'}")
    if options.readme:
        readme = Path(options.readme)
        write_text(readme, between_marks(readme.read_text(encoding="utf-8"), short_table(tables[0])))
        print(f"wrote {readme}")


if __name__ == "__main__":
    run_script(main)
