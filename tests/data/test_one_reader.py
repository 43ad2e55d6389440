"""What exports really hold: read, told or refused alike by training, check-data and evaluation."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from loce.config import Config, DataConfig, EvalConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.annotations.plausible import outlines
from loce.data.annotations.reader import Columns
from loce.data.annotations.requirements import compared_types, evaluation_problems, training_problems
from loce.data.annotations.run_lengths import decode_codes, measure_codes
from loce.data.check import Report, check_set
from loce.evaluation import evaluate_lvis, load_annotations, read_results
from loce.utils.errors import UserError, first_few
from tests.data.made_annotations import CATEGORY_IDS, as_format, content
from tests.fuzz.reader_cases import as_numpy, results_for

Made = dict[str, Any]


def made_set(kind: str = "coco", images: int = 8) -> Made:
    made = as_format(content(images), kind)
    for row in made["annotations"]:
        row["bbox"] = [round(side, 2) for side in row["bbox"]]
    return made


def checked(path: str, use: Any = "", config: Config | None = None) -> Report:
    report = Report()
    check_set(path, "", report, 0, config=config or Config(), use=use)
    return report


def refused_by_all(path: str, message: str) -> None:
    """Training, check-data and evaluation say the same."""
    with pytest.raises(UserError, match=message) as training:
        LVISAnnotations.open(path)
    with pytest.raises(UserError, match=message) as evaluation:
        load_annotations(path)
    assert str(training.value) == str(evaluation.value) and checked(path).problems == [str(training.value)]


def test_only_the_lists_of_the_file_itself_hold_images_and_annotations(write):
    plain = made_set()
    expected = LVISAnnotations.open(write(plain))
    alike = {"id": 1, "image_id": 1, "category_id": 1, "name": "clip", "width": 40, "height": 30}
    for key in ("videos", "tracks", "licenses"):
        made = {key: [alike, alike], **copy.deepcopy(plain)}
        made["annotations"][0]["attributes"] = alike
        made["annotations"][1]["parts"] = [{"more": [alike]}, alike]
        made["images"][0]["camera"] = made["categories"][0]["origin"] = alike
        found = LVISAnnotations.open(write(made))
        for name in ("image_ids", "annotation_ids", "labels", "image_of", "xywh", "train_rows"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert found.dropped == {} and checked(found.path).problems == []


def test_a_list_given_twice_is_refused(write):
    text = json.dumps(made_set())
    again = text[:-1] + ', "annotations": []}'
    refused_by_all(write(again), "1 lists that are there more than once: `annotations`")


def test_a_byte_order_mark_is_read_everywhere(write, tmp_path):
    made = made_set()
    found = results_for(made, np.random.default_rng(0))
    (tmp_path / "r.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(found).encode())
    path = write(b"\xef\xbb\xbf" + json.dumps(made).encode())
    assert len(LVISAnnotations.open(path)) == 8
    expected = evaluate_lvis(made, found, "segm", protocol="coco").metrics
    assert evaluate_lvis(path, tmp_path / "r.json", "segm", protocol="coco").metrics == expected


@pytest.mark.parametrize(
    ("code", "message"),
    [("utf-16", "is text in UTF-16"), ("utf-16-le", "is text in UTF-16LE"), ("gbk", "perhaps GBK .*iconv -f GBK")],
)
def test_other_encodings_are_named(code, message, write):
    made = made_set()
    made["categories"][0]["name"] = "苹果树"
    refused_by_all(write(json.dumps(made, ensure_ascii=False).encode(code)), message)


def test_a_missing_area_is_that_of_the_mask_or_else_of_the_box(write):
    made = made_set()
    for row in made["annotations"]:
        del row["area"]
    made["annotations"][4]["segmentation"] = []
    path = write(made)
    annotations = LVISAnnotations.open(path)
    sizes = {image["id"]: (image["height"], image["width"]) for image in made["images"]}
    for n, (row, area) in enumerate(zip(made["annotations"], annotations.areas.tolist(), strict=True)):
        shape = row["segmentation"]
        if isinstance(shape, dict):
            code = coco_mask.frPyObjects(shape, *shape["size"]) if isinstance(shape["counts"], list) else shape
        elif shape:
            code = coco_mask.merge(coco_mask.frPyObjects(shape, *sizes[row["image_id"]]))
        expected = row["bbox"][2] * row["bbox"][3] if n == 4 else int(coco_mask.area(code))
        assert area == pytest.approx(expected)
    boxes = load_annotations(path, masks=False)  # what boxes are evaluated with does not depend on masks being wanted
    np.testing.assert_array_equal(boxes.areas, annotations.areas[boxes.rows])


@pytest.mark.parametrize("change", [{"area": "1080"}, {"bbox": ["1", "2", "3", "4"]}, {"segmentation": [[1, 2]]}])
def test_what_evaluation_refuses_check_data_finds_where_the_file_is_for_it(change, write):
    made = made_set()
    made["annotations"][3] |= change
    path = write(made)
    annotations = LVISAnnotations.open(path)  # training leaves it out
    (problem,) = evaluation_problems(annotations)
    assert f"(annotations {made['annotations'][3]['id']}): evaluation compares with every" in problem
    with pytest.raises(UserError) as error:
        load_annotations(path)
    assert str(error.value) == problem
    assert checked(path, "evaluation").problems == [problem]
    assert checked(path, "training").problems == [] == training_problems(annotations)
    assert any("evaluation   would refuse this file: 1 " in line for line in checked(path).lines)


def test_check_data_knows_the_protocol_and_that_masks_are_not_compared(write):
    made = made_set()
    for row in made["annotations"]:
        row["segmentation"] = []
    path = write(made)
    box = Config(data=DataConfig(without_mask="box"))
    assert checked(path, "evaluation", box).problems == [] == checked(path, "training", box).problems
    assert any("would refuse this file" in line or "segmentation missing" in line for line in checked(path).lines)
    assert "evaluate boxes alone: iou_types=bbox" in checked(path, "evaluation").problems[0]
    assert compared_types(LVISAnnotations.open(path), "box") == ("bbox",)
    assert compared_types(LVISAnnotations.open(path), "box", ("segm",)) == ("segm",)
    assert evaluate_lvis(path, [], "bbox", protocol="coco").metrics["AP"] == 0
    lvis = Config(eval=EvalConfig(protocol="lvis"), data=box.data)
    assert "has no neg_category_ids, which protocol lvis needs" in checked(path, "evaluation", lvis).problems[0]
    assert checked(path, "training", lvis).problems == []


@pytest.mark.parametrize("first", [2**62 + 3, 2**63 - 40, -(2**63)])
def test_ids_of_64_bits_are_read(first, write):
    metrics = []
    for start in (1, first):
        made = made_set()
        for number, image in enumerate(made["images"]):
            for row in made["annotations"]:
                row["image_id"] = start + number if row["image_id"] == image["id"] else row["image_id"]
            image["id"] = start + number
        found = results_for(made, np.random.default_rng(0))
        assert LVISAnnotations.open(write(made)).image_ids.tolist() == [start + n for n in range(8)]
        metrics.append(evaluate_lvis(write(made), found, "bbox", protocol="coco").metrics)
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("bad", [2**63, 2**80, "md5", 7.0, None, True])
def test_other_ids_are_named(bad, write):
    made = made_set()
    made["categories"][1]["id"] = bad
    refused_by_all(write(made), r"1 categories whose id is no whole number of 64 bits: thing 3 \(")
    made = made_set()
    made["annotations"][0]["id"] = bad
    refused_by_all(write(made), "1 annotations whose id, image_id or category_id is no whole number of 64 bits")


@pytest.mark.parametrize("key", ["iscrowd", "ignore"])
def test_flags_are_0_or_1(key, write):
    for good in (0, 1, True, False, 1.0):
        made = made_set()
        made["annotations"][2][key] = good
        flags = LVISAnnotations.open(write(made))
        assert bool((flags.crowd | flags.ignore)[2]) == bool(good)
    for bad in ("0", "false", 2, -1, 0.5, None, []):
        made["annotations"][2][key] = bad
        refused_by_all(write(made), f"1 annotations whose `{key}` is none of 0, 1, true, false: annotation ")


def test_two_categories_of_one_name_are_told(write):
    made = made_set()
    made["categories"][3]["name"] = made["categories"][0]["name"]
    path = write(made)
    (note,) = LVISAnnotations.open(path).notes
    assert "1 names belong to more than one category: 'thing 7' (ids 7, 1)." in note
    assert any(note in line for line in checked(path).lines) and note in load_annotations(path).notes


def test_half_characters_in_class_names_are_refused(write):
    """The tables of an evaluation, hours later, could not be written."""
    made = made_set()
    made["categories"][1]["name"] = "smile \ud83d"
    refused_by_all(write(made), r"1 categories whose name has half a character.*smile .*ud83d")
    made["categories"][1]["name"] = "smile \U0001f600\n"
    LVISAnnotations.open(write(made))


def test_images_without_sizes_are_named_with_what_to_do(write):
    made = made_set()
    for image in made["images"]:
        del image["width"]
    ids = [f"image {image['id']}" for image in made["images"]]
    message = (
        f"8 images without height and width in pixels, which must be added to each from its file: {first_few(ids)}"
    )
    path = write(made)
    refused_by_all(path, "8 images without height and width")
    assert checked(path).problems == [f"{path}: {message}"]


def test_a_file_without_annotations_is_for_predictions(write):
    made = made_set()
    del made["annotations"]
    path = write(made)
    refused_by_all(path, "no list of annotations; an annotation file has .*test images")
    assert len(LVISAnnotations.open(path, annotated=False)) == 8
    assert len(LVISAnnotations.open(path, annotated=False).labels) == 0


def as_corners(row: Made, size: tuple[int, int]) -> list[float]:
    x, y, w, h = row["bbox"]
    return [x, y, x + w, y + h]


def as_shares(row: Made, size: tuple[int, int]) -> list[float]:
    x, y, w, h = row["bbox"]
    return [x / size[1], y / size[0], w / size[1], h / size[0]]


@pytest.mark.parametrize(("change", "what"), [(as_corners, "are these corners"), (as_shares, "are these shares")])
def test_boxes_that_mean_something_else_are_suspected_aloud(change: Callable[..., Any], what, write, capsys):
    made = made_set()
    sizes = {image["id"]: (image["height"], image["width"]) for image in made["images"]}
    found = [
        {"image_id": row["image_id"], "category_id": row["category_id"], "score": 0.5, "bbox": row["bbox"]}
        for row in made["annotations"]
    ]
    evaluate_lvis(made, found, "bbox", protocol="coco")
    assert "WARNING" not in capsys.readouterr().err
    for entry in found:
        entry["bbox"] = change(entry, sizes[entry["image_id"]])
    evaluate_lvis(made, found, "bbox", protocol="coco")
    told = capsys.readouterr().err
    assert told.count(what) == 1 and "WARNING: results: " in told and "the first: row " in told
    for row in made["annotations"]:
        row["bbox"] = change(row, sizes[row["image_id"]])
    path = write(made)
    assert any(what in note for note in LVISAnnotations.open(path).notes)
    assert any(what in problem for problem in checked(path).problems)
    assert any(what in note for note in load_annotations(path, masks=False).notes)


FORMS: dict[str, tuple[Callable[..., Any], str]] = {
    "corners": (lambda x, y, w, h: [x, y, x + w, y + h], "corners"),
    "centre": (lambda x, y, w, h: [x + w / 2, y + h / 2, w, h], "centre, width, height"),
}


@pytest.mark.parametrize("kind", FORMS)
def test_boxes_near_the_origin_are_told_by_their_masks(kind, write, capsys):
    """Where no box would reach over a border: all objects are in the upper left of large images."""
    form, what = FORMS[kind]
    made = moved_set(lambda x, y, width, height: (x, y), 0)
    for image in made["images"]:
        image |= {"height": 600, "width": 800}
    found = []
    for row in made["annotations"]:
        code = coco_mask.frPyObjects(row["segmentation"], 600, 800)[0]
        box = form(*row["bbox"])
        found.append({"image_id": row["image_id"], "category_id": 7, "score": 0.5, "bbox": box})
        found[-1]["segmentation"] = {"size": [600, 800], "counts": code["counts"].decode()}
    evaluate_lvis(made, found, "bbox", protocol="coco")
    assert f"WARNING: results: boxes fit their masks only when they are read as {what}" in capsys.readouterr().err
    for row in made["annotations"]:
        row["bbox"] = form(*row["bbox"])
    assert any(what in note for note in LVISAnnotations.open(write(made)).notes)
    assert any(what in problem for problem in checked(write(made)).problems)


@pytest.mark.parametrize("name", [None, "", " ", ["a"], True])
def test_names_of_categories_are_text(name, write):
    made = made_set()
    made["categories"][2]["name"] = name
    refused_by_all(write(made), "1 categories whose name is no text: id 20 ")
    made["categories"][2]["name"] = 7  # as data sets of digits have
    assert LVISAnnotations.open(write(made)).stats.names[2] == "7"


def test_boxes_of_negative_size_are_no_ground_truth(write):
    made = made_set()
    made["annotations"][0]["bbox"] = [30, 30, -8, 9]
    path = write(made)
    with pytest.raises(UserError, match="1 boxes with negative width or height") as error:
        load_annotations(path)
    assert checked(path, "evaluation").problems == [str(error.value)] and checked(path, "training").problems == []


def test_images_without_a_list_of_the_not_exhaustive_are_told(write):
    made = made_set("lvis_v1")
    del made["images"][0]["not_exhaustive_category_ids"]
    told = "1 images without not_exhaustive_category_ids, which others have: taken as none"
    assert told in load_annotations(write(made)).notes


MOVES: dict[str, tuple[Callable[..., Any], str]] = {
    "shares": (lambda x, y, width, height: (x / width, y / height), "shares of the image"),
    "larger": (lambda x, y, width, height: (4 * x, 4 * y), "images 4 times as large"),
    "smaller": (lambda x, y, width, height: (x / 4, y / 4), "images 0.25 times as large"),
    "exchanged": (lambda x, y, width, height: (y, x), "x and y look exchanged"),
    "flipped": (lambda x, y, width, height: (width - x, y), "flipped left to right"),
    "upside down": (lambda x, y, width, height: (x, height - y), "flipped upside down"),
    "shifted": (lambda x, y, width, height: (x - 45, y + 31), "shifted by -45 and 31 pixels"),
    "outside": (lambda x, y, width, height: (x + 300, y), "shifted by 300 and 0 pixels"),
}


def moved_set(move: Callable[..., Any], count: int) -> Made:
    """40 images of 200 x 160 pixels with a rectangle each, polygons of the first `count` moved."""
    made: Made = {"images": [], "annotations": [], "categories": [{"id": i, "name": f"t{i}"} for i in CATEGORY_IDS]}
    for n in range(40):
        made["images"].append({"id": n, "height": 160, "width": 200, "file_name": f"{n}.jpg"})
        x, y, w, h = 100 + n, 30 + n // 2, 40, 30
        corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
        corners = [move(a, b, 200, 160) for a, b in corners] if n < count else corners
        row = {"id": n, "image_id": n, "category_id": 7, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
        made["annotations"].append(row | {"segmentation": [[float(v) for corner in corners for v in corner]]})
    return made


@pytest.mark.parametrize("kind", MOVES)
def test_masks_elsewhere_than_their_boxes_are_counted_with_the_likely_cause(kind, write):
    move, cause = MOVES[kind]
    path = write(moved_set(move, 9))
    annotations = LVISAnnotations.open(path)
    assert sorted([*annotations.empty_masks, *annotations.misplaced]) == list(range(9))
    for row in annotations.empty_masks.tolist():
        assert not coco_mask.area(annotations.segmentations.rles([row], 160, 200)[0])
    (note,) = annotations.notes
    assert note.startswith("WARNING: of 40 masks ") and cause in note
    (problem,) = training_problems(annotations)
    assert "data.allow_misplaced=true" in problem
    for use in ("", "training", "evaluation"):
        assert checked(path, use).problems == [problem]
    with pytest.raises(UserError, match="of 40 masks") as error:
        load_annotations(path)
    assert str(error.value) == problem
    allowed = Config(data=DataConfig(allow_misplaced=True))
    assert checked(path, "training", allowed).problems == []
    assert load_annotations(path, allow_misplaced=True).notes[0] == note
    assert load_annotations(path, masks=False).masks is None  # boxes alone are compared


def test_a_few_misplaced_masks_are_told_and_none_where_there_is_none(write):
    few = LVISAnnotations.open(write(moved_set(MOVES["outside"][0], 2)))
    assert "of 40 masks 2 are empty (annotations 0, 1)" in few.notes[0] and not training_problems(few)
    assert checked(few.path).problems == []
    for kind in ("coco", "lvis_v1"):
        assert LVISAnnotations.open(write(made_set(kind))).notes == []


def test_masks_of_objects_under_a_pixel_are_told_and_not_refused(write):
    made = moved_set(lambda x, y, width, height: (x, y), 0)
    for row in made["annotations"][:20]:
        x, y = row["bbox"][:2]
        shape = [x + 0.1, y + 0.1, x + 0.3, y + 0.1, x + 0.3, y + 0.3]
        row |= {"bbox": [x, y, 1.2, 1.2], "area": 0.02, "segmentation": [shape]}
    path = write(made)
    annotations = LVISAnnotations.open(path)
    assert annotations.tiny_masks.tolist() == list(range(20)) and not len(annotations.empty_masks)
    assert annotations.notes == [
        "WARNING: of 40 masks 20 are too small to fill a pixel (annotations 0, 1, 2, 3, 4, ... (20 in all))"
    ]
    assert checked(path, "training").problems == checked(path, "evaluation").problems == []
    evaluate_lvis(made, [], "segm", protocol="coco")


def test_outlines_are_those_of_the_corners_and_codes(write):
    made = made_set()
    annotations = LVISAnnotations.open(write(made))
    found = outlines(annotations.segmentations, annotations.image_sizes[annotations.image_of])
    for row, outline in zip(made["annotations"], found, strict=True):
        shape = row["segmentation"]
        if isinstance(shape, list):
            xs, ys = [v for part in shape for v in part[::2]], [v for part in shape for v in part[1::2]]
            np.testing.assert_allclose(outline, [min(xs), min(ys), max(xs), max(ys)], atol=0.11)
        else:
            code = coco_mask.frPyObjects(shape, *shape["size"]) if isinstance(shape["counts"], list) else shape
            rows, columns = np.nonzero(coco_mask.decode(code))
            assert outline.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def slow_runs(text: bytes) -> list[int] | None:
    """Run lengths character by character; None where the code is broken."""
    runs: list[int] = []
    at = 0
    while at < len(text):
        value, length, more = 0, 0, True
        while more:
            if at == len(text) or not 48 <= text[at] < 112 or length == 8:
                return None
            digit = text[at] - 48
            value |= (digit & 31) << 5 * length
            more, at, length = bool(digit & 32), at + 1, length + 1
        if digit & 16:
            value -= 1 << 5 * length
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs if runs and min(runs) >= 0 else None


def test_many_codes_are_decoded_as_one_by_one_by_plain_loops():
    rng = np.random.default_rng(0)
    texts, sizes = [], []
    for _ in range(3000):
        height, width = (int(side) for side in rng.integers(1, 60, 2))
        mask = np.asfortranarray(rng.random((height, width)) < rng.random(), dtype=np.uint8)
        text = bytearray(coco_mask.encode(mask)["counts"])
        for _ in range(int(rng.integers(0, 3))):
            at = int(rng.integers(len(text) + 1))
            text[at : at + int(rng.integers(0, 2))] = bytes(rng.integers(44, 116, int(rng.integers(0, 2))).tolist())
        texts.append(bytes(text))
        sizes.append((height, width))
    counts = np.frombuffer(b"".join(texts), np.uint8)
    bounds = np.append(0, np.cumsum([len(text) for text in texts]))
    runs, first, sound = decode_codes(counts, bounds)
    filled, areas = measure_codes(counts, bounds, np.array(sizes))
    expected = [slow_runs(text) for text in texts]
    assert 300 < sum(one is None for one in expected) < 2700
    for n, one in enumerate(expected):
        assert sound[n] == (one is not None)
        if one is not None:
            assert runs[first[n] : first[n + 1]].tolist() == one
        assert filled[n] == (one is not None and sum(one) == np.prod(sizes[n]))
        if filled[n]:
            assert areas[n] == sum(one[1::2]) == coco_mask.area({"size": list(sizes[n]), "counts": texts[n]})


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("kind", ["coco", "lvis_v1"])
def test_annotations_at_once_are_those_read_one_by_one(kind, masks):
    rows = made_set(kind, images=40)["annotations"]
    rng = np.random.default_rng(0)
    odd = {
        "bbox": [[1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, float("nan")], [1, 2, 3, True], (1, 2, 3, 4), None],
        "area": [None, "12", float("inf"), 1e300, 12, True],
        "iscrowd": [True, 0.0, 1],
        "segmentation": [
            None,
            [],
            [[]],
            [[1, 2, 3, 4, 5]],
            [["1"] * 6],
            [[1e9] * 6],
            [(1, 2, 9, 2, 9, 9)],
            {"size": 1},
        ],
        "ignore": [1, False],
        "id": [np.int64(77)],
    }
    for number in range(30):  # pieces as they should be, and pieces with something else in them
        piece = copy.deepcopy(rows)
        for key in rng.choice(list(odd), number % 4, replace=False):
            piece[int(rng.integers(len(piece)))][key] = odd[key][int(rng.integers(len(odd[key])))]
        once, one_by_one = Columns(masks), Columns(masks)
        for first in range(0, len(piece), 50):
            once.add_annotations(piece[first : first + 50], first)
        for place, row in enumerate(piece):
            one_by_one.add_annotation(row, place)
        parts = [vars(columns.segmentations.finish()) for columns in (once, one_by_one)]
        for name, value in parts[0].items():
            np.testing.assert_array_equal(value, parts[1][name])
        assert once.segmentations.dropped == one_by_one.segmentations.dropped
        for name in ("annotation_ids", "annotation_images", "annotation_classes", "boxes", "areas", "without_area"):
            np.testing.assert_array_equal(getattr(once, name), getattr(one_by_one, name))
        assert (once.crowd, once.ignore) == (one_by_one.crowd, one_by_one.ignore)
        assert once.mistakes.counts == one_by_one.mistakes.counts


def test_numpy_numbers_and_arrays_are_read_as_json_is():
    made = made_set("lvis_v1")
    found = results_for(made, np.random.default_rng(0))
    for kind in ("bbox", "segm"):
        expected = evaluate_lvis(made, found, kind).metrics
        for seed in range(5):
            rng = np.random.default_rng(seed)
            assert evaluate_lvis(as_numpy(made, rng), as_numpy(found, rng), kind).metrics == expected
    for entry in found:
        entry["score"], entry["bbox"] = np.float32(entry["score"]), np.array(entry["bbox"])
        entry["image_id"], entry["category_id"] = np.int64(entry["image_id"]), np.int32(entry["category_id"])
        entry["segmentation"]["counts"] = entry["segmentation"]["counts"].encode()  # as pycocotools gives it
    assert len(read_results(found)) == len(found)
    assert evaluate_lvis(made, found, "segm").metrics["AP"] > 0


def test_check_data_knows_keep_empty_and_allow_missing(write, images):
    made = made_set()
    made["annotations"] = [row for row in made["annotations"] if row["image_id"] == made["images"][0]["id"]]
    path = write(made)
    kept = Config(data=DataConfig(keep_empty=True))
    assert any("8, of which training uses 8" in line for line in checked(path, "training", kept).lines)
    assert any("8, of which training uses 1" in line for line in checked(path, "training").lines)
    annotations = LVISAnnotations.open(path)
    folder = images(annotations)
    missing = Config(data=DataConfig(allow_missing=True))
    for index, problems in ((3, 0), (0, 1)):  # the first is the only one with objects
        annotations.image_path(index, folder).unlink()
        report = Report()
        check_set(path, str(folder), report, 0, config=missing, use="training")
        assert len(report.problems) == problems
    made["annotations"] = []
    assert "training could use none of its images" in checked(write(made), "training", kept).problems[0]
