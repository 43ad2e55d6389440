"""Page of results: all tables over seeds, the paper's claims and open questions, where the numbers are from."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from loce.report.figures import score_figure
from loce.report.tables.cells import (
    estimated,
    in_short,
    markdown_table,
    published,
    schedule,
    speed,
    with_interval,
)
from loce.report.tables.claims import answers, claims
from loce.report.tables.rows import (
    ACCURACIES,
    COLUMNS,
    PEERS,
    SHOWN,
    UNKNOWN,
    Records,
    Row,
    RunOptions,
    Table,
    read_table,
)
from loce.report.tables.statistics import difference, metric, score_tracks_accuracy

WIDE = (1, 2, 3, 4, 5, 6, 8)  # tables of every data set
MEASURED = 10  # the table of SHOWN measures
DRAWN = (*WIDE, MEASURED)
TABLES = {"glyphs": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10), "glyph100": DRAWN, "glyph1203": DRAWN, "lvis": WIDE}
MARKS = ("<!-- Table 1: begin -->\n", "<!-- Table 1: end -->\n")
DATA = {"glyphs": "Glyph-50", "glyph100": "Glyph-100", "glyph1203": "Glyph-1203", "lvis": "LVIS v1"}  # for readers
PAGES = {"glyphs": "results_v1", "glyph100": "results", "glyph1203": "results_glyph1203", "lvis": "results_lvis"}
SOFTMAX = ("baseline", "softmax", "softmax, one stage")  # rows
NAMES = {  # of the rows of Table 1, for readers who have not seen the paper
    "baseline": "softmax",
    "s, EBL": "Equilibrium Loss (EBL)",
    "s, MFS": "feature sampling (MFS)",
    "s, EBL + MFS": "**LOCE** = EBL + MFS",
    "P(y), EBL + MFS": "LOCE with class counts in place of scores",
}
NOTE = """Written by `make results DATA={data} SEEDS={seeds}` from records in `{records}`;
{other}
[the benchmark](benchmark.md) says what is trained, on what, and how the claims are judged. All numbers are
in percent; AP is mask AP where it does not say box (a detector of boxes has none, and its groups are of boxes).
Mean ± standard deviation over seeds; intervals are 95% over seeds and images (of images alone where there is one
seed); differences pair both, of the seeds that both rows have: rows of different numbers of seeds compare by
differences, not by means. Softmax and LOCE, which the others are compared with, are those of Table 1. Published
numbers are of LVIS v1, each with the schedule of its source (configs/tables.yaml)."""
ACCURACY = """"Accuracy" is the classifier's on the true boxes, the mean over the classes of all or of a group
([evaluation](evaluation.md)); records of before it was measured have none."""


def read_tables(options: RunOptions) -> list[Table]:
    """All tables of a data set."""
    return [read_table(options, number) for number in TABLES[options.data]]


def methods_of_drawn_sets(options: RunOptions) -> dict[str, Table]:
    """Table 8 of each drawn data set that has records, of all their seeds, by data set."""
    drawn: tuple[Literal["glyphs", "glyph100", "glyph1203"], ...] = ("glyphs", "glyph100", "glyph1203")
    there = [data for data in drawn if any(Path(options.records, data).glob("seed*"))]
    return {data: read_table(all_recorded(options, data), 8) for data in there}


def all_recorded(options: RunOptions, data: Literal["glyphs", "glyph100", "glyph1203"]) -> RunOptions:
    """`options` of a data set and of all seeds up to the last that has records."""
    last = max(int(folder.name.removeprefix("seed")) for folder in Path(options.records, data).glob("seed*"))
    return replace(options, data=data, first_seed=0, seeds=last + 1)


def page(tables: list[Table], options: RunOptions) -> str:
    """The page in Markdown; rows that cannot be trained any more stand in it where they were recorded."""
    tables = [replace(t, rows=[row for row in t.rows if row.records or not row.text.last]) for t in tables]
    other = "glyph100" if options.data == "glyphs" else "glyphs"
    link = f"those on {DATA[other]} stand in [{PAGES[other]}.md]({PAGES[other]}.md);"
    note = NOTE.format(data=options.data, seeds=options.seeds, records=options.records, other=link)
    accuracy = [ACCURACY] if any("accuracy" in table.measures for table in tables) else []
    lines = [f"# Results on {DATA[options.data]}", "", note, *accuracy, ""]
    every = {record["command"]: record for table in tables for row in table.rows for record in row.records}
    if not every:
        return "\n".join([*lines, "No row is trained yet."]) + "\n"
    lines += [
        *claims(tables),
        "",
        f"![Mean score and AP of every class]({figure_of(options.data)})",
        "",
        *answers(tables[5], "what the paper leaves open"),
    ]
    for table in tables[6:]:
        lines += ["", *answers(table, table.title)] if any(row.text.question for row in table.rows) else []
    for table in tables:
        lines += ["", f"## Table {table.number}: {table.title}", ""]
        if table.number == MEASURED:
            lines += measures_table(table)
            continue
        lines += whole_table(table, tables[0].records("baseline"), tables[0].records("s, EBL + MFS"))
        lines += closed(table)
        lines += beside_the_paper(table) if table.number in (1, *PEERS) else []
    return "\n".join([*lines, "", *origin(list(every.values()))]) + "\n"


def figure_of(data: str) -> str:
    """The page's figure, from its folder."""
    return f"images/score_accuracy{PAGES[data].removeprefix('results')}.png"


