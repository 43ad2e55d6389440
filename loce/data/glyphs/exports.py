"""A Glyph-LVIS set as annotation tools would have written it: all its images in Pascal VOC, YOLO or LabelMe.

A set to try imports on: what comes back must be what was drawn (`tests/data/test_import_round_trip.py`).
"""

import base64
import io
import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from loce.data.glyphs.records import Record
from loce.utils.files import write_text
from loce.utils.progress import progress

Named = list[tuple[str, Record]]  # (class, annotation)


def write_export(glyphs: Path, kind: str) -> None:
    """Write `glyphs`/`kind`, of the images of both splits: kind is voc, yolo or labelme. A finished one is kept."""
    folder, partial = glyphs / kind, glyphs / f".{kind}.partial"
    if folder.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)
    splits = [json.loads((glyphs / f"annotations/{split}.json").read_text()) for split in ("train", "val")]
    categories: list[Record] = splits[0]["categories"]
    names = {category["id"]: category["name"] for category in categories}
    objects: dict[int, Named] = {}
    for row in chain(*(content["annotations"] for content in splits)):
        objects.setdefault(row["image_id"], []).append((names[row["category_id"]], row))
    images = [image for content in splits for image in content["images"]]
    for image in progress(images, len(images), kind, "images"):
        photo = f"IMG_{image['id']:04}.jpg"
        place, text = KINDS[kind](photo, image, objects.get(image["id"], []), list(names.values()))
        target = partial / PHOTOS[kind] / photo
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(glyphs / "/".join(image["coco_url"].split("/")[-2:]), target)
        write_text(partial / place, text)
    if kind == "yolo":
        lines = "".join(f"  {number}: {name}\n" for number, name in enumerate(names.values()))
        write_text(partial / "data.yaml", f"path: .\ntrain: images\nval: images\nnames:\n{lines}")
    partial.rename(folder)


def _voc(photo: str, image: Record, objects: Named, _: list[str]) -> tuple[str, str]:
    """Boxes alone, from 1, with their last pixel."""
    parts = []
    for name, row in objects:
        x, y, width, height = map(int, row["bbox"])
        corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
        box = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
        parts.append(
            f"\t<object>\n\t\t<name>{escape(name)}</name>\n\t\t<pose>Unspecified</pose>\n\t\t<truncated>0</truncated>\n"
            f"\t\t<difficult>0</difficult>\n\t\t<bndbox>{box}</bndbox>\n\t</object>\n"
        )
    size = f"<width>{image['width']}</width><height>{image['height']}</height><depth>3</depth>"
    head = f"\t<folder>JPEGImages</folder>\n\t<filename>{photo}</filename>\n\t<size>{size}</size>\n"
    return f"Annotations/{Path(photo).stem}.xml", f"<annotation>\n{head}{''.join(parts)}</annotation>\n"


def _yolo(photo: str, image: Record, objects: Named, names: list[str]) -> tuple[str, str]:
    """The polygon where one says it all, else the box, in shares of the image; an empty file where there is nothing."""
    lines, sides = [], (image["width"], image["height"])
    for name, row in objects:
        shape, (x, y, width, height) = row["segmentation"], row["bbox"]
        one = isinstance(shape, list) and len(shape) == 1
        numbers = shape[0] if one else (x + width / 2, y + height / 2, width, height)
        shares = " ".join(f"{number / sides[n % 2]:.6f}" for n, number in enumerate(numbers))
        lines.append(f"{names.index(name)} {shares}\n")
    return f"labels/{Path(photo).stem}.txt", "".join(lines)


def _labelme(photo: str, image: Record, objects: Named, _: list[str]) -> tuple[str, str]:
    """A polygon a part, parts of an object in one group; a picture of the mask where it has a hole."""
    shapes = []
    for name, row in objects:
        shape, (x, y, width, height) = row["segmentation"], map(int, row["bbox"])
        common = {"label": name, "group_id": row["id"], "flags": {}, "description": ""}
        if isinstance(shape, list):
            for part in shape:
                points = np.reshape(part, (-1, 2)).tolist()
                shapes.append({**common, "points": points, "shape_type": "polygon", "mask": None})
        else:
            pixels = coco_mask.decode(shape)[y : y + height, x : x + width]
            drawn = io.BytesIO()
            Image.fromarray(pixels * np.uint8(255)).save(drawn, "PNG")
            points, mask = [[x, y], [x + width - 1, y + height - 1]], base64.b64encode(drawn.getvalue()).decode()
            shapes.append({**common, "points": points, "shape_type": "mask", "mask": mask})
    whole: Record = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": photo, "imageData": None}
    size = {"imageHeight": image["height"], "imageWidth": image["width"]}
    return f"{Path(photo).stem}.json", json.dumps({**whole, **size}, indent=2) + "\n"


KINDS: dict[str, Callable[[str, Record, Named, list[str]], tuple[str, str]]] = {
    "voc": _voc,
    "yolo": _yolo,
    "labelme": _labelme,
}
PHOTOS = {"voc": "JPEGImages", "yolo": "images", "labelme": ""}
