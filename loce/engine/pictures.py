"""Sheets of pictures to look at: what a training shows its model, and what models find in validation images."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask

from loce.data.annotations.lvis import LVISAnnotations
from loce.data.dataset import Sample, TrainDataset
from loce.data.masks import CroppedMasks
from loce.data.samplers import TrainingPlan
from loce.data.transforms import read_image
from loce.engine.drawing import class_text, draw_objects, put_text, worth_drawing
from loce.evaluation.detections import Detections
from loce.evaluation.stream import read_detections
from loce.models.mask_rcnn import MaskRCNN
from loce.utils.classes import GROUP_NAMES, GROUP_RGB, GROUPS, ClassStats
from loce.utils.files import atomic_write

CELL, GAP, CAPTION, TITLE = 448, 8, 26, 44  # pixels: the side of a picture, between two, of the lines of text
PAPER, INK, GREY = (255, 255, 255), (40, 40, 40), (128, 128, 128)
FIRST = 16  # training samples
THRESHOLD, MOST, OVERLAP = 0.3, 30, 0.7  # of detections that are drawn, see `worth_drawing`
LOWER, APART = 0.1, 0.5  # threshold and overlap where runs are compared: scores of rare classes are low
RULE = f"Drawn: scores of at least {LOWER:g}, one label for each place (NMS over all classes at {APART:g})."


def first_samples(dataset: TrainDataset, plan: TrainingPlan) -> np.ndarray:
    """(H, W, 3) uint8 RGB: the first 16 training samples, resized and flipped as the model will see them.

    Augmentation depends on seed, epoch, image and draw alone, so that to make them here changes nothing in training.
    """
    shown = plan.epoch(0).reshape(-1, 3)[:FIRST].tolist()
    samples = [dataset[index, 0, draw, drawn, 0] for index, draw, drawn in shown]
    stats = dataset.annotations.stats
    pictures = [_truth(sample, stats) for sample in samples]
    return sheet(pictures, [_caption(sample) for sample in samples], f"the first {len(samples)} training samples")


def _caption(sample: Sample) -> str:
    if "replaced" in sample:
        return f"in place of a bad image: {sample['image_id']}"
    height, width = sample["image"].shape[1:]
    return f"image {sample['image_id']}, {width} x {height} px, {len(sample['labels'])} objects"


def _truth(sample: Sample, stats: ClassStats) -> np.ndarray:
    """A sample with its objects, each with box and mask; regions that take part in nothing have a grey box."""
    image, scale = _fit(sample["image"])
    for x1, y1, x2, y2 in (sample["ignored"] * scale).round().int().tolist():
        cv2.rectangle(image, (x1, y1), (x2, y2), GREY, 1)
    boxes, labels = (sample["boxes"] * scale).numpy(), sample["labels"].tolist()
    groups = [str(stats.groups[label]) for label in labels]
    for box, group in zip(boxes.round().astype(int).tolist(), groups, strict=True):
        cv2.rectangle(image, tuple(box[:2]), tuple(box[2:]), GROUP_RGB[group], 1)
    masks = _scaled(sample["masks"], image.shape[:2], scale)
    return draw_objects(image, boxes, masks, [_name(stats, label) for label in labels], groups)


def _name(stats: ClassStats, label: int) -> str:
    return class_text(stats.names[label], int(stats.category_ids[label]))


def _fit(image: torch.Tensor) -> tuple[np.ndarray, float]:
    """A uint8 image (3, h, w) as (H, W, 3) with the long side at CELL, and by how much it was scaled."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    scale = CELL / max(pixels.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in pixels.shape[1::-1])
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR), scale


