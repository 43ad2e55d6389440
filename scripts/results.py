"""All tables over all seeds, the paper's claims judged by them, and a figure: python scripts/results.py data=glyphs.

Reads the records of what is trained (scripts/tables.py); docs/benchmark.md says beforehand what is judged and how.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tables import training

from loce.config import read_options, run_script
from loce.report.tables.claims import Records, Table, answers, claims
from loce.report.tables.records import speed_in_words
from loce.report.tables.rows import COLUMNS, PEERS, UNKNOWN, Row, RunOptions, read_rows
from loce.report.tables.statistics import Estimate, difference, metric, score_tracks_accuracy
from loce.utils.files import write_text

TABLES = {"glyphs": (1, 2, 3, 4, 5, 6, 7), "glyph1203": (1, 2, 3, 4, 5, 6), "lvis": (1, 2, 3, 4, 5, 6)}
MARKS = ("<!-- Table 1: begin -->\n", "<!-- Table 1: end -->\n")
DATA = {"glyphs": "Glyph-50", "glyph1203": "Glyph-1203", "lvis": "LVIS v1"}  # as readers know them
SOFTMAX = ("baseline", "softmax", "softmax, one stage")  # rows
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


def read_tables(options: Options) -> list[Table]:
    """All tables with what is trained of them."""
    tables = []
    for number in TABLES[options.data]:
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
        *answers(tables[5], "what the paper leaves open"),
    ]
    for table in tables[6:]:
        lines += ["", *answers(table, table.title)]
    for table in tables:
        lines += ["", f"## Table {table.number}: {table.title}", ""]
        lines += whole_table(table, softmax, loce)
        lines += beside_the_paper(table) if table.number in (1, PEERS) else []
    every = [record for table in tables for rows in table.records.values() for record in rows]
    return "\n".join([*lines, "", *origin(list({record["command"]: record for record in every}.values()))]) + "\n"


def whole_table(table: Table, softmax: Records, loce: Records) -> list[str]:
    """A table in Markdown; speed and memory stand in it where a record has them."""
    names = ["seeds", *COLUMNS, "AP, 95%", "AP - softmax", "AP - LOCE", f"paper: {', '.join(COLUMNS)}", "training"]
    cells = [line(row, table.records[row.text.name], softmax, loce) for row in table.rows]
    costs = [speed_in_words(table.records[row.text.name]) for row in table.rows]
    if set(costs) != {"-"}:
        names.append("speed, memory")
        cells = [f"{cell} {cost} |" for cell, cost in zip(cells, costs, strict=True)]
    return [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", *cells]


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


def beside_the_paper(table: Table) -> list[str]:
    """Differences to softmax of as many iterations, ours and published; how many signs agree; the order of the rows."""
    known = [row for row in table.rows if row.text.paper[1] != UNKNOWN]
    lines = ["", f"| minus softmax: here / published | {' | '.join(COLUMNS)} |", "|---" * 6 + "|"]
    pairs = []
    for row in known:
        base = softmax_for(row, table)
        if base is row:
            continue
        cells = []
        for column, theirs, plain in zip(COLUMNS, row.text.paper, base.text.paper, strict=True):
            ours = difference(table.records[row.text.name], table.records[base.text.name], column)
            published = UNKNOWN not in (theirs, plain)
            pairs += [(ours.mean, theirs - plain)] if ours and published else []
            here = f"{ours.mean:+.1f}" if ours else "not run"
            cells.append(f"{here} / {theirs - plain:+.1f}" if published else f"{here} / -")
        lines.append(f"| {row.text.name} | {' | '.join(cells)} |")
    agree = sum(ours * theirs > 0 for ours, theirs in pairs)
    done = [row for row in known if table.records[row.text.name]]
    orders = (
        sorted(done, key=lambda row: -means(table.records[row.text.name])[1]),
        sorted(done, key=lambda row: -row.text.paper[1]),
    )
    here, there = (" > ".join(row.text.name for row in order) for order in orders)
    return [*lines, "", f"The sign agrees in {agree} of {len(pairs)}. By mask AP: here {here}; published {there}."]


def softmax_for(row: Row, table: Table) -> Row:
    """The softmax row that was trained as `row` was, end to end or in a second stage; else the first one."""
    plain = [other for other in table.rows if other.text.name in SOFTMAX]
    starts = bool(row.runs[0].config.train.init)
    return next((other for other in plain if bool(other.runs[0].config.train.init) == starts), plain[0])


def short_table(table: Table, data: str) -> str:
    """Table 1 for a first page: our means beside the paper's numbers."""
    seeds = max(map(len, table.records.values()))
    head = f"{DATA[data]}, {seeds} seed{'s' * (seeds > 1)}"
    lines = [f"| box AP / mask AP (rare, common, frequent) | {head} | the paper, LVIS v1 |", "|---|---|---|"]
    for row in table.rows:
        ours = in_short(means(table.records[row.text.name]))
        lines.append(f"| {NAMES[row.text.name]} | {ours} | {in_short(row.text.paper)} |")
    return "\n".join(lines) + "\n"


