"""Options and rules for data that is not as it should be: what happens to it; users' files stay as they are."""

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from loce.config import Config, DataConfig, EvalConfig, SamplerConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import val_annotations
from loce.data.check import Report, check_set
from loce.data.dataset import EvalDataset, limit_instances
from loce.data.loader import TrainDataset, eval_batches, fill_batches, train_batches, training_plan
from loce.data.samplers import image_labels, repeat_factors
from loce.data.transforms import ImageError, read_image
from loce.utils.errors import UserError
from tests.data.made_annotations import CATEGORY_IDS, content, full_mask

CONFIG = DataConfig(short_edges=(48, 56, 64), long_edge=100, test_short_edge=64, flip=0.5)


def opened(write, images, made: dict[str, Any], config: DataConfig = CONFIG, **options: bool) -> TrainDataset:
    annotations = LVISAnnotations.open(write(made), **options)
    return TrainDataset(annotations, images(annotations), config, seed=3)


def test_the_instances_that_stay_are_of_the_rarest_classes():
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows = np.sort(rng.choice(1000, int(rng.integers(1, 40)), replace=False))
        rarity = rng.integers(1, 5, len(rows))
        limit = int(rng.integers(1, 45))
        kept = limit_instances(rows, rarity, limit, rng)
        assert len(kept) == min(limit, len(rows)) and (np.diff(kept) > 0).all()
        of = dict(zip(rows.tolist(), rarity.tolist(), strict=True))
        expected = Counter(sorted(of.values())[:limit])  # the slow way: sort all of them
        assert Counter(of[row] for row in kept.tolist()) == expected


def test_every_instance_has_its_turn_and_few_draw_no_random_number():
    rows = np.arange(30)
    generator = np.random.default_rng(0)
    seen = {int(row) for _ in range(60) for row in limit_instances(rows, np.ones(30), 10, generator)}
    assert seen == set(range(30))
    untouched, state = np.random.default_rng(1), np.random.default_rng(1)
    assert limit_instances(rows, np.ones(30), 30, untouched) is rows
    assert untouched.random() == state.random()


def test_a_crowded_image_is_limited_the_rest_is_ignored_and_that_is_said_once(write, images, capsys):
    made = content(images=4)
    crowded = made["images"][0]["id"]
    rows = [row for row in made["annotations"] if row["image_id"] == crowded]
    made["annotations"] += [{**rows[0], "id": 900 + n, "category_id": 7} for n in range(40)]
    dataset = opened(write, images, made, dataclasses.replace(CONFIG, max_instances=10))
    everything = dataset.annotations.rows(0)
    assert len(everything) > 40
    sample = dataset[0, 0]
    assert len(sample["boxes"]) == len(sample["labels"]) == len(sample["masks"]) == len(sample["rows"]) == 10
    assert len(sample["ignored"]) == len(everything) - 10
    assert sample["limited"].startswith(f"image {crowded}: 10 of its {len(everything)} instances are used at a time")
    labels = dataset.annotations.labels[sample["rows"].numpy()]
    assert sample["labels"].tolist() == labels.tolist()
    others = [CATEGORY_IDS.index(row["category_id"]) for row in rows if row["category_id"] != 7]
    assert set(others) <= set(labels.tolist())  # only class 7 is frequent here
    batches = train_batches(dataset, training_plan(dataset, SamplerConfig(), CONFIG, 2, seed=0), epochs=3)
    assert sum(len(samples) for samples in batches) >= 12
    assert capsys.readouterr().out.count("warning: image") == 1 and batches.bad == []
    for samples in fill_batches(dataset, 5, True, seed=0, images=2):
        for each in samples:
            assert len(each["store_rows"]) <= len(each["rows"])
            assert each["labels"][each["store_rows"]].numel() == len(each["store_rows"])


