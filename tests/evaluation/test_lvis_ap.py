"""Our evaluator against the official ones: `lvis.LVISEval` and `pycocotools.COCOeval`, on cases full of traps."""

import copy
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from loce.evaluation import evaluate_lvis, load_annotations, matching
from loce.evaluation.lvis_ap import recall_within
from tests.evaluation.cases import METRICS, official_coco, official_lvis, random_case, without

TOLERANCE = 1e-9
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", "AR@100", "ARs@100", "ARm@100", "ARl@100")


def assert_equal_to_lvis(truth: dict[str, Any], results: list[dict[str, Any]], iou_type: str) -> None:
    """Every metric, precision and recall, AP per category; the input stays as it was."""
    official = official_lvis(truth, results, iou_type)
    before = copy.deepcopy((truth, results))
    ours = evaluate_lvis(truth, results, iou_type)
    assert (truth, results) == before
    assert tuple(ours.metrics) == METRICS == tuple(official.results)
    np.testing.assert_allclose(list(ours.metrics.values()), list(official.results.values()), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(ours.precision, official.eval["precision"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(ours.recall, official.eval["recall"], rtol=0, atol=TOLERANCE)
    ap = official.eval["precision"][..., 0].mean(axis=(0, 1))
    np.testing.assert_allclose([row["AP"] for row in ours.per_category], ap, rtol=0, atol=TOLERANCE)


def check_seed(seed: int) -> None:
    truth, results = random_case(seed, crowded=seed % 10 == 0)
    for iou_type in ("bbox", "segm"):
        if results:
            assert_equal_to_lvis(truth, results, iou_type)
        else:
            assert set(evaluate_lvis(truth, results, iou_type).metrics.values()) <= {0.0, -1.0}


def check_seed_coco(seed: int) -> None:
    truth, results = random_case(seed, crowded=seed % 10 == 0)
    for iou_type in ("bbox", "segm") if results else ():
        official = official_coco(truth, results, iou_type)
        ours = evaluate_lvis(truth, results, iou_type, protocol="coco")
        np.testing.assert_allclose(ours.precision, official.eval["precision"][..., -1], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(ours.recall, official.eval["recall"][..., -1], rtol=0, atol=TOLERANCE)
        stats = [ours.metrics[name] for name in COCO_METRICS]
        np.testing.assert_allclose(stats, official.stats, rtol=0, atol=TOLERANCE)
        assert set(ours.metrics) - set(COCO_METRICS) == {"APr", "APc", "APf"}
        for m, few in enumerate((1, 10)):
            within = recall_within(ours.matches, few)
            np.testing.assert_allclose(within, official.eval["recall"][:, :, 0, m], rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("numpy_float")
@pytest.mark.parametrize("block", range(10))
def test_equal_to_the_official_evaluator(block: int) -> None:
    for seed in range(10 * block, 10 * block + 10):
        check_seed(seed)


@pytest.mark.slow
@pytest.mark.usefixtures("numpy_float")
@pytest.mark.parametrize("block", range(12))
def test_equal_to_the_official_evaluator_often(block: int) -> None:
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        check_seed(seed)


@pytest.mark.parametrize("block", range(3))
def test_equal_to_pycocotools(block: int) -> None:
    for seed in range(10 * block, 10 * block + 10):
        check_seed_coco(seed)


@pytest.mark.slow
def test_equal_to_pycocotools_often() -> None:
    for seed in range(1000, 1300):
        check_seed_coco(seed)


def test_the_random_cases_hold_every_trap() -> None:
    """What the equality above is worth: each trap occurs, many times, in the hundred cases of the fast suite."""
    seen: Counter[str] = Counter()
    for seed in range(100):
        truth, results = random_case(seed, crowded=seed % 10 == 0)
        images, categories = {i["id"]: i for i in truth["images"]}, {c["id"] for c in truth["categories"]}
        cells = {(a["image_id"], a["category_id"]) for a in truth["annotations"]}
        found = [(d["image_id"], d["category_id"]) for d in results]
        scored = [(*cell, d["score"]) for cell, d in zip(found, results, strict=True)]
        boxes = [(a["image_id"], a["category_id"], *a["bbox"]) for a in truth["annotations"]]
        per_image = np.unique([cell[0] for cell in found], return_counts=True)[1]
        seen["score tie"] += len(set(scored)) < len(scored)
        seen["iou tie"] += len(set(boxes)) < len(boxes)
        seen["over 300"] += per_image.max(initial=0) > 300
        seen["negative"] += any(c in images[i]["neg_category_ids"] for i, c in found)
        seen["loose"] += any(c in images[i]["not_exhaustive_category_ids"] and (i, c) in cells for i, c in found)
        seen["dropped"] += any(c not in images[i]["neg_category_ids"] and (i, c) not in cells for i, c in found)
        seen["empty image"] += len({i for i, _ in cells}) < len(images)
        seen["no objects"] += len({c for _, c in cells}) < len(categories)
        seen["no detections"] += len({c for _, c in found}) < len({c for _, c in cells})
        seen["flat box"] += any(d["bbox"][2] * d["bbox"][3] == 0 for d in results)
        seen["flat object"] += any(a["area"] == 0 for a in truth["annotations"])
        seen["ignore"] += any(a.get("ignore") for a in truth["annotations"])
        seen["iscrowd"] += any(a.get("iscrowd") for a in truth["annotations"])
        seen["empty results"] += not results
    assert len(seen) == 14
    assert min(seen.values()) >= 2, seen


@pytest.mark.usefixtures("numpy_float")
def test_negative_categories_and_loose_ones(small: dict[str, Any]) -> None:
    """A false positive counts where the category was verified absent, and not where it is not exhaustive."""
    far = [60.0, 60.0, 20.0, 20.0]
    hits = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 0.5, "bbox": a["bbox"]}
        for a in small["annotations"]
    ]
    assert evaluate_lvis(small, hits).metrics["AP"] == pytest.approx(1.0)
    cells = {"negative": (7, 9), "loose": (3, 5), "unverified": (7, 5), "present": (7, 2)}
    lower = {
        name: [*hits, {"image_id": i, "category_id": c, "score": 0.9, "bbox": far}] for name, (i, c) in cells.items()
    }
    ap = {name: evaluate_lvis(small, results).metrics["AP"] for name, results in lower.items()}
    assert ap["loose"] == ap["unverified"] == pytest.approx(1.0)
    assert ap["negative"] == pytest.approx(1.0)  # category 9 has no objects, so it is in no mean
    assert ap["present"] == pytest.approx((1 + 2 / 3) / 2)
    for results in lower.values():
        assert_equal_to_lvis(small, results, "bbox")


@pytest.mark.usefixtures("numpy_float")
def test_cap_counts_all_categories_and_all_detections(small: dict[str, Any]) -> None:
    """300 better detections of a category that does not even count push a hit out."""
    hit = {"image_id": 7, "category_id": 2, "score": 0.1, "bbox": [10.0, 10.0, 40.0, 40.0]}
    crowd = [{"image_id": 7, "category_id": 5, "score": 0.5, "bbox": [0.0, 0.0, 5.0, 5.0]}] * 300
    assert evaluate_lvis(small, [hit, *crowd[:299]]).recall[0, 0, 0] == 0.5
    assert evaluate_lvis(small, [hit, *crowd]).recall[0, 0, 0] == 0.0
    assert evaluate_lvis(small, [hit, *crowd], max_detections=301).recall[0, 0, 0] == 0.5
    assert evaluate_lvis(small, [hit, *crowd], protocol="fixed").recall[0, 0, 0] == 0.5
    assert_equal_to_lvis(small, [hit, *crowd], "bbox")


@pytest.mark.usefixtures("numpy_float")
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_fixed_keeps_the_best_of_a_category_over_all_images(iou_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AP-fixed: the official code without its cap, given the best detections of each category."""
    monkeypatch.setitem(
        matching.PROTOCOLS, "fixed", matching.Protocol(name="fixed", cap=8, per="category", federated=True)
    )
    for seed in range(20):
        truth, results = random_case(seed, crowded=seed % 10 == 0)
        kept: list[dict[str, Any]] = []
        for category in {d["category_id"] for d in results}:
            kept += sorted((d for d in results if d["category_id"] == category), key=lambda d: -d["score"])[:8]
        kept = [d for d in results if any(d is k for k in kept)]
        if kept:
            official = official_lvis(truth, kept, iou_type, cap=-1)
            ours = evaluate_lvis(truth, results, iou_type, protocol="fixed")
            np.testing.assert_allclose(ours.precision, official.eval["precision"], rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("numpy_float")
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_last_of_two_equal_overlaps_is_taken(small: dict[str, Any], iou_type: str) -> None:
    """The best detection lies midway between two objects, the next on one of them: which is left for it matters."""
    boxes = {"left": [0.0, 0.0, 40.0, 40.0], "right": [20.0, 0.0, 40.0, 40.0], "between": [10.0, 0.0, 40.0, 40.0]}

    def shape(name: str) -> list[list[float]]:
        x, y, w, h = boxes[name]
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]

    def recall(first: str, second: str) -> float:
        entries = enumerate((first, second))
        annotations = [
            {
                "id": n + 1,
                "image_id": 7,
                "category_id": 2,
                "bbox": boxes[name],
                "area": 1600,
                "segmentation": shape(name),
            }
            for n, name in entries
        ]
        truth = {**small, "annotations": annotations}
        results = [
            {
                "image_id": 7,
                "category_id": 2,
                "score": score,
                "bbox": boxes[name],
                "segmentation": mask_utils.frPyObjects(shape(name), 100, 100)[0],
            }
            for name, score in (("between", 0.9), ("left", 0.8))
        ]
        assert_equal_to_lvis(truth, results, iou_type)
        return float(evaluate_lvis(truth, results, iou_type).recall[0, 0, 0])

    assert recall("left", "right") == 1.0
    assert recall("right", "left") == 0.5


def test_area_of_a_mask_is_the_masks(small: dict[str, Any]) -> None:
    """The official code takes a box's area when a mask result carries one; APs, APm and APl move with it."""
    rle = load_annotations(small).rles([0])[0]
    result = {"image_id": 7, "category_id": 2, "score": 0.5, "segmentation": rle}
    far = {**result, "segmentation": {**rle, "counts": rle["counts"]}, "image_id": 3, "category_id": 2}
    huge = [{**d, "bbox": [0.0, 0.0, 1e4, 1e4]} for d in (result, far)]
    assert evaluate_lvis(small, huge, "segm").metrics == evaluate_lvis(small, [result, far], "segm").metrics


@pytest.mark.usefixtures("numpy_float")
def test_annotation_zero_is_an_annotation(small: dict[str, Any]) -> None:
    """The official code takes the id 0 of a matched object for "no match"."""
    hits = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 0.5, "bbox": a["bbox"]}
        for a in small["annotations"]
    ]
    expected = official_lvis(small, hits, "bbox").results["AP"]
    shifted = {**small, "annotations": [{**a, "id": a["id"] - 1} for a in small["annotations"]]}
    assert official_lvis(shifted, hits, "bbox").results["AP"] < expected
    assert evaluate_lvis(shifted, hits).metrics["AP"] == pytest.approx(expected, abs=TOLERANCE)


def test_no_results_give_zero(small: dict[str, Any]) -> None:
    for iou_type in ("bbox", "segm"):
        for protocol in ("lvis", "fixed", "coco"):
            metrics = evaluate_lvis(small, [], iou_type, protocol=protocol).metrics
            assert metrics["AP"] == metrics["APf"] == metrics["APm"] == 0.0
            assert metrics["APr"] == metrics["APs"] == -1.0  # no such objects


def test_per_category_table(small: dict[str, Any]) -> None:
    results = [
        {"image_id": 7, "category_id": 2, "score": 0.8, "bbox": [10.0, 10.0, 40.0, 40.0]},
        {"image_id": 3, "category_id": 2, "score": 0.6, "bbox": [70.0, 70.0, 10.0, 10.0]},
        {"image_id": 7, "category_id": 5, "score": 0.9, "bbox": [10.0, 10.0, 40.0, 40.0]},  # not verified there
    ]
    rows = evaluate_lvis(small, results).per_category
    assert [row["id"] for row in rows] == [2, 5, 9]
    assert [row["name"] for row in rows] == ["often", "loose", "none"]
    assert [row["images"] for row in rows] == [2, 1, 0]
    assert [row["detections"] for row in rows] == [2, 0, 0]
    assert rows[0]["detection_score"] == pytest.approx(0.7)
    assert rows[0]["found_score"] == pytest.approx(0.8)
    assert rows[0]["AP"] == rows[0]["AP50"] == pytest.approx(51 / 101)  # recalls 0 to .5 at precision 1
    assert (rows[1]["AP"], rows[2]["AP"]) == (0.0, -1.0)


def test_forms_of_input_agree(small: dict[str, Any], tmp_path: Path) -> None:
    results = random_case(5)[1]
    truth = random_case(5)[0]
    (tmp_path / "a.json").write_text(json.dumps(truth))
    (tmp_path / "r.json").write_text(json.dumps(results))
    expected = evaluate_lvis(truth, results, "segm").metrics
    assert evaluate_lvis(tmp_path / "a.json", str(tmp_path / "r.json"), "segm").metrics == expected
    assert evaluate_lvis(load_annotations(truth), results, "segm").metrics == expected
    assert without(results, "bbox") != results
    assert evaluate_lvis(truth, without(results, "bbox"), "segm").metrics == expected


@pytest.mark.slow
@pytest.mark.usefixtures("numpy_float")
@pytest.mark.skipif("LOCE_LVIS_SAMPLE" not in os.environ, reason="LOCE_LVIS_SAMPLE names no LVIS annotation file")
def test_equal_on_real_ground_truth() -> None:
    """Detections made from real annotations: jittered copies, some of the wrong category or with another mask."""
    truth = json.loads(Path(os.environ["LOCE_LVIS_SAMPLE"]).read_text())
    ground = load_annotations(truth)
    rng = np.random.default_rng(0)
    results = []
    for n in np.repeat(np.arange(len(ground)), rng.integers(1, 5, len(ground))):
        category = ground.category[n] if rng.random() < 0.8 else rng.integers(len(ground.category_ids))
        other = int(rng.choice(np.flatnonzero(ground.image == ground.image[n]))) if rng.random() < 0.3 else int(n)
        rle = ground.rles([other])[0]
        results.append(
            {
                "image_id": int(ground.image_ids[ground.image[n]]),
                "category_id": int(ground.category_ids[category]),
                "score": round(float(rng.random()), 2),
                "bbox": (ground.boxes[n] * rng.normal(1, 0.1, 4)).clip(0).round(2).tolist(),
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            }
        )
    for iou_type in ("bbox", "segm"):
        assert_equal_to_lvis(truth, results, iou_type)
