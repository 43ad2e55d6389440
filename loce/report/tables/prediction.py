"""What a benchmark predicts: our differences between methods beside the published ones on LVIS, and the leaderboard.

A method's difference is to the softmax that was trained as it was, ours over seeds, the published one to the
publication's own baseline. Legend: S seeds that any row has, D draws of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loce.report.tables.cells import estimated, markdown_table, speed
from loce.report.tables.results import DATA, softmax_for
from loce.report.tables.rows import COLUMNS, UNKNOWN, RunOptions, Table
from loce.report.tables.statistics import LEVEL, metric, rank_correlation

DRAWS, DRAW_SEED = 2000, 0
GOALS = {"signs": 0.9, "rank": 0.7}
PREDICTION_NOTE = """Written by `make results DATA={data} SEEDS={seeds}` from records in `{records}`, for each drawn set
that has records. A method's difference to the softmax that was trained as long, here and published on LVIS, of the
methods of Table 8 that a publication compares with its own baseline. Signs: how many of these differences have the
published one's sign. Rank correlation (Spearman): of the differences over methods. Intervals are 95%, a bootstrap over
seeds: the methods and the published numbers stay. [The benchmark](benchmark.md) was not tuned to these numbers."""
LEADERBOARD_NOTE = """Written by `make results DATA={data} SEEDS={seeds}` from records in `{records}`, best mask AP
first; [a row of your own](plugin.md#a-row-in-the-leaderboard) takes one command. Mean ± standard deviation over seeds,
in percent. Minutes are of one seed, training and evaluation, without stage 1; rows are of different machines and days,
so they and images/s compare roughly. A commit with `+` had changes."""


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
    lines = ["# What the benchmark predicts", "", PREDICTION_NOTE.format(**vars(options))]
    for data, table in tables.items():
        found = pairs(table)
        if not found:
            continue
        rows, told = [], {}
        for column in (*COLUMNS, "all"):
            of_column = [pair for pair in found if column in (pair.column, "all")]
            signs, ranks = with_seeds(of_column, agreement), None
            if column != "all" and len(of_column) > 2:
                ranks = with_seeds(of_column, rank_correlation)
            told[column] = (signs, ranks)
            share, low, high = signs
            number = len(of_column)
            rows.append(
                [
                    column,
                    f"{round(share * number)} of {number}, {100 * share:.0f}% [{100 * low:.0f}, {100 * high:.0f}]",
                    "-" if ranks is None else f"{ranks[0]:+.2f} [{ranks[1]:+.2f}, {ranks[2]:+.2f}]",
                ]
            )
        lines += ["", f"## {DATA[data]}", "", *markdown_table(["", "signs agree", "rank correlation"], rows), ""]
        share, mask = told["all"][0][0], told["AP"][1]
        lines += [
            f"- Goal: signs {100 * GOALS['signs']:.0f}%: {'met' if share >= GOALS['signs'] else 'not met'}, "
            f"{100 * share:.0f}%.",
            f"- Goal: rank correlation of mask AP {GOALS['rank']}: "
            + (
                "not measured."
                if mask is None
                else f"{'met' if mask[0] >= GOALS['rank'] else 'not met'}, {mask[0]:.2f}."
            ),
        ]
        wrong = [pair for pair in found if np.mean(list(pair.ours.values())) * pair.published <= 0]
        cells = [
            [p.method, p.column, f"{np.mean(list(p.ours.values())):+.1f}", f"{p.published:+.1f}", str(len(p.ours))]
            for p in wrong
        ]
        head = ["signs that differ", "", "here", "published", "seeds"]
        lines += ["", *markdown_table(head, cells)]
    return "\n".join(lines) + "\n"


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
