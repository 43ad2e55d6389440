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

from loce.data.annotations.json_stream import JsonStream
from loce.evaluation import Detections, FederatedFilter, Masks, evaluate_lvis, load_annotations, read_results
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
        (changed(bbox=[1, 2, 3]), r"1 results whose bbox is not \[x, y, width, height\], .*: row 1 .*\[1, 2, 3\]"),
        (changed(bbox=[1, 2, 3, "4"]), r"1 results whose bbox is not \[x, y, width, height\], four numbers"),
        (
            changed(bbox=[1, 1e300, 5, 5]),
            r"boxes that no image can hold: row 1 \(image 7\): \[1.0, 1e\+300, 5.0, 5.0\]",
        ),
        (changed(bbox=[1, 2, 3, True]), r"1 results whose bbox is not \[x, y, width, height\], four numbers"),
        (changed(image_id="7"), r"1 results whose image_id is not a whole number of 64 bits: row 1 \(image '7'\): '7'"),
        (changed(image_id=1 << 63), r"1 results whose image_id is not a whole number of 64 bits: row 1 .*: 92233720"),
        (changed(image_id=True), r"1 results whose image_id is not a whole number of 64 bits: row 1 .*: True"),
        (changed(category_id=2.5), r"1 results whose category_id is not a whole number .*: row 1 \(image 7\): 2.5"),
        (changed(score=None), r"1 results whose score is not a number: row 1 \(image 7\): None"),
        (changed(score="0.5"), r"1 results whose score is not a number: row 1 \(image 7\): '0.5'"),
        ([{"image_id": 7, "score": 1.0}], r"1 results whose category_id is not .*\n.*neither bbox nor segmentation"),
        ([7], r"1 results that are no objects: row 0: 7"),
        ([{k: v for k, v in HIT.items() if k != "bbox"}], r"1 results that have neither bbox nor segmentation: row 0"),
        ([HIT, {k: v for k, v in HIT.items() if k != "bbox"}], r"1 results whose bbox is not .* row 1 .*: None"),
        (changed(segmentation=[[1, 1, 5, 1, 5, 5]]), r"2 results whose segmentation is not .*not polygons.*: row 0"),
        (
            [{**HIT, "segmentation": {**RLE, "size": [50, 100]}}],
            r"RLE size is not the \[height, width\] of their image",
        ),
        ("results", r"results: there is no such results file"),
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