def _scaled(masks: CroppedMasks, size: tuple[int, ...], scale: float) -> list[dict[str, Any]]:
    """Run-length codes of the masks on a canvas of `size`, one by one: all at once may not fit the memory."""
    codes = []
    for crop, (x0, y0) in masks.crops():
        move = np.array([[scale, 0, x0 * scale], [0, scale, y0 * scale]])
        canvas = cv2.warpAffine(crop.numpy(), move, (size[1], size[0]), flags=cv2.INTER_NEAREST)
        codes.append(coco_mask.encode(np.asfortranarray(canvas)))
    return codes


def predictions(model: MaskRCNN, dataset: TrainDataset, most: int = 8) -> np.ndarray:
    """(H, W, 3) uint8 RGB: some validation images twice, with what is there and with what the model finds.

    The same images whatever the model: in turn one with a rare, a common and a frequent class. One rank suffices.
    """
    stats = model.stats
    pictures, captions = [], []
    model.eval()
    for index in examples(dataset, stats, most):
        sample = dataset[index, 0]
        height, width = sample["image"].shape[1:]
        found = model.detect([sample["image"]], [(1.0, 1.0)], [(height, width)])[0]
        drawn, caption = _found(sample["image"], found, stats)
        pictures += [_truth(sample, stats), drawn]
        captions += [f"image {sample['image_id']}: annotated", caption]
    return sheet(pictures, captions, "what is annotated, and what is found")


def examples(dataset: TrainDataset, stats: ClassStats, most: int) -> list[int]:
    """Indices of up to `most` images with objects: in turn one that shows a rare, a common and a frequent class."""
    annotations = dataset.annotations
    groups = stats.groups[annotations.labels]
    shown = [np.unique(annotations.image_of[groups == group]) for group in GROUPS]
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


