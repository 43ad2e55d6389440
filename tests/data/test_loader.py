"""What a sample holds, and that workers, ranks and restarts do not change the stream of samples."""

from collections import Counter
from itertools import chain

import cv2
import numpy as np
import pytest
import torch

from loce.config import DataConfig, SamplerConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.loader import EvalDataset, TrainDataset, eval_batches, fill_batches, train_batches, training_plan
from loce.utils.classes import META
from loce.utils.errors import UserError
from tests.data.made_annotations import content, full_mask

CONFIG = DataConfig(short_edges=(48, 56, 64), long_edge=100, test_short_edge=64)


@pytest.fixture
def dataset(write, images):
    annotations = LVISAnnotations.open(write(content(images=13)))
    return TrainDataset(annotations, images(annotations), CONFIG, seed=3)


def fingerprint(batches):
    """What tells two streams apart: every sample's image, pixels, boxes, masks and numbers, in order."""
    return [
        [
            (
                *(s["image_id"], int(s["image"].sum()), s["boxes"].tolist(), int(s["masks"].bits.sum())),
                *(s["sampled_class"], s["seed"], s["batch_index"]),
            )
            for s in samples
        ]
        for samples in batches
    ]


def test_a_sample_is_the_image_and_its_instances_by_the_slow_way(dataset):
    """Masks filled on the whole canvas, resized by OpenCV and flipped whole; boxes around them."""
    made = content(images=13)
    flips = Counter()
    for index, image in enumerate(made["images"]):
        rows = [row for row in made["annotations"] if row["image_id"] == image["id"]]
        for epoch in range(3):
            sample = dataset[index, epoch]
            _, height, width = sample["image"].shape
            assert sample["image"].dtype == torch.uint8 and sample["image_id"] == image["id"]
            assert sample["size"] == (image["height"], image["width"])
            assert min(height, width) in CONFIG.short_edges or max(height, width) == CONFIG.long_edge
            assert sample["scale"] == (np.float32(width / image["width"]), np.float32(height / image["height"]))
            file = cv2.imread(str(dataset.annotations.image_path(index, dataset.folder)))[:, :, ::-1]
            plain = cv2.resize(file, (width, height), interpolation=cv2.INTER_LINEAR)
            flipped = not np.array_equal(sample["image"].permute(1, 2, 0).numpy(), plain)
            flips[flipped] += 1
            turn = (lambda array: array[:, ::-1]) if flipped else (lambda array: array)
            np.testing.assert_array_equal(sample["image"].permute(1, 2, 0).numpy(), turn(plain))
            assert sample["labels"].tolist() == [(7, 3, 20, 1).index(row["category_id"]) for row in rows]
            masks = sample["masks"].full().numpy()
            for row, mask, box in zip(rows, masks, sample["boxes"].numpy(), strict=True):
                full = full_mask(row["segmentation"], image["height"], image["width"])
                resized = cv2.resize(full, (width, height), interpolation=cv2.INTER_NEAREST)
                np.testing.assert_array_equal(mask, turn(resized))
                y, x = np.nonzero(mask)
                around = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
                np.testing.assert_allclose(box, around, atol=2.5)  # corners against whole pixels
    assert min(flips.values()) > 8


def test_showings_of_an_image_differ_between_epochs_and_within_one(dataset):
    keys = [(0, epoch, draw) for epoch in range(6) for draw in range(6)]
    assert len({(*dataset[key]["image"].shape, int(dataset[key]["image"][0, 0, 0])) for key in keys}) > 3
    assert fingerprint([[dataset[0, 2]]]) == fingerprint([[dataset[0, 2, 0]]])
    found = {dataset[key]["seed"] for key in keys} | {dataset[1, 0]["seed"]}
    assert len(found) == len(keys) + 1 and all(0 <= key < 1 << 63 for key in found)


