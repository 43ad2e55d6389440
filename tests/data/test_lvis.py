"""Annotation files: every format against plain Python, what training drops, and each way a file can be broken."""

import bz2
import gzip
import json
import lzma
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from loce.data.annotations.image_files import image_name
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.masks import cut_runs
from loce.evaluation.annotations import FederatedFilter, load_annotations
from loce.utils.errors import UserError
from tests.data.made_annotations import CATEGORY_IDS, as_format, content, full_mask

FORMATS = ("lvis_v1", "lvis_v0.5", "coco")
NAMES = ("annotation_ids", "labels")
SQUARE = [[5.0, 5.0, 25.0, 5.0, 25.0, 25.0, 5.0, 25.0]]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_as_plain_python_reads_it(kind, write):
    made = as_format(content(), kind)
    annotations = LVISAnnotations.open(write(made))
    assert annotations.image_ids.tolist() == [image["id"] for image in made["images"]]
    for index, image in enumerate(made["images"]):
        rows = [row for row in made["annotations"] if row["image_id"] == image["id"]]
        mine = annotations.rows(index)
        assert annotations.annotation_ids[mine].tolist() == [row["id"] for row in rows]
        assert annotations.labels[mine].tolist() == [CATEGORY_IDS.index(row["category_id"]) for row in rows]
        xyxy = [(x, y, x + w, y + h) for x, y, w, h in (row["bbox"] for row in rows)]
        np.testing.assert_array_equal(annotations.corners(mine), np.array(xyxy, dtype=np.float32))
        assert annotations.areas[mine].tolist() == [50.0] * len(rows)
        assert annotations.image_sizes[index].tolist() == [image["height"], image["width"]]
        height, width = image["height"], image["width"]
        for row, runs in zip(rows, annotations.segmentations.runs(mine, height, width), strict=True):
            assert runs.sum() == height * width
            mask = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
            np.testing.assert_array_equal(mask, full_mask(row["segmentation"], height, width))
    prefix = {"lvis_v1": "train2017/", "lvis_v0.5": "COCO_val2014_"}.get(kind, "")
    assert annotations.name(0) == f"{prefix}000000001000.jpg"
    assert annotations.dropped == {}
    assert annotations.train_images.tolist() == list(range(len(made["images"])))


def test_lvis_lists_are_kept_as_labels_and_coco_has_none(write):
    lvis = LVISAnnotations.open(write(as_format(content(), "lvis_v1")))
    assert lvis.negatives.of(3).tolist() == [2, 0] and lvis.not_exhaustive.of(3).tolist() == []
    coco = LVISAnnotations.open(write(content()))
    assert coco.negatives is None and coco.not_exhaustive is None


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ({"coco_url": "http://images.cocodataset.org/val2017/000000397133.jpg"}, "val2017/000000397133.jpg"),
        ({"file_name": "COCO_val2014_000000000001.jpg"}, "COCO_val2014_000000000001.jpg"),
        (
            {"file_name": "COCO_val2014_000000000042.jpg", "coco_url": "u/val2014/COCO_val2014_000000000042.jpg"},
            "val2014/COCO_val2014_000000000042.jpg",
        ),
        ({"file_name": "COCO-cells_plate7_0001.jpg"}, "COCO-cells_plate7_0001.jpg"),
        ({"file_name": "C:\\pictures\\one.jpg"}, "C:/pictures/one.jpg"),
        (
            {"file_name": "COCO_val2014_000000000001.jpg", "coco_url": "u/val2017/000000000001.jpg"},
            "val2017/000000000001.jpg",
        ),
        (
            {"file_name": "000000000001.jpg", "coco_url": "http://x.org/train2017/000000000001.jpg"},
            "train2017/000000000001.jpg",
        ),
        ({"file_name": "mine.png", "coco_url": "http://x.org/train2017/000000000001.jpg"}, "mine.png"),
        ({"file_name": "a/b/mine.png"}, "a/b/mine.png"),
        ({"id": 1}, ""),
    ],
)
def test_image_names(image, name):
    assert image_name(image) == name


