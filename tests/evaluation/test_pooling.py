"""AP-pool against counting down one list in plain Python, and several protocols from one matching."""

from typing import Any

import numpy as np
import pytest

from loce.evaluation import Detections, evaluate_lvis, load_annotations, read_results
from loce.evaluation.bootstrap import means_under, tally
from loce.evaluation.lvis_ap import RECALLS, evaluate_loaded
from loce.evaluation.matching import PROTOCOLS
from tests.evaluation.cases import official_lvis, random_case

GROUPS = {"AP": "rcf", "APr": "r", "APc": "c", "APf": "f"}


def pooled_slowly(official: Any, groups: str, area: int, threshold: int) -> float:
    """AP of one ranking at one IoU threshold, from what the official evaluator matched in each image and category."""
    categories, images = official.params.cat_ids, official.params.img_ids
    found, objects = [], 0
    for i in range(len(images)):
        for k, category in enumerate(categories):
            cell = official.eval_imgs[(k * len(official.params.area_rng) + area) * len(images) + i]
            if cell is None or official.lvis_gt.cats[category]["frequency"] not in groups:
                continue
            objects += sum(not ignored for ignored in cell["gt_ignore"])
            for n, score in enumerate(cell["dt_scores"]):
                if not cell["dt_ignore"][threshold, n]:
                    found.append((score, bool(cell["dt_matches"][threshold, n])))
    if not objects:
        return -1.0
    found.sort(key=lambda pair: -pair[0])  # stable
    curve, true = [], 0
    for n, (_, hit) in enumerate(found, start=1):
        true += hit
        curve.append((true / objects, true / n))
    total = 0.0
    for recall in RECALLS:
        total += max((precision for reached, precision in curve if reached >= recall), default=0.0)
    return total / len(RECALLS)


@pytest.mark.usefixtures("numpy_float")
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_pool_counts_down_one_ranking(iou_type: str) -> None:
    for seed in range(12):
        truth, results = random_case(seed, crowded=seed == 0)
        if not results:
            continue
        official = official_lvis(truth, results, iou_type, cap=-1)
        metrics = evaluate_lvis(truth, results, iou_type, protocol="pool").metrics
        for name, groups in GROUPS.items():
            slow = [pooled_slowly(official, groups, 0, t) for t in range(10)]
            assert metrics[name] == pytest.approx(np.mean(slow), abs=1e-9)
        assert metrics["AP75"] == pytest.approx(pooled_slowly(official, "rcf", 0, 5), abs=1e-9)
        for area, size in enumerate("sml", start=1):
            slow = [pooled_slowly(official, "rcf", area, t) for t in range(10)]
            assert metrics[f"AP{size}"] == pytest.approx(np.mean(slow), abs=1e-9)


def test_a_score_means_the_same_in_all_categories(small: dict[str, Any]) -> None:
    """Category 2 has two objects, category 5 one; one false detection of 2 above the object of 5."""
    box, far = [10.0, 10.0, 40.0, 40.0], [60.0, 60.0, 20.0, 20.0]
    rows = [(7, 2, 0.9, box), (3, 2, 0.8, box), (7, 2, 0.7, far), (3, 5, 0.6, box)]
    results = [dict(zip(("image_id", "category_id", "score", "bbox"), row, strict=True)) for row in rows]
    assert evaluate_lvis(small, results, protocol="fixed").metrics["AP"] == pytest.approx(1.0)
    # Recall 0 to .66 at precision 1 (67 of 101 points), the rest at 3 of 4.
    assert evaluate_lvis(small, results, protocol="pool").metrics["AP"] == pytest.approx((67 + 34 * 0.75) / 101)
    # A category without objects counts where it was verified to be absent: 9 in image 7, not in image 3.
    for image, expected in ((7, (67 * (2 / 3) + 34 * 0.6) / 101), (3, (67 + 34 * 0.75) / 101)):
        more = [{"image_id": image, "category_id": 9, "score": 0.95, "bbox": far}, *results]
        assert evaluate_lvis(small, more, protocol="fixed").metrics["AP"] == pytest.approx(1.0)
        assert evaluate_lvis(small, more, protocol="pool").metrics["AP"] == pytest.approx(expected)


def test_one_matching_serves_all_protocols() -> None:
    for seed in range(30):
        truth, results = random_case(seed, crowded=seed % 5 == 0)
        ground, detections = load_annotations(truth), read_results(results)
        for iou_type in ("bbox", "segm"):
            together = evaluate_loaded(ground, detections, iou_type, list(PROTOCOLS.values()))
            for name, found in zip(PROTOCOLS, together, strict=True):
                alone = evaluate_lvis(truth, results, iou_type, protocol=name)
                assert found.metrics == alone.metrics
                np.testing.assert_array_equal(found.precision, alone.precision)
                np.testing.assert_array_equal(found.matches.taken, alone.matches.taken)


def test_the_cap_of_an_image_counts_what_was_left_out(small: dict[str, Any]) -> None:
    """`ranks`: the best of an image are known although others were not stored."""
    hit = {"image_id": [7], "category_id": [2], "score": [0.1], "bbox": [[10.0, 10.0, 40.0, 40.0]]}
    columns = {"image_ids": "image_id", "category_ids": "category_id", "scores": "score", "boxes": "bbox"}
    arrays = {name: np.array(hit[key]) for name, key in columns.items()}
    for rank, recall in ((299, 0.5), (300, 0.0)):
        detections = Detections(**arrays, ranks=np.array([rank], dtype=np.int32))
        assert evaluate_lvis(small, detections).recall[0, 0, 0] == recall
        assert evaluate_lvis(small, detections, protocol="fixed").recall[0, 0, 0] == 0.5


def test_resampled_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of one give AP-pool; read at some of the ranking's true positives, resamples hardly move."""
    for seed in range(20):
        evaluation = evaluate_lvis(*random_case(seed), "bbox", protocol="pool")
        tallies = tally(evaluation)
        means = means_under(tallies, np.ones((len(tallies.image_ids), 1), dtype=np.int32))
        for name in GROUPS:
            mean, expected = means[name], evaluation.metrics[name]
            assert np.isnan(mean[0]) if expected == -1 else mean[0] == pytest.approx(expected, abs=1e-6)
    truth, results = random_case(4, crowded=True)
    tallies = tally(evaluate_lvis(truth, results, protocol="pool"))
    twice = np.ones((len(tallies.image_ids), 2), dtype=np.int32)
    exact = means_under(tallies, twice)["AP"][0]
    monkeypatch.setattr("loce.evaluation.bootstrap._LOOKS", 5)
    assert 0 < abs(means_under(tallies, twice)["AP"][0] - exact) < 0.1
