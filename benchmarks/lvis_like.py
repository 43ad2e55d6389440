"""Data as large as LVIS's, made here: images, annotations with a long tail, and what a trained detector would find.

Numbers of LVIS v1: 1203 classes; 13 instances an image on average, half of the images with less than 7 and a few with
hundreds; polygons of 34 corners. Images are 480 x 800 in the file, so that training and testing see 800 x 1333.
"""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

CLASSES = 1203
FILE_SIZE = (480, 800)  # height, width
MEAN_INSTANCES, MOST_INSTANCES = 13.0, 300


def instance_counts(rng: np.random.Generator, images: int) -> np.ndarray:
    """(images,) at least 1 each, with a heavy tail: log-normal, cut at 300, a mean of about 13."""
    counts = np.exp(rng.normal(1.9, 1.15, images))
    return np.clip(np.rint(counts * MEAN_INSTANCES / counts.mean()), 1, MOST_INSTANCES).astype(np.int64)


def random_classes(rng: np.random.Generator, number: int, classes: int = CLASSES) -> np.ndarray:
    """(number,) labels; the frequency falls with the rank as 1 / (rank + 10)."""
    tail = 1 / (np.arange(classes) + 10.0)
    return rng.choice(classes, number, p=tail / tail.sum())


def random_boxes(rng: np.random.Generator, number: int, size: tuple[int, int]) -> np.ndarray:
    """(number, 4) xywh within an image of size (height, width); sides are log-normal around a twentieth of it."""
    height, width = size
    limit = np.array([width, height]) * 0.95
    side = np.exp(rng.normal(np.log(max(size) / 20), 0.9, (number, 1))) * np.exp(rng.normal(0, 0.3, (number, 2)))
    side = np.clip(side, 6, limit)
    corner = rng.random((number, 2)) * (np.array([width, height]) - side)
    return np.concatenate([corner, side], axis=1)


def outline(rng: np.random.Generator, box: np.ndarray) -> list[float]:
    """A star-shaped polygon in a box x, y, w, h: 8 to 60 corners, to a hundredth of a pixel."""
    angle = np.linspace(0, 2 * np.pi, int(rng.integers(8, 61)), endpoint=False)
    radius = rng.uniform(0.7, 1.0, len(angle))
    x, y, width, height = box
    corners = [x + width / 2 * (1 + radius * np.cos(angle)), y + height / 2 * (1 + radius * np.sin(angle))]
    return np.stack(corners, axis=1).round(2).reshape(-1).tolist()


def write_annotations(path: Path, images: int, seed: int = 0) -> int:
    """An annotation file in LVIS v1's format, written image by image; returns the number of annotations."""
    rng = np.random.default_rng(seed)
    counts = instance_counts(rng, images)
    number = 0
    with path.open("w", encoding="utf-8") as file:
        file.write('{"annotations": [')
        for image_id, count in enumerate(counts.tolist(), 1):
            boxes = random_boxes(rng, count, FILE_SIZE)
            for label, box in zip(random_classes(rng, count).tolist(), boxes, strict=True):
                number += 1
                file.write((", " if number > 1 else "") + json.dumps(_annotation(rng, number, image_id, label, box)))
        file.write('], "images": [' + ", ".join(json.dumps(_image(rng, i)) for i in range(1, images + 1)))
        file.write('], "categories": ' + json.dumps([_category(c) for c in range(CLASSES)]) + "}")
    return number


def _annotation(rng: np.random.Generator, number: int, image_id: int, label: int, box: np.ndarray) -> dict[str, Any]:
    return {
        "area": round(float(box[2] * box[3]) * 0.7, 2),
        "id": number,
        "segmentation": [outline(rng, box)],
        "image_id": image_id,
        "bbox": box.round(2).tolist(),
        "category_id": label + 1,
    }


def _image(rng: np.random.Generator, image_id: int) -> dict[str, Any]:
    height, width = FILE_SIZE
    return {
        "date_captured": "2013-11-14 11:18:45",
        "neg_category_ids": (rng.choice(CLASSES, 9, replace=False) + 1).tolist(),
        "id": image_id,
        "license": 1,
        "height": height,
        "width": width,
        "flickr_url": f"http://farm9.staticflickr.com/8186/{image_id}_c30d81ff26_z.jpg",
        "coco_url": f"http://images.cocodataset.org/train2017/{image_id:012}.jpg",
        "not_exhaustive_category_ids": [],
    }


def _category(label: int) -> dict[str, Any]:
    group = "f" if label < 405 else "c" if label < 866 else "r"
    return {"id": label + 1, "name": f"category_{label + 1}", "synset": "thing.n.01", "frequency": group}


def write_images(folder: Path, images: int, seed: int = 0) -> None:
    """JPEG files train2017/000000000001.jpg, ...: coarse and fine noise, so that they weigh what photographs do."""
    rng = np.random.default_rng(seed)
    height, width = FILE_SIZE
    (folder / "train2017").mkdir(parents=True, exist_ok=True)
    for image_id in range(1, images + 1):
        coarse = cv2.resize(rng.integers(0, 256, (15, 25, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
        fine = cv2.resize(rng.integers(0, 64, (height // 3, width // 3, 3), np.uint8), (width, height))
        cv2.imwrite(str(folder / f"train2017/{image_id:012}.jpg"), cv2.addWeighted(coarse, 0.7, fine, 1.0, 0))
