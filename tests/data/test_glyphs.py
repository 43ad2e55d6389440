"""A Glyph-LVIS folder as a whole: bytes, LVIS fields, readers, and what happens on a second run."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lvis import LVIS
from PIL import Image
from pycocotools import mask as coco_mask

from loce.config import read_options
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.glyphs.characters import CHARACTERS
from loce.data.glyphs.make import CONFLICTS, PARTIAL, STAMP, GlyphOptions, make_glyphs
from loce.utils.errors import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_glyphs.py"
SPLITS = ("train", "val")


def tiny(out: Path, **changes: Any) -> GlyphOptions:
    options = GlyphOptions(
        out=str(out), classes=50, train_images=150, val_images=60, size=64, smallest=0.25, seed=3, workers=1
    )
    return dataclasses.replace(options, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glyphs") / "set"
    make_glyphs(tiny(folder))
    return folder


@pytest.fixture(scope="module")
def records(made: Path) -> dict[str, dict[str, Any]]:
    return {split: json.loads((made / "annotations" / f"{split}.json").read_text()) for split in SPLITS}


def test_same_bytes_with_two_processes(made: Path, tmp_path: Path) -> None:
    make_glyphs(tiny(tmp_path / "again", workers=2))
    assert contents(tmp_path / "again") == contents(made)


def test_another_seed_draws_another_set(tmp_path: Path) -> None:
    make_glyphs(tiny(tmp_path / "a", train_images=30, val_images=25))
    make_glyphs(tiny(tmp_path / "b", train_images=30, val_images=25, seed=4))
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert first.keys() == second.keys()
    assert not any(first[name] == second[name] for name in first)


def test_version_1_is_drawn_byte_for_byte(made: Path) -> None:
    """Annotations, images and stamp: what records of Glyph-50 were trained on can be drawn again."""
    parts = [made / "annotations", made / "val2017", made / STAMP]
    files = [file for part in parts for file in (sorted(part.iterdir()) if part.is_dir() else [part])]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert digest.startswith("7c008d297a22f177"), "another version of a library, or of the set"


def test_version_2_with_any_number_of_processes(tmp_path: Path) -> None:
    """Drawn alike; labels as planned; a class is verified absent by its group."""
    changes = {"version": 2, "train_images": 40, "val_images": 25, "largest": 0.6, "most_objects": 8}
    for workers in (1, 2):
        make_glyphs(tiny(tmp_path / str(workers), workers=workers, **changes))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    val = json.loads((tmp_path / "1/annotations/val.json").read_text())
    shown = {(a["image_id"], a["category_id"]) for a in val["annotations"]}
    assert all((image["id"], c) not in shown for image in val["images"] for c in image["neg_category_ids"])
    assert json.loads((tmp_path / "1" / STAMP).read_text())["version"] == 2


def test_files(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == sorted(
        ["annotations", "train2017", "val2017", "samples.png", STAMP]
    )
    assert len(list((made / "train2017").iterdir())) == 150
    assert len(list((made / "val2017").iterdir())) == 60
    page = np.asarray(Image.open(made / "samples.png"))
    assert page.shape[0] > 1000
    assert page.std() > 30


def test_images(made: Path, records: dict[str, dict[str, Any]]) -> None:
    ids = []
    for split in SPLITS:
        for image in records[split]["images"]:
            assert image["coco_url"].startswith("http://glyphs/")
            path = made / "/".join(image["coco_url"].split("/")[-2:])
            assert path.parent.name == f"{split}2017"
            assert "file_name" not in image
            with Image.open(path) as stored:
                assert stored.size == (image["width"], image["height"]) == (64, 64)
            ids.append(image["id"])
    assert len(set(ids)) == 210


def test_categories(records: dict[str, dict[str, Any]]) -> None:
    categories = records["train"]["categories"]
    assert categories == records["val"]["categories"]
    ids = [category["id"] for category in categories]
    assert ids == sorted(set(ids))
    assert max(ids) > len(ids)
    names = [category["name"] for category in categories]
    assert names == sorted(set(names))
    assert {category["synonyms"][0] for category in categories} == set(CHARACTERS[:50])
    annotations = records["train"]["annotations"]
    instances = Counter(annotation["category_id"] for annotation in annotations)
    images = Counter(c for c, _ in {(annotation["category_id"], annotation["image_id"]) for annotation in annotations})
    for category in categories:
        assert category["image_count"] == images[category["id"]] >= 1
        assert category["instance_count"] == instances[category["id"]]
        count = category["image_count"]
        assert category["frequency"] == ("r" if count <= 10 else "c" if count <= 100 else "f")
    assert {annotation["category_id"] for annotation in records["val"]["annotations"]} == set(ids)


def test_masks_of_an_image_do_not_overlap(records: dict[str, dict[str, Any]]) -> None:
    kinds = Counter()
    for split in SPLITS:
        seen: dict[int, np.ndarray] = {}
        for annotation in records[split]["annotations"]:
            segmentation = annotation["segmentation"]
            kinds[type(segmentation)] += 1
            if isinstance(segmentation, list):
                segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, 64, 64))
            mask = coco_mask.decode(segmentation).astype(bool)
            rows, columns = np.nonzero(mask)
            width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
            assert annotation["bbox"] == [columns.min(), rows.min(), width, height]
            assert annotation["area"] == mask.sum() >= 20
            covered = seen.setdefault(annotation["image_id"], np.zeros((64, 64), bool))
            assert not (covered & mask).any()
            covered |= mask
        ids = [annotation["id"] for annotation in records[split]["annotations"]]
        assert ids == list(range(1, len(ids) + 1))
    assert kinds[list] > 0.5 * kinds.total()
    assert kinds[dict] > 0.1 * kinds.total()


def test_federated_fields(records: dict[str, dict[str, Any]]) -> None:
    not_exhaustive = 0
    for split in SPLITS:
        present: dict[int, Counter] = {image["id"]: Counter() for image in records[split]["images"]}
        for annotation in records[split]["annotations"]:
            present[annotation["image_id"]][annotation["category_id"]] += 1
        for image in records[split]["images"]:
            here, absent = present[image["id"]], set(image["neg_category_ids"])
            assert not absent & set(here)
            assert len(absent) == len(image["neg_category_ids"]) == round(0.25 * (50 - len(here)))
            assert set(image["not_exhaustive_category_ids"]) <= set(here)
            not_exhaustive += len(image["not_exhaustive_category_ids"])
    assert 0 < not_exhaustive < 0.1 * 210


def test_lvis_package_reads_it(made: Path, records: dict[str, dict[str, Any]]) -> None:
    lvis = LVIS(str(made / "annotations" / "val.json"))
    assert len(lvis.get_cat_ids()) == 50
    assert len(lvis.get_img_ids()) == 60
    for annotation in records["val"]["annotations"][:50]:
        assert lvis.ann_to_mask(lvis.anns[annotation["id"]]).sum() == annotation["area"]


def test_our_reader_uses_every_annotation(made: Path, records: dict[str, dict[str, Any]]) -> None:
    annotations = LVISAnnotations.open(made / "annotations" / "train.json")
    assert len(annotations.train_rows) == len(records["train"]["annotations"])
    assert annotations.stats.image_counts.tolist() == [c["image_count"] for c in records["train"]["categories"]]
    assert annotations.image_path(0, made).exists()


def test_second_run_does_nothing(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    make_glyphs(tiny(made, workers=2))
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_other_options_in_the_same_folder_are_refused(made: Path) -> None:
    before = contents(made)
    with pytest.raises(UserError, match=r"seed = 3 there, 5 wanted; size = 64 there, 96 wanted; choose another out="):
        make_glyphs(tiny(made, seed=5, size=96))
    with pytest.raises(UserError, match=r"skip = None there, 3 wanted"):
        make_glyphs(tiny(made, skip=3))
    assert contents(made) == before


def test_folder_of_the_user_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017" / "000000000001.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match="holds train2017, but no finished set"):
        make_glyphs(tiny(tmp_path))
    assert contents(tmp_path) == {"train2017/000000000001.jpg": b"mine"}


def test_killed_run_leaves_nothing_that_looks_finished(made: Path, tmp_path: Path) -> None:
    words = ["classes=50", "train_images=5000", "workers=1"]
    process = subprocess.Popen([sys.executable, str(SCRIPT), f"out={tmp_path}", *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / PARTIAL).glob("train2017/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [PARTIAL]
    make_glyphs(tiny(tmp_path))
    assert contents(tmp_path) == contents(made)


def test_script_says_all_that_is_wrong() -> None:
    words = ["classes=1300", "smallest=0.5", "largest=0.2", "imgages=3"]
    result = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for text in ("out is missing", "classes = 1300", "<= 1203", "imgages"):
        assert text in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smallest=0.5", "largest=0.2"], "smallest must not be above largest"),
        (["size=64"], "objects under 16 pixels"),
        (["version=2", "negatives=0.5"], "is of version 1"),
        (["train_images=10"], "no training image"),
        (["val_images=19"], "no validation image"),
    ],
)
def test_impossible_options(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_options(GlyphOptions, ["out=somewhere", *words], CONFLICTS)
