"""Intervals: resampling by weights against data sets in which images really are repeated."""

from typing import Any

import numpy as np
import pytest

from loce.evaluation import evaluate_lvis
from loce.evaluation.bootstrap import (
    draw_weights,
    group_means,
    interval,
    intervals,
    load_tallies,
    means_under,
    resampled_ap,
    tally,
)
from loce.evaluation.comparison import compare, regrouped
from loce.utils.errors import UserError
from tests.evaluation.cases import Case, random_case


def ap_of(evaluation: Any) -> np.ndarray:
    """(K,) AP, nan without objects."""
    ap = np.array([row["AP"] for row in evaluation.per_category])
    return np.where(ap < 0, np.nan, ap)


def repeated(case: Case, weights: dict[int, int]) -> Case:
    """The slow twin: each image as many times as its weight says, with all that belongs to it."""
    truth, results = case
    images, annotations, found = [], [], []
    for image in truth["images"]:
        for copy in range(weights[image["id"]]):
            new = image["id"] + 1000 * copy
            images.append({**image, "id": new})
            own = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
            annotations += [{**a, "image_id": new, "id": a["id"] + 10_000 * copy} for a in own]
            found += [{**d, "image_id": new} for d in results if d["image_id"] == image["id"]]
    return {**truth, "images": images, "annotations": annotations}, found


@pytest.mark.parametrize("protocol", ["lvis", "coco"])
def test_weights_are_repetitions(protocol: str) -> None:
    for seed in range(40):
        truth, results = random_case(seed)
        rng = np.random.default_rng(seed)
        ranks = rng.permutation(len(results)) + 1  # no ties: copies of an image would be ordered at random among them
        results = [{**d, "score": float(s)} for d, s in zip(results, ranks, strict=True)]
        tallies = tally(evaluate_lvis(truth, results, protocol=protocol))
        weights = rng.integers(0, 4, (len(tallies.image_ids), 3)).astype(np.int32)
        weights[0] = 1
        fast, half = resampled_ap(tallies, weights), means_under(tallies.at_half, weights)["AP"]
        for b in range(weights.shape[1]):
            drawn = dict(zip(tallies.image_ids.tolist(), weights[:, b].tolist(), strict=True))
            slow = evaluate_lvis(*repeated((truth, results), drawn), protocol=protocol)
            np.testing.assert_allclose(fast[:, b], ap_of(slow), rtol=0, atol=1e-6)
            assert np.nan_to_num(half[b], nan=-1) == pytest.approx(slow.metrics["AP50"], abs=1e-6)


def test_weights_of_one_give_the_evaluation() -> None:
    for seed in range(60):
        evaluation = evaluate_lvis(*random_case(seed), "segm")
        tallies = tally(evaluation)
        ap = resampled_ap(tallies, np.ones((len(tallies.image_ids), 1), dtype=np.int32))
        np.testing.assert_allclose(ap[:, 0], ap_of(evaluation), rtol=0, atol=1e-6)
        means = group_means(ap, tallies.frequency)
        for name, mean in means.items():
            expected = evaluation.metrics[name]
            assert np.isnan(mean[0]) if expected == -1 else mean[0] == pytest.approx(expected, abs=1e-6)


def test_recalls_that_the_official_grid_reaches_late() -> None:
    """20 objects, 7 found: recall .35 lies a rounding error below the grid's .35, and the official code misses it."""
    images = [
        {"id": n, "height": 9, "width": 9, "neg_category_ids": [], "not_exhaustive_category_ids": []} for n in range(20)
    ]
    box = {"category_id": 1, "bbox": [1.0, 1.0, 4.0, 4.0]}
    annotations = [{"id": n + 1, "image_id": n, "area": 16.0, "segmentation": [], **box} for n in range(20)]
    truth = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a", "frequency": "r"}]}
    evaluation = evaluate_lvis(truth, [{"image_id": n, "score": 1 - n / 100, **box} for n in range(7)])
    assert evaluation.metrics["AP"] == pytest.approx(35 / 101)
    ones = np.ones((20, 1), dtype=np.int32)
    assert resampled_ap(tally(evaluation), ones)[0, 0] == pytest.approx(35 / 101, abs=1e-6)


