"""Importers of what annotation tools write: Pascal VOC, YOLO, LabelMe, and the COCO-style exports of other tools.

Each gives the images with their objects in pixels, COCO's way (from 0, x, y, width, height), and notes on everything
that was left out or read otherwise than it is written. Nothing is changed in the source.
"""

import base64
import binascii
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from loce.data.annotations.lvis import LVISAnnotations
from loce.data.annotations.reader import Mistakes
from loce.data.annotations.values import is_number
from loce.utils.errors import UserError, first_few
from loce.utils.yaml_text import load_yaml

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2"}
FORMATS = ("voc", "yolo", "labelme", "coco")
ORIENTATION = 0x0112  # EXIF's
CIRCLE = 32  # corners of a polygon in place of a circle
ROUNDING = 0.01  # a share of the image may be so far outside of 0..1
Polygon = list[float]  # x1, y1, x2, y2, ... in px


@dataclass
class Instance:
    """An object: class, box (x, y, width, height in px) and mask (polygons, a run-length code; None: a box alone)."""

    name: str
    box: list[float]
    mask: list[Polygon] | dict[str, Any] | None = None
    crowd: bool = False


@dataclass
class AnnotatedImage:
    """An image file, its size in px as annotated, and what is in it."""

    file: Path
    width: int
    height: int
    instances: list[Instance] = field(default_factory=list)


@dataclass
class Found:
    """What a source holds: classes in its order, empty ones too; notes: what became of the rest."""

    format: str
    classes: list[str] = field(default_factory=list)
    pictures: list[AnnotatedImage] = field(default_factory=list)
    notes: Mistakes = field(default_factory=Mistakes)


@dataclass(frozen=True)
class Rules:
    """What the source does not say. first_pixel: of VOC's coordinates; rotated: boxes that CVAT turned; exif: as
    `data.exif` of a training, for sources that name no sizes."""

    first_pixel: Literal["auto", "0", "1"] = "auto"
    rotated: Literal["refuse", "polygon"] = "refuse"
    exif: Literal["ignore", "apply"] = "ignore"


class Source:
    """Files below a folder, and the image that an annotation means. Hidden files and folders are left alone."""

    def __init__(self, path: Path, rules: Rules) -> None:
        self.path, self.rules = path, rules
        self.root = path if path.is_dir() else path.parent
        every = (Path(folder) / name for folder, _, names in os.walk(self.root) for name in names)
        hidden = re.compile(r"(^|/)\.")
        self.files = sorted(file for file in every if not hidden.search(str(file.relative_to(self.root))))
        self.images = [file for file in self.files if file.suffix.lower() in SUFFIXES]
        self._known = set(self.images)
        self._by_name: dict[str, list[Path]] = {}
        for file in self.images:
            for key in (file.name.lower(), file.stem.lower()):
                self._by_name.setdefault(key, []).append(file)

    def with_suffix(self, *suffixes: str) -> list[Path]:
        """Files to read: the one that was named, or all below the folder."""
        files = self.files if self.path.is_dir() else [self.path]
        return [file for file in files if file.suffix.lower() in suffixes]

    def image(self, name: str, annotation: Path) -> Path | None:
        """The image file of this name, or of this name but for its suffix, nearest to the annotation."""
        parts = name.replace("\\", "/").rstrip("/").split("/")
        near = (annotation.parent, annotation.parent / "images", annotation.parent.parent / "images", self.root)
        for n in range(len(parts)):  # the longest end of the path that is there
            for folder in near:
                if (file := folder.joinpath(*parts[n:])) in self._known:
                    return file
        found = self._by_name.get(parts[-1].lower()) or self._by_name.get(Path(parts[-1]).stem.lower()) or []
        return max(found, key=lambda file: len(os.path.commonpath([file, annotation])), default=None)

    def picture(self, file: Path, size: tuple[int, int] | None, found: Found) -> AnnotatedImage | None:
        """The image with the size (width, height) that it was annotated at; None, with a note, where it is no image."""
        try:
            with Image.open(file) as opened:
                pixels, orientation = opened.size, opened.getexif().get(ORIENTATION, 1)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            found.notes.add("images left out, with all in them: they cannot be read", str(file))
            return None
        turned = orientation in range(2, 9)
        upright = (pixels[1], pixels[0]) if orientation in range(5, 9) else pixels
        if turned and (self.rules.exif == "apply" or size == upright != pixels):
            found.notes.add("images are turned by EXIF as they were annotated: train with data.exif=apply", str(file))
            pixels = upright
        elif turned:
            found.notes.add(
                "images ask to be turned (EXIF); if they were annotated upright: exif=apply here", str(file)
            )
        if size and size != pixels:
            shown = f"{file} ({size[0]} x {size[1]} told, {pixels[0]} x {pixels[1]} px)"
            found.notes.add("images have another size than is told; the file's is taken", shown)
        return AnnotatedImage(file, *pixels)