def test_crowds_are_ignored_regions(write, images):
    made = content(images=3)
    row = made["annotations"][0]
    row["iscrowd"] = 1
    lost = made["annotations"][1]
    lost |= {"ignore": 1, "bbox": [5, 5, 0, 9]}  # has no region
    dataset = opened(write, images, made)
    ids = [image["id"] for image in made["images"]]
    regions = {i: dataset.annotations.ignored(i).tolist() for i in range(3)}
    assert regions[ids.index(row["image_id"])] == [0] and sum(map(len, regions.values())) == 1
    sample = dataset[ids.index(row["image_id"]), 0]
    _, _, width, height = row["bbox"]
    size = sample["scale"][0] * width, sample["scale"][1] * height
    ((x1, y1, x2, y2),) = sample["ignored"].tolist()
    assert (x2 - x1, y2 - y1) == pytest.approx(size, abs=1e-3)
    assert 0 not in sample["rows"].tolist()


def test_images_without_objects_are_negatives_by_option(write, images):
    made = content(images=6)
    gone = made["images"][2]["id"]
    made["annotations"] = [row for row in made["annotations"] if row["image_id"] != gone]
    assert len(opened(write, images, made)) == 5
    dataset = opened(write, images, made, keep_empty=True)
    assert len(dataset) == 6 and "images without an annotation that training uses" not in dataset.annotations.dropped
    sample = dataset[2, 0]
    assert sample["boxes"].shape == (0, 4) and len(sample["masks"]) == 0 and sample["labels"].shape == (0,)
    labels = image_labels(dataset.annotations)
    factors = repeat_factors(labels, 0.9)
    assert factors[2] == 1 and len(factors) == 6
    others = repeat_factors(image_labels(opened(write, images, made).annotations), 0.9 * 6 / 5)
    np.testing.assert_allclose(np.delete(factors, 2), others)  # shares are of all images that are shown
    for name in ("uniform", "repeat_factor", "class_balanced"):
        plan = training_plan(dataset, SamplerConfig(name=name, repeat_threshold=0.9), CONFIG, 2, seed=0)
        shown = [sample for samples in train_batches(dataset, plan, epochs=1) for sample in samples]
        assert len(shown) >= 6
        assert (gone in [sample["image_id"] for sample in shown]) == (name != "class_balanced")


def test_a_box_stands_for_a_mask_by_option(write, images):
    made = content(images=3)
    rows = made["annotations"]
    for row, segmentation in zip(rows, ([], [[1, 2, 3]], {"size": [1, 1], "counts": [1]}), strict=False):
        row["segmentation"] = segmentation
    dropped = opened(write, images, made)
    assert dropped.annotations.dropped["annotations without a usable segmentation"] == 3
    still = dataclasses.replace(CONFIG, flip=0.0)
    dataset = opened(write, images, made, still, box_masks=True)
    assert any(
        "3 annotations have no mask that can be used: their box is the mask" in n for n in dataset.annotations.notes
    )
    assert len(dataset.annotations.train_rows) == len(dropped.annotations.train_rows) + 3
    assert (~dataset.annotations.has_mask).nonzero()[0].tolist() == [0, 1, 2]
    for index, image in enumerate(made["images"]):
        sample = dataset[index, 0]
        masks, boxes = sample["masks"].full().numpy(), sample["boxes"].numpy()
        size = (image["height"], image["width"])
        for row, mask, box in zip(sample["rows"].tolist(), masks, boxes, strict=True):
            if row < 3:
                y, x = np.nonzero(mask)
                around = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
                np.testing.assert_allclose(box, around, atol=1.6 * max(sample["scale"]))
                assert mask.sum() == (around[2] - around[0]) * (around[3] - around[1])
            else:
                assert full_mask(rows[row]["segmentation"], *size).any() and mask.any()


@pytest.mark.parametrize("corner", [(0, 0), (30.4, 20.6), (55.0, 37.5)])
@pytest.mark.parametrize("side", [1.0, 1.2, 4.5])
def test_the_filled_box_covers_pixel_centres(corner, side):
    from loce.data.dataset import filled_box

    x, y = corner
    bits, (left, top) = filled_box(x, y, x + side, y + side)
    inside = {(i, j) for i in range(64) for j in range(64) if x <= i + 0.5 < x + side and y <= j + 0.5 < y + side}
    covered = {(left + i, top + j) for j in range(bits.shape[0]) for i in range(bits.shape[1])}
    assert covered == inside and bits.all()


