"""scripts/predict.py as its user starts it: files and folders in, pictures and JSON out; and what is drawn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from loce.checkpoint.load import Checkpoint, load_model, weights_hash
from loce.engine.drawing import draw_objects
from loce.engine.pictures import Limits, worth_drawing
from loce.utils.classes import GROUP_RGB
from tests.conftest import random_run, stats_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, and images of several kinds in a folder."""
    path = tmp_path_factory.mktemp("predict")
    random_run(path)
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    (path / "images/deep").mkdir(parents=True)
    cv2.imwrite(str(path / "images/colour.jpg"), noise)
    cv2.imwrite(str(path / "images/grey.PNG"), noise[:, :, 0])
    cv2.imwrite(str(path / "images/deep/sixteen.png"), noise.astype(np.uint16) * 256)
    cv2.imwrite(str(path / "images/deep/alpha.png"), np.dstack([noise, noise[:, :, :1]]))
    (path / "images/notes.txt").write_text("no image")
    return path


def predict(folder: Path, *words: str, code: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts/predict.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_folder_of_images(folder: Path) -> None:
    text = predict(folder, "run", "images", "output=out", "threshold=0.0", "most=3")
    assert "wrote 4 pictures" in text
    pictures = {str(p.relative_to(folder / "out")) for p in (folder / "out").rglob("*.png")}
    assert pictures == {
        "colour_predicted.png",
        "grey_predicted.png",
        "deep/sixteen_predicted.png",
        "deep/alpha_predicted.png",
    }
    for name in pictures:
        assert cv2.imread(str(folder / "out" / name)).shape == (9 * 50, 9 * 70, 3)  # enlarged, to be readable
    records = json.loads((folder / "out/predictions.json").read_text())
    assert {record["file"] for record in records} == {
        *("images/colour.jpg", "images/grey.PNG", "images/deep/sixteen.png", "images/deep/alpha.png")
    }
    for file in {record["file"] for record in records}:
        mine = [record for record in records if record["file"] == file]
        assert [r["score"] for r in mine] == sorted((r["score"] for r in mine), reverse=True)
        assert 1 <= sum(record["drawn"] for record in mine) <= 3 < len(mine)
        assert {record["name"] for record in mine} <= set(stats_of(6).names)
        assert coco_mask.decode(mine[0]["segmentation"]).shape == (50, 70)


def test_the_makefile_takes_paths_with_spaces(folder: Path) -> None:
    (folder / "my photos").mkdir()
    (folder / "my photos/a.jpg").write_bytes((folder / "images/colour.jpg").read_bytes())
    words = [f"CKPT={folder / 'run'}", f"IMAGES={folder / 'my photos'}", f"OUT={folder / 'made'}"]
    line = ["make", "-C", str(ROOT), "-o", "setup", f"PY={sys.executable}", "predict", *words]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "made/a_predicted.png").is_file() and (folder / "made/predictions.json").is_file()


def test_the_same_as_the_model_in_python(folder: Path) -> None:
    predict(folder, "run", "images/colour.jpg", "output=one")
    records = json.loads((folder / "one/predictions.json").read_text())
    image = cv2.cvtColor(cv2.imread(str(folder / "images/colour.jpg")), cv2.COLOR_BGR2RGB)
    found = load_model(folder / "run")([torch.from_numpy(image).permute(2, 0, 1)])[0]
    np.testing.assert_allclose([record["score"] for record in records], found["scores"].numpy(), atol=1e-6)
    for record, mask in zip(records, found["masks"].numpy(), strict=True):
        np.testing.assert_array_equal(coco_mask.decode(record["segmentation"]), mask)


def test_nothing_above_the_threshold_says_what_would_draw_more(folder: Path) -> None:
    assert "draws more" in predict(folder, "run", "images/colour.jpg", "output=none", "threshold=1")


