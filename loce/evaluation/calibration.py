"""Calibration of detections: expected and maximal calibration error, reliability of scores, by group of categories.

Detection ECE (Küppers et al., CVPR workshops 2020, arXiv 2004.13546): detections lie in bins of equal width by score,
the precision of a bin is its share of true positives at IoU .5, and ECE = sum over bins of |bin| / |all| times
|precision - mean score|. MCE (Naeini et al., AAAI 2015) is the largest of these gaps. Taken are the detections that
count under the protocol; those on ignored objects, or unmatched where a category is not exhaustive, are neither true
nor false.

Legend: I images, G = 3 groups r, c, f, M bins, B weightings of the images; 3 sums of a bin: detections, scores, hits.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loce.evaluation.matching import Matches
from loce.utils.classes import GROUP_NAMES, GROUP_RGB, GROUPS
from loce.utils.files import atomic_write, csv_text

BINS = 20
NAMES = tuple(f"{error}{group}" for error in ("ECE", "MCE") for group in ("", *GROUPS))


def reliability(matches: Matches) -> np.ndarray | None:
    """(I, G, M, 3) float32 sums of every image; None where scores are no probabilities."""
    if len(matches.score) and not (matches.score.min() >= 0 and matches.score.max() <= 1):
        return None
    found, false = matches.verdicts()
    counted = np.flatnonzero(found | false)
    # Each detection's place among all bins of all groups and images.
    groups = np.array([GROUPS.index(str(group)) for group in matches.truth.frequency])
    group = np.repeat(groups, np.diff(matches.bounds))[counted]
    score = matches.score[counted].astype(np.float64)
    shape = (len(matches.truth.image_ids), len(GROUPS), BINS)
    bins = np.minimum((score * BINS).astype(np.int64), BINS - 1)
    place = np.ravel_multi_index((matches.image[counted], group, bins), shape)
    columns = (None, score, found[counted].astype(np.float64))
    sums = [np.bincount(place, column, minlength=int(np.prod(shape))) for column in columns]
    return np.stack(sums, axis=-1).reshape(*shape, 3).astype(np.float32)


def weighted(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B, G, M, 3) sums over images when image i counts weights[i, b] times (I, B)."""
    flat = sums.reshape(len(sums), -1)
    return (weights.T.astype(np.float32) @ flat).reshape(-1, *sums.shape[1:])


def errors(sums: np.ndarray) -> dict[str, np.ndarray]:
    """NAMES -> (B,) of sums (B, G, M, 3); nan for a group without detections. ECE, MCE: of all groups together."""
    found = {}
    for group in ("", *GROUPS):
        own = sums[:, GROUPS.index(group)] if group else sums.sum(axis=1, dtype=np.float64)
        count, score, true = np.moveaxis(own.astype(np.float64), -1, 0)
        total = count.sum(axis=1)
        some = total > 0
        gap = np.abs(true - score)
        found[f"ECE{group}"] = np.where(some, gap.sum(axis=1) / np.where(some, total, 1), np.nan)
        worst = (gap / np.where(count > 0, count, 1)).max(axis=1)
        found[f"MCE{group}"] = np.where(some, worst, np.nan)
    return {name: found[name] for name in NAMES}


def table(sums: np.ndarray, of: str) -> str:
    """CSV, a row a group and bin: group, from, to, detections, mean_score, precision (empty without detections).

    sums (G, M, 3); of: what the numbers are of, in the last column.
    """
    rows: list[list[Any]] = [["group", "from", "to", "detections", "mean_score", "precision", "of"]]
    for group, bins in zip(GROUPS, sums.tolist(), strict=True):
        for m, (count, score, true) in enumerate(bins):
            cells = [f"{score / count:.6f}", f"{true / count:.6f}"] if count else ["", ""]
            rows.append([group, f"{m / BINS}", f"{(m + 1) / BINS}", int(count), *cells, of])
    return csv_text(rows)


def draw(sums: np.ndarray, numbers: Mapping[str, float], title: str, path: Path) -> None:
    """Reliability diagram, a panel a group: precision of each bin against its mean score; size: its detections.

    sums (G, M, 3); numbers: ECE and MCE by name, -1 where undefined.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(10.5, 4), layout="constrained")
    panels = figure.subplots(1, len(GROUPS), sharex=True, sharey=True)
    for axes, group, bins in zip(panels, GROUPS, sums, strict=True):
        some = bins[bins[:, 0] > 0]
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        colour = [part / 255 for part in GROUP_RGB[group]]
        score, precision = some[:, 1] / some[:, 0], some[:, 2] / some[:, 0]
        axes.plot(score, precision, color=colour, linewidth=1)
        axes.scatter(score, precision, 4 + 12 * np.log10(some[:, 0]), color=colour)
        known = [f"{name} {100 * numbers[name + group]:.1f}" for name in ("ECE", "MCE") if numbers[name + group] >= 0]
        axes.set_title(f"{GROUP_NAMES[group]}: {', '.join(known) or 'no detections'}", fontsize=10)
        axes.set_xlabel("mean score of a bin")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("precision at IoU .5")
    figure.suptitle(f"Reliability of scores: {title}", fontsize=11)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)
