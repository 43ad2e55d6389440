"""Importers: the known traps of each format against numbers worked out by hand; splits; damaged sources."""

import base64
import hashlib
import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from loce.config import UserError
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.import_set import coco_content, split_pictures, video_of
from loce.data.importers import AnnotatedImage, Instance, Rules, read_source
from scripts import import_data

SIZE = (40, 30)


def image(path: Path, size: tuple[int, int] = SIZE, orientation: int = 1) -> Path:
    """A grey image file of this width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (90, 90, 90)).save(path, exif=exif)
    return path


def voc(path: Path, boxes: list[tuple[str, int, int, int, int]], name: str = "", size: str = "") -> None:
    """A Pascal VOC file; each object has a part with a box of its own."""
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    objects = "".join(
        f"<object><name>{label}</name>{part}<difficult>0</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
        f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for label, a, b, c, d in boxes
    )
    size = size or f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height></size>"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><filename>{name or path.stem + '.jpg'}</filename>{size}{objects}</annotation>")


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["import_data.py", *map(str, words)])
    import_data.main()


def content(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The file, which our reader reads."""
    LVISAnnotations.open(path)
    return json.loads(path.read_text())


def boxes(made: dict[str, list[dict[str, Any]]]) -> dict[str, list[tuple[str, list[float]]]]:
    """File -> (class, box) of its objects."""
    names = {c["id"]: c["name"] for c in made["categories"]}
    return {
        i["file_name"]: [(names[a["category_id"]], a["bbox"]) for a in made["annotations"] if a["image_id"] == i["id"]]
        for i in made["images"]
    }


