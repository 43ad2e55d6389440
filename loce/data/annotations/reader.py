"""Annotation file as flat columns, with a message for each way in which such files are commonly broken.

Annotations and images are copied into columns some thousands at a time and forgotten at once: neither a million
dictionaries nor a gigabyte of text ever exist. A dict that is loaded already goes the same way and is left as it is.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from loce.data.annotations.image_files import image_name, is_readable_name
from loce.data.annotations.json_file import open_json
from loce.data.annotations.segmentations import SegmentationBuilder
from loce.data.annotations.values import (
    FAR,
    as_list,
    is_flag,
    is_number,
    is_whole,
    pack_numbers,
    pack_rows,
    pack_whole,
    require_types,
)
from loce.utils.errors import FEW, UserError, first_few, raise_problems

SECTIONS = ("images", "annotations", "categories")
WANTED = "annotation file"
LONGEST = 65535  # pixels; the longest side that JPEG knows
NO_NUMBER = float("nan")
_PART = 10_000  # elements of a loaded dict that are taken at a time


class Columns:
    """What a file says about images and annotations, in file order; an annotation's box is x, y, width, height.

    masks: all segmentations are read, else only those of annotations that have no area. areas: NaN where they are no
    number; without_area: rows that have none at all.
    """

    def __init__(self, masks: bool = True) -> None:
        self.masks = masks
        self.annotation_ids, self.annotation_images, self.annotation_classes = array("q"), array("q"), array("q")
        self.boxes, self.areas, self.without_area = array("d"), array("d"), array("q")
        self.crowd, self.ignore = bytearray(), bytearray()
        self.segmentations = SegmentationBuilder()
        self.image_ids, self.heights, self.widths = array("q"), array("q"), array("q")
        self.image_names: list[str] = []
        self.negatives: list[Any] = []
        self.not_exhaustive: list[Any] = []
        self.mistakes = Mistakes()
        self.nameless = Mistakes()  # images without a usable file name, which only matters where images are read

    def add_annotations(self, part: Sequence[Any], first: int) -> None:
        """Elements of the list `annotations`, from number `first` on: at once where all are as they should be."""
        if self._pack_annotations(part):
            if self.masks:
                self.segmentations.add_all([obj.get("segmentation") for obj in part])
            else:
                self.segmentations.add_none(len(part))
        else:
            for number, obj in enumerate(part, first):
                self.add_annotation(obj, number)

    def _pack_annotations(self, part: Sequence[Any]) -> bool:
        """All of `part` but the segmentations, if nothing is missing, wrong or of another type than JSON's; else False.

        Tested equal to `add_annotation`, in a tenth of its time.
        """
        try:
            require_types(part, dict)
            ids, images, classes = (
                pack_whole(list(map(itemgetter(key), part))) for key in ("id", "image_id", "category_id")
            )
            boxes = pack_rows(list(map(itemgetter("bbox"), part)), 4)
            areas = pack_numbers(list(map(itemgetter("area"), part)))
            crowd, ignore = ([obj.get(key, 0) for obj in part] for key in ("iscrowd", "ignore"))
            flagged = set(crowd) | set(ignore)
        except (TypeError, ValueError, OverflowError, KeyError):
            return False
        # Not NaN either.
        if not (flagged <= {0, 1} and (np.abs(boxes) < FAR).all() and (np.abs(areas) < FAR).all()):
            return False
        for column, values in (
            (self.annotation_ids, ids),
            (self.annotation_images, images),
            (self.annotation_classes, classes),
            (self.boxes, boxes),
            (self.areas, areas),
        ):
            column.frombytes(values.tobytes())
        self.crowd.extend(map(bool, crowd))
        self.ignore.extend(map(bool, ignore))
        return True

    def add_annotation(self, obj: Any, number: int) -> None:
        """One element of the list `annotations`; number: its place there."""
        row = len(self.annotation_ids)
        if not isinstance(obj, Mapping) or not ("id" in obj and "image_id" in obj and "category_id" in obj):
            self.mistakes.add("elements of `annotations` without all of id, image_id, category_id", _named(obj, number))
            return
        ids = tuple(as_list(obj[key]) for key in ("id", "image_id", "category_id"))
        if not all(is_whole(i) for i in ids):
            self.mistakes.add(
                "annotations whose id, image_id or category_id is no whole number of 64 bits", short(list(ids))
            )
            return
        # From here on every column gets a value, so that all have as many rows.
        self.annotation_ids.append(ids[0])
        self.annotation_images.append(ids[1])
        self.annotation_classes.append(ids[2])
        box = as_list(obj.get("bbox"))
        box = [as_list(side) for side in box] if isinstance(box, list) and len(box) == 4 else [None]
        if not all(is_number(side) for side in box):
            box = [NO_NUMBER] * 4
        self.boxes.extend(box)
        area = as_list(obj.get("area", NO_NUMBER))
        self.areas.append(area if is_number(area) else NO_NUMBER)
        if "area" not in obj:
            self.without_area.append(row)
        for key, flags in (("iscrowd", self.crowd), ("ignore", self.ignore)):
            flag = as_list(obj.get(key, 0))
            if not is_flag(flag):
                kind = f"annotations whose `{key}` is none of 0, 1, true, false"
                self.mistakes.add(kind, f"annotation {ids[0]} ({short(flag)})")
                flag = 0
            flags.append(bool(flag))
        if self.masks or "area" not in obj:
            self.segmentations.add(obj.get("segmentation"))
        else:
            self.segmentations.add_none()

    def add_images(self, part: Sequence[Any], first: int) -> None:
        """Elements of the list `images`, from number `first` on."""
        for number, obj in enumerate(part, first):
            self.add_image(obj, number)

    def add_image(self, obj: Any, number: int) -> None:
        """One element of the list `images`; number: its place there."""
        if not isinstance(obj, Mapping) or "id" not in obj:
            self.mistakes.add("elements of `images` without an id", _named(obj, number))
            return
        if "height" not in obj or "width" not in obj:
            kind = "images without height and width in pixels, which must be added to each from its file"
            self.mistakes.add(kind, f"image {short(obj['id'])}")
            return
        sides = tuple(as_list(obj[key]) for key in ("id", "height", "width"))
        if not all(is_whole(i) for i in sides) or not all(0 < side <= LONGEST for side in sides[1:]):
            kind = f"images whose id, height or width is no whole number of 64 bits, or a side is not 1 to {LONGEST}"
            self.mistakes.add(kind, f"({', '.join(short(side) for side in sides)})")
            return
        # A bad name is a mistake only where images are read, and may end there.
        name = image_name(obj)
        if not name:
            self.nameless.add("images with neither file_name nor coco_url", f"image {obj['id']}")
        elif not is_readable_name(name):
            kind = "images whose file name is no text that can be printed"
            self.nameless.add(kind, f"image {obj['id']} ({name!a})")
            name = ""
        self.image_ids.append(sides[0])
        self.heights.append(sides[1])
        self.widths.append(sides[2])
        self.image_names.append(name)
        self.negatives.append(as_list(obj["neg_category_ids"]) if "neg_category_ids" in obj else None)
        not_exhaustive = "not_exhaustive_category_ids"
        self.not_exhaustive.append(as_list(obj[not_exhaustive]) if not_exhaustive in obj else None)


class Mistakes:
    """Kinds of mistakes, how often each was made, and the first examples."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """One more mistake of a kind, or several with one example."""
        self.counts[kind] += count
        if len(shown := self.examples.setdefault(kind, [])) < FEW:
            shown.append(example)

    def raise_all(self, path: str) -> None:
        """One UserError for all of them, or nothing."""
        raise_problems(
            [f"{path}: {count} {kind}: {first_few(self.examples[kind], count)}" for kind, count in self.counts.items()]
        )


def read_annotation_file(
    source: str | Path | Mapping[str, Any], masks: bool = True, annotated: bool = True
) -> tuple[Columns, list[Any]]:
    """(columns, categories as in the file) of a file or of a dict with its content; UserError names what is wrong.

    masks: false leaves the segmentations out; annotated: false takes a file of test images, which need not have a list
    `annotations`.
    """
    columns = Columns(masks)
    if isinstance(source, Mapping):
        lists = {key: as_list(source.get(key)) for key in SECTIONS}
        arrays = ((key, _pieces(value)) for key, value in lists.items() if isinstance(value, list))
        return columns, _sections("annotations", arrays, columns, annotated)
    path = str(source)
    with open_json(path, WANTED) as (stream, work):
        first = stream.peek()
        if first != "{":
            if first != "[":
                stream.value()  # not JSON at all, as a rule
            kind = "a list, as files of results are" if first == "[" else "no object"
            raise UserError(f"{path}: is {kind}, not an annotation file with {', '.join(SECTIONS)}")

        def counted(elements: Iterator[list[Any]]) -> Iterator[list[Any]]:
            for part in elements:
                work.done = stream.offset >> 20
                yield part

        parts = ((key, counted(value)) for key, value in stream.members() if isinstance(value, Iterator))
        return columns, _sections(path, parts, columns, annotated)


def _pieces(whole: list[Any]) -> Iterator[list[Any]]:
    return (whole[first : first + _PART] for first in range(0, len(whole), _PART))


def _sections(
    path: str,
    arrays: Iterable[tuple[str, Iterator[list[Any]]]],
    columns: Columns,
    annotated: bool,
) -> list[Any]:
    """Add all images and annotations to the columns; returns the categories. Other lists are skipped."""
    found: dict[str, list[Any]] = {}
    takers = {"images": columns.add_images, "annotations": columns.add_annotations}
    for section, parts in arrays:
        if section in found and section in SECTIONS:
            columns.mistakes.add("lists that are there more than once", f"`{section}`")
        found[section], done = [], 0
        for part in parts:
            if section == "categories":
                found[section] += part
            elif section in takers:
                takers[section](part, done)
            done += len(part)
    missing = [section for section in SECTIONS if section not in found and (annotated or section != "annotations")]
    if missing:
        test = "; of test images, scripts/evaluate.py checkpoint=RUN save_json=true writes results.json without numbers"
        hint = test if missing == ["annotations"] else ""
        raise UserError(
            f"{path}: no list of {' and no list of '.join(missing)}; an annotation file has {SECTIONS}{hint}"
        )
    return found["categories"]


def _named(obj: Any, number: int) -> str:
    """An element by its id, or by its place."""
    known = isinstance(obj, Mapping) and "id" in obj
    return f"id {short(obj['id'])}" if known else f"number {number}"


def short(value: Any) -> str:
    """A value of the file as text of at most 60 characters, for messages."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