@pytest.mark.parametrize(
    ("name", "meta"),
    [("uniform", False), ("repeat_factor", False), ("class_balanced", False), ("bilevel", False), ("uniform", True)],
)
def test_workers_ranks_and_restarts_do_not_change_the_stream(name, meta, dataset):
    sampler = SamplerConfig(name=name, repeat_threshold=0.9)
    plan = training_plan(dataset, sampler, CONFIG, 4, seed=3, meta=meta)
    whole = fingerprint(train_batches(dataset, plan, epochs=3))
    assert len(whole) == sum(plan.iterations(3)) == len(train_batches(dataset, plan, epochs=3))
    assert fingerprint(train_batches(dataset, plan, epochs=3, workers=2)) == whole
    for start in (1, plan.iterations(1)[0], plan.iterations(1)[0] + 2, len(whole) - 1, len(whole)):
        restarted = train_batches(dataset, plan, epochs=3, start_iteration=start)
        assert len(restarted) == len(whole) - start
        assert fingerprint(restarted) == whole[start:]
    for world, accumulate in ((2, 1), (1, 2), (2, 2), (4, 1)):
        ranks = [
            fingerprint(train_batches(dataset, plan, epochs=3, accumulate=accumulate, rank=rank, world=world))
            for rank in range(world)
        ]
        assert {len(rank) for rank in ranks} == {len(whole) * accumulate}
        micro_batches = zip(*ranks, strict=True)
        joined = [[sample for part in parts for sample in part] for parts in micro_batches]
        together = [list(chain(*joined[i : i + accumulate])) for i in range(0, len(joined), accumulate)]
        assert together == whole


def test_samples_say_what_they_were_drawn_for(dataset):
    plan = training_plan(dataset, SamplerConfig(name="bilevel"), CONFIG, 4, seed=3)
    for sample in chain(*train_batches(dataset, plan, epochs=2)):
        assert sample["sampled_class"] in sample["labels"]
    plan = training_plan(dataset, SamplerConfig(), CONFIG, 4, seed=3, meta=True)
    for rank in range(2):
        for samples in train_batches(dataset, plan, epochs=1, accumulate=2, rank=rank, world=2):
            assert [sample["sampled_class"] for sample in samples] == [-1, META]
    assert dataset[0, 0]["sampled_class"] == dataset[0, 0, 1]["sampled_class"] == -1


def test_two_images_on_a_rank_have_the_same_shape(dataset):
    plan = training_plan(dataset, SamplerConfig(), CONFIG, 8, seed=0)
    for rank in range(4):
        for samples in train_batches(dataset, plan, epochs=2, rank=rank, world=4):
            first, second = (sample["size"][1] > sample["size"][0] for sample in samples)
            assert first == second
    ungrouped = training_plan(dataset, SamplerConfig(), DataConfig(group_by_aspect=False), 8, seed=0)
    assert not ungrouped.wide.any() and plan.wide.any()