def runs_of(box: list[int], side: int = 100) -> list[int]:
    """Run lengths of a box's mask, by counting."""
    x, y, width, height = box
    pixels = [x <= i // side < x + width and y <= i % side < y + height for i in range(side * side)]
    runs, value = [0], False
    for pixel in pixels:
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def compressed(box: list[int]) -> str:
    return mask_utils.frPyObjects({"size": [100, 100], "counts": runs_of(box)}, 100, 100)["counts"].decode()


BOX = [10, 10, 40, 40]
BROKEN_COUNTS = {
    "zeros at the end left out": runs_of(BOX)[:-1],
    "one run too long": [*runs_of(BOX)[:-1], runs_of(BOX)[-1] + 1],
    "a negative run": [-7, 7, *runs_of(BOX)],
    "null": None,
    "no list of numbers": ["a", 3],
    "characters missing": compressed(BOX)[:-3],
    "a character too many": compressed(BOX) + "5",
    "the text of bytes": str(compressed(BOX).encode()),
    "of a larger image": mask_utils.encode(np.ones((300, 300), dtype=np.uint8, order="F"))["counts"],
    "letters beyond ASCII": compressed(BOX)[:-1] + "é",
    "empty": "",
    "inside a number": compressed(BOX) + "P",
}


@pytest.mark.parametrize("what", BROKEN_COUNTS)
def test_broken_run_lengths_are_refused_on_both_sides(small: dict[str, Any], what: str) -> None:
    """pycocotools would read beyond its memory, never end, or give a mask that is not meant."""
    broken = {"size": [100, 100], "counts": BROKEN_COUNTS[what]}
    with pytest.raises(UserError, match=r"(1 results|masks) whose .*run-length code .*row 1 \(image 7\)"):
        evaluate_lvis(small, [{**HIT, "segmentation": RLE}, {**HIT, "segmentation": broken}], "segm")
    small["annotations"][1]["segmentation"] = broken
    with pytest.raises(UserError, match=r"1 run-length code broken or of another size .*\(annotations 2\)"):
        evaluate_lvis(small, [{**HIT, "segmentation": RLE}], "segm")
    assert evaluate_lvis(small, [HIT], "bbox").metrics["AP"] > 0  # boxes need no masks


def test_broken_codes_in_given_columns_are_refused(small: dict[str, Any]) -> None:
    counts = compressed(BOX).encode()
    masks = Masks.from_counts([counts, counts[:-2]], np.full((2, 2), 100))
    ids = np.array([7, 7])
    found = Detections(image_ids=ids, category_ids=np.array([2, 2]), scores=np.ones(2), masks=masks)
    with pytest.raises(UserError, match=r"code is broken or does not fill its image: row 1 \(image 7\)"):
        evaluate_lvis(small, found, "segm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("images"), "no list of images; an annotation file has"),
        (lambda d: d["images"].append(d["images"][0]), "1 image ids used more than once: 7"),
        (lambda d: d["categories"].append(d["categories"][0]), "1 category ids used more than once: 9"),
        (lambda d: d["annotations"][0].update(id=[1, 2]), r"no whole number of 64 bits: \[\[1, 2\], 7, 2\]"),
        (lambda d: d["annotations"][0].update(image_id=1 << 70), r"no whole number of 64 bits: \[1, 1180"),
        (lambda d: d["images"][0].update(id=1 << 70), r"images whose id, .* is no whole number of 64 bits.*: \(1180"),
        (lambda d: d["images"][0].update(neg_category_ids=[1 << 70]), "is not a list of category ids: image 7"),
        (lambda d: d["images"][0].pop("height"), "images without height and width in pixels, .*: image 7"),
        (lambda d: d["images"][0].update(id="7"), "images whose id, height or width is no whole number"),
        (lambda d: d["annotations"][1].update(bbox=[1, 2]), r"1 boxes that are not four numbers \(annotations 2\)"),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, "4"]), r"boxes that are not four numbers \(annotations 2"),
        (lambda d: d["images"].append(4), "elements of `images` without an id: number 2"),
        (lambda d: d["images"][0].update(height=None), r"is no whole number .*: \(7, None, 100\)"),
        (lambda d: d["images"][0].update(neg_category_ids=["a"]), "neg_category_ids is not a list of .*: image 7"),
        (lambda d: d["images"][0].update(neg_category_ids=[77]), r"unknown categories in image lists .*: image 7: 77"),
        (lambda d: d["annotations"].append(4), "elements of `annotations` without all of .*: number 3"),
        (lambda d: d["annotations"][0].update(image_id="7"), "image_id or category_id is no whole number"),
        (lambda d: d["annotations"][0].update(image_id=70), r"unknown image: annotation 1 \(image_id 70\)"),
        (lambda d: d["annotations"][0].update(area="big"), r"area is not a number \(annotations 1\)"),
        (lambda d: d["annotations"][0].update(bbox=[1, [2], 3, 4]), r"not four numbers \(annotations 1\)"),
        (lambda d: d["annotations"][1].update(area=float("nan")), r"area is not a number \(annotations 2\)"),
        (lambda d: d["annotations"][1].update(bbox=[1, 1, float("inf"), 5]), r"not four numbers \(annotations 2\)"),
        (
            lambda d: d["annotations"][1].update(iscrowd="0"),
            r"`iscrowd` is none of 0, 1, true, false: annotation 2 \('0'",
        ),
        (lambda d: d["annotations"][1].update(ignore=2), r"`ignore` is none of 0, 1, true, false: annotation 2 \(2\)"),
        (lambda d: d["images"][0].pop("neg_category_ids"), "neg_category_ids, which others have: image 7"),
        (lambda d: d["annotations"][0].update(segmentation=[[1.0, 2.0]]), r"polygon parts with .*\(annotations 1\)"),
        (
            lambda d: d["annotations"][0].update(segmentation=[[1.0, 1.0, 5.0, 1.0, float("nan"), 5.0]]),
            r"no usable number in one \(annotations 1\)",
        ),
        (
            lambda d: d["annotations"][0].update(segmentation=[[1.0, 1.0, 5.0, 1e12, 5.0, 5.0]]),
            r"no usable number in one \(annotations 1\)",
        ),
        (
            lambda d: d["annotations"][0].update(segmentation=RLE | {"size": [3, 3]}),
            r"of another size than the image \(annotations 1\)",
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
        (b'[{"image_id": 1, "category_id"', r"the JSON ends too early|as files of results are"),
        (b'{"images": [{"id": 1, "height', r"the JSON ends too early"),
        (b'{"image_id": 1}\n{"image_id": 2}\n', "more than one JSON value"),
        (gzip.compress(b"[]", mtime=0), "is still compressed; unpack it first: gunzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a git-lfs pointer"),
        (b"<!DOCTYPE html>", "is not JSON but a web page or XML"),
        (b'"\xff\xfe"', "is not a text file|is not UTF-8 text"),
        (
            '{"a": "红色的苹果"}'.encode("gbk"),
            r"is not UTF-8 text \(byte 7 of 19\), perhaps GBK .* iconv -f GBK -t UTF-8",
        ),
        ('{"a": "café"}'.encode("latin-1"), "perhaps Latin-1"),
        ('{"images": []}'.encode("utf-16"), "is text in UTF-16; save it as UTF-8: iconv -f UTF-16"),
        ('{"images": []}'.encode("utf-32"), "is text in UTF-32; save it as UTF-8: iconv -f UTF-32 -t"),
        ('\n [{"images": []}]'.encode("utf-32-le"), "is text in UTF-32LE; save it as UTF-8: iconv -f UTF-32LE -t"),
        ('\n {"images": []}'.encode("utf-16-le"), "is text in UTF-16LE; save it as UTF-8: iconv -f UTF-16LE -t"),
        (
            b'{"a": "' + "고양이".encode("euc-kr") + b'"}',
            "perhaps GBK .* or EUC-KR; .*; look whether its names are legible",
        ),
        (b'{"images": [{"id": 1},]}', "is not JSON .*; perhaps a comma too many before it"),
        (b'{"images": [{"id": 1}],}', "is not JSON .*; perhaps a comma too many before it"),
        (b"{'images': []}", "is not JSON .*; perhaps text that Python printed; write it with json.dump"),
        (b'{"images": []}' + bytes(50), "is not JSON .*; perhaps empty bytes of a broken download"),
        ('{"images": [], \ufeff"categories": []}'.encode(), "perhaps a byte order mark inside the file"),
        (b"images:\n  - id: 1\n", "is not JSON"),
        ('{"images": []}'.encode("utf-16-be"), "is text in UTF-16BE; save it as UTF-8: iconv -f UTF-16BE"),
        (b"{1, 2, x]" + b" " * 200 + b"x" * 200, "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "holds a whole number of thousands of digits"),
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
    with pytest.raises(UserError, match="is still compressed; unpack it first: unzip"):
        read_results(tmp_path / "a.json")
    with pytest.raises(UserError, match="is a folder"):
        load_annotations(tmp_path)
    (tmp_path / "d.json").write_text('{"annotations": []}')
    with pytest.raises(UserError, match="is an object, as annotation files are, not a list of results"):
        read_results(tmp_path / "d.json")


@pytest.mark.parametrize("block", [1 << 22, 50, 700, 3000])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (",\n  ", ": ")])
def test_results_read_in_blocks(
    tmp_path: Path, block: int, separators: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is read in pieces cut between results, wherever the pieces fall."""
    monkeypatch.setattr(JsonStream.__init__, "__defaults__", (block,))
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


def test_notes_say_what_was_assumed(small: dict[str, Any]) -> None:
    small["categories"] = [
        {k: v for k, v in c.items() if k != "frequency"} | {"image_count": n}
        for c, n in zip(small["categories"], (10, 11, 101), strict=True)
    ]
    truth = load_annotations(small)
    assert truth.frequency.tolist() == ["c", "f", "r"]  # of categories 2, 5, 9
    assert len(truth) == 3
    assert truth.notes == [
        "no frequency: groups r/c/f are from image_count with LVIS's bounds (10 and 100 images)",
    ]
    for category in small["categories"]:
        del category["image_count"]
    assert load_annotations(small).frequency.tolist() == ["r"] * 3
    small["images"] = [{"id": i, "height": 100, "width": 100} for i in (7, 3)]
    assert not load_annotations(small).federated
    assert "not an LVIS file" in load_annotations(small).notes[0]


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
    with pytest.raises(UserError, match="protocol: 'voc' is not known; choose one of lvis, fixed, pool, coco"):
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
    assert "2 annotations have the id of another one (1): they were given new ids" in again.notes
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
