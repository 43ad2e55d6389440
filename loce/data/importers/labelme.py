"""Importer of LabelMe: a JSON file an image with `shapes`; those with one group_id and label are one object."""

import base64
import io
import math
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from loce.data.annotations.image_files import is_readable_name
from loce.data.annotations.values import is_number
from loce.data.importers.source import (
    BROKEN_IMAGE,
    AnnotatedImage,
    Found,
    Instance,
    Source,
    box_around,
    head_of,
    json_of,
)

CIRCLE = 32  # corners of a polygon in place of a circle


def is_format(source: Source) -> bool:
    """Whether a JSON file with shapes is there."""
    heads = map(head_of, source.with_suffix(".json"))
    return any('"shapes"' in head and '"annotations"' not in head for head in heads)


def read(source: Source) -> Found:
    """Images and objects: polygons, circles and masks, and rectangles as boxes; points and lines have no area."""
    found = Found("labelme")
    for file in source.with_suffix(".json"):
        content = json_of(file)
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            found.notes.add("JSON files left out: broken, or without `shapes`", str(file))
            continue
        name = content.get("imagePath")
        names = (name, file.stem) if isinstance(name, str) and name else (file.stem,)
        size = [side for side in (content.get("imageWidth"), content.get("imageHeight")) if type(side) is int]
        hint = " (it is in the JSON as imageData)" if content.get("imageData") else ""
        if (picture := source.annotated(names, file, size, found, hint)) is None:
            continue
        whole: dict[Any, Instance] = {}
        for number, shape in enumerate(content["shapes"]):
            where = f"{file} shape {number}"
            if (instance := _instance(shape, picture, where, found)) is None:
                continue
            group = shape.get("group_id")
            key = (instance.name, group) if isinstance(group, (int, str)) else number
            first = whole.setdefault(key, instance)
            if first is not instance and isinstance(first.mask, list) and isinstance(instance.mask, list):
                first.mask += instance.mask
                first.box = box_around(first.mask)
                found.notes.add("shapes are parts of the object with the same label and group_id", where)
            elif first is not instance:
                whole[number] = instance
        picture.instances += whole.values()
    return found


def _instance(shape: Any, picture: AnnotatedImage, where: str, found: Found) -> Instance | None:
    """The object of a shape; None, with a note, where it is none."""
    shape = shape if isinstance(shape, dict) else {}
    label, points = shape.get("label"), shape.get("points")
    pairs = isinstance(points, list) and all(
        isinstance(point, list) and len(point) == 2 and all(map(is_number, point)) for point in points
    )
    named = isinstance(label, str) and label.strip() and is_readable_name(label.strip())
    if not named or not points or not pairs:
        found.notes.add("shapes left out: no label that can be read, or points that are no pairs of numbers", where)
        return None
    kind, flat = shape.get("shape_type") or "polygon", [float(side) for point in points for side in point]
    name, box = str(label).strip(), box_around([flat])
    if kind == "rectangle":
        return Instance(name, box)
    if kind == "polygon" and len(points) >= 3:
        return Instance(name, box, [flat])
    if kind == "circle" and len(points) == 2:  # its centre, and a point of its rim
        radius = math.dist(*points)
        angles = [2 * math.pi * n / CIRCLE for n in range(CIRCLE)]
        rim = [flat[n] + radius * turn(a) for a in angles for n, turn in enumerate((math.cos, math.sin))]
        return Instance(name, box_around([rim]), [rim])
    if kind == "mask" and isinstance(shape.get("mask"), str):
        full = _pixels(shape["mask"], max(round(box[0]), 0), max(round(box[1]), 0), picture)
        if full.any():
            code = coco_mask.encode(full)
            counts = {"size": [picture.height, picture.width], "counts": code["counts"].decode()}
            return Instance(name, coco_mask.toBbox(code).tolist(), counts)
    found.notes.add(f"shapes left out: {kind!a:.40} has no area, or too few points", where)
    return None


def _pixels(drawn: str, left: int, top: int, picture: AnnotatedImage) -> np.ndarray:
    """(height, width) uint8 of the image, 1 where the picture in base64 at (left, top) is; all 0 where it is broken."""
    full = np.zeros((picture.height, picture.width), np.uint8, order="F")
    try:
        with Image.open(io.BytesIO(base64.b64decode(drawn))) as opened:
            part = np.asarray(opened.convert("L")) > 0
    except BROKEN_IMAGE:
        return full
    room = full[top : top + part.shape[0], left : left + part.shape[1]]
    room[:] = part[: room.shape[0], : room.shape[1]]
    return full