def read_source(path: Path, kind: str, rules: Rules) -> Found:
    """All images and objects of a file or folder. kind: one of FORMATS, or auto. UserError where nothing is found."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    source = Source(path, rules)
    kinds = [kind] if kind != "auto" else list(formats_of(source))
    if len(kinds) != 1:
        what = f"holds several formats: choose format={' or format='.join(kinds)}" if kinds else "holds no annotations"
        raise UserError(
            f"{path}: {what} (looked for Pascal VOC's XML, YOLO's data.yaml or classes.txt, LabelMe's and COCO's JSON; "
            "of CVAT and Label Studio export COCO)"
        )
    found = {"voc": read_voc, "yolo": read_yolo, "labelme": read_labelme, "coco": read_coco}[kinds[0]](source)
    if not found.pictures:
        found.notes.raise_all(str(path))
        raise UserError(f"{path}: no image with annotations in format {kinds[0]}")
    # Boxes within their images.
    for picture in found.pictures:
        picture.instances = [instance for instance in picture.instances if _is_inside(instance, picture, found)]
    return found


def formats_of(source: Source) -> Iterator[str]:
    """The formats that the files of a source look like."""
    if any(_root(file) is not None for file in source.with_suffix(".xml")):
        yield "voc"
    if any(_yolo_names(file) for file in source.with_suffix(".yaml", ".yml", ".txt")):
        yield "yolo"
    heads = [_head(file) for file in source.with_suffix(".json")]
    if any('"shapes"' in head and '"annotations"' not in head for head in heads):
        yield "labelme"
    if any('"images"' in head or '"annotations"' in head or '"categories"' in head for head in heads):
        yield "coco"


def _head(file: Path) -> str:
    with file.open("rb") as opened:
        start = opened.read(4096)
        opened.seek(max(file.stat().st_size - 4096, 0))
        return (start + opened.read()).decode(errors="replace")


def _is_inside(instance: Instance, picture: AnnotatedImage, found: Found) -> bool:
    """Cut the box at the image's border; False, with a note, where nothing is left."""
    x, y, width, height = instance.box
    where = f"{picture.file.name} ({instance.name})"
    left, top = min(max(x, 0), picture.width), min(max(y, 0), picture.height)
    right, bottom = min(max(x + width, 0), picture.width), min(max(y + height, 0), picture.height)
    if not all(map(math.isfinite, instance.box)) or right <= left or bottom <= top:
        found.notes.add("objects left out: no area inside their image", where)
        return False
    if max(left - x, top - y, x + width - right, y + height - bottom) > 1:
        found.notes.add("boxes reach more than a pixel over the border: cut there", where)
    instance.box = [round(side, 3) for side in (left, top, right - left, bottom - top)]
    return True


def _around(polygons: list[Polygon]) -> list[float]:
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


# ---- Pascal VOC ------------------------------------------------------------------------------------------------------


def _root(file: Path) -> ElementTree.Element | None:
    """The root of VOC's XML; None of any other file. UserError for CVAT's own XML."""
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError):
        return None
    if root.tag == "annotations" and root.find("image") is not None:
        raise UserError(f"{file}: is CVAT's own XML; export the task as COCO 1.0")
    return root if root.tag == "annotation" else None


