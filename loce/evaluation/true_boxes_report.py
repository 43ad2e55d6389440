"""Report of the true boxes' classification: accuracy by group, confusions.csv, confusions.png (the largest ones)."""

import warnings
from pathlib import Path

import numpy as np

from loce.evaluation.annotations import GroundTruth
from loce.evaluation.bootstrap import as_they_are, draw_weights, fraction_intervals
from loce.evaluation.true_boxes import (
    Confusion,
    TrueBoxes,
    confusion_table,
    confusions,
    group_accuracies,
    largest,
    matrix,
    resampled_accuracy,
)
from loce.utils.classes import GROUP_NAMES
from loce.utils.files import atomic_write, write_text

SHOWN = 5  # confusions on the screen
LETTERS = 24  # of a name in the figure
HEAD = (
    "classification of the true boxes: share that is right, mean over the categories of a group (background left out)"
)


def accuracies(boxes: TrueBoxes, truth: GroundTruth) -> dict[str, float]:
    """Class-balanced accuracy of all categories and of each group; -1 without boxes."""
    found = _resampled(boxes, truth, as_they_are(len(truth.image_ids)))
    return {name: float(value[0]) if np.isfinite(value[0]) else -1.0 for name, value in found.items()}


def accuracy_intervals(boxes: TrueBoxes, truth: GroundTruth, resamples: int) -> dict[str, tuple[float, float]]:
    """95% intervals over images of `accuracies`; the images of a resample are those of AP."""
    images = len(truth.image_ids)
    whole, drawn = (_resampled(boxes, truth, w) for w in (as_they_are(images), draw_weights(images, resamples, seed=0)))
    return fraction_intervals(whole, drawn)


def _resampled(boxes: TrueBoxes, truth: GroundTruth, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Class-balanced accuracies (B,) under weights (I, B) of the images."""
    accuracy = resampled_accuracy(boxes, truth.image_ids, truth.category_ids, weights)
    return group_accuracies(accuracy, truth.frequency)


def write_true_boxes(
    output: Path,
    boxes: TrueBoxes,
    truth: GroundTruth,
    numbers: dict[str, float],
    spread: dict[str, tuple[float, float]],
) -> list[str]:
    """confusions.csv and confusions.png in the folder `output`; lines for the screen."""
    found = confusions(boxes, truth.category_ids)
    write_text(output / "confusions.csv", confusion_table(found, truth))
    if found:
        draw(boxes, truth, found, output / "confusions.png")
    # The numbers as those of AP stand above; then the first confusions.
    groups = truth.frequency[np.isin(truth.category_ids, boxes.category_ids)]
    lines = [HEAD, f"{'':12} {'value':>6}  {'95% interval':14}"]
    for name, value in numbers.items():
        low, high = spread.get(name, (np.nan, np.nan))
        between = f"{low:.3f} - {high:.3f}" if np.isfinite(low) else ""
        group = name.partition("_")[2]
        of = f"{(groups == group).sum():,} {GROUP_NAMES[group]} categories" if group else f"{len(groups):,} categories"
        lines.append(f"{name:12} {f'{value:6.3f}' if value >= 0 else '     -'}  {between:14} {of}")
    taken = [
        f"{truth.names[one.category]} for {truth.names[one.other]} ({one.taken} of {one.boxes})"
        for one in found[:SHOWN]
    ]
    return [*lines, f"taken for another most often: {', '.join(taken)} (confusions.csv)"] if taken else lines


def draw(boxes: TrueBoxes, truth: GroundTruth, found: list[Confusion], path: Path) -> None:
    """Confusion matrix of the categories of the largest confusions, in percent of a category's boxes."""
    from matplotlib.figure import Figure  # slow to import

    chosen = largest(found)
    counts = matrix(boxes, truth.category_ids, chosen)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.6 + 0.36 * len(chosen)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [truth.names[k][:LETTERS] for k in chosen]
    axes.set_xticks(range(len(chosen) + 1), [*names, "any other"], rotation=90, fontsize=8, parse_math=False)
    rows = [f"{name} ({truth.frequency[k]}, {n})" for name, k, n in zip(names, chosen, counts.sum(axis=1), strict=True)]
    axes.set_yticks(range(len(chosen)), rows, fontsize=8, parse_math=False)
    for y, x in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[y, x] > 0.5 else "black"
        axes.text(x, y, f"{100 * shares[y, x]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_ylabel("true class (group, boxes)")
    axes.set_xlabel("highest score, percent of the boxes of a row")
    part = f"\nSUBSET, {truth.part}" if truth.part else ""
    axes.set_title(f"Largest confusions of the true boxes{part}", fontsize=10)
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # letters that matplotlib's font lacks are empty boxes
        figure.savefig(temporary, dpi=110)
