"""Pictures of a run: the paper's Figures 1 and 4 (score, accuracy, AP of every class), predictions beside truth."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import nms

from loce.data.lvis import LVISAnnotations
from loce.data.transforms import read_image
from loce.evaluation.detections import Detections
from loce.evaluation.stream import read_detections
from loce.files import atomic_write

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patheffects import withStroke

GROUP_COLOURS = {"r": "#d1495b", "c": "#edae49", "f": "#30638e"}
GROUP_NAMES = {"r": "rare", "c": "common", "f": "frequent"}
VALUES = {"score": "mean score of own class", "accuracy": "classification accuracy", "ap": "AP"}  # rows of a figure
COLUMNS = {"score": "mean_score", "accuracy": "accuracy"}  # of mean_scores.csv
SHOWN_SCORE = 0.1  # predictions below it are not drawn
SHOWN_OVERLAP = 0.5  # of two predictions that overlap more, whatever their classes, the better one is drawn

CAPTION = (
    f"Of predictions one label per place is drawn: the best with a score of at least {SHOWN_SCORE:g},\n"
    f"all classes in one NMS at IoU {SHOWN_OVERLAP:g}."
)


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def equilibrium_figure(runs: Mapping[str, Path], output: Path, rows: Sequence[str] = ("score", "ap")) -> None:
    """A row for each kind of value of every class, most frequent in training first, one column per run (Figures 1, 4).

    runs: title -> evaluation folder with per_category.csv and, but for rows=("ap",), mean_scores.csv. rows: of VALUES.
    Classes without objects in the validation data are gaps, and in no mean. The suffix of `output` says PNG or PDF.
    """
    size = (4.6 * len(runs), 0.6 + 2.3 * len(rows))
    figure, axes = plt.subplots(len(rows), len(runs), figsize=size, sharex="col", sharey="row", squeeze=False)
    # Rows share their axis, so each panel only raises the common limit.
    for column, (title, folder) in zip(axes.T, runs.items(), strict=True):
        values, groups, counts = class_values(folder)
        for axis, name in zip(column, rows, strict=True):
            _bars(axis, values[name], groups)
        column[0].set_title(title)
        _class_axis(column[-1], counts)
    for axis, name in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(VALUES[name])
    handles = [plt.Rectangle((0, 0), 1, 1, color=GROUP_COLOURS[g]) for g in GROUP_COLOURS]
    figure.legend(handles, GROUP_NAMES.values(), loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.25 / size[1], 1, 1))
    _save(figure, output)


def class_values(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None]:
    """Values of an evaluation's classes, their groups ("r", "c", "f") and training instances, most instances first.

    Values: name in VALUES -> (C,), nan where the validation data have no boxes (score, accuracy) or no objects that
    count (AP: empty or -1). The results of another program have AP only: no instances then (None), and the order is
    groups, in them most objects in the validation data first.
    """
    tested = folder / "mean_scores.csv"
    by_id = {row["id"]: row for row in read_table(folder / "per_category.csv")}
    if not tested.is_file():
        rows = sorted(by_id.values(), key=lambda row: ("fcr".index(row["frequency"]), -int(row["instances"])))
        return {"ap": _numbers(rows, "AP")}, np.array([row["frequency"] for row in rows]), None
    rows = sorted(read_table(tested), key=lambda row: -int(row["training_instances"]))
    boxes = np.array([int(row["boxes"]) for row in rows])
    values = {n: np.where(boxes > 0, _numbers(rows, c), np.nan) for n, c in COLUMNS.items() if c in rows[0]}
    values["ap"] = _numbers([by_id[row["id"]] for row in rows], "AP")
    return values, np.array([row["group"] for row in rows]), np.array([int(row["training_instances"]) for row in rows])


def _numbers(rows: Sequence[Mapping[str, str]], column: str) -> np.ndarray:
    values = np.array([float(row[column] or "nan") for row in rows])
    return np.where(values < 0, np.nan, values)


def _class_axis(axis: Any, counts: np.ndarray | None) -> None:
    """The paper's x axis: places in the order, and the training instances of the class there."""
    if counts is None:
        axis.set_xlabel("classes: frequent, common, rare")
        return
    places = np.linspace(0, len(counts) - 1, min(5, len(counts))).round().astype(int)
    axis.set_xticks(places, [f"{place + 1}\n({counts[place]})" for place in places])
    axis.set_xlabel("class (its training instances)")