def closed(table: Table) -> list[str]:
    """Which rows are not trained any more, because an option of theirs went."""
    rows = [row.text for row in table.rows if row.text.last]
    named = ", ".join(f"{row.name} (`{' '.join(row.words)}`, last in commit {row.last})" for row in rows)
    return ["", f"As recorded, and not trained any more, since an option of theirs went: {named}."] if rows else []


def whole_table(table: Table, softmax: Records, loce: Records) -> list[str]:
    """A table in Markdown; speed and memory stand in it where a record has them."""
    more = table.measures
    head = [
        "",
        "seeds",
        *COLUMNS,
        *more,
        "AP, 95%",
        "AP - softmax",
        "AP - LOCE",
        f"paper: {', '.join(COLUMNS)}",
        "training",
    ]
    rows, costs = [], [speed(row.records) for row in table.rows]
    for row, cost in zip(table.rows, costs, strict=True):
        records, whole = row.records, metric(row.records, "AP")
        rows.append(
            [
                row.text.name,
                str(len(records)),
                *(estimated(metric(records, name)) if records else "not run" for name in (*COLUMNS, *more)),
                f"{whole.low:.1f} to {whole.high:.1f}" if whole else "-",
                *(str((o != records and difference(records, o, "AP")) or "-") for o in (softmax, loce)),
                " / ".join(published(row.text.paper)),
                schedule(row.runs[0].config),
                *([cost] if set(costs) != {"-"} else []),
            ]
        )
    return markdown_table([*head, "speed, memory"] if set(costs) != {"-"} else head, rows)


def measures_table(table: Table) -> list[str]:
    """AP and the SHOWN measures with their intervals, then what LOCE's differ from each row's."""
    names = ("AP", *(name for name in SHOWN if name not in ACCURACIES or name in table.measures))
    rows, loce = [], table.records("LOCE")
    for row in table.rows:
        found = [metric(row.records, name) for name in names]
        rows.append([row.text.name, str(len(row.records)), *(with_interval(value) for value in found)])
    for row in table.rows:
        found = [difference(loce, row.records, name) for name in names]
        if row.text.name != "LOCE" and any(found):
            rows.append(
                [f"LOCE - {row.text.name}", str(found[0].seeds if found[0] else 0), *(str(v or "-") for v in found)]
            )
    return markdown_table(["", "seeds", *names], rows)


def beside_the_paper(table: Table) -> list[str]:
    """Differences to softmax of as many iterations, ours and published; how many signs agree; the order of the rows."""
    known = [row for row in table.rows if row.text.paper[1] != UNKNOWN]
    rows, pairs, dated = [], [], any(row.text.over for row in table.rows)
    for row in table.rows:
        base = softmax_for(row, table)
        if base is row:
            continue
        cells = []
        for column, theirs, plain in zip(COLUMNS, row.text.paper, row.text.over or base.text.paper, strict=True):
            ours = difference(row.records, base.records, column)
            is_published = UNKNOWN not in (theirs, plain)
            pairs += [(ours.mean, theirs - plain)] if ours and is_published else []
            here = f"{ours.mean:+.1f}" if ours else "not run"
            cells.append(f"{here} / {theirs - plain:+.1f}" if is_published else f"{here} / -")
        if dated:
            rows.append([str(row.text.year), row.text.name, *cells])
        elif row in known:
            rows.append([row.text.name, *cells])
    # How well they agree: signs of the differences, order of the rows by mask AP.
    agree = sum(ours * theirs > 0 for ours, theirs in pairs)
    done = [row for row in known if row.records]
    orders = (
        sorted(done, key=lambda row: -means(row.records)[1]),
        sorted(done, key=lambda row: -row.text.paper[1]),
    )
    here, there = (" > ".join(row.text.name for row in order) for order in orders)
    return [
        "",
        *markdown_table([*["year"] * dated, "minus softmax: here / published", *COLUMNS], rows),
        "",
        f"The sign agrees in {agree} of {len(pairs)}. By mask AP: here {here}; published {there}.",
    ]