def read_voc(source: Source) -> Found:
    """A file an image; boxes from 1, with their last pixel inside: xmin 1, xmax 10 is x 0, width 10."""
    found, boxes = Found("voc"), []
    for file in source.with_suffix(".xml"):
        root = _root(file)
        if root is None:
            found.notes.add("XML files left out: broken, or no <annotation>", str(file))
            continue
        name = (root.findtext("filename") or file.stem).strip()
        image = source.image(name, file) or source.image(file.stem, file)
        if image is None:
            found.notes.add("images left out, with all in them: the file is missing", f"{name} of {file}")
            continue
        size = [_number(root.findtext(f"size/{side}")) for side in ("width", "height")]
        told = (int(size[0]), int(size[1])) if all(size) and size[0] and size[1] else None
        if (picture := source.picture(image, told, found)) is None:
            continue
        found.pictures.append(picture)
        for element in root.findall("object"):
            label = (element.findtext("name") or "").strip()
            corners = [_number(element.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            if not label or None in corners:
                found.notes.add(
                    "objects left out: no name, or no box of four numbers", f"{file} ({label or 'no name'})"
                )
                continue
            if (element.findtext("difficult") or "").strip() == "1":
                found.notes.add("objects are marked as difficult: kept like others", f"{file} ({label})")
            x1, y1, x2, y2 = (float(side or 0) for side in corners)
            instance = Instance(label, [min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1)])
            outline = element.find("polygon")
            numbers = [_number(child.text) for child in outline] if outline is not None else []
            if len(numbers) >= 6 and len(numbers) % 2 == 0 and None not in numbers:
                instance.mask = [[float(number or 0) for number in numbers]]
            boxes.append(instance)
            picture.instances.append(instance)
    # One set counts in one way: a coordinate of 0 tells that it counts from 0, to the border.
    lowest = min((min(instance.box[:2]) for instance in boxes), default=1)
    from_zero = source.rules.first_pixel == "0" or (source.rules.first_pixel == "auto" and lowest < 1)
    for instance in () if from_zero else boxes:
        instance.box = [instance.box[0] - 1, instance.box[1] - 1, instance.box[2] + 1, instance.box[3] + 1]
    how = (
        "begin at 0 (a coordinate is 0) and end at the border" if from_zero else "begin at 1 and hold their last pixel"
    )
    if boxes:
        found.notes.add(f"boxes {how}; first_pixel=0 or 1 says otherwise", str(source.path), len(boxes))
    if any(part.name == "SegmentationObject" for file in source.images for part in file.parents):
        found.notes.add("pictures in SegmentationObject are not read: objects have boxes alone", "its masks")
    return _with_classes(found)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _with_classes(found: Found) -> Found:
    found.classes = sorted({instance.name for picture in found.pictures for instance in picture.instances})
    return found


# ---- YOLO ------------------------------------------------------------------------------------------------------------


def _yolo_names(file: Path) -> list[str]:
    """Class names of a data.yaml (a list, or numbers and names) or a classes.txt; none of any other file."""
    if file.suffix == ".txt":
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.name == "classes.txt" else []
        return [line.strip() for line in lines if line.strip()]
    try:
        names = load_yaml(file.read_text(encoding="utf-8"), str(file)).get("names")
    except (UserError, UnicodeDecodeError, OSError):
        return []
    if isinstance(names, dict) and all(str(key).isdigit() for key in names):
        count = max((int(key) for key in names), default=-1) + 1
        known = {int(key): str(name) for key, name in names.items()}
        return [known.get(n, f"class {n}") for n in range(count)] if count < 100_000 else []
    return [str(name) for name in names] if isinstance(names, list) else []


def read_yolo(source: Source) -> Found:
    """A text file an image: `class x y width height` with the centre, or `class x1 y1 x2 y2 x3 y3 ...`, in shares."""
    found = Found("yolo")
    lists = {file: names for file in source.with_suffix(".yaml", ".yml", ".txt") if (names := _yolo_names(file))}
    if len({tuple(names) for names in lists.values()}) != 1:
        raise UserError(
            f"{source.path}: class names must stand in one data.yaml or classes.txt, found: {first_few(lists)}"
        )
    found.classes = next(iter(lists.values()))
    texts, read = {file for file in source.files if file.suffix == ".txt" and file not in lists}, set()
    for image in source.images:
        parts = list(image.with_suffix(".txt").parts)
        there = [n for n, part in enumerate(parts[:-1]) if part == "images"]
        places = [Path(*parts[: there[-1]], "labels", *parts[there[-1] + 1 :])] if there else []
        label = next((place for place in [*places, image.with_suffix(".txt")] if place in texts), None)
        if (picture := source.picture(image, None, found)) is None:
            continue
        found.pictures.append(picture)
        if label is None:
            found.notes.add("images have no text file: taken as without objects", str(image))
            continue
        read.add(label)
        for number, line in enumerate(label.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if line.strip():
                _yolo_line(line, f"{label}:{number}", picture, found)
    for file in sorted(texts - read):
        if re.match(r"\s*\d+(\.0)?(\s+[-+.\deE]+){4}", file.read_text(encoding="utf-8", errors="replace")):
            found.notes.add("text files left out, with all in them: their image is missing", str(file))
    return found


def _yolo_line(line: str, where: str, picture: AnnotatedImage, found: Found) -> None:
    numbers = [_number(word) for word in line.split()]
    if None in numbers or not (len(numbers) in (5, 6) or (len(numbers) >= 7 and len(numbers) % 2)):
        found.notes.add("lines left out: not a class with a box or a polygon", where)
        return
    label, *shares = (float(number or 0) for number in numbers)
    if label % 1 or not 0 <= label < len(found.classes):
        found.notes.add(
            f"lines left out: a class that is none of the {len(found.classes)} names", f"{where} ({label:g})"
        )
        return
    if len(shares) == 5:
        found.notes.add("lines have a sixth number, a score as of predictions: not used", where)
    shares = shares[:4] if len(shares) == 5 else shares
    if not all(-ROUNDING <= share <= 1 + ROUNDING for share in shares):
        found.notes.add("lines left out: no shares of the image (0 to 1); pixels?", where)
        return
    name, sides = found.classes[int(label)], (picture.width, picture.height)
    if len(shares) == 4:
        x, y, width, height = (share * sides[n % 2] for n, share in enumerate(shares))
        picture.instances.append(Instance(name, [x - width / 2, y - height / 2, width, height]))
    else:
        polygon = [round(min(max(share, 0), 1) * sides[n % 2], 3) for n, share in enumerate(shares)]
        picture.instances.append(Instance(name, _around([polygon]), [polygon]))


# ---- LabelMe ---------------------------------------------------------------------------------------------------------


def read_labelme(source: Source) -> Found:
    """A JSON file an image with `shapes`; those with one group_id and label are one object."""
    found = Found("labelme")
    for file in source.with_suffix(".json"):
        content = _json(file)
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            found.notes.add("JSON files left out: broken, or without `shapes`", str(file))
            continue
        name = content.get("imagePath")
        image = source.image(name if isinstance(name, str) and name else file.stem, file) or source.image(
            file.stem, file
        )
        if image is None:
            inside = " (it is in the JSON as imageData)" if content.get("imageData") else ""
            found.notes.add("images left out, with all in them: the file is missing", f"{name}{inside} of {file}")
            continue
        size = (content.get("imageWidth"), content.get("imageHeight"))
        told = (size[0], size[1]) if type(size[0]) is int and type(size[1]) is int else None
        if (picture := source.picture(image, told, found)) is None:
            continue
        found.pictures.append(picture)
        groups: dict[Any, Instance] = {}
        for number, shape in enumerate(content["shapes"]):
            instance = _shape(shape, picture, f"{file} shape {number}", found)
            if instance is None:
                continue
            group = shape.get("group_id")
            key = (instance.name, group) if isinstance(group, (int, str)) else number
            first = groups.setdefault(key, instance)
            if first is not instance and isinstance(first.mask, list) and isinstance(instance.mask, list):
                first.mask += instance.mask
                first.box = _around(first.mask)
                found.notes.add(
                    "shapes are parts of the object with the same label and group_id", f"{file} shape {number}"
                )
            elif first is not instance:
                groups[number] = instance
        picture.instances += groups.values()
    return _with_classes(found)


def _shape(shape: Any, picture: AnnotatedImage, where: str, found: Found) -> Instance | None:
    label = shape.get("label") if isinstance(shape, dict) else None
    points = shape.get("points") if isinstance(shape, dict) else None
    good = isinstance(points, list) and all(
        isinstance(point, list) and len(point) == 2 and all(is_number(side) for side in point) for point in points
    )
    if not isinstance(label, str) or not label.strip() or not good or not points:
        found.notes.add("shapes left out: no label, or points that are no pairs of numbers", where)
        return None
    kind, flat = shape.get("shape_type") or "polygon", [float(side) for point in points for side in point]
    name = label.strip()
    box = _around([flat])
    if kind == "rectangle":
        return Instance(name, box)
    if kind == "polygon" and len(points) >= 3:
        return Instance(name, box, [flat])
    if kind == "circle" and len(points) == 2:
        radius = math.dist(*points)
        angles = [2 * math.pi * n / CIRCLE for n in range(CIRCLE)]
        rim = [flat[n] + radius * turn(a) for a in angles for n, turn in enumerate((math.cos, math.sin))]
        return Instance(name, _around([rim]), [rim])
    if kind == "mask" and isinstance(shape.get("mask"), str):
        try:
            with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as drawn:
                part = np.asarray(drawn.convert("L")) > 0
        except (OSError, ValueError, binascii.Error, SyntaxError, Image.DecompressionBombError):
            part = np.zeros((0, 0), bool)
        left, top = max(round(box[0]), 0), max(round(box[1]), 0)
        full = np.zeros((picture.height, picture.width), np.uint8, order="F")
        room = full[top : top + part.shape[0], left : left + part.shape[1]]
        room[:] = part[: room.shape[0], : room.shape[1]]
        if full.any():
            code = coco_mask.encode(full)
            counts = {"size": [picture.height, picture.width], "counts": code["counts"].decode()}
            return Instance(name, coco_mask.toBbox(code).tolist(), counts)
    found.notes.add(f"shapes left out: {kind!a:.40} has no area, or too few points", where)
    return None


# ---- COCO ------------------------------------------------------------------------------------------------------------


def _json(file: Path) -> Any:
    """The content of a file; None where it is no JSON."""
    try:
        return json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def read_coco(source: Source) -> Found:
    """COCO-style files: what our reader refuses is refused in its words; several (a file a split) become one set."""
    found = Found("coco")
    for file in source.with_suffix(".json"):
        head = _head(file)
        if not ('"images"' in head or '"annotations"' in head or '"categories"' in head):
            found.notes.add("JSON files left out: no images, annotations and categories", str(file))
            continue
        checked = LVISAnnotations.open(file, keep_empty=True, box_masks=True)
        content = _json(file)
        if content is None:
            raise UserError(f"{file}: is read by training, but not here: save it as UTF-8")
        for reason, number in checked.dropped.items():
            found.notes.add(f"annotations as training will see them: {reason}", str(file), number)
        for note in (note for note in checked.notes if note.startswith("WARNING")):
            found.notes.add("warning of the reader", f"{file.name}: {note.removeprefix('WARNING: ')}")
        names = {category["id"]: str(category["name"]).strip() for category in content["categories"]}
        if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
            found.notes.add("classes of one name become one", first_few(twice))
        above = {str(category.get("supercategory") or "") for category in content["categories"]}
        found.classes += [name for name in dict.fromkeys(names.values()) if name not in found.classes]
        pictures: dict[Any, AnnotatedImage] = {}
        for index, entry in enumerate(content["images"]):
            image = source.image(checked.name(index), file)
            if image is None:
                found.notes.add(
                    "images left out, with all in them: the file is missing", f"{checked.name(index)} of {file}"
                )
            elif picture := source.picture(image, (int(entry["width"]), int(entry["height"])), found):
                pictures[entry["id"]] = picture
        found.pictures += pictures.values()
        _coco_instances(content, pictures, names, found, source.rules.rotated, file)
        used = {instance.name for picture in pictures.values() for instance in picture.instances}
        for name in names.values():
            if name not in used and name in above:
                found.notes.add("classes without objects are only the heading of others (Roboflow's category 0)", name)
    return found


def _coco_instances(
    content: dict[str, Any],
    pictures: dict[Any, AnnotatedImage],
    names: dict[Any, str],
    found: Found,
    rotated: str,
    file: Path,
) -> None:
    turned = []
    for entry in content["annotations"]:
        picture, box, mask = pictures.get(entry["image_id"]), entry.get("bbox"), entry.get("segmentation")
        if picture is None:
            continue  # told with its image
        polygons = mask if isinstance(mask, list) and mask and all(isinstance(part, list) for part in mask) else None
        if polygons:
            polygons = [
                part for part in polygons if len(part) >= 6 and len(part) % 2 == 0 and all(map(is_number, part))
            ]
        shape: list[Polygon] | dict[str, Any] | None = polygons or (mask if isinstance(mask, dict) else None)
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
            box = _around(polygons) if polygons else None
        if box is None:
            found.notes.add("objects left out: no box of four numbers, and no polygon", f"annotation {entry['id']}")
            continue
        attributes = entry.get("attributes")
        angle = attributes.get("rotation", 0) if isinstance(attributes, dict) else 0
        if is_number(angle) and angle % 360 and not shape:
            turned.append(entry["id"])
            shape = [_turned(box, angle)]
            box = _around(shape)
        found_name = names[entry["category_id"]]
        picture.instances.append(
            Instance(found_name, [float(side) for side in box], shape, bool(entry.get("iscrowd", 0)))
        )
    if turned and rotated == "refuse":
        raise UserError(
            f"{file}: {len(turned)} boxes are turned (attributes.rotation of CVAT; annotations {first_few(turned)}), "
            "and bbox is the box before that: export polygons or masks, or rotated=polygon takes the turned rectangles"
        )
    if turned:
        found.notes.add("boxes were turned by their attribute rotation: polygons of corners", str(file), len(turned))


def _turned(box: list[float], degrees: float) -> Polygon:
    """The corners of a box (x, y, width, height) turned clockwise about its centre."""
    x, y, width, height = box
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = [(-width / 2, -height / 2), (width / 2, -height / 2), (width / 2, height / 2), (-width / 2, height / 2)]
    return [
        round(value, 3)
        for dx, dy in corners
        for value in (x + width / 2 + dx * cos - dy * sin, y + height / 2 + dx * sin + dy * cos)
    ]
