"""Importer of YOLO: a text file an image, `class x y width height` with the centre, or `class x1 y1 x2 y2 x3 y3 ...`.

All are shares of the image. Class names stand in a data.yaml or a classes.txt.
"""

from pathlib import Path
from typing import Any

from loce.data.importers.source import AnnotatedImage, Found, Instance, Source, box_around, number_in
from loce.utils.errors import UserError, first_few
from loce.utils.yaml_text import load_yaml

ROUNDING = 0.01  # a share of the image may be so far outside of 0..1
MOST_CLASSES = 100_000


def is_format(source: Source) -> bool:
    """Whether a file with class names is there."""
    return any(map(_names, source.with_suffix(".yaml", ".yml", ".txt")))


def read(source: Source) -> Found:
    """Images and objects; an image with an empty text file, or none, is one without objects."""
    found = Found("yolo")
    lists = {file: names for file in source.with_suffix(".yaml", ".yml", ".txt") if (names := _names(file))}
    if len({tuple(names) for names in lists.values()}) != 1:
        raise UserError(
            f"{source.path}: class names must stand in one data.yaml or classes.txt, found: {first_few(lists)}"
        )
    found.classes = next(iter(lists.values()))
    keypoints = any("kpt_shape" in _settings(file) for file in lists)
    texts, used = {file for file in source.files if file.suffix == ".txt" and file not in lists}, set()
    for image in source.images:
        if (picture := source.opened(image, (), found)) is None:
            continue
        label = next((place for place in _label_files(image) if place in texts), None)
        if label is None:
            found.notes.add("images have no text file: taken as without objects", str(image))
            continue
        used.add(label)
        for number, line in enumerate(_text(label).splitlines(), 1):
            words = line.split()
            if keypoints and len(words) > 5:
                found.notes.add("lines have keypoints (kpt_shape): their boxes alone are kept", f"{label}:{number}")
                words = words[:5]
            if words:
                _add_object(words, f"{label}:{number}", picture, found)
    for file in sorted(texts - used):
        found.notes.add("text files left out, with all in them: no image has their name", str(file))
    return found


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _names(file: Path) -> list[str]:
    """Class names of a data.yaml (a list, or numbers and names) or a classes.txt; none of any other file."""
    if file.suffix == ".txt":
        lines = _text(file).splitlines() if file.name == "classes.txt" else []
        return [line.strip() for line in lines if line.strip()]
    names = _settings(file).get("names")
    if isinstance(names, dict) and all(str(key).isdecimal() for key in names):
        known = {int(key): str(name) for key, name in names.items()}
        count = max(known, default=-1) + 1
        return [known.get(n, f"class {n}") for n in range(count)] if count < MOST_CLASSES else []
    return [str(name) for name in names] if isinstance(names, list) else []


def _settings(file: Path) -> dict[str, Any]:
    """What a data.yaml says; nothing where it is none."""
    try:
        return {} if file.suffix == ".txt" else load_yaml(_text(file), str(file))
    except (UserError, OSError):
        return {}


def _label_files(image: Path) -> list[Path]:
    """Where an image's text file may be: images/train/a.jpg has labels/train/a.txt, or else images/train/a.txt."""
    beside = image.with_suffix(".txt")
    last = max((n for n, part in enumerate(beside.parts[:-1]) if part == "images"), default=None)
    return [beside] if last is None else [Path(*beside.parts[:last], "labels", *beside.parts[last + 1 :]), beside]


def _add_object(words: list[str], where: str, picture: AnnotatedImage, found: Found) -> None:
    """The object of a line, or a note on what is wrong with it."""
    numbers = [number_in(word) for word in words]
    if None in numbers or not (len(numbers) in (5, 6) or (len(numbers) >= 7 and len(numbers) % 2)):
        found.notes.add("lines left out: not a class with a box or a polygon", where)
        return
    label, *shares = (number or 0 for number in numbers)
    if label % 1 or not 0 <= label < len(found.classes):
        kind = f"lines left out: a class that is none of the {len(found.classes)} names"
        found.notes.add(kind, f"{where} ({label:g})")
        return
    if len(shares) == 5:
        found.notes.add("lines have a sixth number, a score as of predictions: not used", where)
        shares.pop()
    if not all(-ROUNDING <= share <= 1 + ROUNDING for share in shares):
        found.notes.add("lines left out: no shares of the image (0 to 1); pixels?", where)
        return
    name, sides = found.classes[int(label)], (picture.width, picture.height)
    if len(shares) == 4:
        x, y, width, height = (share * sides[n % 2] for n, share in enumerate(shares))
        picture.instances.append(Instance(name, [x - width / 2, y - height / 2, width, height]))
    else:
        polygon = [round(min(max(share, 0), 1) * sides[n % 2], 3) for n, share in enumerate(shares)]
        picture.instances.append(Instance(name, box_around([polygon]), [polygon]))
