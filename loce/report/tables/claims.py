"""Verdicts on the paper's claims and open questions by the tables; docs/benchmark.md says beforehand how."""

from collections.abc import Sequence
from functools import partial

from loce.report.tables.cells import markdown_table
from loce.report.tables.rows import PROTOCOLS, Records, Table
from loce.report.tables.statistics import difference, score_tracks_accuracy

TRACKS = 0.7  # rank correlation from which on the mean score tracks accuracy
LITTLE = 1.0  # box AP: what matters less matters little
ENOUGH_SEEDS = 3  # for a verdict without a warning


def claims(tables: list[Table]) -> list[str]:
    """The paper's claims, each with numbers and a verdict, by every protocol that records have."""
    rows = judged(tables)
    head = ["claim of the paper", "here", "verdict"]
    for protocol in PROTOCOLS:
        by = judged(tables, f"-{protocol}")
        if any(word != "-" for *_, word in by):
            head.append(f"by AP-{protocol}")
            rows = [
                (*row, word if word == "-" else f"{word}: {text}")
                for row, (_, text, word) in zip(rows, by, strict=True)
            ]
    return markdown_table(head, rows)


def judged(tables: list[Table], protocol: str = "") -> list[tuple[str, ...]]:
    """Claim, numbers and verdict; protocol: "" (the first) or what columns of another end with, "-fixed", "-pool"."""
    one, five = tables[0], tables[4]
    base, ebl, mfs, loce, prior = (row.records for row in one.rows)
    matter = ("alpha", "the background's score", "the choice of k and m")
    peers = ("EQL", "RFS", "Forest R-CNN", "Seesaw", "EQL v2", "BAGS")
    tracks = {"softmax": base, "RFS": five.records("RFS"), "LOCE": loce}
    more = partial(better, protocol=protocol)
    return [
        tracking({} if protocol else tracks),  # AP of classes, which are not recorded by other protocols
        more("EBL helps rare, common and frequent classes (Table 1)", ebl, base, ("APr", "APc", "APf")),
        more("MFS lifts the rare classes (Table 1)", mfs, base, ("APr",)),
        more("both together beat EBL alone (Table 1)", loce, ebl, ("box AP", "AP")),
        more("both together beat MFS alone (Table 1)", loce, mfs, ("box AP", "AP")),
        more("the mean score beats counts for frequent classes (Table 1)", loce, prior, ("APf",)),
        *(
            little(f"{what} matters little (Table {t.number})", t, loce, protocol)
            for what, t in zip(matter, tables[1:4], strict=True)
        ),
        *(more(f"LOCE beats {name} (Table 5)", loce, five.records(name), ("box AP",)) for name in peers),
    ]


def better(
    claim: str,
    ours: Records,
    others: Records,
    columns: Sequence[str],
    protocol: str,
) -> tuple[str, str, str]:
    """Confirmed where the intervals of all these differences are above 0, not confirmed where one is below."""
    found = {name: difference(ours, others, name + protocol) for name in columns}
    known = {name: value for name, value in found.items() if value is not None}
    if len(known) < len(columns):
        return claim, "not run", "-"
    text = ", ".join(f"{name} {value}" for name, value in known.items())
    seeds = min(value.seeds for value in known.values())
    return claim, text, verdict([v.low > 0 for v in known.values()], [v.high < 0 for v in known.values()], seeds)


def little(claim: str, table: Table, loce: Records, protocol: str) -> tuple[str, str, str]:
    """Confirmed where no row is further than LITTLE from LOCE, not confirmed where an interval is outside of that."""
    others = {row.text.name: row.records for row in table.rows if row.records != loce}
    found = {name: difference(records, loce, f"box AP{protocol}") for name, records in others.items()}
    known = {name: value for name, value in found.items() if value is not None}
    if not known or len(known) < len(found):
        return claim, "not run", "-"
    text = "box AP " + ", ".join(f"{name}: {value}" for name, value in known.items())
    within = [abs(value.mean) <= LITTLE for value in known.values()]
    outside = [v.low > LITTLE or v.high < -LITTLE for v in known.values()]
    return claim, text, verdict(within, outside, min(value.seeds for value in known.values()))


def tracking(rows: dict[str, Records]) -> tuple[str, str, str]:
    """Confirmed where mean score and AP are correlated by TRACKS or more in every row's mean."""
    claim = "the mean score tracks accuracy (Figure 1)"
    if not rows or not all(rows.values()):
        return claim, "not run", "-"
    means = {name: sum(map(score_tracks_accuracy, records)) / len(records) for name, records in rows.items()}
    text = "rank correlation " + ", ".join(f"{name} {value:.2f}" for name, value in means.items())
    above = [value >= TRACKS for value in means.values()]
    return claim, text, verdict(above, [not value for value in above], min(map(len, rows.values())))


def answers(table: Table, head: str) -> list[str]:
    """The questions of a table below `head`, each with numbers and the answer of mask AP."""
    rows = []
    for row in table.rows:
        if question := row.text.question:
            ours, others = row.records, table.records(row.text.against)
            found = {name: difference(ours, others, name) for name in ("box AP", "AP", "APr", "APf")}
            text = ", ".join(f"{name} {value}" for name, value in found.items() if value) or "not run"
            ap = found["AP"]
            word = "-" if ap is None else "better" if ap.low > 0 else "worse" if ap.high < 0 else "no difference shown"
            rows.append((question, text, word + (few_seeds(ap.seeds) if ap else "")))
    return markdown_table([head, "here", "answer"], rows)


def few_seeds(seeds: int) -> str:
    """A warning where these are too few to say much."""
    return "" if seeds >= ENOUGH_SEEDS else f", by {seeds} seed{'s' * (seeds > 1)} only"


def verdict(holds: list[bool], fails: list[bool], seeds: int) -> str:
    """In a word, and of how many seeds where these are too few to say much."""
    word = "confirmed" if all(holds) else "not confirmed" if any(fails) else "within noise"
    return word + few_seeds(seeds)