def test_weights_are_drawn_with_replacement() -> None:
    weights = draw_weights(50, 200, seed=0)
    assert (weights.sum(axis=0) == 50).all()
    assert abs((weights == 0).mean() - np.exp(-1)) < 0.02  # an image is left out with probability (1 - 1/I)^I
    assert (weights != draw_weights(50, 200, seed=1)).any()
    np.testing.assert_array_equal(weights, draw_weights(50, 200, seed=0))


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Samples of one big set: the interval of a sample should hold the big set's AP in about 95 of 100."""
    rng = np.random.default_rng(0)
    box = {"category_id": 1, "bbox": [1.0, 1.0, 4.0, 4.0]}
    category = [{"id": 1, "name": "a", "frequency": "f"}]
    covered = 0
    for _ in range(100):
        found = rng.random(80) < 0.6  # every image has one object, found with probability .6 at precision 1
        images = [{"id": n, "height": 9, "width": 9, "neg_category_ids": []} for n in range(80)]
        annotations = [{"id": n + 1, "image_id": n, "area": 16.0, "segmentation": [], **box} for n in range(80)]
        truth = {"images": images, "annotations": annotations, "categories": category}
        results = [{"image_id": int(n), "score": float(rng.random()), **box} for n in np.flatnonzero(found)]
        low, high = intervals(tally(evaluate_lvis(truth, results)), resamples=200)["APf"]
        covered += low <= 0.6 <= high
    assert 88 <= covered <= 100


def test_intervals_lie_around_the_number() -> None:
    """With categories of few objects the resampled AP lies beside the AP; the interval must not."""
    beside = 0
    for seed in range(20):
        evaluation = evaluate_lvis(*random_case(seed))
        tallies = tally(evaluation)
        drawn = means_under(tallies, draw_weights(len(tallies.image_ids), 100, 0))["AP"]
        low, high = intervals(tallies, 100)["AP"]
        if evaluation.metrics["AP"] > 0:
            assert low - 1e-6 <= evaluation.metrics["AP"] <= high + 1e-6
            beside += abs(np.nanmean(drawn) - evaluation.metrics["AP"]) > 0.01
    assert beside > 5  # or the test above shows nothing


def test_interval_of_nothing_is_nan() -> None:
    assert np.isnan(interval(np.array([np.nan]), 0.0)).all()
    assert np.isnan(interval(np.array([1.0]), float("nan"))).all()
    assert interval(np.linspace(0, 1, 1001), 0.5) == pytest.approx((0.025, 0.975))
    assert interval(np.linspace(0, 1, 1001), 0.7) == pytest.approx((0.225, 1.175))


def test_saved_and_loaded(tmp_path: Any) -> None:
    tallies = tally(evaluate_lvis(*random_case(4)))
    tallies.save(tmp_path / "t.npz")
    loaded = load_tallies(tmp_path / "t.npz")
    assert repr(intervals(loaded, 50)) == repr(intervals(tallies, 50))
    (tmp_path / "broken.npz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"broken.npz: cannot be read"):
        load_tallies(tmp_path / "broken.npz")


def test_paired_difference() -> None:
    truth, results = random_case(10, crowded=True)
    first = tally(evaluate_lvis(truth, results))
    same = compare(first, first, resamples=50)["AP"]
    assert same["difference"] == same["low"] == same["high"] == same["better"] == 0
    hits = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 1.0, "bbox": a["bbox"]}
        for a in truth["annotations"]
    ]
    better = evaluate_lvis(truth, hits)
    row = compare(first, tally(better), resamples=50)["AP"]
    assert row["second"] == pytest.approx(better.metrics["AP"], abs=1e-6)
    assert row["difference"] == pytest.approx(row["second"] - row["first"])
    assert 0 < row["low"] <= row["difference"] <= row["high"]
    assert row["better"] == 1.0
    # Categories in other groups: numbers of groups would be of different ones.
    truth["categories"] = [{**c, "frequency": "rcf"["crf".index(c["frequency"])]} for c in truth["categories"]]
    for protocol in ("lvis", "pool"):
        pair = [tally(evaluate_lvis(t, results, protocol=protocol)) for t in (random_case(10, crowded=True)[0], truth)]
        assert set(compare(*pair, resamples=5)) == {"AP", "ECE", "MCE"}
        assert "categories are rare, common or frequent otherwise in B" in regrouped(*pair)
    assert regrouped(first, first) == ""
    with pytest.raises(UserError, match="differ in iou type"):
        compare(first, tally(evaluate_lvis(truth, results, "segm")))
    with pytest.raises(UserError, match="differ in image ids"):
        compare(first, tally(evaluate_lvis(*random_case(11))))
