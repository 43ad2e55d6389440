"""What users really pass: broken files, results of another split, NaN. One message, the first five, the fix."""

import copy
import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from loce.evaluation import Detections, FederatedFilter, evaluate_lvis, load_annotations, read_results, reading
from loce.evaluation.annotations import only_images
from loce.utils.errors import UserError
from tests.evaluation.cases import random_case

HIT = {"image_id": 7, "category_id": 2, "score": 0.5, "bbox": [10.0, 10.0, 40.0, 40.0]}
RLE = {"size": [100, 100], "counts": mask_utils.encode(np.eye(100, dtype=np.uint8, order="F"))["counts"]}


def changed(**values: Any) -> list[dict[str, Any]]:
    return [HIT, {**HIT, **values}]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (changed(image_id=8), r"1 of the 2 image ids are not in annotations: 8; use the annotation file of the split"),
        (changed(category_id=4), r"category ids that are not in annotations: 4; write the file's category ids"),
        (changed(score=float("nan")), r"scores that are NaN or infinite: row 1 \(image 7\): nan"),
        (changed(score=float("inf")), r"scores that are NaN or infinite: row 1 \(image 7\): inf"),
        (
            changed(bbox=[1, 1, -5, 5]),
            r"negative width or height \(bbox is \[x, y, width, height\], not corners\): row 1",
        ),
        (changed(bbox=[1, float("nan"), 5, 5]), r"boxes that are NaN or infinite: row 1"),
        (changed(bbox=[1, 2, 3]), r"bbox must be \[x, y, width, height\], four numbers in every result: \[1, 2, 3\]"),
        (changed(image_id="7"), r"image_id must be an integer: '7'"),
        (changed(category_id=2.5), r"category_id must be an integer: 2.5"),
        (changed(score=None), r"score must be a number: None"),
        ([{"image_id": 7, "score": 1.0}], r"results without image_id, category_id and score"),
        ([7], r"results without image_id, category_id and score: 7"),
        ([{k: v for k, v in HIT.items() if k != "bbox"}], r"results have neither bbox nor segmentation"),
        ([HIT, {k: v for k, v in HIT.items() if k != "bbox"}], r"four numbers in every result: None"),
        (changed(segmentation=[[1, 1, 5, 1, 5, 5]]), r"segmentation must be an RLE dict .*not polygons.*: image 7"),
        (
            [{**HIT, "segmentation": {**RLE, "size": [50, 100]}}],
            r"RLE size is not the \[height, width\] of their image",
        ),
        ("results", r"results: no such file"),
        ({"image_id": 7}, r"results must be a path, a list of result dicts or Detections, not dict"),
    ],
)
def test_bad_results(small: dict[str, Any], results: Any, message: str) -> None:
    before = copy.deepcopy(small)
    with pytest.raises(UserError, match=message):
        evaluate_lvis(small, results)
    assert small == before


def test_five_offenders_and_their_number(small: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        evaluate_lvis(small, [HIT] + [{**HIT, "image_id": 100 + n, "score": float("nan")} for n in range(8)])
    message = str(error.value)
    assert "8 of the 9 image ids are not in annotations: 100, 101, 102, 103, 104, ... (8 in all)" in message
    assert "row 5 (image 104): nan, ... (8 in all)" in message


def test_mask_with_too_many_pixels(small: dict[str, Any]) -> None:
    counts = mask_utils.encode(np.ones((300, 300), dtype=np.uint8, order="F"))["counts"]
    with pytest.raises(UserError, match="RLE covers more pixels than their image has: rows"):
        evaluate_lvis(small, [{**HIT, "segmentation": {"size": [100, 100], "counts": counts}}], "segm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("images"), "needs the lists images, annotations and categories"),
        (lambda d: d["images"].append(d["images"][0]), "images with the same id twice: 7"),
        (lambda d: d["categories"].append(d["categories"][0]), "categories with the same id twice: 9"),
        (lambda d: d["annotations"][0].update(id=[1, 2]), r"annotations whose id is not an integer: \[1, 2\]"),
        (lambda d: d["annotations"][0].update(image_id=1 << 70), "annotations whose image_id is not an integer: 1180"),
        (lambda d: d["images"][0].update(id=1 << 70), "images whose id is not an integer: 1180"),
        (lambda d: d["images"][0].update(neg_category_ids=[1 << 70]), "is not a list of category ids: 7"),
        (lambda d: d["images"][0].pop("height"), "images without all of id, height, width: 7"),
        (lambda d: d["images"][0].update(id="7"), "images whose id is not an integer: '7'"),
        (lambda d: d["annotations"][1].pop("area"), "annotations without all of .*area.*: 2"),
        (
            lambda d: d["annotations"][1].update(bbox=[1, 2]),
            r"annotations whose bbox is not \[x, y, width, height\]: 2",
        ),
        (lambda d: d["images"].append(4), "images without all of id, height, width: 4"),
        (lambda d: d["images"][0].update(height=None), "images whose height is not an integer: None"),
        (
            lambda d: d["images"][0].update(neg_category_ids=["a"]),
            "images whose neg_category_ids is not a list of .*: 7",
        ),
        (lambda d: d["annotations"].append(4), "annotations without all of .*: 4"),
        (lambda d: d["annotations"][0].update(image_id="7"), "annotations whose image_id is not an integer: '7'"),
        (lambda d: d["annotations"][0].update(area="big"), "annotations whose area is not a number: 1"),
        (lambda d: d["annotations"][0].update(bbox=[1, [2], 3, 4]), "annotations whose bbox is not .*: 1"),
        (lambda d: d["annotations"][1].update(area=float("nan")), "annotations whose bbox or area is not finite: 2"),
        (lambda d: d["images"][0].pop("neg_category_ids"), "images without neg_category_ids, which others have: 7"),
        (lambda d: d["annotations"][0].update(segmentation=[[1.0, 2.0]]), "annotation 1: the mask cannot be read"),
        (
            lambda d: d["annotations"][0].update(segmentation=RLE | {"size": [3, 3]}),
            r"annotation 1: .*its RLE is \[3, 3\]",
        ),
    ],
)
def test_bad_annotations(small: dict[str, Any], change: Callable[[dict[str, Any]], Any], message: str) -> None:
    change(small)
    with pytest.raises(UserError, match=message):
        evaluate_lvis(small, [{**HIT, "segmentation": RLE}], "segm")


