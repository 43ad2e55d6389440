"""An annotation JSON file as flat columns, and a clear message for each way in which such a file is commonly broken.

The parser hands over every finished JSON object; annotations and images are copied into columns and forgotten at once,
and a small part of the file is held at a time: neither a million dictionaries nor a gigabyte of text ever exist.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loce.data.annotations.image_files import image_name, is_readable_name
from loce.data.annotations.json_stream import BLOCK, JsonStream
from loce.data.annotations.segmentations import SegmentationBuilder
from loce.utils.errors import UserError, raise_problems
from loce.utils.progress import Phase, phase

SECTIONS = ("images", "annotations", "categories")
NEEDED = {"images": "id, height, width", "annotations": "id, image_id, category_id"}
NAMED = 5  # examples listed of each kind of mistake
LONGEST = 65535  # pixels; the longest side that JPEG knows
_WHOLE = 1 << 62
NO_BOX = float("nan")


class Columns:
    """What a file says about images and annotations, in file order; an annotation's box is x, y, width, height."""

    def __init__(self) -> None:
        self.annotation_ids, self.annotation_images, self.annotation_classes = array("q"), array("q"), array("q")
        self.boxes, self.areas = array("d"), array("d")
        self.crowd, self.ignore = bytearray(), bytearray()
        self.segmentations = SegmentationBuilder()
        self.image_ids, self.heights, self.widths = array("q"), array("q"), array("q")
        self.image_names: list[str] = []
        self.negatives: list[Any] = []
        self.not_exhaustive: list[Any] = []
        self.mistakes = Mistakes()

    def take(self, obj: dict[str, Any]) -> Any:
        """Called by the parser for each object: its row number if it is an annotation or an image, else itself."""
        if "image_id" in obj and "category_id" in obj:
            return self._annotation(obj)
        if "height" in obj and "width" in obj and "id" in obj:
            return self._image(obj)
        return obj

    def _annotation(self, obj: dict[str, Any]) -> int:
        row = len(self.annotation_ids)
        ids = [obj.get("id"), obj["image_id"], obj["category_id"]]
        if not all(_is_whole(i) for i in ids):
            self.mistakes.add("annotations whose id, image_id or category_id is no whole number", str(ids))
            ids = [-1, -1, -1]
        self.annotation_ids.append(ids[0])
        self.annotation_images.append(ids[1])
        self.annotation_classes.append(ids[2])
        box = obj.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(_is_number(side) for side in box)):
            box = [NO_BOX] * 4
        area = obj.get("area", box[2] * box[3])
        self.boxes.extend(box)
        self.areas.append(area if _is_number(area) else NO_BOX)
        self.crowd.append(bool(obj.get("iscrowd")))
        self.ignore.append(bool(obj.get("ignore")))
        self.segmentations.add(obj.get("segmentation"))
        return row

    def _image(self, obj: dict[str, Any]) -> int:
        row = len(self.image_ids)
        sides = (obj["id"], obj["height"], obj["width"])
        name = image_name(obj)
        if not all(_is_whole(i) for i in sides) or not all(0 < side <= LONGEST for side in sides[1:]):
            self.mistakes.add(
                f"images whose id, height or width is no whole number, or a side is not 1 to {LONGEST}", str(sides)
            )
            sides = (-1, 1, 1)
        if not name:
            self.mistakes.add("images with neither file_name nor coco_url", f"image {obj['id']}")
        elif not is_readable_name(name):
            self.mistakes.add("images whose file name is no text that can be printed", f"image {obj['id']} ({name!a})")
            name = ""
        self.image_ids.append(sides[0])
        self.heights.append(sides[1])
        self.widths.append(sides[2])
        self.image_names.append(name)
        self.negatives.append(obj.get("neg_category_ids"))
        self.not_exhaustive.append(obj.get("not_exhaustive_category_ids"))
        return row


