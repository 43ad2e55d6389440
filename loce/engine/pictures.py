"""Pictures of images with their objects: first training samples, annotations and detections of validation images.

What is shown, and which detections of it; drawing.py draws.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import nms

from loce.data.annotations.lvis import LVISAnnotations
from loce.data.dataset import Sample, TrainDataset
from loce.data.masks import CroppedMasks
from loce.data.samplers import TrainingPlan
from loce.data.transforms import read_image
from loce.engine.drawing import CELL, GREY, class_text, draw_objects, shade, sheet
from loce.evaluation.stream import read_detections
from loce.evaluation.thresholds import read_thresholds
from loce.models.mask_rcnn import MaskRCNN
from loce.utils.classes import GROUPS, ClassStats

FIRST, PREDICTED = 16, 8  # training samples, and validation images, on a sheet
SURE, COMPARED_FROM = 0.3, 0.1  # scores drawn where no evaluation chose thresholds; of runs that are compared


class Limits(NamedTuple):
    """Which detections are drawn: scores of at least `threshold` (one number, or one for each class (C,)), one for each
    place (boxes of all classes together overlap at most `overlap`), and at most `most`.
    """

    threshold: float | np.ndarray = SURE
    most: int = 30
    overlap: float = 0.7


COMPARED = Limits(threshold=COMPARED_FROM, overlap=0.5)  # where runs are compared: scores of rare classes are low
RULE = (
    "Drawn: scores of at least the threshold of the run's class (best F1 on this data, so these pictures flatter; "
    f"{COMPARED_FROM:g} where an evaluation has none), one label for each place "
    f"(NMS over all classes at {COMPARED.overlap:g})."
)


def first_samples(dataset: TrainDataset, plan: TrainingPlan) -> np.ndarray:
    """(H, W, 3) uint8 RGB: the first 16 training samples, resized and flipped as the model will see them.

    Augmentation depends on seed, epoch, image and draw alone, so that to make them here changes nothing in training.
    """
    shown = plan.epoch(0).reshape(-1, 3)[:FIRST].tolist()
    samples = [dataset[index, 0, draw, drawn, 0] for index, draw, drawn in shown]
    pictures = [_annotated(sample, dataset.annotations.stats) for sample in samples]
    return sheet(pictures, [_caption(sample) for sample in samples], f"the first {len(samples)} training samples")


def _caption(sample: Sample) -> str:
    if "replaced" in sample and "pasted" not in sample:  # else it may be the source of pasted objects
        return f"in place of a bad image: {sample['image_id']}"
    height, width = sample["image"].shape[1:]
    pasted = f", {sample['pasted']} pasted" if sample.get("pasted") else ""
    return f"image {sample['image_id']}, {width} x {height} px, {len(sample['labels'])} objects{pasted}"


def predictions(model: MaskRCNN, dataset: TrainDataset, evaluation: Path | None) -> np.ndarray:
    """(H, W, 3) uint8 RGB: some validation images twice, with their annotations and with the model's detections.

    The same images whatever the model: in turn one with a rare, a common and a frequent class. evaluation: the folder
    with the thresholds of its classes; None: in training, where no score is known to mean anything, so that as many
    detections as objects are drawn, the best. One rank suffices.
    """
    stats = model.stats
    own = None if evaluation is None else read_thresholds(evaluation, stats.category_ids, SURE)
    limits = Limits(SURE if own is None else own)
    least = f"a score of {SURE:g} or more" if own is None else "their class's threshold (best F1) or more"
    pictures, captions = [], []
    model.eval()
    for index in examples(dataset, stats, PREDICTED):
        sample = dataset[index, 0]
        height, width = sample["image"].shape[1:]
        found = model.detect([sample["image"]], [(1.0, 1.0)], [(height, width)])[0]
        if evaluation is None:
            limits = Limits(0.0, len(sample["labels"]))
            least = "the best scores, as many as are annotated"
        drawn, rows = draw_detections(_pixels(sample), found, stats, limits, CELL)
        # Below the picture: how many are drawn, or the best of all where none is.
        caption = f"found: {len(rows)} with {least}"
        if not len(rows):
            caption = f"found: nothing with {least}"
            if len(found["scores"]):
                best = int(found["scores"].argmax())
                caption += f"; the best: {_name(stats, found['labels'][best])} {found['scores'][best]:.2g}"
        pictures += [_annotated(sample, stats), drawn]
        captions += [f"image {sample['image_id']}: annotated", caption]
    return sheet(pictures, captions, "what is annotated, and what is found")


def examples(dataset: TrainDataset, stats: ClassStats, most: int) -> list[int]:
    """Indices of up to `most` images with objects: in turn one that shows a rare, a common and a frequent class."""
    annotations = dataset.annotations
    rows = annotations.train_rows
    groups = stats.groups[annotations.labels[rows]]
    shown = [np.unique(annotations.image_of[rows[groups == group]]) for group in GROUPS]
    usable = [images[np.isin(images, annotations.train_images)] for images in shown]
    generator = np.random.default_rng(dataset.seed)
    queues = [generator.permutation(images).tolist() for images in usable]
    chosen: list[int] = []
    while len(chosen) < most and any(queues):
        for queue in queues:
            fresh = next((image for image in queue if image not in chosen), None)
            queue[:] = queue[queue.index(fresh) + 1 :] if fresh is not None else []
            if fresh is not None and len(chosen) < most:
                chosen.append(fresh)
    return chosen


def comparison_sheet(
    annotations: LVISAnnotations,
    images: str,
    folders: Mapping[str, Path],
    count: int,
) -> np.ndarray:
    """(H, W, 3) uint8 RGB: `comparisons` of runs, an image a line. folders: title -> folder of an evaluation."""
    stats = annotations.stats
    classes = dict(zip(stats.category_ids.tolist(), zip(stats.names, stats.groups, strict=True), strict=True))
    drawn = [row for _, row in comparisons(annotations, images, folders, classes, count)]
    pictures = [picture for row in drawn for picture in row.values()]
    return sheet(pictures, [title for row in drawn for title in row], RULE, 1 + len(folders))


def comparisons(
    annotations: LVISAnnotations,
    images: str,
    folders: Mapping[str, Path],
    classes: Mapping[int, tuple[str, str]],
    count: int,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Name of an image -> caption -> (H, W, 3) uint8 RGB: "ground truth", and the detections of each run.

    At most `count` images, those with most objects of rare classes first. images: their folder; folders: title ->
    folder of an evaluation, with its detections; classes: category id -> name and group, by the training data. `RULE`
    says what is drawn.
    """

    def draw(
        corners: np.ndarray,
        codes: Sequence[Any],
        category_ids: np.ndarray,
        scores: np.ndarray,
    ) -> np.ndarray:
        known = [(number, *classes.get(number, ("?", "r"))) for number in category_ids.tolist()]
        names = [class_text(name, number) for number, name, _ in known]
        texts = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)] if len(scores) else names
        labels = [label_of.get(number, 0) for number, _, _ in known]
        return draw_objects(image, corners, codes, texts, [group for _, _, group in known], labels, CELL)

    ids = annotations.stats.category_ids
    label_of = {number: label for label, number in enumerate(ids.tolist())}
    found = {title: read_detections(folder / "detections", annotations.image_ids) for title, folder in folders.items()}
    chosen = {title: read_thresholds(folder, ids, COMPARED_FROM) for title, folder in folders.items()}
    limits = {title: COMPARED._replace(threshold=COMPARED_FROM if t is None else t) for title, t in chosen.items()}
    rare = np.array([classes.get(int(c), ("", ""))[1] == "r" for c in ids])
    telling = [int(rare[annotations.labels[annotations.rows(i)]].sum()) for i in range(len(annotations))]
    for index in sorted(range(len(annotations)), key=lambda i: (-telling[i], i))[:count]:
        height, width = (int(side) for side in annotations.image_sizes[index])
        image = read_image(annotations.image_path(index, images), (height, width))
        # What is annotated, without scores; then what each run found, if it is worth drawing.
        own = annotations.rows(index)
        masked = annotations.has_mask[own]
        masks = iter(annotations.segmentations.rles(own[masked], height, width))
        codes = [next(masks) if has_mask else None for has_mask in masked]  # of the others the box is drawn
        corners = annotations.clipped_boxes(own)
        drawn = {"ground truth": draw(corners, codes, ids[annotations.labels[own]], np.empty(0))}
        for title, detections in found.items():
            mine = np.flatnonzero(detections.image_ids == annotations.image_ids[index])
            labels = np.array([label_of[number] for number in detections.category_ids[mine].tolist()], dtype=np.int64)
            scores = detections.scores[mine]
            best = mine[worth_drawing(detections.corners()[mine], scores, labels, limits[title])]
            found_masks = detections.masks.rles(best) if detections.masks is not None else []
            ids_of_best, scores = detections.category_ids[best], detections.scores[best]
            drawn[title] = draw(detections.corners()[best], found_masks, ids_of_best, scores)
        yield annotations.name(index), drawn