def softmax_for(row: Row, table: Table) -> Row:
    """The softmax row that was trained as `row` was, end to end or in a second stage; else the first one."""
    plain = [other for other in table.rows if other.text.name in SOFTMAX]
    starts = bool(row.runs[0].config.train.init)
    return next((other for other in plain if bool(other.runs[0].config.train.init) == starts), plain[0])


def first_screen(tables: list[Table], data: str) -> str:
    """For a first page: Table 1, our means beside the paper's numbers, and what LOCE gains under other measures."""
    table = tables[0]
    seeds = max(len(row.records) for row in table.rows)
    head = f"{DATA[data]}, {seeds} seed{'s' * (seeds > 1)}"
    rows = [[NAMES[row.text.name], in_short(means(row.records)), in_short(row.text.paper)] for row in table.rows]
    lines = markdown_table(["box AP / mask AP (rare, common, frequent)", head, "the paper, LVIS v1"], rows)
    for measured in tables:
        if measured.number == MEASURED:
            lines += gains(measured, data)
    return "\n".join(lines) + "\n"


def gains(table: Table, data: str) -> list[str]:
    """A sentence on LOCE's differences to softmax in the table of measures; none where there is no record of it."""
    loce, softmax = table.records("LOCE"), table.records("softmax")
    ap, fixed, pool, rare, frequent = (difference(loce, softmax, n) for n in ("AP", *SHOWN[:2], "ECEr", "ECEf"))
    if ap is None or pool is None:
        return []
    return [
        "",
        f"LOCE minus softmax on {DATA[data]} ({ap.seeds} seed{'s' * (ap.seeds > 1)}, 95% intervals): mask AP {ap}, "
        f"AP-fixed {fixed},",
        f"AP-pool, where all classes share one ranking, {pool}; calibration error of rare classes {rare},",
        f"of frequent ones {frequent} ([measures](docs/evaluation.md), [Table {MEASURED}](docs/{PAGES[data]}.md)).",
    ]


def means(records: Records) -> Sequence[float]:
    """Of COLUMNS over seeds, in percent; UNKNOWN where there is none."""
    found = [metric(records, name) for name in COLUMNS]
    return [UNKNOWN if value is None else value.mean for value in found]


def between_marks(page: str, text: str) -> str:
    """`page` with `text` between MARKS. ValueError where it does not have them."""
    before, begin, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (begin and end):
        raise ValueError(f"no {MARKS[0].strip()} ... {MARKS[1].strip()}")
    return before + begin + text + end + after


def origin(records: Records) -> list[str]:
    """Where the numbers come from: data, protocol, machines, code, time."""
    lines = []
    for name in ("data", "protocol", "device", "code"):
        counted = Counter(record[name] for record in records)
        lines.append(f"- {name}: " + "; ".join(f"{value} ({count} runs)" for value, count in counted.items()))
    # Weights that the rows of a seed start from; rows of several of one stage compare as different seeds do.
    starts: dict[tuple[int, str], Counter[str]] = {}
    for record in records:
        if stage := record["options"]["init"]:
            starts.setdefault((record["seed"], stage), Counter())[record.get("start", "an unknown one")] += 1
    for (seed, stage), found in sorted(starts.items()):
        which = ", ".join(f"{weights} ({count} runs)" for weights, count in found.items())
        several = f"{len(found)} different checkpoints of {stage}, and compare as different seeds do"
        lines.append(f"- seed {seed}: rows start from {several if len(found) > 1 else stage}: {which}")
    days = sorted(record["started"][:10] for record in records)
    hours = sum(record["minutes"] for record in records) / 60
    span = f"{days[0]} to {days[-1]}" if days else "-"
    return [*lines, f"- time: {hours:.1f} hours of training and evaluation in {len(records)} runs, {span}"]


def write_figure(tables: list[Table], file: Path) -> None:
    """Mean score against AP of every class, of the first runs of softmax, RFS and LOCE as far as they are there."""
    rows = {
        "softmax": tables[0].records("baseline"),
        "RFS": tables[4].records("RFS"),
        "LOCE": tables[0].records("s, EBL + MFS"),
    }
    first = {name: records[0] for name, records in rows.items() if records}
    titles = {f"{name}: rank correlation {score_tracks_accuracy(r):.2f}": r["classes"] for name, r in first.items()}
    if titles:
        score_figure(titles, file)
