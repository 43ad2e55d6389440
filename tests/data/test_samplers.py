"""Samplers against plain loops, and the properties every plan of a training must have."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from loce.config import SamplerConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.samplers import (
    ImageLabels,
    TrainingPlan,
    epoch_images,
    held_out_images,
    image_labels,
    memory_fill_images,
    meta_images,
    plan_batches,
    rank_slice,
    repeat_factors,
)
from loce.utils.classes import META
from tests.data.made_annotations import content
from tests.fixtures.newer import Authors, rule

NAMES = ("uniform", "repeat_factor", "class_balanced", "bilevel")


def long_tail(images=200, classes=12, seed=0):
    """Image -> set of labels: every one shows class 0 or 1, and about one in c^2 class c; ids have gaps."""
    rng = np.random.default_rng(seed)
    shown = {}
    for image in range(images):
        labels = {int(rng.integers(2))} | {c for c in range(2, classes) if rng.random() < 1 / c**2}
        shown[5 + 3 * image] = labels
    shown[5] |= {classes}  # a class with one image
    return shown


def as_arrays(shown, classes=14):  # the last class is in no image
    labels = [sorted(own) for own in shown.values()]
    first = np.cumsum([0] + [len(own) for own in labels])
    instances = [sum(c in own for own in labels) * (1 + c % 3) for c in range(classes)]
    return ImageLabels(np.array(list(shown)), np.concatenate(labels), first, np.array(instances))


def test_image_labels_against_plain_python(write):
    made = content(images=20)
    made["annotations"][0]["area"] = 0  # dropped
    made["images"][4]["height"] = 20  # left out
    annotations = LVISAnnotations.open(write(made))
    labels = image_labels(annotations)
    ids = [category["id"] for category in made["categories"]]
    expected = defaultdict(set)
    for row in made["annotations"][1:]:
        expected[row["image_id"]].add(ids.index(row["category_id"]))
    images = [i for i, image in enumerate(made["images"]) if i != 4 and expected[image["id"]]]
    assert labels.images.tolist() == images == annotations.train_images.tolist()
    used = [r for r in made["annotations"][1:] if r["image_id"] != made["images"][4]["id"]]
    assert labels.instances.tolist() == [sum(r["category_id"] == i for r in used) for i in ids]
    assert labels.num_classes == 4
    for position, image in enumerate(images):
        own = labels.labels[labels.first[position] : labels.first[position + 1]]
        assert own.tolist() == sorted(expected[made["images"][image]["id"]])


def test_repeat_factors_against_plain_loops():
    shown = long_tail()
    for threshold in (0.0, 0.001, 0.1, 0.5):
        factors = repeat_factors(as_arrays(shown), threshold)
        for labels, factor in zip(shown.values(), factors, strict=True):
            best = 0.0
            for label in labels:
                share = sum(label in other for other in shown.values()) / len(shown)
                best = max(best, 1, math.sqrt(threshold / share))
            assert factor == pytest.approx(best, rel=1e-12)
    assert repeat_factors(as_arrays(shown), 0.5).max() == pytest.approx(10)  # one image in 200


def test_other_repeat_factors_against_plain_loops():
    """Without the root; IRFS; E-IRFS with its own counting."""
    shown = long_tail()
    labels, t, alpha = as_arrays(shown), 0.01, 1.5
    images = [sum(label in own for own in shown.values()) for label in range(14)]
    instances = labels.instances.tolist()
    for by in ("linear", "both", "exponential"):
        found = repeat_factors(labels, t, by, alpha)
        for own, factor in zip(shown.values(), found, strict=True):
            best = 1.0
            for c in own:
                f, b = images[c] / len(shown), instances[c] / sum(instances)
                g = max(images[c], 1) / sum(max(n, 1) for n in images)
                d = (instances[c] + 1) / sum(n + 1 for n in instances)
                class_factor = {
                    "linear": max(1, t / f),
                    "both": max(1, math.sqrt(t / math.sqrt(f * b))),
                    "exponential": math.exp(alpha * math.sqrt(t / math.sqrt(g * d))),
                }[by]
                best = max(best, class_factor)
            assert factor == pytest.approx(best, rel=1e-9)


def test_repeat_factors_of_their_authors():
    """Numbers of detectron2, MMDetection and E-IRFS; of IRFS there is no code, two implementations of others agree."""
    data, count = rule.dataset(rule.PUBLIC), rule.PUBLIC["images"]
    pairs = np.unique(data["image"] * rule.PUBLIC["C"] + data["category"])
    first = np.searchsorted(pairs // rule.PUBLIC["C"], np.arange(count + 1))
    labels = ImageLabels(np.arange(count), pairs % rule.PUBLIC["C"], first, rule.instance_counts(rule.PUBLIC))
    wanted = Authors("repeat")

    def close(found, name):
        wanted[f"{name}/factors"] = wanted[f"{name}/values"][wanted[f"{name}/index"]]
        wanted.close(f"{name}/factors", found)

    for t in (0.001, 0.01, 0.1):
        close(repeat_factors(labels, t), f"rfs/t{t}")
        close(repeat_factors(labels, t, "linear"), f"rfs_no_root/t{t}")
    for t in (0.001, 0.01):
        close(repeat_factors(labels, t, "both"), f"irfs/t{t}/image_factors")
    for alpha, t in ((2, 0.0001), (1, 0.0001), (2, 0.001), (0.5, 0.01)):
        close(repeat_factors(labels, t, "exponential", alpha), f"eirfs/alpha{alpha}/t{t}/image_weights")
    times = np.ceil(repeat_factors(labels, 0.01)).astype(int)
    assert times.tolist() == wanted["mmdet/t0.01/times"].tolist()


def test_an_epoch_that_is_drawn_shows_as_many_images_as_there_are():
    labels = as_arrays(long_tail())
    sampler = SamplerConfig(name="repeat_factor", repeat_threshold=0.2, repeat_rounding="drawn")
    factors, times = repeat_factors(labels, 0.2), Counter()
    for epoch in range(400):
        images, _ = epoch_images(labels, sampler, np.random.default_rng(epoch))
        assert len(images) == len(labels.images)
        times.update(images.tolist())
    share = np.array([times[image] for image in labels.images.tolist()]) / 400
    np.testing.assert_allclose(share, factors / factors.mean(), atol=0.35)


def test_repeat_factor_sampling_rounds_at_random_in_each_epoch():
    labels = as_arrays(long_tail())
    factors = repeat_factors(labels, 0.2)
    sampler = SamplerConfig(name="repeat_factor", repeat_threshold=0.2)
    total = np.zeros(len(factors))
    for epoch in range(400):
        times = Counter(epoch_images(labels, sampler, np.random.default_rng(epoch))[0].tolist())
        shown = np.array([times[image] for image in labels.images.tolist()])
        assert (shown >= np.floor(factors)).all() and (shown <= np.ceil(factors)).all()
        total += shown
    np.testing.assert_allclose(total / 400, factors, atol=0.12)


def test_repeat_factor_sampling_rounded_up_is_the_same_in_all_epochs():
    shown = long_tail()
    sampler = SamplerConfig(name="repeat_factor", repeat_threshold=0.2, repeat_rounding="up")
    epochs = [epoch_images(as_arrays(shown), sampler, np.random.default_rng(epoch))[0] for epoch in range(2)]
    np.testing.assert_array_equal(*epochs)
    times = Counter(epochs[0].tolist())
    for image, labels in shown.items():
        shares = [sum(label in other for other in shown.values()) / len(shown) for label in labels]
        assert times[image] == math.ceil(max(max(1, math.sqrt(0.2 / share)) for share in shares))
    assert max(times.values()) > 2


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_bilevel_sampling_draws_a_class_then_one_of_its_images(tau):
    shown = long_tail()
    labels = as_arrays(shown)
    where = {c: [image for image, own in shown.items() if c in own] for c in range(14)}
    classes, pairs = Counter(), Counter()
    for epoch in range(300):
        sampler = SamplerConfig(name="bilevel", bilevel_tau=tau)
        images, drawn = epoch_images(labels, sampler, np.random.default_rng(epoch))
        assert len(images) == len(drawn) == len(shown)
        classes.update(drawn.tolist())
        pairs.update(zip(drawn.tolist(), images.tolist(), strict=True))
    weights = [min(len(where[c]) * (1 + c % 3), 100) ** tau if where[c] else 0 for c in range(14)]
    total = 300 * len(shown)
    for c, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(classes[c] - total * share) <= 4 * math.sqrt(total * share * (1 - share))  # 4 standard deviations
        if c >= 2:
            expected = total * share / max(len(where[c]), 1)
            for image in shown:
                assert abs(pairs[c, image] - expected * (image in where[c])) <= 6 * math.sqrt(expected)
    assert (labels.instances > 100).any()


def test_meta_images_favour_those_with_rare_classes():
    shown = long_tail()
    times = Counter(meta_images(as_arrays(shown), 100_000, np.random.default_rng(0)).tolist())
    images_of = Counter(c for own in shown.values() for c in own)
    weights = {image: max(len(shown) / images_of[c] for c in own) for image, own in shown.items()}
    for image, weight in weights.items():
        share = weight / sum(weights.values())
        assert abs(times[image] - 100_000 * share) <= 5 * math.sqrt(100_000 * share)


def test_class_balanced_sampling_goes_round_the_classes():
    shown = long_tail()
    labels = as_arrays(shown)
    counts = np.bincount(labels.labels, minlength=14)
    order = epoch_images(labels, SamplerConfig(name="class_balanced"), np.random.default_rng(0))[0].tolist()
    assert len(order) == len(shown)
    present = np.flatnonzero(counts)
    rounds = [order[i : i + len(present)] for i in range(0, len(order), len(present))]
    # Each place of a round belongs to one class: its images show it, and none comes again before all were shown.
    classes = []
    for place in range(len(present)):
        images = [around[place] for around in rounds if place < len(around)]
        fitting = [c for c in present if all(c in shown[i] for i in images)]
        fitting = [c for c in fitting if len(set(images)) == min(len(images), counts[c])]
        assert fitting
        times = Counter(images)
        assert max(times.values()) - min(times.values()) <= 1
        classes.append(set(fitting))
    assert set().union(*classes) == set(present.tolist())
    rare = next(image for image, own in shown.items() if 12 in own)
    assert order.count(rare) >= len(rounds) - 1  # the class with one image has its turn in every round


def test_class_balanced_sampling_goes_on_from_epoch_to_epoch():
    """Epochs are the pieces of one walk, in which a class has a turn every round and shows its images in turn."""
    shown = long_tail()
    labels, sampler, epochs = as_arrays(shown), SamplerConfig(name="class_balanced"), 10
    found = [epoch_images(labels, sampler, np.random.default_rng(9), 3, epoch)[0].tolist() for epoch in range(epochs)]
    where = {c: {image for image, own in shown.items() if c in own} for c in range(14)}
    classes = [c for c in where if where[c]]
    assert len(found[0]) % len(classes)  # an epoch ends within a round
    walk = [image for images in found for image in images]
    left = list(classes)
    for index in range(len(classes)):
        images = walk[index :: len(classes)]  # the turns of one class
        own = next(c for c in left if where[c] == set(images))  # all of its images, and no other
        left.remove(own)
        period = len(where[own])
        assert len(set(images[:period])) == period < len(images)
        assert all(image == images[turn % period] for turn, image in enumerate(images))
    again = epoch_images(labels, sampler, np.random.default_rng(0), 3, 4)[0].tolist()
    assert again == found[4]  # depends on (seed, epoch) alone
    assert epoch_images(labels, sampler, np.random.default_rng(9), 4, 0)[0].tolist() != found[0]


def test_uniform_sampling_shows_every_image_once():
    labels = as_arrays(long_tail())
    images, drawn = epoch_images(labels, SamplerConfig(), np.random.default_rng(0))
    assert images.tolist() == labels.images.tolist() and (drawn == -1).all()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("count", [1, 2, 7, 64, 101])
def test_batches_show_every_image_and_pair_equal_shapes(count, batch_size):
    rng = np.random.default_rng(count)
    indices, wide = rng.permutation(count), rng.random(count) < 0.3
    plan = plan_batches(indices, wide, batch_size, np.random.default_rng(0))
    assert plan.shape[1] == batch_size
    assert set(plan.ravel().tolist()) == set(range(count))
    pairs = count if batch_size % 2 else sum(math.ceil(n / 2) * 2 for n in (wide.sum(), (~wide).sum()))
    assert len(plan) == math.ceil(pairs / batch_size)  # not more was drawn again than is needed
    if batch_size % 2 == 0:
        shapes = wide[plan].reshape(-1, 2)
        assert (shapes[:, 0] == shapes[:, 1]).all()
    again = plan_batches(indices, wide, batch_size, np.random.default_rng(0))
    np.testing.assert_array_equal(plan, again)


def test_batches_are_shuffled():
    wide = np.arange(1000) % 2 == 0
    plan = plan_batches(np.arange(1000), wide, 4, np.random.default_rng(0)).ravel()
    assert abs(np.corrcoef(np.arange(1000), plan)[0, 1]) < 0.1
    groups = wide[plan][::2]
    assert 0.4 < (groups[1:] == groups[:-1]).mean() < 0.6


def test_ranks_share_a_batch_out():
    batch = np.arange(16)
    assert rank_slice(batch, 0, 1, 1).tolist() == [list(range(16))]
    assert rank_slice(batch, 1, 2, 2).tolist() == [[4, 5, 6, 7], [12, 13, 14, 15]]
    for world, accumulate in ((1, 4), (2, 2), (4, 1), (4, 2), (8, 1)):
        slices = [rank_slice(batch, rank, world, accumulate) for rank in range(world)]
        images = 16 // world // accumulate
        for a in range(accumulate):
            for rank in range(world):
                start = (a * world + rank) * images
                assert slices[rank][a].tolist() == list(range(start, start + images))
    with pytest.raises(ValueError, match="cannot be shared by 3 ranks"):
        rank_slice(batch, 0, 3, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_a_pure_function_and_counts_repeats(name):
    labels = as_arrays(long_tail())
    wide = np.random.default_rng(0).random(1000) < 0.5
    sampler = SamplerConfig(name=name, repeat_threshold=0.2)

    def make(seed):
        return TrainingPlan(labels=labels, wide=wide, sampler=sampler, batch_size=8, seed=seed)

    plan = make(0)
    epochs = [plan.epoch(epoch) for epoch in range(3)]
    assert plan.iterations(3) == [len(epoch) for epoch in epochs]
    np.testing.assert_array_equal(epochs[2], make(0).epoch(2))
    assert not np.array_equal(epochs[0], make(1).epoch(0)) and not np.array_equal(epochs[0][:10], epochs[1][:10])
    for epoch in epochs:
        seen = Counter()
        for image, showing, drawn in epoch.reshape(-1, 3).tolist():
            assert showing == seen[image]
            seen[image] += 1
            own = labels.labels[slice(*labels.first[labels.images.tolist().index(image) :][:2])]
            assert drawn in own if name == "bilevel" else drawn == -1
        if name in ("uniform", "repeat_factor"):
            assert set(seen) == set(labels.images.tolist())
        pairs = wide[epoch[:, :, 0]].reshape(-1, 2)
        assert (pairs[:, 0] == pairs[:, 1]).all()


@pytest.mark.parametrize("batch_size", [3, 8])
def test_every_training_image_has_a_meta_image_beside_it(batch_size):
    labels = as_arrays(long_tail())
    wide = np.random.default_rng(0).random(1000) < 0.5
    options = {"labels": labels, "wide": wide, "sampler": SamplerConfig(), "batch_size": batch_size, "seed": 0}
    plan, plain = TrainingPlan(**options, meta=True), TrainingPlan(**options)
    assert (plan.rows, plain.rows) == (2 * batch_size, batch_size)
    for epoch in range(2):
        both, alone = plan.epoch(epoch), plain.epoch(epoch)
        assert both.shape == (len(alone), 2 * batch_size, 3)
        np.testing.assert_array_equal(both[:, 0::2, 0], alone[:, :, 0])  # the training images are the same
        assert (both[:, 0::2, 2] == -1).all() and (both[:, 1::2, 2] == META).all()
        seen = Counter()
        for image, showing, _ in both.reshape(-1, 3).tolist():
            assert showing == seen[image]
            seen[image] += 1
        rare = labels.images[labels.owner[labels.labels == 12]]
        assert np.isin(both[:, 1::2, 0], rare).mean() > 0.04  # by itself, one image of 200
        if batch_size % 2 == 0:
            pairs = wide[both[:, 1::2, 0]].reshape(-1, 2)
            assert (pairs[:, 0] == pairs[:, 1]).all()
    for world, accumulate in ((1, batch_size), (batch_size, 1)):
        for rank in range(world):
            for part in rank_slice(both[0], rank, world, accumulate):
                assert part[:, 2].tolist() == [-1, META]


def test_memory_filling_takes_instances_from_distinct_images_at_random(write):
    made = content(images=40)
    made["annotations"] = [r for r in made["annotations"] if r["category_id"] != 20] + [
        {**made["annotations"][0], "category_id": 20, "id": 9000 + i} for i in range(3)
    ]  # class 20: three instances in one image
    annotations = LVISAnnotations.open(write(made))
    usable = defaultdict(set)
    for row in annotations.train_rows.tolist():
        usable[int(annotations.labels[row])].add(int(annotations.image_of[row]))
    choices = set()
    for seed in range(20):
        fills = memory_fill_images(annotations, 5, np.random.default_rng(seed))
        images = [image for image, _ in fills]
        assert len(set(images)) == len(images)
        taken = defaultdict(list)
        for image, rows in fills:
            assert rows.tolist() == sorted(rows.tolist()) and set(rows) <= set(annotations.rows(image))
            for row in rows.tolist():
                taken[int(annotations.labels[row])].append(image)
        for label, where in usable.items():
            assert len(taken[label]) == len(set(taken[label])) == min(5, len(where))
        choices.add(tuple(sorted(taken[0])))
    assert len(choices) > 10
    same = [memory_fill_images(annotations, 5, np.random.default_rng(7)) for _ in range(2)]
    assert [(i, r.tolist()) for i, r in same[0]] == [(i, r.tolist()) for i, r in same[1]]


def test_held_out_images_are_a_quarter_of_a_class_at_most():
    """Rare classes first; each has its number where its images may be taken, and none with fewer than 4 images any."""
    shown = long_tail()
    labels = as_arrays(shown)
    counts = np.bincount(labels.labels, minlength=14)
    chosen = [held_out_images(labels, number, np.random.default_rng(1)).tolist() for number in (1, 3)]
    for images, number in zip(chosen, (1, 3), strict=True):
        held = np.bincount([c for i in images for c in shown[i]], minlength=14)
        assert (held <= counts // 4).all() and images == sorted(set(images)) and set(images) <= set(shown)
        assert (held[counts >= 4 * number] >= 1).all()
    assert len(chosen[0]) < len(chosen[1])
    again = held_out_images(labels, 3, np.random.default_rng(1)).tolist()
    other = held_out_images(labels, 3, np.random.default_rng(2)).tolist()
    assert again == chosen[1] != other