def means(records: Records) -> list[float]:
    """Of COLUMNS over seeds, in percent; UNKNOWN where there is none."""
    found = [metric(records, name) for name in COLUMNS]
    return [UNKNOWN if value is None else value.mean for value in found]


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


def origin(records: Records) -> list[str]:
    """What the numbers are of: data, protocol, machines, code, time."""
    lines = []
    for name in ("data", "protocol", "device", "code"):
        counted = Counter(record[name] for record in records)
        lines.append(f"- {name}: " + "; ".join(f"{value} ({count} runs)" for value, count in counted.items()))
    days = sorted(record["started"][:10] for record in records)
    hours = sum(record["minutes"] for record in records) / 60
    span = f"{days[0]} to {days[-1]}" if days else "-"
    lines += unequal_starts(records)
    return [*lines, f"- time: {hours:.1f} hours of training and evaluation in {len(records)} runs, {span}"]


def unequal_starts(records: Records) -> list[str]:
    """A warning of each seed whose rows start from several checkpoints of one stage: they compare as other seeds do."""
    starts: dict[tuple[int, str], Counter[str]] = {}
    for record in records:
        if stage := record["options"]["init"]:
            starts.setdefault((record["seed"], stage), Counter())[record.get("start", "an unknown one")] += 1
    return [
        f"- seed {seed}: rows start from {len(found)} different checkpoints of {stage}, and compare as different seeds "
        f"do: {', '.join(f'{weights} ({count} runs)' for weights, count in found.items())}"
        for (seed, stage), found in sorted(starts.items())
        if len(found) > 1
    ]


def note(options: Options) -> str:
    """What the page is."""
    return (
        f"Written by `make results DATA={options.data} SEEDS={options.seeds}` from records in `{options.records}`;\n"
        "[the benchmark](benchmark.md) says what is trained, on what, and how the claims are judged. All numbers are\n"
        "in percent; AP is mask AP where it does not say box. Mean ± standard deviation over seeds; intervals are 95%\n"
        "over seeds and images (of images alone where there is one seed); differences pair both, of the seeds that\n"
        "both rows have: rows of different numbers of seeds compare by differences, not by means. Softmax and LOCE,\n"
        "which the others are compared with, are those of Table 1. Published numbers are of LVIS v1, each with the\n"
        "schedule of its source (configs/tables.yaml)."
    )


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    tables = read_tables(options)
    folder = Path(options.out or Path(options.runs, options.data))
    text = page(tables, note(options))

    from loce.report.figures import score_figure  # imports matplotlib

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
        write_text(readme, between_marks(readme.read_text(encoding="utf-8"), short_table(tables[0], options.data)))
        print(f"wrote {readme}")


if __name__ == "__main__":
    run_script(main)