def hashes(folder: Path) -> dict[str, str]:
    return {str(f): hashlib.md5(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()}


def test_voc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes from 1 with their last pixel; a name without suffix; a size that is not the file's; a missing image."""
    source = tmp_path / "src"
    for name in ("a", "b", "c"):
        image(source / f"JPEGImages/{name}.jpg")
    voc(source / "Annotations/a.xml", [("dog", 1, 1, 40, 30), ("cat", 5, 6, 5, 6)])
    voc(source / "Annotations/b.xml", [], name="b")
    voc(source / "Annotations/c.xml", [("dog", 20, 10, 10, 20), ("", 1, 2, 3, 4)], size="<size><width>9</width></size>")
    voc(source / "Annotations/d.xml", [("dog", 1, 1, 5, 5)])
    (source / "Annotations/e.xml").write_text("<annotation>")
    before = hashes(source)
    run(monkeypatch, source, tmp_path / "out")
    made = content(tmp_path / "out/annotations.json")
    assert boxes(made) == {
        "JPEGImages/a.jpg": [("dog", [0, 0, 40, 30]), ("cat", [4, 5, 1, 1])],
        "JPEGImages/b.jpg": [],
        "JPEGImages/c.jpg": [("dog", [9, 9, 11, 11])],
    }
    text = (tmp_path / "out/import.txt").read_text()
    for line in (
        "3 images (1 without objects), 3 objects, 0 of them with masks, 2 classes: cat 1, dog 2",
        "3 boxes begin at 1 and hold their last pixel",
        "1 images left out, with all in them: the file is missing: d.jpg of ",
        "1 objects left out: no name, or no box of four numbers: ",
        "1 XML files left out: broken, or no <annotation>: ",
        "there are no masks: model.masks=false",
    ):
        assert line in text, line
    assert hashes(source) == before


def test_voc_from_zero(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    voc(tmp_path / "a.xml", [("dog", 0, 0, 40, 30), ("dog", 5, 5, 10, 10)])
    found = read_source(tmp_path, "auto", Rules())
    assert [i.box for i in found.pictures[0].instances] == [[0, 0, 40, 30], [5, 5, 5, 5]]
    assert any("begin at 0" in kind for kind in found.notes.counts)
    found = read_source(tmp_path / "a.xml", "voc", Rules(first_pixel="1"))
    assert [i.box for i in found.pictures[0].instances] == [[0, 0, 40, 30], [4, 4, 6, 6]]


def test_yolo(tmp_path: Path) -> None:
    """Shares of width and height, boxes and polygons, empty and missing files, lines that say nothing."""
    for name in ("images/train/a.jpg", "images/train/b.jpg", "images/val/a.jpg"):
        image(tmp_path / name)
    (tmp_path / "data.yaml").write_text("path: .\nnames:\n  0: dog\n  2: cat\n")
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/train/a.txt").write_text(
        "0 0.5 0.5 1 1\n2 0.25 0.5 0.5 0.2\n0 0.1 0.1 0.9 0.1 0.9 1.0\n2 0.5 0.5 0.1 0.1 0.87\n"
        "7 0.5 0.5 0.1 0.1\n0 20 15 10 10\n0 0.5 0.5\nx y\n\n"
    )
    (tmp_path / "labels/train/b.txt").write_text("")
    (tmp_path / "labels/train/gone.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    found = read_source(tmp_path, "auto", Rules())
    assert found.classes == ["dog", "class 1", "cat"]
    first = found.pictures[0]
    assert [(i.name, i.box) for i in first.instances] == [
        ("dog", [0, 0, 40, 30]),
        ("cat", [0, 12, 20, 6]),
        ("dog", [4, 3, 32, 27]),
        ("cat", [18, 13.5, 4, 3]),
    ]
    assert first.instances[2].mask == [[4, 3, 36, 3, 36, 30]] and first.instances[0].mask is None
    assert [len(picture.instances) for picture in found.pictures] == [4, 0, 0]
    told = Counter[str]()
    for kind, number in found.notes.counts.items():
        told[kind.split(":")[0]] += number
    assert told == {
        "lines have a sixth number, a score as of predictions": 1,
        "lines left out": 4,
        "images have no text file": 1,
        "text files left out, with all in them": 1,
    }


def test_yolo_of_keypoints(tmp_path: Path) -> None:
    """Numbers after the box are points of a pose, and no polygon."""
    image(tmp_path / "a.jpg")
    (tmp_path / "data.yaml").write_text("names: [dog]\nkpt_shape: [2, 3]\n")
    (tmp_path / "a.txt").write_text("0 0.5 0.5 1 1 0.1 0.1 2 0.2 0.2 2\n")
    found = read_source(tmp_path, "auto", Rules())
    assert [(i.box, i.mask) for i in found.pictures[0].instances] == [([0, 0, 40, 30], None)]
    assert "lines have keypoints (kpt_shape): their boxes alone are kept" in found.notes.counts


def test_labelme(tmp_path: Path) -> None:
    """Shapes that are masks, two parts of one object, corners in any order, and shapes that have no area."""
    image(tmp_path / "photos/a.png")
    drawn = io.BytesIO()
    Image.fromarray(np.full((3, 5), 255, np.uint8)).save(drawn, "PNG")
    square = [[2, 2], [8, 2], [8, 8], [2, 8]]
    shapes = [
        {"label": "dog", "points": square, "shape_type": "polygon", "group_id": 1},
        {"label": "dog", "points": [[20, 2], [26, 2], [26, 8]], "shape_type": "polygon", "group_id": 1},
        {"label": "cat", "points": [[30, 20], [10, 12]], "shape_type": "rectangle"},
        {"label": "ball", "points": [[20, 15], [20, 20]], "shape_type": "circle"},
        {"label": "cat", "points": [[4, 6], [8, 8]], "shape_type": "mask",
         "mask": base64.b64encode(drawn.getvalue()).decode()},
        {"label": "dog", "points": [[1, 1]], "shape_type": "point"},
        {"label": "", "points": square},
    ]  # fmt: skip
    made = {"shapes": shapes, "imagePath": "..\\photos\\a.png", "imageWidth": 40, "imageHeight": 30}
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.json").write_text(json.dumps(made))
    found = read_source(tmp_path, "auto", Rules())
    dog, cat, ball, mask = found.pictures[0].instances
    assert dog.mask == [[2, 2, 8, 2, 8, 8, 2, 8], [20, 2, 26, 2, 26, 8]] and dog.box == [2, 2, 24, 6]
    assert cat.box == [10, 12, 20, 8] and cat.mask is None
    assert ball.box == [15, 10, 10, 10] and isinstance(ball.mask, list) and len(ball.mask[0]) == 64
    pixels = coco_mask.decode(mask.mask)
    assert mask.box == [4, 6, 5, 3] and pixels.sum() == 15 and pixels[6:9, 4:9].all()
    assert sum(n for kind, n in found.notes.counts.items() if kind.startswith("shapes left out")) == 2
    whole = coco_content(found.pictures, found.classes, tmp_path)
    areas = [a["area"] for a in whole["annotations"]]
    assert areas[1] == 160 and areas[3] == 15 and 70 < areas[2] < 90  # of the circle, 78.5


def coco(file: Path, categories: list[dict[str, Any]], objects: list[dict[str, Any]], name: str = "a.jpg") -> None:
    """A COCO-style file of one image."""
    rows = [{"id": n, "image_id": 0, "iscrowd": 0, "area": 9.0, **row} for n, row in enumerate(objects)]
    made = {"images": [{"id": 0, "file_name": name, "width": 40, "height": 30}], "annotations": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**made, "categories": categories}))


