"""Content of small annotation files in all formats, and what its masks are by the slow way."""

import copy
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Content = dict[str, Any]
CATEGORY_IDS = (7, 3, 20, 1)  # gaps, not in order


def content(images: int = 8, seed: int = 0) -> Content:
    """A COCO-style file: polygons of one and two parts and both kinds of run-length codes, sizes from 40 to 90."""
    rng = np.random.default_rng(seed)
    made: Content = {"images": [], "annotations": [], "categories": []}
    made["categories"] = [{"id": i, "name": f"thing {i}"} for i in CATEGORY_IDS]
    for number in range(images):
        height, width = (int(side) for side in rng.integers(40, 90, 2))
        image_id = 1000 - 3 * number
        made["images"].append({"id": image_id, "height": height, "width": width, "file_name": f"{image_id:012}.jpg"})
        for _ in range(int(rng.integers(1, 6))):
            made["annotations"].append(annotation(rng, len(made["annotations"]) + 50, image_id, height, width))
    rng.shuffle(made["annotations"])
    return made


def annotation(rng: np.random.Generator, number: int, image_id: int, height: int, width: int) -> Content:
    """An instance of a random class and kind of segmentation, inside the image."""
    x0, x1 = np.sort(rng.uniform(0, width - 12, 2)) + np.array([0, 12])
    y0, y1 = np.sort(rng.uniform(0, height - 12, 2)) + np.array([0, 12])
    corners = rng.uniform([x0, y0], [x1, y1], (7, 2)).round(2)
    corners[:4] = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]).round(2)
    parts = [corners[:4].ravel().tolist()] + ([corners[3:].ravel().tolist()] if number % 2 else [])
    segmentation: Any = parts
    if number % 3 == 1:
        code = coco_mask.merge(coco_mask.frPyObjects(parts, height, width))
        segmentation = {"size": [height, width], "counts": code["counts"].decode()}
    elif number % 3 == 2:
        full = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, height, width)))
        segmentation = {"size": [height, width], "counts": uncompressed(full)}
    left, top, right, bottom = (float(side) for side in np.array([x0, y0, x1, y1]).round(2))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": int(rng.choice(CATEGORY_IDS)),
        "bbox": [left, top, right - left, bottom - top],
        "area": 50.0,
        "iscrowd": 0,
        "segmentation": segmentation,
    }


def uncompressed(mask: np.ndarray) -> list[int]:
    """Run lengths of a mask (H, W) by counting."""
    runs, value = [0], 0
    for pixel in mask.T.ravel():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def full_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The slow twin: the COCO mask library on the whole canvas."""
    if isinstance(segmentation, list):
        code = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        code = coco_mask.frPyObjects(segmentation, height, width)
    else:
        code = segmentation
    return coco_mask.decode(code)


def as_format(made: Content, kind: str) -> Content:
    """The same content as "lvis_v1", "lvis_v0.5" or "coco"."""
    made = copy.deepcopy(made)
    if kind == "coco":
        return made
    for image in made["images"]:
        image |= {"neg_category_ids": [20, 7], "not_exhaustive_category_ids": []}
        if kind == "lvis_v1":
            image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
        else:
            image["file_name"] = f"COCO_val2014_{image['file_name']}"
    for category, group in zip(made["categories"], "rcfr", strict=True):
        category |= {"frequency": group, "image_count": 3, "instance_count": 4}
    for row in made["annotations"]:
        del row["iscrowd"]
    return made