def test_counts_and_groups(write):
    made = content(images=30)
    annotations = LVISAnnotations.open(write(made), rare_max=15, common_max=20)
    counts = {i: ({r["image_id"] for r in rows}, len(rows)) for i, rows in by_category(made).items()}
    assert annotations.stats.image_counts.tolist() == [len(counts[i][0]) for i in CATEGORY_IDS]
    assert annotations.stats.instance_counts.tolist() == [counts[i][1] for i in CATEGORY_IDS]
    groups = ["r" if n <= 15 else "c" if n <= 20 else "f" for n in annotations.stats.image_counts]
    assert annotations.stats.groups.tolist() == groups and len(set(groups)) > 1
    assert annotations.stats.image_total == 30
    assert annotations.stats.category_ids.tolist() == list(CATEGORY_IDS)
    lvis = LVISAnnotations.open(write(as_format(made, "lvis_v1")))
    assert lvis.stats.groups.tolist() == ["r", "c", "f", "r"]
    np.testing.assert_array_equal(lvis.stats.image_counts, annotations.stats.image_counts)


def by_category(made):
    return {i: [row for row in made["annotations"] if row["category_id"] == i] for i in CATEGORY_IDS}


def one_image(*rows, height=60, width=80):
    """A file of one image with annotations that differ from a good one by what is given."""
    good = {"image_id": 1, "category_id": 7, "bbox": [5.0, 5.0, 20.0, 20.0], "area": 400.0, "segmentation": SQUARE}
    return {
        "images": [{"id": 1, "height": height, "width": width, "file_name": "a.jpg"}],
        "categories": [{"id": 7, "name": "thing"}],
        "annotations": [{"id": 100 + number, **good, **row} for number, row in enumerate(rows)],
    }


BAD_POLYGONS = "polygon parts with fewer than 3 points, an odd number of coordinates, or no usable number in one"
NO_MASK = "annotations without a usable segmentation"
BAD_RLE = "run-length code broken or of another size than the image"
BAD_SHAPE = "segmentation missing, empty or neither polygons nor a run-length code"


@pytest.mark.parametrize(
    ("row", "reasons"),
    [
        ({"iscrowd": 1}, ["crowd regions"]),
        ({"ignore": 1}, ["annotations marked `ignore`"]),
        ({"bbox": [5, 5, 20]}, ["boxes that are not four numbers"]),
        ({"bbox": None}, ["boxes that are not four numbers"]),
        ({"bbox": [5, 5, float("nan"), 20]}, ["boxes that are not four numbers"]),
        ({"bbox": [5, 5, "20", 20]}, ["boxes that are not four numbers"]),
        ({"bbox": [5, 5, 20, 0.99]}, ["boxes under 1 pixel wide or high"]),
        ({"bbox": [25, 25, -20, -20]}, ["boxes under 1 pixel wide or high"]),
        ({"bbox": [80, 5, 20, 20]}, ["boxes outside the image"]),
        ({"bbox": [5, -20, 20, 20]}, ["boxes outside the image"]),
        ({"bbox": [79.5, 5, 20, 20]}, ["boxes under 1 pixel wide or high inside the image"]),
        ({"area": 0}, ["annotations whose area is not positive (where none is given, it is computed)"]),
        ({"area": None}, ["annotations whose area is not positive (where none is given, it is computed)"]),
        ({"segmentation": []}, [NO_MASK, BAD_SHAPE]),
        ({"segmentation": None}, [NO_MASK, BAD_SHAPE]),
        ({"segmentation": "abc"}, [NO_MASK, BAD_SHAPE]),
        ({"segmentation": [[1, 2, 3, 4]]}, [NO_MASK, BAD_POLYGONS]),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, [NO_MASK, BAD_POLYGONS]),
        ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, [NO_MASK, BAD_POLYGONS]),
        ({"segmentation": [[1, 2, 3, 4, 5, 1e9]]}, [NO_MASK, BAD_POLYGONS]),
        ({"segmentation": [[1, 2, 3, None, 5, 6]]}, [NO_MASK, BAD_POLYGONS]),
        ({"segmentation": {"size": [60, 80], "counts": [100, 200]}}, [NO_MASK, BAD_RLE]),
        ({"segmentation": {"size": [80, 60], "counts": [100, 4700]}}, [NO_MASK, BAD_RLE]),
        ({"segmentation": {"size": [60, 80], "counts": "~~~"}}, [NO_MASK, BAD_RLE]),
        ({"segmentation": {"size": [60, 80], "counts": "PQRo"}}, [NO_MASK, BAD_RLE]),
        ({"segmentation": {"size": [60, 80], "counts": ""}}, [NO_MASK, BAD_RLE]),
        ({"segmentation": {"counts": [4800]}}, [NO_MASK, BAD_RLE]),
    ],
)
def test_what_training_drops_is_counted_by_reason(row, reasons, write):
    annotations = LVISAnnotations.open(write(one_image({}, row)))
    assert annotations.annotation_ids[annotations.rows(0)].tolist() == [100]
    assert annotations.dropped == dict.fromkeys(reasons, 1)
    alone = LVISAnnotations.open(write(one_image(row)))
    assert alone.train_images.tolist() == []
    assert alone.dropped == dict.fromkeys([*reasons, "images without an annotation that training uses"], 1)