def test_missing_images_are_left_out_by_option(write, images):
    dataset = opened(write, images, content(images=6))
    for index in (1, 4):
        dataset.annotations.image_path(index, dataset.folder).unlink()
    missing = dataset.annotations.missing_images(dataset.folder)
    assert missing == [1, 4]
    with pytest.raises(UserError, match=r"2 of 6 images are missing.*data.allow_missing=true goes on without them"):
        dataset.annotations.require_images(dataset.folder)
    rest = dataset.annotations.without_images(missing, dataset.folder)
    assert rest.train_images.tolist() == [0, 2, 3, 5] and rest.absent == [1, 4]
    assert rest.dropped[f"images that are missing in {dataset.folder} (data.allow_missing)"] == 2
    assert len(dataset.annotations.train_images) == 6  # nothing was changed in place
    dataset.annotations = rest
    plan = training_plan(dataset, SamplerConfig(), CONFIG, 2, seed=0)
    assert not any("replaced" in s for samples in train_batches(dataset, plan, epochs=2) for s in samples)
    assert rest.without_images([], dataset.folder) is rest


def test_a_subset_needs_its_own_images_only(write, images, tmp_path):
    dataset = opened(write, images, content(images=6))
    dataset.annotations.image_path(1, dataset.folder).unlink()
    data = dataclasses.replace(CONFIG, val_annotations=dataset.annotations.path, val_images=str(dataset.folder))
    ids = dataset.annotations.image_ids.tolist()
    (tmp_path / "few.txt").write_text(f"{ids[4]}\n{ids[2]}\n")
    few = EvalConfig(images=str(tmp_path / "few.txt"))
    assert list(val_annotations(Config(data=data, eval=few)).absent) == [0, 1, 3, 5]
    (tmp_path / "few.txt").write_text(f"{ids[1]}\n{ids[2]}\n")
    with pytest.raises(UserError, match="1 of 6 images are missing"):
        val_annotations(Config(data=data, eval=few))
    found = val_annotations(Config(data=dataclasses.replace(data, allow_missing=True), eval=few))
    assert list(found.absent) == [0, 1, 3, 4, 5]


def test_annotations_with_one_id_are_told_apart(write):
    made = content()
    ids = [row["id"] for row in made["annotations"]]
    made["annotations"][3]["id"] = made["annotations"][5]["id"] = ids[0]
    annotations = LVISAnnotations.open(write(made))
    (note,) = annotations.notes
    assert note == f"2 annotations have the id of another one ({ids[0]}): they were given new ids"
    found = annotations.annotation_ids.tolist()
    assert len(set(found)) == len(ids) and found[0] == ids[0]
    assert [new for n, new in enumerate(found) if n not in (3, 5)] == [
        old for n, old in enumerate(ids) if n not in (3, 5)
    ]
    assert len(annotations.train_rows) == len(ids)
    assert LVISAnnotations.open(write(content())).notes == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied_by_option(orientation, tmp_path):
    rng = np.random.default_rng(0)
    stored = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as file:
        expected = np.asarray(ImageOps.exif_transpose(file))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", expected.shape[:2], "apply"), expected)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", (20, 30)), np.asarray(stored))
    if orientation > 4:
        with pytest.raises(ImageError, match=f"its EXIF orientation is {orientation}, data.exif=apply turns it"):
            read_image(tmp_path / "a.png", (30, 20))
        with pytest.raises(ImageError, match=f"its EXIF orientation is {orientation}, data.exif=ignore turns it"):
            read_image(tmp_path / "a.png", (20, 30), "apply")