def group_means(values: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """The mean of each group over its classes (C,) that have a value; a group without any is left out."""
    known = ~np.isnan(values)
    return {g: float(values[known & (groups == g)].mean()) for g in GROUP_COLOURS if (known & (groups == g)).any()}


def _bars(axis: Any, values: np.ndarray, groups: np.ndarray) -> None:
    axis.bar(range(len(values)), values, width=1.0, color=[GROUP_COLOURS[g] for g in groups])
    for group, mean in group_means(values, groups).items():
        places = np.flatnonzero(groups == group)
        axis.hlines(mean, min(places) - 0.5, max(places) + 0.5, colors="black", linewidth=1.2)
        text = axis.text(max(places) + 0.5, mean, f" {mean:.2f}", va="bottom", ha="right", fontsize=9, weight="bold")
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    axis.margins(x=0.01)
    highest = np.nanmax(values, initial=0.0) or 1 / 1.1  # nothing to show: the whole range
    axis.set_ylim(0, max(axis.get_ylim()[1] if axis.get_ylim()[1] < 1 else 0, min(1.0, highest * 1.1)))
    axis.spines[["top", "right"]].set_visible(False)


def score_figure(runs: Mapping[str, Mapping[str, Sequence[Any]]], output: Path) -> None:
    """Mean score against mask AP of every class, one panel per run, coloured by group (what Figure 1 claims).

    runs: title -> "mean score", "AP" and "group" of every class; None where validation has no objects.
    """
    figure, axes = plt.subplots(1, len(runs), figsize=(4.2 * len(runs), 4.2), sharex=True, sharey=True, squeeze=False)
    for axis, (title, classes) in zip(axes[0], runs.items(), strict=True):
        for group, colour in GROUP_COLOURS.items():
            points = zip(classes["mean score"], classes["AP"], classes["group"], strict=True)
            mine = [(score, ap) for score, ap, g in points if g == group and score is not None and ap is not None]
            axis.scatter(*np.array(mine or np.empty((0, 2))).T, s=22, color=colour, alpha=0.8, label=GROUP_NAMES[group])
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("mean score of own class")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("mask AP")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    _save(figure, output)


def prediction_sheet(
    annotations: LVISAnnotations, images: str, runs: Mapping[str, Path], output: Path, rows: int = 6
) -> None:
    """At most `rows` validation images, one a line: ground truth, then a column of predictions per run.

    Images with rare classes come first. runs: title -> folder with streamed detections. Of predictions only one for
    each place is drawn, whatever the classes, which the caption says: AP knows all of them.
    """
    chosen = _telling_images(annotations, rows)
    ids = annotations.image_ids.tolist()
    label_of = {int(c): label for label, c in enumerate(annotations.stats.category_ids)}
    found = {title: read_detections(folder, ids) for title, folder in runs.items()}
    size = (3.4 * (1 + len(runs)), 3.4 * len(chosen) + 0.5)
    figure, axes = plt.subplots(len(chosen), 1 + len(runs), figsize=size, squeeze=False)
    for line, index in zip(axes, chosen, strict=True):
        height, width = (int(side) for side in annotations.image_sizes[index])
        image = read_image(annotations.image_path(index, images), (height, width))
        own = annotations.rows(index)
        runs_of = annotations.segmentations.runs(own, height, width)
        masks = [coco_mask.frPyObjects({"counts": r.tolist(), "size": [height, width]}, height, width) for r in runs_of]
        _draw(line[0], image, annotations, annotations.labels[own], masks, None)
        for axis, detections in zip(line[1:], found.values(), strict=True):
            mine = _shown(detections, ids[index])
            labels = np.array([label_of[c] for c in detections.category_ids[mine].tolist()], np.int64)
            codes = detections.masks.rles(mine) if detections.masks is not None else []
            _draw(axis, image, annotations, labels, codes, detections.scores[mine])
    for axis, title in zip(axes[0], ["ground truth", *runs], strict=True):
        axis.set_title(title)
    figure.text(0.5, 0.1 / size[1], CAPTION, ha="center", fontsize=9)
    figure.tight_layout(rect=(0, 0.45 / size[1], 1, 1))
    _save(figure, output)


def _shown(detections: Detections, image_id: int) -> np.ndarray:
    """Rows of an image's predictions that are worth drawing: one for each place, good enough, best first."""
    mine = np.flatnonzero((detections.image_ids == image_id) & (detections.scores >= SHOWN_SCORE))
    boxes, scores = torch.from_numpy(detections.corners()[mine]), torch.from_numpy(detections.scores[mine])
    return mine[nms(boxes, scores, SHOWN_OVERLAP).numpy()]


def _telling_images(annotations: LVISAnnotations, count: int) -> list[int]:
    rare = annotations.stats.group_mask("r")
    rare_per_image = [int(rare[annotations.labels[annotations.rows(i)]].sum()) for i in range(len(annotations))]
    return sorted(range(len(annotations)), key=lambda i: (-rare_per_image[i], i))[:count]


def _draw(
    axis: Any,
    image: np.ndarray,
    annotations: LVISAnnotations,
    labels: np.ndarray,
    masks: Sequence[dict[str, Any]],
    scores: np.ndarray | None,
) -> None:
    """One image with masks tinted by frequency group, and names (and scores)."""
    canvas = image.astype(np.float32) / 255
    for place, (label, code) in enumerate(zip(labels, masks, strict=True)):
        colour = np.array(matplotlib.colors.to_rgb(GROUP_COLOURS[str(annotations.stats.groups[label])]))
        mask = coco_mask.decode(code).astype(bool)
        canvas[mask] = 0.45 * canvas[mask] + 0.55 * colour
        if mask.any():
            x, y, _, _ = coco_mask.toBbox(code)
            text = annotations.stats.names[label] + ("" if scores is None else f" {scores[place]:.2f}")
            box = {"facecolor": colour, "alpha": 0.8, "pad": 0.8, "edgecolor": "none"}
            axis.text(x, y, text, fontsize=7, color="white", bbox=box, clip_on=True)
    axis.imshow(canvas)
    axis.axis("off")


def _save(figure: Any, output: Path) -> None:
    with atomic_write(output) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