def test_thresholds_of_the_evaluation_are_used_and_told(folder: Path) -> None:
    """Those of these very weights; without any, one number, and it is said which."""
    text = predict(folder, "run", "images/colour.jpg", "output=own")
    assert "threshold 0.3 for every class: these weights have no evaluation that chose any" in text
    every = json.loads((folder / "own/predictions.json").read_text())
    least = {1: 2.0, **dict.fromkeys(range(3, 12, 2), 0.0)}  # none of the first class, all of the others
    evaluation = folder / "run/eval"
    evaluation.mkdir()
    (evaluation / "evaluation.json").write_text('{"annotations": "mine/val.json"}')
    rows = "".join(f"{number},{threshold}\n" for number, threshold in least.items())
    (evaluation / "per_category.csv").write_text(f"id,threshold\n{rows}")
    weights = weights_hash(Checkpoint.open(folder / "run").detector())
    try:
        (evaluation / "origin.txt").write_text(f"weights {weights}, head softmax, mine/val.json (sha256 0)")
        text = predict(folder, "run", "images/colour.jpg", "output=own", "overlap=1", "most=1000")
    finally:
        (evaluation / "origin.txt").write_text("weights 0, of before")
    assert "threshold of each class: the best F1 on mine/val.json (run/eval): 0 to 2, median 0" in text
    found = json.loads((folder / "own/predictions.json").read_text())
    drawn = [record["category_id"] for record in found if record["drawn"]]
    assert len(drawn) == sum(record["category_id"] != 1 for record in every) and 1 not in drawn


def test_what_lies_in_a_folder(folder: Path) -> None:
    """Links are followed, also in circles; hidden files are skipped, other kinds named; no image is taken twice."""
    noise = np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    trip, album = folder / "trip", folder / "album"
    (trip / "day").mkdir(parents=True)
    (trip / ".thumbnails").mkdir()
    album.mkdir()
    for file in (trip / "one.png", trip / ".thumbnails/one.png", album / "two.png"):
        cv2.imwrite(str(file), noise)
    for suffix in (".jfif", ".JPE"):
        (trip / f"day/photo{suffix}").write_bytes(cv2.imencode(".jpg", noise)[1].tobytes())
    (trip / "._one.png").write_bytes(b"\0\5\x16\7")
    for number in range(7):
        (trip / f"day/live{number}.heic").write_bytes(b"ftypheic")
    (trip / "album").symlink_to(album)
    (album / "back").symlink_to(trip)
    expected = ["trip/album/two.png", "trip/day/photo.JPE", "trip/day/photo.jfif", "trip/one.png"]
    text = predict(folder, "run", "trip", "trip/one.png", "album/two.png", "output=trip/found")
    assert "wrote 4 pictures" in text and "left out: 7 files of other kinds (7 .heic): trip/day/live0.heic, " in text
    assert "live4.heic, ..." in text and "live5" not in text
    records = json.loads((trip / "found/predictions.json").read_text())
    assert sorted({record["file"] for record in records}) == expected
    assert (trip / "found/album/two_predicted.png").is_file()
    assert (trip / "found/day/photo.JPE_predicted.png").is_file()  # there is a photo.jfif, too
    for output in ("trip/found", "trip/other", "trip"):  # the second and third run see the pictures of those before
        text = predict(folder, "run", "trip", f"output={output}")
        records = json.loads((folder / output / "predictions.json").read_text())
        assert sorted({record["file"] for record in records}) == expected
    assert "left out: 8 pictures of earlier predictions" in text
    assert "wrote 4 pictures" in predict(folder, "run", "trip", "output=trip") and not list(trip.rglob("*ed_pred*"))


def test_what_is_no_file_in_a_folder(folder: Path) -> None:
    """Links that lead nowhere or to themselves, and a pipe, which would be waited for: none is an image."""
    odd = folder / "odd"
    odd.mkdir()
    (odd / "one.jpg").write_bytes((folder / "images/colour.jpg").read_bytes())
    (odd / "gone.png").symlink_to("/nowhere/gone.png")
    (odd / "self.png").symlink_to(odd / "self.png")
    os.mkfifo(odd / "pipe.png")
    text = predict(folder, "run", "odd", "output=odd/found")
    assert "wrote 1 pictures" in text and "left out: 3 files of other kinds (3 .png): odd/gone.png, " in text
    assert "odd/found: no image in this folder, but 1 pictures of earlier" in predict(
        folder, "run", "odd/found", code=2
    )
    for name, what in (("odd/pipe.png", "is no file"), ("odd/self.png", "is no file"), ("x" * 300, "there is no such")):
        assert f"{name}: {what}" in predict(folder, "run", name, code=2)


