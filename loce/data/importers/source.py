"""A folder of annotations and images, and what importers make of it: images with their objects, and notes."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from loce.data.annotations.reader import Mistakes

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2"}
ORIENTATION = 0x0112  # EXIF's
HIDDEN = re.compile(r"(^|/)\.")
BROKEN_IMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
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
        self.files = sorted(file for file in every if not HIDDEN.search(file.relative_to(self.root).as_posix()))
        self.images = [file for file in self.files if file.suffix.lower() in SUFFIXES]
        self._known = set(self.images)
        self._by_name: dict[str, list[Path]] = {}
        self._opened: dict[Path, AnnotatedImage] = {}
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

    def annotated(
        self,
        names: Sequence[str],
        annotation: Path,
        size: Sequence[Any],
        found: Found,
        hint: str = "",
    ) -> AnnotatedImage | None:
        """The image of the first of `names` that is there, as `opened` gives it. hint: where else it might be."""
        file = next((file for name in names if (file := self.image(name, annotation))), None)
        if file is None:
            where = f"{names[0]}{hint} of {annotation}"
            found.notes.add("images left out, with all in them: the file is missing", where)
            return None
        return self.opened(file, size, found)

    def opened(self, file: Path, size: Sequence[Any], found: Found) -> AnnotatedImage | None:
        """The image, added to `found`, with the size (width, height, or nothing) that it was annotated at.

        None, with a note, where it cannot be read. An image that two files annotate is one, with the objects of both.
        """
        if file in self._opened:
            found.notes.add("images are annotated more than once: their objects are put together", str(file))
            return self._opened[file]
        try:
            with Image.open(file) as image:
                pixels, orientation = image.size, image.getexif().get(ORIENTATION, 1)
        except BROKEN_IMAGE:
            found.notes.add("images left out, with all in them: they cannot be read", str(file))
            return None
        told = (int(size[0]), int(size[1])) if len(size) == 2 and all(size) else None
        # Turned as EXIF asks where the annotation was, or the user says so.
        upright = pixels[::-1] if orientation in range(5, 9) else pixels
        if orientation in range(2, 9):
            kind = "images ask to be turned (EXIF); if they were annotated upright: exif=apply here"
            if self.rules.exif == "apply" or told == upright != pixels:
                kind = "images are turned by EXIF as they were annotated: train with data.exif=apply"
                pixels = upright
            found.notes.add(kind, str(file))
        if told and told != pixels:
            shown = f"{file} ({told[0]} x {told[1]} told, {pixels[0]} x {pixels[1]} px)"
            found.notes.add("images have another size than is told; the file's is taken", shown)
        self._opened[file] = AnnotatedImage(file, *pixels)
        found.pictures.append(self._opened[file])
        return self._opened[file]


def cut_at_border(found: Found) -> None:
    """Cut boxes at the border of their image; those without area inside are left out, with a note."""
    for picture in found.pictures:
        kept, sides = [], (picture.width, picture.height) * 2
        for instance in picture.instances:
            x, y, width, height = instance.box
            where = f"{picture.file.name} ({instance.name})"
            corners = (x, y, x + width, y + height)
            left, top, right, bottom = cut = [min(max(c, 0), side) for c, side in zip(corners, sides, strict=True)]
            if not all(map(math.isfinite, instance.box)) or right <= left or bottom <= top:
                found.notes.add("objects left out: no area inside their image", where)
                continue
            if max(abs(new - old) for new, old in zip(cut, corners, strict=True)) > 1:
                found.notes.add("boxes reach more than a pixel over the border: cut there", where)
            instance.box = [round(side, 3) for side in (left, top, right - left, bottom - top)]
            kept.append(instance)
        picture.instances = kept


def box_around(polygons: list[Polygon]) -> list[float]:
    """x, y, width, height of the box around polygons."""
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def number_in(text: str | None) -> float | None:
    """The finite number that a text is; None where it is none."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def head_of(file: Path) -> str:
    """The beginning and the end of a file, which tell COCO's JSON from LabelMe's."""
    with file.open("rb") as opened:
        start = opened.read(4096)
        opened.seek(max(file.stat().st_size - 4096, 0))
        return (start + opened.read()).decode(errors="replace")


def json_of(file: Path) -> Any:
    """The content of a file; None where it is no JSON."""
    try:
        return json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