@pytest.mark.parametrize("how", ["high_byte", "range"])
def test_images_of_12_bits_are_told_once_by_training_evaluation_and_check_data(how, write, images, capsys):
    dataset = opened(write, images, content(images=4), dataclasses.replace(CONFIG, scale_16bit=how))
    rng = np.random.default_rng(0)
    for index, (height, width) in enumerate(dataset.annotations.image_sizes.tolist()):
        path = dataset.annotations.image_path(index, dataset.folder)
        cv2.imwrite(str(path.with_suffix(".png")), rng.integers(0, 4096, (height, width)).astype(np.uint16))
        path.with_suffix(".png").rename(path)
    plan = training_plan(dataset, SamplerConfig(), dataset.config, 2, seed=0)
    evaluation = EvalDataset(dataset.annotations, dataset.folder, dataset.config)
    for batches in (train_batches(dataset, plan, epochs=1), eval_batches(evaluation, 2)):
        brightest = max(int(sample["image"].max()) for samples in batches for sample in samples)
        assert (brightest < 16) == (how == "high_byte")
        assert capsys.readouterr().out.count("become 16 of 256 levels") == (how == "high_byte")
    report = Report()
    config = Config(data=DataConfig(scale_16bit=how))
    check_set(dataset.annotations.path, str(dataset.folder), report, 100, config=config)
    told = [line for line in report.lines if line.startswith("  16 bits")]
    assert len(told) == (how == "high_byte") and not report.problems
    assert all(f"{len(dataset.annotations)} of them use few of 256 levels; the first: " in line for line in told)


def test_no_image_can_be_read_at_all(write, images, capsys):
    """A disk that went away: no rank ends alone at an image, all of them do where they agree."""
    dataset = opened(write, images, content(images=6))
    for index in range(6):
        dataset.annotations.image_path(index, dataset.folder).unlink()
    sample = dataset[0, 0]
    assert len(sample["replaced"]) > 5 and not sample["image"].any() and len(sample["boxes"]) == 0
    plan = training_plan(dataset, SamplerConfig(), CONFIG, 2, seed=0)
    with pytest.raises(UserError, match=r"(?s)more than 1 of 6 images cannot be used.*image 1000: .*No such file"):
        list(train_batches(dataset, plan, epochs=1))
    assert capsys.readouterr().out.count("warning: image 1000:") == 1


def fingerprints(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Time, mode and content of every file and folder."""
    paths = sorted(folder.rglob("*"))
    texts = {p: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in paths}
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_mode, texts[p]) for p in paths}


def test_the_users_files_are_never_changed(write, images, tmp_path):
    """A read-only tree with a damaged image goes through checking, training, filling and evaluation."""
    from loce.data.check import Report, check_set
    from loce.data.loader import EvalDataset

    dataset = opened(write, images, content(images=6))
    dataset.annotations.image_path(2, dataset.folder).write_bytes(b"\xff\xd8damaged")
    for path in tmp_path.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    tmp_path.chmod(0o555)
    before = fingerprints(tmp_path)
    try:
        check_set(dataset.annotations.path, str(dataset.folder), Report(), 100)
        plan = training_plan(dataset, SamplerConfig(), CONFIG, 2, seed=0)
        for batches in (train_batches(dataset, plan, epochs=2), fill_batches(dataset, 5, True, seed=0, images=2)):
            assert sum(map(len, batches)) >= 6
        evaluation = EvalDataset(dataset.annotations, dataset.folder, CONFIG)
        assert sum(map(len, eval_batches(evaluation, 2))) == 6
        assert fingerprints(tmp_path) == before
    finally:
        tmp_path.chmod(0o755)
        for path in tmp_path.rglob("*"):
            path.chmod(0o755)


def test_one_class_one_image_one_instance(write, images):
    made = content(images=1)
    made["categories"] = made["categories"][:1]
    made["annotations"] = [{**made["annotations"][0], "category_id": made["categories"][0]["id"]}]
    dataset = opened(write, images, made)
    assert len(dataset.annotations.stats) == 1
    for name in ("uniform", "repeat_factor", "class_balanced"):
        plan = training_plan(dataset, SamplerConfig(name=name), CONFIG, 4, seed=0)
        (samples,) = train_batches(dataset, plan, epochs=1)  # the image fills the whole batch
        assert len(samples) == 4 and all(torch.equal(s["labels"], torch.tensor([0])) for s in samples)