def test_the_loader_leaves_the_global_random_numbers_alone(dataset):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    next(iter(train_batches(dataset, training_plan(dataset, SamplerConfig(), CONFIG, 2, 0), epochs=1)))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 20])
def test_evaluation_covers_every_image_once(world, dataset):
    evaluation = EvalDataset(dataset.annotations, dataset.folder, CONFIG)
    ids = dataset.annotations.image_ids.tolist()
    for skip in ((), ids[2:7]):
        batches = [eval_batches(evaluation, 2, skip=skip, rank=rank, world=world) for rank in range(world)]
        shards = [[sample["image_id"] for samples in own for sample in samples] for own in batches]
        assert list(chain(*shards)) == [i for i in ids if i not in skip]  # contiguous, none twice
        assert [len(own) for own in batches] == [-(-len(shard) // 2) for shard in shards]


def test_evaluation_images_are_at_test_size(dataset):
    for sample in (
        s for samples in eval_batches(EvalDataset(dataset.annotations, dataset.folder, CONFIG), 3) for s in samples
    ):
        height, width = sample["size"]
        scale = min(64 / min(height, width), 100 / max(height, width))
        new_height, new_width = int(height * scale + 0.5), int(width * scale + 0.5)
        assert sample["image"].shape == (3, new_height, new_width)
        assert sample["scale"] == (np.float32(new_width / width), np.float32(new_height / height))
        assert set(sample) == {"image", "image_id", "size", "scale", "boxes", "labels", "rows"}
        own = dataset.annotations.image_ids[dataset.annotations.image_of[sample["rows"].numpy()]]
        assert (own == sample["image_id"]).all() and len(own) == len(sample["boxes"]) == len(sample["labels"])


def stored(dataset, batches):
    """(label, annotation id) of everything a rank's filling stores."""
    found = []
    for samples in batches:
        for sample in samples:
            index = dataset.annotations.image_ids.tolist().index(sample["image_id"])
            rows = dataset.annotations.rows(index)[sample["store_rows"].numpy()]
            assert sample["labels"][sample["store_rows"]].tolist() == dataset.annotations.labels[rows].tolist()
            found += [
                (int(dataset.annotations.labels[row]), int(dataset.annotations.annotation_ids[row])) for row in rows
            ]
    return found


@pytest.mark.parametrize("world", [1, 2, 5, 20])
def test_filling_stores_a_few_of_every_class_and_ranks_take_equal_steps(world, dataset):
    alone = stored(dataset, fill_batches(dataset, 3, True, seed=1, images=2))
    images = {c: set(dataset.annotations.image_of[dataset.annotations.labels == c]) for c in range(4)}
    assert Counter(label for label, _ in alone) == {c: min(3, len(own)) for c, own in images.items()}
    shared = [fill_batches(dataset, 3, True, seed=1, images=2, rank=rank, world=world) for rank in range(world)]
    assert len({len(own) for own in shared}) == 1
    assert sorted(chain(*(stored(dataset, own) for own in shared))) == sorted(alone)
    private = [fill_batches(dataset, 3, False, seed=1, images=2, rank=rank, world=world) for rank in range(world)]
    assert len({len(own) for own in private}) == 1
    contents = [stored(dataset, own) for own in private]
    assert all(Counter(c for c, _ in own) == Counter(c for c, _ in alone) for own in contents)
    assert world == 1 or len({tuple(sorted(own)) for own in contents}) > 1


def damage(dataset, *indices):
    for index in indices:
        dataset.annotations.image_path(index, dataset.folder).write_bytes(b"broken")


def test_one_bad_image_is_replaced_and_reported_once(dataset, capsys):
    bad_id = int(dataset.annotations.image_ids[4])
    damage(dataset, 4)
    plan = training_plan(dataset, SamplerConfig(), CONFIG, 2, seed=0)
    first = fingerprint(train_batches(dataset, plan, epochs=3))
    ids = [sample[0] for samples in first for sample in samples]
    assert bad_id not in ids and len(ids) >= 39
    printed = capsys.readouterr().out
    assert printed.count("damaged or not an image") == 1 and f"{bad_id:012}.jpg" in printed
    assert fingerprint(train_batches(dataset, plan, epochs=3, workers=1)) == first
    for samples in fill_batches(dataset, 9, True, seed=0, images=2):
        for sample in samples:
            assert sample["image_id"] != bad_id
            assert len(sample["store_rows"]) == 0 or "replaced" not in sample


def test_a_bad_evaluation_image_is_shown_black_and_reported(dataset, capsys):
    damage(dataset, 4)
    evaluation = EvalDataset(dataset.annotations, dataset.folder, CONFIG)
    samples = [sample for batch in eval_batches(evaluation, 2) for sample in batch]
    assert len(samples) == 13 and [int(s["image"].sum()) == 0 for s in samples].index(True) == 4
    assert not len(samples[4]["rows"]) and not len(samples[4]["boxes"])
    assert "damaged or not an image" in capsys.readouterr().out


def test_many_bad_images_end_the_run_with_a_list(dataset):
    damage(dataset, 2, 4, 6)
    plan = training_plan(dataset, SamplerConfig(), CONFIG, 2, seed=0)
    with pytest.raises(UserError, match=r"(?s)more than 1 of 13 images cannot be used.*damaged.*damaged.*check-data"):
        list(train_batches(dataset, plan, epochs=1))


def test_nothing_left_to_train_on(write, images):
    made = content(images=3)
    for row in made["annotations"]:
        row["iscrowd"] = 1
    annotations = LVISAnnotations.open(write(made))
    dataset = TrainDataset(annotations, images(annotations), CONFIG, seed=0)
    with pytest.raises(UserError, match=r"(?s)no image is left to train on.*crowd regions"):
        training_plan(dataset, SamplerConfig(), CONFIG, 2, seed=0)
