"""Small data sets with one defect each: what is told, and with which exit code."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from loce.data.annotations.lvis import LVISAnnotations
from loce.data.check import Report, check_pair, check_set, suggested_bounds
from scripts.check_data import read_words
from tests.data.made_annotations import as_format, content

ROOT = Path(__file__).resolve().parent.parent.parent
ALL = 10**9


def made_set(kind: str = "lvis_v1") -> dict[str, Any]:
    """8 images and their annotations, all of which training can use."""
    made = as_format(content(), kind)
    for row in made["annotations"]:
        row["bbox"] = [round(side, 2) for side in row["bbox"]]
    return made


def look(path: str, images: Path | str = "", sample: int = ALL) -> Report:
    report = Report()
    check_set(path, str(images), report, sample, workers=1)
    return report


def told(report: Report, label: str) -> list[str]:
    """The texts of the lines with a label."""
    return [line[14:].strip() for line in report.lines if line.startswith(f"  {label} ")]


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and content of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p): (p.stat().st_mtime_ns, hashlib.md5(p.read_bytes()).hexdigest()) for p in files}


@pytest.mark.parametrize("kind", ["lvis_v1", "lvis_v0.5", "coco"])
def test_a_good_set_has_no_problems_and_is_left_as_it_is(kind, write, images, tmp_path):
    made = made_set(kind)
    path = write(made)
    folder = images(LVISAnnotations.open(path))
    before = snapshot(tmp_path)
    report = look(path, folder)
    assert report.problems == []
    assert snapshot(tmp_path) == before
    total = len(made["annotations"])
    assert told(report, "images") == ["8, of which training uses 8"]
    assert told(report, "annotations") == [f"{total}, of which training uses {total}"]
    assert told(report, "decoded") == ["8 of 8 images, 0 cannot be used"]
    split = "train2017" if kind == "lvis_v1" else ""
    assert told(report, "folder") == [f"{folder / split}: 8 images, 0 missing"]


def test_groups_and_small_classes_are_counted_as_plain_python_counts_them(write):
    made = made_set()
    made["categories"].append({"id": 99, "name": "unicorn", "frequency": "r", "image_count": 0, "instance_count": 0})
    report = look(write(made))
    rows = made["annotations"]
    of = {c["id"]: sum(row["category_id"] == c["id"] for row in rows) for c in made["categories"]}
    expected = []
    for group in "rcf":
        members = [c["id"] for c in made["categories"] if c["frequency"] == group]
        expected.append(f"{group}: {len(members)} with {sum(of[i] for i in members)} instances")
    assert told(report, "5 classes") == ["; ".join(expected)]
    few = [c["id"] for c in made["categories"] if of[c["id"]] < 5]
    text = told(report, "under 5")[0]
    assert text.startswith(f"{len(few)} classes, 1 with none: unicorn (0)")
    assert told(report, "no instance") == ["unicorn: data.drop_empty=true trains without them, in both stages"]
    for category in made["categories"]:
        assert (f"{category['name']} ({of[category['id']]})" in text) == (category["id"] in few)


def test_bounds_are_suggested_where_a_group_would_be_empty(write):
    made = made_set("coco")
    assert suggested_bounds(np.array([70, 300, 90, 1432, 0, 800, 500])) == (90, 500)
    assert suggested_bounds(np.array([7, 8, 9, 60, 60, 60, 60])) == (8, 9)  # no third is above the most frequent
    assert suggested_bounds(np.array([5, 5, 5, 9])) is None and suggested_bounds(np.array([5, 9])) is None
    counts = sorted(LVISAnnotations.open(write(made)).stats.image_counts)
    bounds = suggested_bounds(np.array(counts))
    assert bounds is not None
    text = f"data.rare_max={bounds[0]} data.common_max={bounds[1]}, in both stages"
    assert told(look(write(made)), "no classes")[0].endswith(text)
    assert told(look(write(made)), "not done") and not told(look(write(made_set())), "no classes")


def test_missing_images_are_counted_by_folder_with_where_they_come_from(write, images):
    made = made_set()
    for image in made["images"][:3]:
        image["coco_url"] = image["coco_url"].replace("train2017", "val2017")
    made["images"][7]["coco_url"] = "http://elsewhere.org/own/x.jpg"
    annotations = LVISAnnotations.open(write(made))
    folder = images(annotations)
    for index in (0, 2, 5, 7):
        (folder / annotations.name(index)).unlink()
    report = look(annotations.path, folder)
    assert told(report, "folder") == [
        f"{folder / 'own'}: 1 images, 1 missing",
        f"{folder / 'train2017'}: 4 images, 1 missing",
        f"{folder / 'val2017'}: 3 images, 2 missing",
    ]
    own, train, val = report.problems
    assert f"1 of 1 images are missing in {folder / 'own'} (the first: x.jpg). Put or link them there" in own
    assert "1 of 4 images are missing" in train and "zips/train2017.zip" in train and "make data" in train
    assert "2 of 3 images are missing" in val and "zips/val2017.zip" in val
    assert Path(annotations.name(0)).name in val
    assert told(report, "decoded") == ["4 of 8 images, 0 cannot be used"]


def test_no_image_folder_at_all(write, tmp_path):
    report = look(write(made_set()), tmp_path / "nowhere")
    assert len(report.problems) == 1 and "8 of 8 images are missing" in report.problems[0]


def test_the_folder_of_the_images_itself_may_be_given(write, images):
    annotations = LVISAnnotations.open(write(made_set()))
    folder = images(annotations) / "train2017"
    (folder / Path(annotations.name(4)).name).unlink()
    report = look(annotations.path, folder)
    assert told(report, "folder") == [f"{folder}: 8 images, 1 missing"]
    assert f"missing in {folder} (" in report.problems[0] and f"train2017.zip in {folder.parent}," in report.problems[0]


def test_damaged_images_and_other_sizes_are_named(write, images):
    annotations = LVISAnnotations.open(write(made_set()))
    folder = images(annotations)
    paths = [folder / annotations.name(index) for index in range(8)]
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    paths[2].write_bytes(b"<html>")
    height, width = annotations.image_sizes[6].tolist()
    assert height != width
    cv2.imwrite(str(paths[6]), np.zeros((width, height, 3), np.uint8))
    report = look(annotations.path, folder)
    assert told(report, "decoded") == ["8 of 8 images, 3 cannot be used"]
    (problem,) = report.problems
    assert f"{paths[1]}: damaged" in problem and f"{paths[2]}: damaged" in problem
    assert f"{paths[6]}: is {height} x {width} pixels" in problem and "turned by 90 degrees they agree" in problem


@pytest.mark.parametrize(("sample", "looked"), [(0, 0), (1, 1), (3, 3), (8, 8), (50, 8)])
def test_a_sample_is_spread_over_the_file(sample, looked, write, images):
    annotations = LVISAnnotations.open(write(made_set()))
    folder = images(annotations)
    for index in (0, 7):
        (folder / annotations.name(index)).write_bytes(b"damaged")
    report = look(annotations.path, folder, sample)
    damaged = {0: 0, 1: 1}.get(sample, 2)  # the first and the last are looked at
    assert told(report, "decoded") == [f"{looked} of 8 images, {damaged} cannot be used"]


def test_boxes_over_the_border_and_what_training_leaves_out(write):
    made = made_set("coco")
    rows = made["annotations"]
    rows += [{**row, "id": row["id"] + 1000} for row in rows[:6]]  # no image loses its last one
    sizes = {image["id"]: (image["width"], image["height"]) for image in made["images"]}
    width, _ = sizes[rows[0]["image_id"]]
    rows[0]["bbox"] = [width - 10, 0, 11.5, 5]  # 1.5 over the right border
    rows[1]["bbox"] = [-0.9, 0, 10, 10]  # within a pixel
    rows[2]["bbox"] = [5, 5, 0, 7]
    rows[3]["bbox"] = [5, 5, 20, None]
    rows[4]["iscrowd"] = 1
    rows[5]["area"] = 0
    report = look(write(made))
    assert report.problems == []
    assert told(report, "boxes") == ["1 reach more than 1 pixel over their image's border (they are cut there)"]
    assert sorted(told(report, "left out")) == [
        f"1 annotations whose area is not positive (where none is given, it is computed) (first: {rows[5]['id']})",
        f"1 boxes that are not four numbers (first: {rows[3]['id']})",
        f"1 boxes under 1 pixel wide or high (first: {rows[2]['id']})",
        f"1 crowd regions (first: {rows[4]['id']})",
    ]
    assert "frequency: rare" in told(report, "no field")[1] and "neg_category_ids" in told(report, "no field")[0]
    (twice,) = told(report, "twice")  # four of the six copies have another box
    assert twice.startswith("2 annotations repeat another's image, class and box")
    assert told(report, "annotations") == [f"{len(rows)}, of which training uses {len(rows) - 4}"]


def test_corners_in_place_of_width_and_height(write):
    made = made_set()
    for row in made["annotations"]:
        x, y, width, height = row["bbox"]
        row["bbox"] = [x, y, x + width, y + height]
    (problem,) = look(write(made)).problems
    assert "must be x, y, width, height in pixels; are these corners" in problem


def test_a_file_that_cannot_be_read_is_a_problem(write, tmp_path):
    assert "the JSON ends too early" in look(write(json.dumps(made_set())[:-20])).problems[0]
    problem = look(str(tmp_path / "no.json")).problems[0]
    assert "there is no such annotation file" in problem and "make data" not in problem
    problem = look(str(tmp_path / "lvis_v0.5_val.json")).problems[0]
    assert "there is no such annotation file" in problem and "make data VERSION=0.5" in problem


def test_an_image_listed_twice(write):
    made = made_set("coco")
    made["images"][3]["file_name"] = made["images"][5]["file_name"]
    (problem,) = look(write(made)).problems
    assert f"1 image files are listed more than once ({made['images'][5]['file_name']})" in problem


def test_a_set_that_training_cannot_use(write):
    made = made_set() | {"annotations": []}
    assert "training could use none of its images" in look(write(made)).problems[0]


def pair(write, train: Any, val: Any, val_images: str = "images") -> Report:
    report = Report()
    files = [LVISAnnotations.open(write(made, name)) for made, name in ((train, "train.json"), (val, "val.json"))]
    check_pair(*files, "images", val_images, report)
    return report


def renamed(made: dict[str, Any]) -> dict[str, Any]:
    """The same set of other images."""
    for image in made["images"]:
        image["coco_url"] = image["coco_url"].replace("train2017/", "val2017/9")
    return made


def test_a_pair_of_files(write):
    val = renamed(made_set())
    report = pair(write, made_set(), val)
    assert report.problems == []
    assert told(report, "images") == ["0 in both"]
    assert told(report, "classes") == ["the same; 0 have no validation instance, 0 only those"]


def test_classes_that_only_one_file_has_instances_of(write):
    train, val = made_set(), renamed(made_set())
    train["annotations"] = [row for row in train["annotations"] if row["category_id"] != 7]
    val["annotations"] = [row for row in val["annotations"] if row["category_id"] not in (3, 20)]
    report = pair(write, train, val)
    assert told(report, "classes") == ["the same; 2 have no validation instance, 1 only those"]
    assert told(report, "no AP") == ["thing 3, thing 20"] and told(report, "never seen") == ["thing 7"]


def test_images_in_both_files(write):
    train, val = made_set(), renamed(made_set())
    val["images"][4]["coco_url"] = train["images"][2]["coco_url"]
    (problem,) = pair(write, train, val).problems
    assert "1 images are in" in problem and train["images"][2]["coco_url"].rpartition("/")[2] in problem
    assert pair(write, train, val, "other images").problems == []  # files of one name in two folders


def test_one_file_for_both_is_said_and_allowed(write):
    path = write(made_set())
    report = Report()
    check_pair(LVISAnnotations.open(path), LVISAnnotations.open(path), "images", "images", report)
    assert report.problems == [] and told(report, "images") == ["the same file for both"]


def test_other_classes(write):
    val = renamed(made_set())
    val["categories"] = val["categories"][::-1]
    (problem,) = pair(write, made_set(), val).problems
    assert "its categories are not those of" in problem and "train.json" in problem


def script(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/check_data.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_script_on_a_good_set_and_on_a_config_with_problems(write, images, tmp_path):
    path = write(made_set())
    folder = images(LVISAnnotations.open(path))
    good = script(path, f"images={folder}", "decode=all", "workers=1")
    assert good.returncode == 0, good.stderr
    assert good.stdout.endswith("nothing to mend\n") and "decoded      8 of 8 images" in good.stdout

    val = renamed(made_set())
    val["categories"].pop()
    val["annotations"] = [row for row in val["annotations"] if row["category_id"] != 1]
    config = tmp_path / "own.yaml"
    config.write_text(f"data:\n  train_annotations: {path}\n  train_images: {folder}\n  val_images: {folder}\n")
    bad = script(config, f"data.val_annotations={write(val, 'val.json')}", "sample=2")
    assert bad.returncode == 2 and "Traceback" not in bad.stderr
    assert "2 problems" in bad.stderr and "8 of 8 images are missing" in bad.stderr
    assert "3 categories here, 4 there" in bad.stderr
    assert "decoded      2 of 8 images" in bad.stdout and "nothing to mend" not in bad.stdout


def test_a_file_alone_is_checked_with_options_of_a_run(write):
    made = made_set()
    for row in made["annotations"]:
        del row["segmentation"]
    path = write(made)
    found = {}
    for word in ("data.keep_empty=true", "model.masks=false", "data.without_mask=box"):
        _, pairs, config = read_words([path, word])
        check_set(*pairs[0], report := Report(), 0, config=config)
        found[word] = "\n".join([*report.lines, *report.problems])
    assert "segmentation missing" in found["data.keep_empty=true"] and "refuse" in found["data.keep_empty=true"]
    assert "left out" not in found["model.masks=false"] and "refuse" not in found["model.masks=false"]
    assert (
        "their box is the mask" in found["data.without_mask=box"] and "left out" not in found["data.without_mask=box"]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage1.yaml", "annotations=a.json"], "stage1.yaml: does not go with annotations=a.json"),
        (["images=x"], "needs annotations="),
        (["a.json", "b.json", "c.json"], "one file, or one for training and one for validation"),
        (["a.json", "images=x", "recipe=mine.yaml"], "recipe=: needs TRAIN.json VAL.json images=DIR"),
        (["decode=some"], "decode = some"),
    ],
)
def test_wrong_words_of_the_script(words, message):
    done = script(*words)
    assert done.returncode == 2 and message in done.stderr
