"""Means over seeds with intervals over seeds and images, and differences that pair both.

Legend: S seeds, B resampled sets of validation images, the same for all runs (records.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds in percent, the standard deviation of the seeds (nan of one), and its 95% interval."""

    mean: float
    deviation: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def estimate(values_S: np.ndarray, drawn_SB: np.ndarray, seed: int = 0) -> Estimate:
    """Of a metric's values (S,) and what resampled images make of them (S, B).

    A two-way bootstrap: each of the B sets of images goes with seeds drawn with replacement. What the images do is
    averaged over all seeds. Drawn seeds vary too little by sqrt((S - 1) / S), which is made up for. One seed tells
    nothing of seeds: then the interval is of the images alone.
    """
    seeds, resamples = drawn_SB.shape
    images_B = (drawn_SB - drawn_SB.mean(axis=1, keepdims=True)).mean(axis=0)
    around_S = values_S - values_S.mean()
    chosen_BS = np.random.default_rng(seed).integers(0, seeds, (resamples, seeds))
    enlarged = np.sqrt(seeds / max(seeds - 1, 1))
    sums_B = values_S.mean() + images_B + enlarged * around_S[chosen_BS].mean(axis=1)
    low, high = np.quantile(sums_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    deviation = float(values_S.std(ddof=1)) if seeds > 1 else float("nan")
    return Estimate(float(values_S.mean()), deviation, float(low), float(high), seeds)


def metric(records: Sequence[dict[str, Any]], column: str) -> Estimate | None:
    """Of the records of a row; None where there is none, or no class of the group."""
    if not records or any(column not in record["resamples"] for record in records):
        return None
    values = np.array([record["values"][column] for record in records])
    return estimate(values, np.array([record["resamples"][column] for record in records]))


def difference(ours: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], column: str) -> Estimate | None:
    """Ours minus theirs, over the seeds that both have; None where there is none."""
    of_seed = {record["seed"]: record for record in others}
    pairs = [(record, of_seed[record["seed"]]) for record in ours if record["seed"] in of_seed]
    if not pairs or any(column not in record["resamples"] for pair in pairs for record in pair):
        return None
    values = np.array([a["values"][column] - b["values"][column] for a, b in pairs])
    drawn = [np.subtract(a["resamples"][column], b["resamples"][column]) for a, b in pairs]
    return estimate(values, np.array(drawn))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, with mean ranks for ties."""
    return float(np.corrcoef(_ranks(np.array(first)), _ranks(np.array(second)))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def score_tracks_accuracy(record: dict[str, Any]) -> float:
    """Rank correlation of mean score and mask AP over the classes that validation shows."""
    classes = record["classes"]
    seen = [pair for pair in zip(classes["mean score"], classes["AP"], strict=True) if None not in pair]
    return rank_correlation(*zip(*seen, strict=True))