def test_no_image_is_overwritten(folder: Path) -> None:
    (folder / "pair").mkdir()
    for name in ("a.jpg", "a_predicted.png"):
        (folder / "pair" / name).write_bytes((folder / "images/colour.jpg").read_bytes())
    text = predict(folder, "run", "pair", "output=pair", code=2)
    assert "pair/a.jpg: its picture would be pair/a_predicted.png, which is an image itself" in text
    assert (folder / "pair/a_predicted.png").read_bytes() == (folder / "images/colour.jpg").read_bytes()


def test_a_bad_image_stops_none_of_the_others(folder: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    text = predict(folder, "run", "broken.jpg", "images/colour.jpg", "output=some", code=2)
    assert "wrote 1 pictures" in text and "1 of 2 images could not be read" in text and "broken.jpg" in text
    assert len(list((folder / "some").rglob("*.png"))) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run",), "usage: predict.py CHECKPOINT IMAGE_OR_FOLDER"),
        (("run", "nowhere.jpg", "elsewhere"), "elsewhere: there is no such file or folder"),
        (("run", "run"), "run: no image in this folder"),
        (("run", "images", "output=tiny.yaml/x"), "tiny.yaml/x: no files can be written there (Not a directory)"),
        (("run", "images", "output=tiny.yaml"), "choose another with output="),
        (("images", "images"), "images: no finished checkpoint there"),
        (("run", "images", "treshold=0.1"), "did you mean threshold?"),
        (("run", "images", "threshold=high"), "threshold = high: must be auto, or a number >= 0 and <= 1"),
    ],
)
def test_mistakes(folder: Path, words: tuple[str, ...], message: str) -> None:
    assert message in predict(folder, *words, code=2)


def test_worth_drawing_keeps_the_best_of_each_place() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [40, 40, 50, 50]], np.float32)
    scores = np.array([0.5, 0.9, 0.4, 0.1], np.float32)
    labels = np.array([0, 1, 1, 0])
    assert worth_drawing(boxes, scores, labels, Limits(0.3, 5, 0.7)).tolist() == [1, 2]
    assert worth_drawing(boxes, scores, labels, Limits(0.3, 1, 0.7)).tolist() == [1]
    assert worth_drawing(boxes, scores, labels, Limits(0.0, 5, 1.0)).tolist() == [1, 0, 2, 3]
    assert worth_drawing(boxes, scores, labels, Limits(np.array([0.05, 0.5]), 5, 1.0)).tolist() == [1, 0, 3]


def test_masks_are_tinted_and_the_image_is_left_alone() -> None:
    image = np.full((600, 600, 3), 200, np.uint8)
    mask = np.zeros((600, 600), np.uint8, order="F")
    mask[30:50, 30:50] = 1
    boxes = np.array([[30, 30, 50, 50]], np.float32)
    drawn = draw_objects(image, boxes, [coco_mask.encode(mask)], ["a 0.50"], ["r"], [0])
    assert (image == 200).all() and drawn.shape == image.shape
    expected = (0.55 * 200 + 0.45 * np.array(GROUP_RGB["r"])).astype(np.uint8)
    np.testing.assert_array_equal(drawn[40, 40], expected)
    assert (drawn[55, 10] == 200).all()


def test_letters_stay_inside_a_small_image() -> None:
    image = np.zeros((24, 24, 3), np.uint8)
    drawn = draw_objects(image, np.array([[20, 0, 24, 4]], np.float32), [], ["a very long name ✓"], ["c"], [0])
    assert drawn.shape == (480, 480, 3) and drawn.any()
