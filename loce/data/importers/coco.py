"""Importer of COCO-style files: of CVAT, Roboflow, Label Studio and others; several (a file a split) become one set."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from loce.data.annotations.lvis import LVISAnnotations
from loce.data.annotations.run_lengths import measure_codes
from loce.data.annotations.segmentations import pack_code
from loce.data.annotations.values import is_number
from loce.data.importers.source import AnnotatedImage, Found, Instance, Polygon, Source, box_around, head_of, json_of
from loce.utils.errors import UserError, first_few

SECTIONS = ('"images"', '"annotations"', '"categories"')


def is_format(source: Source) -> bool:
    """Whether a JSON file with a list of COCO's is there."""
    return any(map(_has_sections, source.with_suffix(".json")))


def _has_sections(file: Path) -> bool:
    head = head_of(file)
    return any(section in head for section in SECTIONS)


def read(source: Source) -> Found:
    """Images and objects; what our reader refuses is refused in its words."""
    found = Found("coco")
    for file in source.with_suffix(".json"):
        if not _has_sections(file):
            found.notes.add("JSON files left out: no images, annotations and categories", str(file))
            continue
        checked = LVISAnnotations.open(file, keep_empty=True, box_masks=True)
        if (content := json_of(file)) is None:
            raise UserError(f"{file}: is read by training, but not here: save it as UTF-8")
        for reason, number in checked.dropped.items():
            found.notes.add(f"annotations as training will see them: {reason}", str(file), number)
        for note in (note for note in checked.notes if note.startswith("WARNING")):
            found.notes.add("warning of the reader", f"{file.name}: {note.removeprefix('WARNING: ')}")
        # Classes, images, objects.
        names = {category["id"]: str(category["name"]).strip() for category in content["categories"]}
        if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
            found.notes.add("classes of one name become one", first_few(twice))
        found.classes += [name for name in dict.fromkeys(names.values()) if name not in found.classes]
        pictures: dict[Any, AnnotatedImage] = {}
        for index, entry in enumerate(content["images"]):
            size = (entry["width"], entry["height"])
            if picture := source.annotated((checked.name(index),), file, size, found):
                pictures[entry["id"]] = picture
        used = _add_objects(content["annotations"], pictures, names, file, source.rules.rotated, found)
        above = {str(category.get("supercategory") or "") for category in content["categories"]}
        for name in names.values():
            if name not in used and name in above:
                found.notes.add("classes without objects are only the heading of others (Roboflow's category 0)", name)
    return found


def _add_objects(
    entries: list[dict[str, Any]],
    pictures: dict[Any, AnnotatedImage],
    names: dict[Any, str],
    file: Path,
    rotated: str,
    found: Found,
) -> set[str]:
    """Objects of a file into their images; the classes that have some. UserError for boxes that CVAT turned."""
    turned, used = [], set()
    for entry in entries:
        if (picture := pictures.get(entry["image_id"])) is None:
            continue  # told with its image
        box, mask = entry.get("bbox"), entry.get("segmentation")
        parts = mask if isinstance(mask, list) and all(isinstance(part, list) for part in mask) else []
        polygons = [part for part in parts if len(part) >= 6 and len(part) % 2 == 0 and all(map(is_number, part))]
        shape: list[Polygon] | dict[str, Any] | None = polygons or (mask if _is_code(mask, picture) else None)
        if mask and not shape:
            found.notes.add("masks cannot be read: the box alone is kept", f"annotation {entry['id']} of {file}")
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
            if not polygons:
                found.notes.add("objects left out: no box of four numbers, and no polygon", f"annotation {entry['id']}")
                continue
            box = box_around(polygons)
        attributes = entry.get("attributes")
        angle = attributes.get("rotation", 0) if isinstance(attributes, dict) else 0
        if is_number(angle) and angle % 360 and not shape:
            turned.append(entry["id"])
            shape = [turned_box(box, angle)]
            box = box_around(shape)
        name = names[entry["category_id"]]
        used.add(name)
        picture.instances.append(Instance(name, [float(side) for side in box], shape, bool(entry.get("iscrowd", 0))))
    if turned and rotated == "refuse":
        raise UserError(
            f"{file}: {len(turned)} boxes are turned (attributes.rotation of CVAT; annotations {first_few(turned)}), "
            "and bbox is the box before that: export polygons or masks, or rotated=polygon takes the turned rectangles"
        )
    if turned:
        found.notes.add("boxes were turned by their attribute rotation: polygons of corners", str(file), len(turned))
    return used


def _is_code(mask: Any, picture: AnnotatedImage) -> bool:
    """Whether this is a run-length code, of either kind, that fills the image and has a pixel."""
    if (packed := pack_code(mask)) is None or packed[1] != (picture.height, picture.width):
        return False
    counts, bounds = np.frombuffer(packed[0], np.uint8), np.array([0, len(packed[0])])
    sound, area = measure_codes(counts, bounds, np.array([packed[1]]))
    return bool(sound[0] and area[0])


def turned_box(box: list[float], degrees: float) -> Polygon:
    """The corners of a box (x, y, width, height) turned clockwise about its centre."""
    x, y, width, height = box
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = [(-width / 2, -height / 2), (width / 2, -height / 2), (width / 2, height / 2), (-width / 2, height / 2)]
    return [
        round(value, 3)
        for dx, dy in corners
        for value in (x + width / 2 + dx * cos - dy * sin, y + height / 2 + dx * sin + dy * cos)
    ]