def test_a_bad_part_leaves_the_good_parts(write):
    annotations = LVISAnnotations.open(write(one_image({"segmentation": [[1, 2, 3], *SQUARE]})))
    assert annotations.dropped == {BAD_POLYGONS: 1}
    bits, corner = cut_runs(annotations.segmentations.runs(annotations.rows(0), 60, 80)[0], 60)
    expected = full_mask(SQUARE, 60, 80)
    assert bits.sum() == expected.sum() and corner == (5, 5)


def test_small_images_are_left_out_of_training(write):
    annotations = LVISAnnotations.open(write(one_image({}, height=31)))
    assert annotations.train_images.tolist() == [] and len(annotations) == 1
    assert annotations.dropped == {"images with a side under 32 pixels": 1}
    assert LVISAnnotations.open(write(one_image({}, height=32))).train_images.tolist() == [0]


def test_dropped_boxes_against_plain_loops(write):
    rng = np.random.default_rng(0)
    boxes = [(rng.uniform(-30, 90, 4) * [1, 1, 0.3, 0.3]).round(int(rng.integers(0, 3))).tolist() for _ in range(400)]
    annotations = LVISAnnotations.open(write(one_image(*({"bbox": box} for box in boxes))))

    def keep(x, y, width, height):
        inside_x = max(0, min(x + width, 80) - max(x, 0)) if x < 0 or x + width > 80 else width
        inside_y = max(0, min(y + height, 60) - max(y, 0)) if y < 0 or y + height > 60 else height
        return width >= 1 and height >= 1 and inside_x >= 1 and inside_y >= 1

    kept = [100 + number for number, box in enumerate(boxes) if keep(*box)]
    assert annotations.annotation_ids[annotations.rows(0)].tolist() == kept
    assert 50 < len(kept) < 350 and sum(annotations.dropped.values()) == 400 - len(kept)
    clipped = annotations.clipped_boxes(annotations.rows(0))
    assert clipped.min() >= 0 and (clipped[:, 2] <= 80).all() and (clipped[:, 3] <= 60).all()


def changed(section, number, **values):
    made = as_format(content(), "lvis_v1")
    made[section][number] |= values
    return made


def without(section):
    made = content()
    del made[section]
    return made