def test_roboflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one name, each beside its images; category 0 is a heading; merged and dropped classes."""
    categories = [{"id": 0, "name": "cells", "supercategory": "none"}]
    categories += [
        {"id": n, "name": name, "supercategory": "cells"} for n, name in ((1, "red"), (2, "white"), (3, "x"))
    ]
    for split, kind in (("train", 1), ("valid", 2), ("test", 3)):
        image(tmp_path / f"src/{split}/a.jpg")
        polygon = [[1, 1, 9, 1, 9, 9]]
        objects = [{"category_id": kind, "bbox": [1, 1, 8, 8], "segmentation": polygon}]
        coco(tmp_path / f"src/{split}/_annotations.coco.json", categories, objects)
    run(monkeypatch, tmp_path / "src", tmp_path / "plain")
    text = (tmp_path / "plain/import.txt").read_text()
    assert "only the heading of others (Roboflow's category 0): cells" in text and "'drop=[cells]'" in text
    run(monkeypatch, tmp_path / "src", tmp_path / "out", "merge=[blood:red+white]", "drop=[cells, x]")
    made = content(tmp_path / "out/annotations.json")
    kept = [("blood", [1, 1, 8, 8])]
    assert boxes(made) == {"test/a.jpg": [], "train/a.jpg": kept, "valid/a.jpg": kept}
    assert [c["name"] for c in made["categories"]] == ["blood"] and made["annotations"][0]["segmentation"] == polygon
    text = (tmp_path / "out/import.txt").read_text()
    assert "1 objects of the dropped class x: a.jpg" in text and "1 objects of red became blood: a.jpg" in text
    for words, message in (
        (["drop=[gren]"], "gren: none of the classes cells, red, white, x"),
        (["merge=[red]"], "must be new:old"),
        ([], "out: is the source itself"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, tmp_path / ("src" if words else "out"), tmp_path / "out", *words)


def test_boxes_that_cvat_turned(tmp_path: Path) -> None:
    """Refused, since bbox is the box before it was turned; on demand the turned rectangle."""
    image(tmp_path / "images/a.jpg")
    row = {"category_id": 1, "bbox": [10, 10, 10, 4], "segmentation": [], "attributes": {"rotation": 90.0}}
    coco(tmp_path / "annotations/instances_default.json", [{"id": 1, "name": "car"}], [row])
    with pytest.raises(UserError, match=r"1 boxes are turned \(attributes.rotation of CVAT; annotations 0\)"):
        read_source(tmp_path, "auto", Rules())
    found = read_source(tmp_path, "auto", Rules(rotated="polygon"))
    assert found.pictures[0].instances[0].box == [13, 7, 4, 10]
    (tmp_path / "a.xml").write_text("<annotations><image/></annotations>")
    with pytest.raises(UserError, match="CVAT's own XML; export the task as COCO"):
        read_source(tmp_path, "auto", Rules())


def test_sizes_and_orientation(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg", (30, 40), orientation=6)
    voc(tmp_path / "a.xml", [("dog", 1, 1, 40, 30)])  # annotated upright
    found = read_source(tmp_path, "auto", Rules())
    assert (found.pictures[0].width, found.pictures[0].height) == SIZE
    assert "images are turned by EXIF as they were annotated: train with data.exif=apply" in found.notes.counts
    voc(tmp_path / "a.xml", [("dog", 1, 1, 90, 90)], size="<size><width>90</width><height>90</height></size>")
    found = read_source(tmp_path, "auto", Rules())
    assert (found.pictures[0].width, found.pictures[0].height) == (30, 40)
    assert found.pictures[0].instances[0].box == [0, 0, 30, 40]
    assert any(kind.startswith("boxes reach") for kind in found.notes.counts)
    assert any(kind.startswith("images have another size") for kind in found.notes.counts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "holds no annotations"),
        (lambda folder: (folder / "classes.txt").write_text("dog"), "no image with annotations in format yolo"),
        (lambda folder: voc(folder / "a.xml", []), "1 images left out, with all in them: the file is missing"),
        (lambda folder: coco(folder / "a.json", [{"id": 1}], []), "a.json"),
        (
            lambda folder: [voc(folder / "a.xml", []), (folder / "classes.txt").write_text("dog")],
            "holds several formats: choose format=voc or format=yolo",
        ),
    ],
)
def test_sources_that_are_refused(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        read_source(tmp_path, "auto", Rules())
    with pytest.raises(UserError, match="no such file or folder"):
        read_source(tmp_path / "x", "auto", Rules())


# Splits


def pictures(seed: int = 0, count: int = 300) -> list[AnnotatedImage]:
    """Images of a long tail of classes, every third one of a video of five frames."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        name = f"video{n // 15}_frame_{n:05}.jpg" if n % 3 == 0 else f"{rng.integers(1 << 40):x}z.jpg"
        kinds = {int(k) for k in rng.zipf(1.7, 3) if k <= 12}
        made.append(AnnotatedImage(Path(name), 9, 9, [Instance(f"c{k}", [0, 0, 1, 1]) for k in sorted(kinds)]))
    return made


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_split_has_every_class_in_both_and_no_video_in_two(share: float) -> None:
    made = pictures()
    chosen, lines = split_pictures(made, share, 0)
    assert split_pictures(made, share, 0)[0] == chosen != split_pictures(made, share, 1)[0]
    sides: dict[str, set[bool]] = {}
    counts = {side: Counter[str]() for side in (False, True)}
    for picture, val in zip(made, chosen, strict=True):
        sides.setdefault(video_of(picture.file), set()).add(val)
        counts[val].update({instance.name for instance in picture.instances})
    assert all(len(values) == 1 for values in sides.values())
    for name, number in (counts[False] + counts[True]).items():
        assert number < 2 or (counts[True][name] and counts[False][name]), name
        assert abs(counts[True][name] - share * number) <= max(6, 0.5 * share * number), name  # a video has five frames
    assert abs(sum(chosen) - share * len(made)) < 0.5 * share * len(made) and "stay together" in lines[0]


def test_a_split_says_what_it_cannot_do() -> None:
    """One name for all is no video; a class in one image alone is in one part alone."""
    made = [AnnotatedImage(Path(f"IMG_{n}.jpg"), 9, 9, [Instance("often", [0, 0, 1, 1])]) for n in range(20)]
    made[3].instances.append(Instance("once", [0, 0, 1, 1]))
    chosen, lines = split_pictures(made, 0.2, 0)
    assert sum(chosen) == 4 and any("begin with IMG_" in line for line in lines)
    assert any(line.startswith("split: no image in val: once") for line in lines)


def test_copies_of_one_photo_have_one_name() -> None:
    names = ("x/cat_7_jpg.rf.0a1b2c3d4e5f.jpg", "x/cat_7_jpg.rf.ffffffffff.jpg", "x/cat_8.png")
    assert {video_of(Path(name)) for name in names} == {"x/cat_"} and video_of(Path("y/12.jpg")) == "y/#"