@pytest.mark.parametrize("loader", [load_annotations, read_results])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'[{"image_id": 1, "category_id"', r"ends in the middle \(truncated at 30 bytes\)"),
        (b'{"image_id": 1}\n{"image_id": 2}\n', "more than one JSON value"),
        (gzip.compress(b"[]", mtime=0), "is compressed with gzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a git-lfs pointer"),
        (b"<!DOCTYPE html>", "is a web page or XML"),
        (b'"\xff\xfe"', "is not UTF-8 text"),
        (b"[1, 2, x]", "is not JSON"),
    ],
)
def test_broken_files(tmp_path: Path, loader: Callable[[Path], Any], content: bytes, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        loader(path)
    assert path.read_bytes() == content


def test_zip_and_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.json", "w") as archive:
        archive.writestr("inside.json", "[]")
    with pytest.raises(UserError, match="is a zip archive; unzip it first"):
        read_results(tmp_path / "a.json")
    with pytest.raises(UserError, match="is a folder"):
        load_annotations(tmp_path)
    (tmp_path / "d.json").write_text('{"annotations": []}')
    with pytest.raises(UserError, match="holds a dict, not a list of results"):
        read_results(tmp_path / "d.json")


@pytest.mark.parametrize("block", [1 << 24, 50, 700, 3000])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (",\n  ", ": ")])
def test_results_read_in_blocks(
    tmp_path: Path, block: int, separators: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is read in pieces cut between results, wherever the pieces fall."""
    monkeypatch.setattr(reading, "BLOCK", block)
    results = random_case(10, crowded=True)[1]
    (tmp_path / "r.json").write_text(json.dumps(results, separators=separators))
    read, expected = read_results(tmp_path / "r.json"), read_results(results)
    assert len(results) > 300
    for name in ("image_ids", "category_ids", "scores", "boxes"):
        np.testing.assert_array_equal(getattr(read, name), getattr(expected, name))
    assert read.masks is not None and expected.masks is not None
    np.testing.assert_array_equal(read.masks.counts, expected.masks.counts)


def test_results_written_and_read_again(tmp_path: Path) -> None:
    results = random_case(2)[1]
    detections = read_results(results)
    detections.save_json(tmp_path / "out" / "r.json")
    assert json.loads((tmp_path / "out" / "r.json").read_text()) == results
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["r.json"]
    read_results([]).save_json(tmp_path / "none.json")
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_masks_that_are_not_compressed(small: dict[str, Any]) -> None:
    mask = np.zeros((100, 100), dtype=np.uint8, order="F")
    mask[10:50, 10:50] = 1
    runs = np.flatnonzero(np.diff(mask.reshape(-1, order="F"), prepend=0, append=0))
    counts = np.diff(np.concatenate([[0], runs, [mask.size]])).tolist()
    results = [{**HIT, "segmentation": {"size": [100, 100], "counts": counts}}]
    packed = [{**HIT, "segmentation": mask_utils.encode(mask)}]
    assert evaluate_lvis(small, results, "segm").metrics == evaluate_lvis(small, packed, "segm").metrics
    assert evaluate_lvis(small, packed, "segm").recall[:, 0, 0].tolist() == [0.5] * 10


def test_annotations_in_the_file_in_any_order(tmp_path: Path) -> None:
    """The reader takes annotations out of the stream; where they stand in the file does not matter."""
    truth, results = random_case(3)
    expected = evaluate_lvis(truth, results, "segm").metrics
    for keys in (("images", "annotations", "categories"), ("categories", "annotations", "images")):
        (tmp_path / "a.json").write_text(json.dumps({key: truth[key] for key in keys}))
        assert evaluate_lvis(tmp_path / "a.json", results, "segm").metrics == expected


def test_what_is_no_polygon_is_reported_when_it_is_needed(tmp_path: Path, small: dict[str, Any]) -> None:
    small["annotations"][0]["segmentation"] = [["a", "b"]]
    (tmp_path / "a.json").write_text(json.dumps(small))
    assert evaluate_lvis(tmp_path / "a.json", [HIT]).metrics["AP"] > 0
    with pytest.raises(UserError, match="annotation 1: the mask cannot be read"):
        evaluate_lvis(tmp_path / "a.json", [{**HIT, "segmentation": {**RLE, "counts": RLE["counts"].decode()}}], "segm")


def test_notes_say_what_was_assumed(small: dict[str, Any]) -> None:
    small["annotations"].append({**small["annotations"][0], "id": 9, "image_id": 1000})
    small["categories"] = [
        {k: v for k, v in c.items() if k != "frequency"} | {"image_count": n}
        for c, n in zip(small["categories"], (10, 11, 101), strict=True)
    ]
    truth = load_annotations(small)
    assert truth.frequency.tolist() == ["c", "f", "r"]  # of categories 2, 5, 9
    assert len(truth) == 3
    assert truth.notes == [
        "1 annotations belong to images that are not in the file: not counted",
        "no frequency: groups r/c/f are from image_count with LVIS's bounds (10 and 100 images)",
    ]
    for category in small["categories"]:
        del category["image_count"]
    assert load_annotations(small).frequency.tolist() == ["r"] * 3
    small["images"] = [{"id": 7, "height": 100, "width": 100}]
    assert not load_annotations(small).federated
    assert "not an LVIS file" in load_annotations(small).notes[1]


def test_federated_filter_is_the_evaluators_rule(small: dict[str, Any]) -> None:
    small["annotations"][0]["area"] = 0  # does not exist, so category 2 was not verified in image 7
    allowed = FederatedFilter(small)
    assert allowed.label_ids.tolist() == [9, 2, 5]
    assert allowed.allowed(7).tolist() == [True, False, False]
    assert allowed.allowed(3).tolist() == [False, True, True]
    with pytest.raises(KeyError):
        allowed.allowed(4)
    for seed in range(20):
        truth, results = random_case(seed)
        rule = FederatedFilter(truth)
        label = {int(c): n for n, c in enumerate(rule.label_ids)}
        kept = [d for d in results if rule.allowed(d["image_id"])[label[d["category_id"]]]]
        assert evaluate_lvis(truth, kept).metrics == evaluate_lvis(truth, results).metrics


def test_unknown_choices_are_named(small: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="iou_type: 'mask'"):
        evaluate_lvis(small, [], "mask")
    with pytest.raises(UserError, match="protocol: 'voc' is not known; choose one of lvis, fixed, coco"):
        evaluate_lvis(small, [], protocol="voc")
    for number in (0, -1, 2.5, True):
        with pytest.raises(UserError, match=f"max_detections: {number} is not a positive whole number"):
            evaluate_lvis(small, [], max_detections=number)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"max_detections: 300 cannot stand with protocol fixed, .* leave max_detect"):
        evaluate_lvis(small, [], max_detections=300, protocol="fixed")
    for protocol in ("lvis", "coco"):
        assert "AR@300" in evaluate_lvis(small, [], "bbox", max_detections=300, protocol=protocol).metrics
    box = Detections(image_ids=np.array([7]), category_ids=np.array([2]), scores=np.ones(1), boxes=np.ones((1, 4)))
    with pytest.raises(UserError, match="iou_type=segm: the results have no segmentation"):
        evaluate_lvis(small, box, "segm")
    coco = {**small, "images": [{"id": i["id"], "height": 100, "width": 100} for i in small["images"]]}
    with pytest.raises(UserError, match="has no neg_category_ids, so protocol=lvis is not possible; use protocol=coco"):
        evaluate_lvis(coco, box)
    assert evaluate_lvis(coco, box, protocol="coco").metrics["AP"] == 0.0


def test_annotations_with_one_id_all_count_and_that_is_said(small: dict[str, Any]) -> None:
    apart = evaluate_lvis(small, [HIT], "bbox")
    for row in small["annotations"]:
        row["id"] = 1
    again = load_annotations(small)
    assert len(again) == len(small["annotations"])
    assert any("have the id of another one: 1; all of them count" in note for note in again.notes)
    assert evaluate_lvis(small, [HIT], "bbox").metrics == apart.metrics


def test_ground_truth_of_some_images_is_that_of_a_file_with_these(small: dict[str, Any]) -> None:
    first = small["images"][0]["id"]
    part = only_images(load_annotations(small), np.array([first]), "the others are missing")
    rows = [row for row in small["annotations"] if row["image_id"] == first]
    alone = load_annotations({**small, "images": small["images"][:1], "annotations": rows})
    assert "PARTIAL: the numbers are of 1 of 2 images, the others are missing" in part.notes
    for name in ("image_ids", "sizes", "ids", "image", "category", "boxes", "areas", "ignore", "crowd", "negative"):
        np.testing.assert_array_equal(getattr(part, name), getattr(alone, name), err_msg=name)
    assert 0 < len(part) < len(small["annotations"])
