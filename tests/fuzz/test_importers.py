"""Damaged exports: a message, or a set that our reader reads, in which every written object is one or is counted.

More of them: FUZZ=10000:20000 python -m pytest -m slow tests/fuzz
"""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from loce.config import UserError
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.import_set import coco_content, report_lines, split_pictures
from loce.data.importers import FORMATS, Rules, read_source
from tests.data.test_import import coco, image, voc
from tests.fuzz.mutations import change_bytes, change_value

SMOKE, WHOLE = 40, (0, 1500)
START, END = map(int, os.environ["FUZZ"].split(":")) if "FUZZ" in os.environ else WHOLE
WITHOUT_FILE = ("images left out", "XML files left out", "JSON files left out", "text files left out")
LEFT_OUT = ("objects left out", "lines left out", "shapes left out")
ODD = ["", "x", "-5", "1e99", "nan", "0", "7", "3.5", "0.2 0.2", "<", "²", "10 10 20", "\n", "\x85", "1e-9"]
EACH = pytest.mark.parametrize("kind", FORMATS)


def write_source(folder: Path, kind: str) -> None:
    """An export of two images with objects of all kinds that the format has."""
    for name in ("a", "b"):
        image(folder / f"{name}.jpg")
    shapes = [
        {"label": "dog", "points": [[2, 2], [8, 2], [8, 8]], "shape_type": "polygon", "group_id": 1},
        {"label": "dog", "points": [[12, 2], [18, 2], [18, 8]], "shape_type": "polygon", "group_id": 1},
        {"label": "cat", "points": [[30, 20], [10, 12]], "shape_type": "rectangle", "group_id": None},
        {"label": "cat", "points": [[20, 15], [20, 20]], "shape_type": "circle"},
    ]
    rows = [
        {"category_id": 1, "bbox": [1, 1, 8, 8], "segmentation": [[1, 1, 9, 1, 9, 9]]},
        {"category_id": 2, "bbox": [1, 1, 8, 8], "segmentation": [], "attributes": {"rotation": 0}},
        {"category_id": 2, "bbox": [0, 0, 40, 30], "segmentation": {"size": [30, 40], "counts": [0, 1200]}},
    ]
    for name in ("a", "b"):
        if kind == "voc":
            voc(folder / f"{name}.xml", [("dog", 1, 1, 20, 20), ("cat", 4, 4, 9, 9)])
        elif kind == "yolo":
            (folder / "classes.txt").write_text("dog\ncat\n")
            (folder / f"{name}.txt").write_text("0 0.5 0.5 0.4 0.4\n1 0.1 0.1 0.9 0.1 0.9 0.9\n")
        elif kind == "labelme":
            made = {"shapes": shapes, "imagePath": f"{name}.jpg", "imageWidth": 40, "imageHeight": 30}
            (folder / f"{name}.json").write_text(json.dumps(made))
        else:
            categories = [{"id": 1, "name": "dog", "supercategory": "pet"}, {"id": 2, "name": "cat"}]
            coco(folder / f"{name}.json", categories, rows, f"{name}.jpg")


def damage(folder: Path, rng: np.random.Generator) -> None:
    """A mistake in one file, sometimes in two; rarely an image is damaged or away."""
    files = sorted(folder.iterdir())
    texts = [file for file in files if file.suffix != ".jpg"]
    for _ in range(int(rng.integers(1, 3))):
        file = texts[int(rng.integers(len(texts)))]
        raw = file.read_bytes()
        if rng.random() < 0.2:
            file.write_bytes(change_bytes(raw, rng))
        elif file.suffix == ".json":
            try:
                file.write_text(json.dumps(change_value(json.loads(raw), rng)))
            except (ValueError, RecursionError):  # a second mistake in a file that is none any more
                file.write_bytes(b"")
        else:
            text = raw.decode(errors="replace")
            places = list(re.finditer(r"[\d.]+|[a-z]+", text)) or [re.compile("").match(text)]
            place = places[int(rng.integers(len(places)))]
            file.write_text(text[: place.start()] + str(rng.choice(ODD)) + text[place.end() :], encoding="utf-8")
    if rng.random() < 0.1:
        (folder / "b.jpg").write_bytes(b"" if rng.random() < 0.5 else (folder / "b.jpg").read_bytes()[:99])
    elif rng.random() < 0.1:
        (folder / "b.jpg").unlink()


def written(file: Path, kind: str) -> int:
    """How many objects a file holds, as far as it can be read."""
    if kind == "voc" and file.suffix == ".xml":
        try:
            return len(ElementTree.parse(file).getroot().findall("object"))
        except (ElementTree.ParseError, ValueError, LookupError):
            return 0
    if kind == "yolo" and file.stem in ("a", "b") and file.suffix == ".txt":
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        return sum(bool(line.strip()) for line in lines)
    if file.suffix == ".json":
        content: Any = json.loads(file.read_bytes().decode("utf-8-sig", errors="replace"))
        return len(content["shapes" if kind == "labelme" else "annotations"])
    return 0


def fuzz(seed: int, kind: str, folder: Path) -> str:
    """How the case of a seed ends: refused, whole, or told, where something is left out and counted."""
    rng = np.random.default_rng([7, seed])
    write_source(folder, kind)
    damage(folder, rng)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    try:
        found = read_source(folder, kind, Rules())
    except UserError as error:
        assert len(str(error)) > 20
        return "refused"
    notes = found.notes.counts
    made = coco_content(found.pictures, found.classes, folder)
    assert len({entry["file_name"] for entry in made["images"]}) == len(made["images"])
    left_out = sum(number for note, number in notes.items() if note.startswith(LEFT_OUT))
    parts = sum(number for note, number in notes.items() if note.startswith("shapes are parts"))
    files_left_out = any(note.startswith(WITHOUT_FILE) for note in notes)
    if not files_left_out:
        assert len(made["annotations"]) + left_out + parts == sum(written(file, kind) for file in before), notes
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    # What comes of it is read by training, split and reported.
    split_pictures(found.pictures, 0.5, seed)
    assert len(report_lines(found)) > len(notes)
    made_file = folder.parent / f"{folder.name}.json"
    made_file.write_text(json.dumps(made, allow_nan=False))
    assert len(LVISAnnotations.open(made_file, keep_empty=True).labels) == len(made["annotations"])
    return "told" if left_out or files_left_out else "whole"


def fuzz_all(seeds: range, kind: str, folder: Path) -> Counter[str]:
    ends: Counter[str] = Counter()
    for seed in seeds:
        case = folder / str(seed)
        try:
            ends[fuzz(seed, kind, case)] += 1
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(case)
    return ends


@EACH
def test_a_few_damaged_exports(kind: str, tmp_path: Path) -> None:
    ends = fuzz_all(range(SMOKE), kind, tmp_path)
    assert min(ends["whole"], ends["told"] + ends["refused"]) > 1, ends


@pytest.mark.slow
@EACH
def test_many_damaged_exports(kind: str, tmp_path: Path) -> None:
    fuzz_all(range(START, END), kind, tmp_path)