def _pixels(sample: Sample) -> np.ndarray:
    """(H, W, 3) of a sample's (3, H, W) image."""
    return np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())


def _name(stats: ClassStats, label: int) -> str:
    return class_text(stats.names[label], int(stats.category_ids[label]))


def _annotated(sample: Sample, stats: ClassStats) -> np.ndarray:
    """A sample with its objects, each with box and mask; regions that take part in nothing have a grey box."""
    image, labels = _pixels(sample), sample["labels"].tolist()
    groups = [str(stats.groups[label]) for label in labels]
    names = [_name(stats, label) for label in labels]
    codes = _codes(sample["masks"], image.shape[:2]) if "masks" in sample else []
    picture = draw_objects(image, sample["boxes"].numpy(), codes, names, groups, labels, CELL)
    boxes = torch.cat([sample["ignored"], sample["boxes"]]) * (CELL / max(image.shape[:2]))
    own = [shade(group, label) for group, label in zip(groups, labels, strict=True)]
    colours = [GREY] * len(sample["ignored"]) + own
    for (x1, y1, x2, y2), colour in zip(boxes.round().int().tolist(), colours, strict=True):
        cv2.rectangle(picture, (x1, y1), (x2, y2), colour, 1)
    return picture


def _codes(masks: CroppedMasks, size: tuple[int, ...]) -> list[dict[str, Any]]:
    """Run-length codes of the masks of an image of this size, one by one: all at once may not fit the memory."""
    codes = []
    for crop, (x0, y0) in masks.crops():
        full = np.zeros(size, np.uint8, order="F")
        full[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = crop.numpy()
        codes.append(coco_mask.encode(full))
    return codes


def draw_detections(
    image: np.ndarray,
    found: Mapping[str, Any],
    stats: ClassStats,
    limits: Limits,
    longest: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) with a model's detections, as `MaskRCNN.detect` gives them, and the rows that are drawn.

    longest: see `draw_objects`.
    """
    boxes, scores, labels = (found[name].numpy() for name in ("boxes", "scores", "labels"))
    rows = worth_drawing(boxes, scores, labels, limits)
    texts = [f"{_name(stats, labels[row])} {scores[row]:.2f}" for row in rows]
    groups = [str(stats.groups[labels[row]]) for row in rows]
    counts = [found["rles"][row] for row in rows] if "rles" in found else []
    codes = [{"size": list(image.shape[:2]), "counts": count} for count in counts]
    return draw_objects(image, boxes[rows], codes, texts, groups, labels[rows].tolist(), longest), rows


def worth_drawing(boxes_N4: np.ndarray, scores_N: np.ndarray, labels_N: np.ndarray, limits: Limits) -> np.ndarray:
    """Rows to draw within `limits`, best first."""
    least = limits.threshold
    rows = np.flatnonzero(scores_N >= (least[labels_N] if isinstance(least, np.ndarray) else least))
    boxes, scores = torch.from_numpy(boxes_N4[rows]).float(), torch.from_numpy(scores_N[rows]).float()
    return rows[nms(boxes, scores, limits.overlap).numpy()][: limits.most]