TEXT = json.dumps(content())
BROKEN = {
    "empty": (b"", "is empty"),
    "gzip": (gzip.compress(TEXT.encode()), "still compressed; unpack it first: gunzip"),
    "zip": (b"PK\x03\x04abc", "unzip"),
    "bzip2": (bz2.compress(TEXT.encode()), "bunzip2 -k"),
    "xz": (lzma.compress(TEXT.encode()), "unxz -k"),
    "tar": (
        b"annotations.json".ljust(257, b"\0") + b"ustar\0" + TEXT.encode(),
        "a tar archive; unpack it first: tar xf",
    ),
    "pickle": (pickle.dumps({"images": []}), "a pickle of Python, which is not read"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "truncated": (TEXT[: len(TEXT) // 2], "ends too early"),
    "truncated in a string": (TEXT[: TEXT.index("thing") + 2], "ends too early"),
    "json lines": ('{"a": 1}\n{"a": 2}\n', "more than one JSON value"),
    "not json": ("<!DOCTYPE html>" + "x" * 200, "is not JSON"),
    "binary": (bytes(range(128, 256)), "not a text file"),
    "deep": ('{"images": ' + "[" * 200_000, "nested too deeply"),
    "results": ([{"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}], "as files of results are"),
    "a number": ("3", "is no object"),
    "no images": (without("images"), "no list of images"),
    "no sections": ("{}", "no list of images and no list of annotations and no list of categories"),
    "empty images": ({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}, "1 empty list: images"),
    "empty categories": ({**content(), "categories": []}, "1 empty list: categories"),
    "category without name": ({**content(), "categories": [{"id": 1}]}, "categories without a whole-number id"),
    "annotation without image": (
        {**content(), "annotations": [{"id": 3}]},
        "`annotations` without all of id, image_id",
    ),
    "image without size": ({**content(), "images": [{"id": 3}]}, "images without height and width in pixels"),
    "image without name": (changed("images", 2, coco_url=None), "neither file_name nor coco_url: image 994"),
    "image of size 0": (changed("images", 2, height=0), "a side is not 1 to 65535: (994, 0,"),
    "text as id": (changed("annotations", 2, id="a"), "1 annotations whose id, image_id or category_id is no whole"),
    "unknown image": (changed("annotations", 2, image_id=5, id=77), "unknown image: annotation 77 (image_id 5)"),
    "unknown category": (
        changed("annotations", 2, category_id=5, id=77),
        "unknown category: annotation 77 (category_id 5)",
    ),
    "duplicate image": (changed("images", 2, id=1000), "1 image ids used more than once: 1000"),
    "duplicate category": (changed("categories", 2, id=7), "1 category ids used more than once: 7"),
    "image larger than any": (changed("images", 2, height=1 << 40), "a side is not 1 to 65535"),
    "file name that is no text": (changed("images", 2, file_name="a\ud800.jpg"), "no text that can be printed"),
    "file name with a zero byte": (changed("images", 2, file_name="a\0.jpg"), "no text that can be printed"),
    "unknown negatives": (changed("images", 2, neg_category_ids=[7, 8]), "1 unknown categories in image lists"),
    "unknown frequency": (changed("categories", 2, frequency="x"), "`frequency` is not r, c or f: thing 20 ('x')"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(case, write):
    made, message = BROKEN[case]
    path = write(made)
    with pytest.raises(UserError) as error:
        LVISAnnotations.open(path)
    assert message in str(error.value) and path in str(error.value)


def test_all_mistakes_of_a_kind_of_check_come_together(write):
    made = changed("annotations", 2, category_id=5, id=77)
    made["annotations"][3]["image_id"] = 6
    with pytest.raises(UserError, match=r"(?s)unknown image.*unknown category"):
        LVISAnnotations.open(write(made))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="there is no such annotation file"):
        LVISAnnotations.open(tmp_path / "none.json")
    with pytest.raises(UserError, match="is a folder"):
        LVISAnnotations.open(tmp_path)


@pytest.mark.parametrize("kind", FORMATS)
def test_images_are_found_in_the_split_folder_or_beside_it(kind, write, images, tmp_path):
    annotations = LVISAnnotations.open(write(as_format(content(), kind)))
    folder = images(annotations)
    annotations.require_images(folder)
    name = annotations.name(2)
    assert annotations.image_path(2, folder) == folder / name
    flat = tmp_path / "flat"
    flat.mkdir()
    (folder / name).rename(flat / Path(name).name)
    assert annotations.image_path(2, flat) == flat / Path(name).name
    assert annotations.missing_images(folder) == [2]
    assert annotations.missing_images(flat) == [0, 1, *range(3, 8)]


def test_missing_images_are_counted_by_split(write, images):
    made = as_format(content(), "lvis_v1")
    for image in made["images"][:3]:
        image["coco_url"] = image["coco_url"].replace("train2017", "val2017")
    annotations = LVISAnnotations.open(write(made))
    folder = images(annotations)
    for file in (folder / "train2017").iterdir():
        file.unlink()
    with pytest.raises(UserError) as error:
        annotations.require_images(folder)
    message = str(error.value)
    assert f"5 of 8 images are missing: 5 in {folder}/train2017 (the first: train2017/000000000991.jpg, " in message
    assert "needs the images of train2017 and val2017: put or link them into" in message
    with pytest.raises(UserError, match="There is no folder"):
        annotations.require_images(folder / "elsewhere")


def test_classes_of_two_files_must_be_the_same_in_the_same_order(write):
    made = content()
    stats = LVISAnnotations.open(write(made)).stats
    LVISAnnotations.open(write(content(seed=1))).require_same_classes(stats, "the checkpoint")
    made["categories"].append({"id": 99, "name": "more"})
    with pytest.raises(UserError, match="not those of the checkpoint, in the same order: 5 categories here, 4 there"):
        LVISAnnotations.open(write(made)).require_same_classes(stats, "the checkpoint")
    swapped = content()
    swapped["categories"][1:3] = swapped["categories"][2:0:-1]
    with pytest.raises(UserError, match=r"\(20, 'thing 20'\) here, \(3, 'thing 3'\) there; \(3"):
        LVISAnnotations.open(write(swapped)).require_same_classes(stats, "the checkpoint")


def test_some_classes_of_a_file_are_those_of_a_file_without_the_others(write):
    made = as_format(content(), "lvis_v1")
    whole = LVISAnnotations.open(write(made))
    part = whole.of_classes(np.array([20, 7, 1]))
    made["annotations"] = [row for row in made["annotations"] if row["category_id"] != 3]
    made["categories"] = [category for category in made["categories"] if category["id"] != 3]
    expected = LVISAnnotations.open(write(made))
    assert part.stats.names == expected.stats.names == ("thing 7", "thing 20", "thing 1")
    for name in ("category_ids", "image_counts", "instance_counts", "groups"):
        np.testing.assert_array_equal(getattr(part.stats, name), getattr(expected.stats, name))
    assert part.train_images.tolist() == expected.train_images.tolist()
    for index in range(len(whole)):
        ids, labels = ([getattr(one, name)[one.rows(index)].tolist() for one in (part, expected)] for name in NAMES)
        assert ids[0] == ids[1] and labels[0] == labels[1]
    # What a detector of these can find; what is to be found is all.
    truth, rule = load_annotations(part), FederatedFilter(load_annotations(part), part.stats.category_ids)
    assert len(truth) == len(load_annotations(whole)) and truth.category_ids.tolist() == [1, 3, 7, 20]
    less = FederatedFilter(expected)
    for image_id in whole.image_ids.tolist():
        assert rule.allowed(image_id).tolist() == less.allowed(image_id).tolist()
        for found, other in zip(rule.objects(image_id), less.objects(image_id), strict=True):
            np.testing.assert_array_equal(found, other)
    lost = (whole.labels == 1).sum()
    text = "WARNING: 1 categories without a training instance have no output (data.drop_empty): thing 3; "
    assert part.notes[-1].startswith(f"{text}{lost} objects of theirs are in ") and part.notes[-1] in truth.notes
    assert whole.of_classes(whole.stats.category_ids) is whole and whole.without_empty() is whole
    part.require_same_classes(expected.stats, "the checkpoint")
    whole.require_same_classes(expected.stats, "the checkpoint", more=True)
    with pytest.raises(UserError, match="4 categories here, 3 there"):
        whole.require_same_classes(expected.stats, "the checkpoint")
    with pytest.raises(UserError, match="3 categories here, 4 there"):
        expected.require_same_classes(whole.stats, "the checkpoint", more=True)


def test_annotations_cost_little_memory(write):
    """Flat arrays: few bytes per annotation remain after reading, and go to a worker that is not forked."""
    made = one_image(*({} for _ in range(20_000)))
    path = write(made)
    tracemalloc.start()
    annotations = LVISAnnotations.open(path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 150 * 20_000
    assert len(pickle.dumps(annotations)) < 130 * 20_000