def _found(image: torch.Tensor, found: Mapping[str, Any], stats: ClassStats) -> tuple[np.ndarray, str]:
    """An image with its best detections, and what is written below it."""
    boxes, scores, labels = (found[name].numpy() for name in ("boxes", "scores", "labels"))
    rows = worth_drawing(boxes, scores, THRESHOLD, MOST, OVERLAP)
    pixels, scale = _fit(image)
    masks = []
    for row in rows:
        mask = coco_mask.decode({"size": list(image.shape[1:]), "counts": found["rles"][row]})
        canvas = cv2.resize(mask, pixels.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        masks.append(coco_mask.encode(np.asfortranarray(canvas)))
    texts = [f"{_name(stats, labels[row])} {scores[row]:.2f}" for row in rows]
    drawn = draw_objects(pixels, boxes[rows] * scale, masks, texts, [str(stats.groups[labels[row]]) for row in rows])
    if len(rows):
        return drawn, f"found: {len(rows)} with a score of {THRESHOLD:g} or more"
    best = int(scores.argmax()) if len(scores) else None
    said = "" if best is None else f"; the best: {_name(stats, labels[best])} {scores[best]:.2g}"
    return drawn, f"found: nothing that scores {THRESHOLD:g}{said}"


def comparisons(
    annotations: LVISAnnotations,
    images: str,
    found: Mapping[str, Detections],
    classes: Mapping[int, tuple[str, str]],
    count: int,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Name of an image -> caption -> (H, W, 3) uint8 RGB: what is there ("ground truth"), and what each run found.

    At most `count` images, those with most objects of rare classes first. images: their folder; found: title -> stored
    detections; classes: category id -> name and group, by the training data. `RULE` says what is drawn.
    """
    ids = annotations.stats.category_ids
    rare = np.array([classes.get(int(c), ("", ""))[1] == "r" for c in ids])
    telling = [int(rare[annotations.labels[annotations.rows(i)]].sum()) for i in range(len(annotations))]
    for index in sorted(range(len(annotations)), key=lambda i: (-telling[i], i))[:count]:
        height, width = (int(side) for side in annotations.image_sizes[index])
        image = read_image(annotations.image_path(index, images), (height, width))
        own = annotations.rows(index)
        masks = [
            coco_mask.frPyObjects({"counts": runs.tolist(), "size": [height, width]}, height, width)
            for runs in annotations.segmentations.runs(own, height, width)
        ]
        boxes = np.array([coco_mask.toBbox(mask) for mask in masks]).reshape(-1, 4)
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        drawn = {"ground truth": _named(image, corners, masks, ids[annotations.labels[own]], None, classes)}
        for title, detections in found.items():
            mine = np.flatnonzero(detections.image_ids == annotations.image_ids[index])
            rows = worth_drawing(detections.corners()[mine], detections.scores[mine], LOWER, MOST, APART)
            best = mine[rows]
            codes = detections.masks.rles(best) if detections.masks is not None else []
            numbers, scores = detections.category_ids[best], detections.scores[best]
            drawn[title] = _named(image, detections.corners()[best], codes, numbers, scores, classes)
        yield annotations.name(index), drawn


def _named(
    image: np.ndarray,
    corners: np.ndarray,
    masks: Sequence[dict[str, Any]],
    category_ids: np.ndarray,
    scores: np.ndarray | None,
    classes: Mapping[int, tuple[str, str]],
) -> np.ndarray:
    """An image with objects and their names (and scores)."""
    known = [classes.get(int(number), ("?", "r")) for number in category_ids]
    names = [class_text(name, int(number)) for (name, _), number in zip(known, category_ids, strict=True)]
    texts = names if scores is None else [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
    return draw_objects(image, corners, masks, texts, [group for _, group in known])


def comparison_sheet(annotations: LVISAnnotations, images: str, folders: Mapping[str, Path], count: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB: `comparisons` of runs, an image a line. folders: title -> folder of stored detections."""
    stats = annotations.stats
    classes = dict(zip(stats.category_ids.tolist(), zip(stats.names, stats.groups, strict=True), strict=True))
    found = {title: read_detections(folder, annotations.image_ids) for title, folder in folders.items()}
    drawn = [row for _, row in comparisons(annotations, images, found, classes, count)]
    pictures = [picture for row in drawn for picture in row.values()]
    return sheet(pictures, [title for row in drawn for title in row], RULE, 1 + len(folders))


def sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], title: str, columns: int = 4) -> np.ndarray:
    """(H, W, 3) uint8 RGB: pictures of any size in rows, a line below each, title and colours on top."""
    columns = min(columns, max(1, len(pictures)))
    fitted = [_fitted(picture) for picture in pictures]
    rows = [fitted[first : first + columns] for first in range(0, len(fitted), columns)]
    tops = TITLE + np.cumsum([0, *(max(len(picture) for picture in row) + CAPTION + GAP for row in rows)])
    page = np.full((int(tops[-1]), max(columns, 2) * (CELL + GAP) + GAP, 3), PAPER, np.uint8)
    _legend(page, title)
    for place, (picture, caption) in enumerate(zip(fitted, captions, strict=True)):
        top, left = int(tops[place // columns]), GAP + place % columns * (CELL + GAP)
        page[top : top + len(picture), left : left + picture.shape[1]] = picture
        put_text(page, caption, (left, top + len(picture) + CAPTION - 9), INK, 0.45)
    return page


def _fitted(picture: np.ndarray) -> np.ndarray:
    """A picture whose longer side is CELL pixels."""
    scale = CELL / max(picture.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in picture.shape[1::-1])
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def _legend(page: np.ndarray, title: str) -> None:
    put_text(page, title, (GAP, 29), INK, 0.6)
    left = page.shape[1] - 345
    for group in GROUPS:
        cv2.rectangle(page, (left, 16), (left + 16, 32), GROUP_RGB[group], cv2.FILLED)
        put_text(page, GROUP_NAMES[group], (left + 24, 29), INK, 0.5)
        left += 115


def write_jpeg(file: Path, picture: np.ndarray) -> None:
    """A picture (H, W, 3) uint8 RGB as a file."""
    with atomic_write(file) as temporary:
        temporary.write_bytes(cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes())
