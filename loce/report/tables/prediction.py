"""What a benchmark predicts: our differences between methods beside the published ones on LVIS, and the leaderboard.

A method's difference is to the softmax that was trained as it was, ours over seeds, the published one to the
publication's own baseline. Legend: S seeds that any row has, D draws of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loce.report.tables.cells import estimated, markdown_table, speed
from loce.report.tables.results import DATA, all_recorded, softmax_for
from loce.report.tables.rows import COLUMNS, UNKNOWN, RunOptions, Table, read_table
from loce.report.tables.statistics import LEVEL, difference, metric, rank_correlation

DRAWS, DRAW_SEED = 2000, 0
GOALS = {"signs": 0.9, "rank": 0.7}
LONGER = 7  # the table of Glyph-50 trained longer
PREDICTION_NOTE = """Written by `make results` from records in `{records}`, for each drawn set that has records, of all
their seeds. A method's difference to the softmax that was trained as long, here and published on LVIS, of the methods
of Table 8 that a publication compares with its own baseline. Signs: how many of these differences have the published
one's sign. Rank correlation (Spearman): of the differences over methods. Intervals are 95%, a bootstrap over seeds: the
methods and the published numbers stay. [The benchmark](benchmark.md) was not tuned to these numbers."""
LEADERBOARD_NOTE = """Written by `make results` from records in `{records}`, all their seeds, best mask AP first;
[a row of your own](plugin.md#a-row-in-the-leaderboard) takes one command. Mean ± standard deviation over seeds, in
percent. Minutes are of one seed, training and evaluation, without stage 1; rows are of different machines and days, so
they and images/s compare roughly. A commit with `+` had changes."""
CAUSES_NOTE = """Causes: a longer schedule on Glyph-50, beside Glyph-LVIS 2 with a schedule as long, scenes and 100
classes together. Our intervals are over seeds and images."""


@dataclass(frozen=True)
class Pair:
    """A difference to softmax, ours by seed and the published one."""

    method: str
    column: str
    ours: dict[int, float]
    published: float


def pairs(table: Table) -> list[Pair]:
    """Of every row with a published difference and a record of a seed that its softmax has, too."""
    found = []
    for row in table.rows:
        base = softmax_for(row, table)
        if base is row or base.text.name == row.text.name:
            continue
        plain = {record["seed"]: record["values"] for record in base.records}
        shared = [record for record in row.records if record["seed"] in plain]
        for column, theirs, over in zip(COLUMNS, row.text.paper, row.text.over or base.text.paper, strict=True):
            if shared and UNKNOWN not in (theirs, over):
                ours = {record["seed"]: record["values"][column] - plain[record["seed"]][column] for record in shared}
                found.append(Pair(row.text.name, column, ours, theirs - over))
    return found


def agreement(ours: Sequence[float], published: Sequence[float]) -> float:
    """The share of differences of one sign."""
    return float(np.mean([a * b > 0 for a, b in zip(ours, published, strict=True)]))


def with_seeds(
    found: Sequence[Pair],
    measure: Callable[[Sequence[float], Sequence[float]], float],
) -> tuple[float, float, float]:
    """`measure` of the means over seeds, and its interval.

    A draw takes S of the S seeds with replacement; a row has the mean of those that it has, or of all where it has none
    of them. Rows of a seed share its stage 1, so they are drawn together.
    """
    published = [pair.published for pair in found]
    seeds = sorted({seed for pair in found for seed in pair.ours})
    counts_DS = np.random.default_rng(DRAW_SEED).multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), DRAWS)
    drawn = []  # of each pair, (D,) means
    for pair in found:
        has_S = np.array([seed in pair.ours for seed in seeds])
        values_S = np.array([pair.ours.get(seed, 0.0) for seed in seeds])
        weights_DS = np.where((counts_DS * has_S).sum(axis=1, keepdims=True) > 0, counts_DS * has_S, has_S)
        drawn.append((weights_DS * values_S).sum(axis=1) / weights_DS.sum(axis=1))
    of_draws = [measure(values, published) for values in np.array(drawn).T.tolist()]
    low, high = np.quantile(of_draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return measure([float(np.mean(list(pair.ours.values()))) for pair in found], published), float(low), float(high)


def prediction(tables: dict[str, Table], options: RunOptions) -> str:
    """The page on what the drawn sets predict, in Markdown; tables: Table 8 of each, by data set."""
    of_set = {DATA[data]: found for data, table in tables.items() if (found := pairs(table))}
    lines = ["# What the benchmark predicts", "", PREDICTION_NOTE.format(**vars(options))]
    # All sets side by side: a row for each metric, two columns for each set.
    columns = {name: agreements(found) for name, found in of_set.items()}
    head = [f"{name}: {what}" for name in of_set for what in ("signs agree", "rank correlation")]
    rows = [[metric, *(cell for name in of_set for cell in columns[name][metric])] for metric in (*COLUMNS, "all")]
    lines += ["", *markdown_table(["", *head], rows), ""] if of_set else []
    lines += [goals(name, found) for name, found in of_set.items()]
    lines += causes(tables, options)
    for name, found in of_set.items():
        cells = [
            [p.method, p.column, f"{np.mean(list(p.ours.values())):+.1f}", f"{p.published:+.1f}", str(len(p.ours))]
            for p in found
            if np.mean(list(p.ours.values())) * p.published <= 0
        ]
        lines += ["", *markdown_table([f"{name}: signs that differ", "", "here", "published", "seeds"], cells)]
    return "\n".join(lines) + "\n"


def agreements(found: Sequence[Pair]) -> dict[str, list[str]]:
    """Of each metric and of all: how many signs agree, the rank correlation."""
    cells = {}
    for column in (*COLUMNS, "all"):
        chosen = [pair for pair in found if column in (pair.column, "all")]
        cells[column] = ["-", "-"]
        if chosen:
            share, low, high = with_seeds(chosen, agreement)
            interval = f"{100 * share:.0f}% [{100 * low:.0f}, {100 * high:.0f}]"
            cells[column][0] = f"{round(share * len(chosen))} of {len(chosen)}, {interval}"
        if column != "all" and len(chosen) > 2:
            cells[column][1] = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*with_seeds(chosen, rank_correlation))
    return cells


def goals(name: str, found: Sequence[Pair]) -> str:
    """A line on what a set was meant to predict, and whether it does."""
    means = [(pair.column, float(np.mean(list(pair.ours.values()))), pair.published) for pair in found]
    share = agreement([ours for _, ours, _ in means], [theirs for *_, theirs in means])
    masks = [(ours, theirs) for column, ours, theirs in means if column == "AP"]
    rank = rank_correlation(*zip(*masks, strict=True)) if len(masks) > 2 else None
    signs = f"{'met' if share >= GOALS['signs'] else 'not met'}, {100 * share:.0f}%"
    order = "not measured" if rank is None else f"{'met' if rank >= GOALS['rank'] else 'not met'}, {rank:.2f}"
    return (
        f"- {name}: goal of {100 * GOALS['signs']:.0f}% of the signs {signs}; goal of a rank correlation of mask AP of "
        f"{GOALS['rank']} {order}."
    )


def causes(tables: dict[str, Table], options: RunOptions) -> list[str]:
    """Whether longer schedules, or Glyph-LVIS 2's scenes and 100 classes, bring differences nearer to the published."""
    if "glyphs" not in tables:
        return []
    longer = read_table(all_recorded(options, "glyphs"), LONGER)
    head = ["mask AP minus softmax", "published", *(DATA[data] for data in tables)]
    head.insert(3, f"{DATA['glyphs']}, trained longer (Table {LONGER})")
    rows = []
    for row in longer.rows:
        there = next((r for r in tables["glyphs"].rows if r.text.recipe == row.text.recipe), None)
        if there is None or not row.text.against.startswith("softmax"):
            continue
        published = there.text.paper[1] - softmax_for(there, tables["glyphs"]).text.paper[1]
        cells = [
            str(difference(table.records(there.text.name), softmax_for(there, table).records, "AP") or "not run")
            for table in tables.values()
        ]
        cells.insert(1, str(difference(row.records, longer.records(row.text.against), "AP") or "not run"))
        rows.append([there.text.name, f"{published:+.1f}", *cells])
    return ["", CAUSES_NOTE, "", *markdown_table(head, rows)]


def leaderboard(tables: dict[str, Table], options: RunOptions) -> str:
    """The page of all methods by mask AP, in Markdown; tables: Table 8 of each data set."""
    lines = ["# Leaderboard", "", LEADERBOARD_NOTE.format(**vars(options))]
    for data, table in tables.items():
        done = [row for row in table.rows if row.records]
        done.sort(key=lambda row: -np.mean([record["values"]["AP"] for record in row.records]))
        held = [name for name in ("AP-fixed", "AP-pool", "accuracy") if any(metric(row.records, name) for row in done)]
        head = ["", "method", "year", "box AP", "mask AP", "r", "c", "f", *held, "mask AP, 95%"]
        head += ["minutes", "speed, memory", "seeds", "commit"]
        rows = []
        for rank, row in enumerate(done, start=1):
            whole = metric(row.records, "AP")
            minutes = np.mean([record["minutes"] for record in row.records])
            commits = dict.fromkeys(commit(record["code"]) for record in row.records)
            rows.append(
                [
                    str(rank),
                    row.text.name,
                    str(row.text.year),
                    *(estimated(metric(row.records, name)) for name in (*COLUMNS, *held)),
                    f"{whole.low:.1f} to {whole.high:.1f}" if whole else "-",
                    f"{minutes:.0f}",
                    speed(row.records),
                    str(len(row.records)),
                    ", ".join(commits),
                ]
            )
        lines += ["", f"## {DATA[data]}", "", *markdown_table(head, rows)] if rows else []
    return "\n".join(lines) + "\n"


def commit(code: str) -> str:
    """Of "loce 0.1.0, commit 278446cf... with changes": "278446c+"."""
    words = code.partition("commit ")[2].split()
    return words[0][:7] + "+" * ("changes" in words) if words else "-"