class Mistakes:
    """Kinds of mistakes, how often each was made, and the first examples."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str) -> None:
        """One more mistake of a kind."""
        self.counts[kind] += 1
        if self.counts[kind] <= NAMED:
            self.examples.setdefault(kind, []).append(example)

    def raise_all(self, path: str) -> None:
        """One UserError for all of them, or nothing."""
        raise_problems(
            [
                f"{path}: {count} {kind}: {', '.join(self.examples[kind])}{', ...' if count > NAMED else ''}"
                for kind, count in self.counts.items()
            ]
        )


def read_annotation_file(path: str) -> tuple[Columns, list[Any]]:
    """(columns, categories as in the file). UserError names what is wrong with the file."""
    size, columns = _check_kind(Path(path)), Columns()
    with open(path, "rb") as file, phase(f"reading {path}", size >> 20, "MiB") as work:
        stream = JsonStream(file, json.JSONDecoder(object_hook=columns.take, parse_constant=lambda _: None))
        try:
            categories = _sections(path, stream, columns, work)
        except json.JSONDecodeError as error:
            raise UserError(_json_message(path, error.msg, *stream.place(error))) from None
        except UnicodeDecodeError as error:
            where = f"byte {error.start} of {size}"
            raise UserError(f"{path}: is not a text file ({where}); download it again") from None
        except RecursionError:
            raise UserError(f"{path}: brackets nested too deeply to be an annotation file") from None
    return columns, categories


def _sections(path: str, stream: JsonStream, columns: Columns, work: Phase) -> list[Any]:
    """Take in all images and annotations; the categories are small and stay as they are."""
    first = stream.peek()
    if first != "{":
        if first != "[":
            stream.value()  # not JSON at all, as a rule
        kind = "a list, as files of results are" if first == "[" else "no object"
        raise UserError(f"{path}: is {kind}, not an annotation file with {', '.join(SECTIONS)}")
    found: dict[str, Any] = {}
    for section, value in stream.members():
        if isinstance(value, Iterator):
            elements = _counted(value, stream, work)
            found[section] = _rows(elements) if section in NEEDED else list(elements)
        else:
            found.pop(section, None)  # no list
    if missing := [section for section in SECTIONS if section not in found]:
        raise UserError(f"{path}: no list of {' and no list of '.join(missing)}; an annotation file has {SECTIONS}")
    _check_rows(columns, "images", found["images"], len(columns.image_ids))
    _check_rows(columns, "annotations", found["annotations"], len(columns.annotation_ids))
    return found["categories"]


def _counted(elements: Iterator[Any], stream: JsonStream, work: Phase) -> Iterator[Any]:
    for element in elements:
        work.done = stream.offset >> 20
        yield element


def _rows(elements: Iterator[Any]) -> tuple[list[int], int, bool]:
    """Of a section: elements that were not taken as rows, how many there are, and whether all are rows in order."""
    wrong, in_order, number = [], True, 0
    for number, row in enumerate(elements, 1):
        if type(row) is not int:
            wrong.append(number - 1)
        in_order &= row == number - 1
    return wrong, number, in_order


def _check_rows(columns: Columns, section: str, found: tuple[list[int], int, bool], rows: int) -> None:
    """Every element of a section must have been taken as a row of its kind, and no row come from elsewhere."""
    wrong, number, in_order = found
    for i in wrong:
        columns.mistakes.add(f"elements of `{section}` without all of {NEEDED[section]}", f"number {i}")
    if not wrong and not (in_order and number == rows):
        columns.mistakes.add(f"objects outside `{section}` that look like one of its elements", f"{rows - number}")


def _check_kind(path: Path) -> int:
    """The file's size in bytes; UserError for what people really have where an annotation file should be."""
    if not path.exists():
        raise UserError(f"{path}: there is no such annotation file; set data.train_annotations, data.val_annotations")
    if not path.is_file():
        raise UserError(f"{path}: is a folder, not an annotation file")
    try:
        with path.open("rb") as file:
            head = file.read(BLOCK)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    size = path.stat().st_size
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        tool = "gunzip -k" if head.startswith(b"\x1f") else "unzip"
        raise UserError(f"{path}: is still compressed; unpack it first: {tool} {path}")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a git-lfs pointer of {size} bytes, not the file; fetch it: git lfs pull")
    if not head.strip():
        raise UserError(f"{path}: is empty ({size} bytes); download it again")
    return size


def _json_message(path: str, message: str, line: int, character: int, left: int) -> str:
    """left: characters that follow, spaces at the end apart."""
    where = f"line {line}, character {character} of {character + left}"
    if message == "Extra data":
        return f"{path}: more than one JSON value ({where}), as in JSON Lines; one object with {SECTIONS} is needed"
    if left < 100 or "Unterminated" in message:
        return f"{path}: the JSON ends too early ({where}: {message}); a broken download? Fetch it again"
    return f"{path}: is not JSON ({where}: {message})"


def _is_whole(value: Any) -> bool:
    return type(value) is int and -_WHOLE < value < _WHOLE


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_WHOLE < value < _WHOLE
