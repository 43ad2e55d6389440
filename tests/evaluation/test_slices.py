"""Subsets of the images, and slices by attributes: the numbers are those of the images alone, and say so."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loce.evaluation import evaluate_lvis, load_annotations, read_results
from loce.evaluation.annotations import only_images
from loce.evaluation.bootstrap import tally
from loce.evaluation.comparison import compare, compare_folders, slice_differences
from loce.evaluation.lvis_ap import evaluate_loaded
from loce.evaluation.matching import PROTOCOLS
from loce.evaluation.report import evaluate_and_report
from loce.evaluation.slices import slice_numbers
from loce.utils.errors import UserError
from tests.evaluation.cases import random_case
from tests.evaluation.test_report import save, script


def without(truth: dict[str, Any], results: list[dict[str, Any]], images: list[int]) -> tuple[Any, Any]:
    """The slow twin: a file of some images alone."""
    kept = {
        **truth,
        "images": [i for i in truth["images"] if i["id"] in images],
        "annotations": [a for a in truth["annotations"] if a["image_id"] in images],
    }
    return kept, [d for d in results if d["image_id"] in images]


@pytest.mark.parametrize("protocol", ["lvis", "pool", "coco"])
def test_a_slice_is_an_evaluation_of_its_images(protocol: str) -> None:
    for seed in range(20):
        truth, results = random_case(seed, crowded=seed % 5 == 0)
        evaluation = evaluate_lvis(truth, results, protocol=protocol)
        ids = evaluation.truth.image_ids
        chosen = np.arange(0, len(ids), 2)
        row = slice_numbers(tally(evaluation, {("half", "yes"): chosen}), resamples=5)[0]
        alone = evaluate_lvis(*without(truth, results, ids[chosen].tolist()), protocol=protocol)
        for name in ("AP", "APr", "APc", "APf"):
            assert row[name] == pytest.approx(alone.metrics[name], abs=1e-6)
        assert row["ECE"] == pytest.approx(alone.calibration["ECE"], abs=1e-5)
        assert (row["images"], row["objects"]) == (len(chosen), alone.matches.objects[0].sum())


@pytest.mark.parametrize("protocol", ["lvis", "pool"])
def test_slices_are_compared_as_their_images_alone_are(protocol: str) -> None:
    truth, results = random_case(10, crowded=True)
    ids = np.array(sorted(image["id"] for image in truth["images"]))
    half = np.arange(0, len(ids), 2)
    parts = {("half", "yes"): half, ("half", "no"): np.setdiff1d(np.arange(len(ids)), half)}
    worse = [{**d, "score": 1 - d["score"]} for d in results]
    pair = [tally(evaluate_lvis(truth, found, protocol=protocol), parts) for found in (results, worse)]
    kept, some = without(truth, results, ids[half].tolist())
    _, some_worse = without(truth, worse, ids[half].tolist())
    alone = compare(*(tally(evaluate_lvis(kept, found, protocol=protocol)) for found in (some, some_worse)), 20)
    inside = np.isin(np.arange(len(ids)), half)
    for name, row in compare(*pair, 20, inside).items():
        assert row == pytest.approx(alone[name], abs=1e-5, nan_ok=True), name
    lines = slice_differences(*pair, 20)
    assert lines[0] == f"  half=yes, {len(half)} images" and any(line.startswith("  half=no") for line in lines)
    assert lines[1].split()[:4] == [
        "AP",
        *(f"{alone['AP'][key]:.3f}" for key in ("first", "second")),
        lines[1].split()[3],
    ]
    other = tally(evaluate_lvis(truth, results, protocol=protocol), {("half", "yes"): half[1:], ("light", "day"): half})
    assert slice_differences(pair[0], other, 5) == [
        "  slices of one alone, or of other images, are left out: half=yes, half=no, light=day"
    ]
    assert slice_differences(tally(evaluate_lvis(truth, results)), tally(evaluate_lvis(truth, results)), 5) == []


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_a_subset_is_an_evaluation_of_its_images(iou_type: str) -> None:
    for seed in range(10):
        truth, results = random_case(seed)
        ground, detections = load_annotations(truth), read_results(results)
        ids = ground.image_ids[::2]
        some = detections.some(np.flatnonzero(np.isin(detections.image_ids, ids)))
        part = only_images(ground, ids, "")
        assert part.part == f"{len(ids)} of {len(ground.image_ids)} images"
        found = evaluate_loaded(part, some, iou_type, [PROTOCOLS["lvis"]])[0]
        assert found.metrics == evaluate_lvis(*without(truth, results, ids.tolist()), iou_type).metrics


def test_every_number_of_a_subset_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, results = random_case(10, crowded=True)
    for image in truth["images"]:
        image["file_name"] = f"val/{image['id']:06}.jpg"
    ids = sorted(image["id"] for image in truth["images"])
    (tmp_path / "few.txt").write_text(f"# two images\n{ids[0]}\n\n{ids[2]:06}.jpg\n")
    (tmp_path / "facts.csv").write_text(f"image,light\nval/{ids[0]:06}.jpg,day\n{ids[2]},night\n")
    for name in "ab":
        options: dict[str, Any] = {"images": str(tmp_path / "few.txt"), "slices": str(tmp_path / "facts.csv")}
        evaluation = evaluate_and_report(truth, results, tmp_path / name, protocol=["lvis", "pool"], **options)["segm"]
    alone = evaluate_lvis(*without(truth, results, [ids[0], ids[2]]), "segm")
    assert evaluation.metrics == alone.metrics
    what, text = f"2 of {len(ids)} images", capsys.readouterr().out
    assert f"note: PARTIAL: the numbers are of {what}, those of {tmp_path / 'few.txt'}" in text
    assert f"segm, protocol pool, SUBSET, {what}" in text and f"| segm, lvis, SUBSET, {what} |" in text
    assert json.loads((tmp_path / "a/metrics.json").read_text())["subset"] == what
    assert json.loads((tmp_path / "a/evaluation.json").read_text())["subset"] == what
    for table in ("per_category.csv", "calibration.csv"):
        assert {list(row.values())[-1].partition("SUBSET, ")[2] or what for row in rows(tmp_path / "a" / table)} == {
            what
        }
    assert [(r["of"], r["value"]) for r in rows(tmp_path / "a/slices.csv")][:2] == [("bbox", "day"), ("bbox", "night")]
    assert "light=night" in text
    compared = compare_folders(tmp_path / "a", tmp_path / "b", resamples=2).replace(PROTOCOL, "lvis")
    assert f"bbox, protocol lvis, SUBSET, {what}" in compared and "  light=night, 1 images" in compared


PROTOCOL = str(PROTOCOLS["lvis"])


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("images", "4711\nnone.jpg\n", "images that are not in the annotation file: 4711, none.jpg"),
        ("images", "\n# nothing\n", "lists no image"),
        ("images", "{0}\n{0}\n", "images that are listed twice: {0}"),
        ("images", None, "cannot be read"),
        ("slices", "image\n{0}\n", "columns of images and of an attribute at least"),
        ("slices", "image,a\n4711,x\n", "images that are not in the annotation file: 4711"),
    ],
)
def test_wrong_lists(tmp_path: Path, option: str, text: str | None, message: str) -> None:
    truth, results = random_case(10)
    first = truth["images"][0]["id"]
    if text is not None:
        (tmp_path / "list").write_text(text.format(first))
    with pytest.raises(UserError, match=message.format(first)):
        evaluate_and_report(truth, results, tmp_path / "out", **{option: str(tmp_path / "list")})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_script_takes_them_for_results(tmp_path: Path) -> None:
    truth, results = random_case(10)
    (tmp_path / "few.txt").write_text(str(truth["images"][0]["id"]))
    words = (*save(tmp_path, truth, results), f"output={tmp_path / 'out'}", "resamples=0", "errors=false")
    done = script("evaluate.py", *words, f"eval.images={tmp_path / 'few.txt'}")
    assert done.returncode == 0, done.stderr
    assert f"SUBSET, 1 of {len(truth['images'])} images" in done.stdout
