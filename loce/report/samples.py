"""Validation images with what they hold and what each run finds, drawn, as data URIs for the page."""

import base64
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from loce.data.lvis import LVISAnnotations
from loce.data.transforms import read_image
from loce.drawing import draw_objects, worth_drawing
from loce.errors import UserError
from loce.evaluation.detections import Detections
from loce.evaluation.stream import read_detections
from loce.report.reading import Run

SHOWN_SCORE, SHOWN_OVERLAP, MOST = 0.1, 0.5, 30  # of what is drawn: lowest score, overlap of boxes, objects in an image
LONGEST, QUALITY = 480, 85  # pixels and JPEG quality of a picture
RULE = (
    f"Drawn: scores of at least {SHOWN_SCORE:g}, one label for each place (NMS over all classes at {SHOWN_OVERLAP:g})."
)
Pictures = dict[str, dict[str, str]]  # image -> caption -> data URI


def pictures(runs: Sequence[Run], count: int) -> tuple[Pictures, list[str]]:
    """At most `count` images, those with rare classes first, and notes on what is not drawn and why."""
    if not count:
        return {}, []
    able = [run for run in runs if any((run.folder / "eval/detections").glob("*.npz"))]
    notes = [f"{run.title}: no stored detections (eval/detections)" for run in runs if run not in able]
    if not able:
        return {}, notes
    first = able[0]
    path, images = str(first.facts.get("annotations")), str(first.option("data", "val_images"))
    same = [run for run in able if run.facts.get("annotations") == path]
    notes += [f"{run.title}: was evaluated on other data" for run in able if run not in same]
    try:
        annotations = LVISAnnotations.open(path, keep_empty=True)
        found = {run.title: read_detections(run.folder / "eval/detections", annotations.image_ids) for run in same}
        classes = dict(zip(first.classes.ids, zip(first.classes.names, first.classes.groups, strict=True), strict=True))
        return dict(_drawn(annotations, images, found, classes, count)), [*notes, RULE]
    except UserError as error:
        here = "paths are relative to where the runs were started: start the report there, too"
        return {}, [*notes, f"Not drawn: {error} ({here})"]


def _drawn(
    annotations: LVISAnnotations,
    images: str,
    found: dict[str, Detections],
    classes: dict[int, tuple[str, str]],
    count: int,
) -> Iterator[tuple[str, dict[str, str]]]:
    """Image -> caption -> picture."""
    ids = annotations.stats.category_ids
    rare = np.array([classes.get(int(c), ("", ""))[1] == "r" for c in ids])  # by the training data
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
        drawn = {"ground truth": _picture(image, corners, masks, ids[annotations.labels[own]], None, classes)}
        for title, detections in found.items():
            mine = np.flatnonzero(detections.image_ids == annotations.image_ids[index])
            rows = worth_drawing(detections.corners()[mine], detections.scores[mine], SHOWN_SCORE, MOST, SHOWN_OVERLAP)
            best = mine[rows]
            codes = detections.masks.rles(best) if detections.masks is not None else []
            numbers, scores = detections.category_ids[best], detections.scores[best]
            drawn[title] = _picture(image, detections.corners()[best], codes, numbers, scores, classes)
        yield annotations.name(index), drawn


def _picture(
    image: np.ndarray,
    corners: np.ndarray,
    masks: list[dict[str, Any]],
    category_ids: np.ndarray,
    scores: np.ndarray | None,
    classes: dict[int, tuple[str, str]],
) -> str:
    """A data URI of an image with objects and their names (and scores)."""
    known = [classes.get(int(number), ("?", "r")) for number in category_ids]
    texts = [name if scores is None else f"{name} {scores[i]:.2f}" for i, (name, _) in enumerate(known)]
    canvas = draw_objects(image, corners, masks, texts, [group for _, group in known])
    scale = min(1.0, LONGEST / max(canvas.shape[:2]))
    small = cv2.resize(canvas, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    content = cv2.imencode(".jpg", small[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
