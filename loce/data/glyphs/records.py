"""Records of Glyph-LVIS: LVIS v1's images, annotations and categories.

A mask without holes becomes polygons along the edges of its pixels, which rasterise to exactly that mask; a mask with a
hole (an O, say) is no union of polygons and becomes a compressed run-length code. Of the objects of the 50 classes 7 in
10 have polygons. Boxes are tight around the visible part: x, y, width, height in pixels.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from loce.data.glyphs.characters import category_name
from loce.data.glyphs.drawing import Sides, draw_image
from loce.utils.classes import frequency_groups

Record = dict[str, Any]
INFO = {"description": "Glyph-LVIS: drawn glyphs in the format of LVIS v1", "version": "1.0", "year": 2021, "url": ""}
LICENSE = {"id": 1, "name": "Bitstream Vera and DejaVu font licence", "url": "https://dejavu-fonts.github.io"}
JPEG_QUALITY, FULL_COLOUR = 95, 0  # no chroma subsampling: thin coloured strokes keep their colour


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all images of a set share. characters, category_ids: by label, 0 is the most frequent class."""

    folder: Path
    size: int
    characters: str
    category_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One image to draw. labels, sides: of its objects, back to front; annotated: whether each is written down."""

    image_id: int
    path: str  # under the folder
    seed: tuple[int, ...]
    labels: tuple[int, ...]
    sides: Sides
    annotated: tuple[bool, ...]


def draw_task(settings: Settings, task: Task) -> list[Record]:
    """Draw one image into its file; its annotations, without `id`."""
    characters = "".join(settings.characters[label] for label in task.labels)
    image, owners = draw_image(characters, settings.size, task.sides, np.random.default_rng(task.seed))
    Image.fromarray(image).save(settings.folder / task.path, quality=JPEG_QUALITY, subsampling=FULL_COLOUR)
    return [
        {"image_id": task.image_id, "category_id": settings.category_ids[label], **describe_mask(owners == index)}
        for index, (label, annotated) in enumerate(zip(task.labels, task.annotated, strict=True))
        if annotated
    ]


def describe_mask(mask: np.ndarray) -> Record:
    """Box, area and segmentation of a mask (H, W) bool that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    height, width = int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left
    segmentation: Any = outline(mask[top : top + height, left : left + width], left, top)
    if segmentation is None:
        code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        segmentation = {"size": list(mask.shape), "counts": code["counts"].decode("ascii")}
    box = [float(side) for side in (left, top, width, height)]
    return {"bbox": box, "area": float(mask.sum()), "segmentation": segmentation}


def outline(mask: np.ndarray, left: int = 0, top: int = 0) -> list[list[int]] | None:
    """Polygons [x, y, x, y, ...] along the pixel edges of a mask (h, w) bool, moved by (left, top); None with a hole.

    On a mask enlarged twice, pixels 2x and 2x + 1 belong to the edges x and x + 1: the border pixels name the corners.
    """
    enlarged = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, hierarchy = cv2.findContours(enlarged, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if (hierarchy[0, :, 3] >= 0).any():
        return None
    polygons = []
    for contour in contours:
        points = (contour[:, 0] + 1) // 2
        points = points[(points != np.roll(points, 1, axis=0)).any(1)]
        before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
        corners = points[(before != after).any(1)] + [left, top]
        polygons.append(corners.ravel().tolist())
    return polygons


def image_record(
    task: Task,
    settings: Settings,
    negatives: float | np.ndarray,
    rng: np.random.Generator,
) -> Record:
    """LVIS v1's record of an image: there is no `file_name`, the end of `coco_url` is the path.

    negatives: the share of the absent classes that is listed as verified absent, or (C,) the probability of each.
    """
    id_of = np.array(settings.category_ids)
    absent = np.setdiff1d(np.arange(len(id_of)), task.labels)
    if isinstance(negatives, np.ndarray):
        verified = absent[rng.random(len(absent)) < negatives[absent]]
    else:
        verified = rng.choice(absent, round(negatives * len(absent)), replace=False)
    left_out = {label for label, annotated in zip(task.labels, task.annotated, strict=True) if not annotated}
    return {
        "id": task.image_id,
        "width": settings.size,
        "height": settings.size,
        "license": LICENSE["id"],
        "coco_url": f"http://glyphs/{task.path}",
        "flickr_url": "",
        "date_captured": "2021-08-16 00:00:00",
        "neg_category_ids": sorted(id_of[verified].tolist()),
        "not_exhaustive_category_ids": sorted(settings.category_ids[label] for label in left_out),
    }


def category_records(characters: str, category_ids: tuple[int, ...], annotations: list[Record]) -> list[Record]:
    """LVIS v1's categories by id, counted over the training `annotations`; `synonyms` holds the character itself."""
    shown = {(annotation["category_id"], annotation["image_id"]) for annotation in annotations}
    images = Counter(category for category, _ in shown)
    instances = Counter(annotation["category_id"] for annotation in annotations)
    groups = frequency_groups(np.array([images[category] for category in category_ids]))
    return sorted(
        (
            {
                "id": category_id,
                "name": category_name(character),
                "synset": f"{category_name(character)}.n.01",
                "synonyms": [character],
                "def": f"the character {character} (U+{ord(character):04X})",
                "frequency": str(group),
                "image_count": images[category_id],
                "instance_count": instances[category_id],
            }
            for character, category_id, group in zip(characters, category_ids, groups, strict=True)
        ),
        key=lambda record: record["id"],
    )
