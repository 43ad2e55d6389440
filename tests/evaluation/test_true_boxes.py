"""Classification of the true boxes against plain loops; what is written of it, of lost objects and in comparisons."""

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loce.evaluation.annotations import load_annotations
from loce.evaluation.bootstrap import draw_weights
from loce.evaluation.category_differences import FEWEST
from loce.evaluation.comparison import compare_folders
from loce.evaluation.report import evaluate_and_report
from loce.evaluation.stream import DetectionWriter
from loce.evaluation.true_boxes import (
    FILE,
    TrueBoxes,
    confusions,
    group_accuracies,
    largest,
    matrix,
    read_true_boxes,
    resampled_accuracy,
)
from loce.evaluation.true_boxes_report import accuracies, accuracy_intervals
from loce.utils.errors import UserError
from tests.evaluation.cases import random_case


def classified(truth: dict[str, Any], seed: int = 0, right: float = 0.6) -> TrueBoxes:
    """Every annotation with a best category at random, its own with the probability `right`."""
    rng = np.random.default_rng(seed)
    known = [c["id"] for c in truth["categories"]]
    own = np.array([a["category_id"] for a in truth["annotations"]])
    best = np.where(rng.random(len(own)) < right, own, rng.choice(known, len(own)))
    scores = np.sort(rng.random((2, len(own))).astype(np.float32), axis=0)
    return TrueBoxes(
        image_ids=np.array([a["image_id"] for a in truth["annotations"]]),
        annotation_ids=np.array([a["id"] for a in truth["annotations"]]),
        category_ids=own,
        best_ids=best,
        scores=np.where(best == own, scores[1], scores[0]),
        best_scores=scores[1],
    )


def many_images(count: int = 30) -> dict[str, Any]:
    """Four categories, the last without boxes: frequent in all images, common in many, rare in three."""
    images = [{"id": n, "height": 90, "width": 90, "neg_category_ids": []} for n in range(1, count + 1)]
    objects, box = [], {"area": 1600.0, "segmentation": []}
    for n in range(1, count + 1):
        for c in [1] * (1 + n % 2) + [2] * (n % 3 == 0) + [3] * (n % 10 == 0):
            number = len(objects) + 1
            place = [1.0 + 45 * (number % 2), 1.0, 40.0, 40.0]
            objects.append({"id": number, "image_id": n, "category_id": c, "bbox": place, **box})
    categories = [{"id": i + 1, "name": f"class {i + 1}", "frequency": "fcrr"[i]} for i in range(4)]
    return {"images": images, "annotations": objects, "categories": categories}


@pytest.mark.parametrize("seed", range(4))
def test_accuracy_is_the_mean_over_categories_by_plain_loops(seed: int) -> None:
    truth = load_annotations(random_case(seed)[0], masks=False)
    boxes = classified(random_case(seed)[0], seed)
    weights = draw_weights(len(truth.image_ids), 5, seed)
    found = group_accuracies(resampled_accuracy(boxes, truth.image_ids, truth.category_ids, weights), truth.frequency)
    for b in range(5):
        shares: dict[str, list[float]] = {"": [], "r": [], "c": [], "f": []}
        for k, category in enumerate(truth.category_ids.tolist()):
            right = total = 0
            for image, own, best in zip(boxes.image_ids, boxes.category_ids, boxes.best_ids, strict=True):
                times = int(weights[truth.image_ids.tolist().index(image), b])
                total += times * (own == category)
                right += times * (own == category and best == category)
            for group in ("", str(truth.frequency[k])) if total else ():
                shares[group].append(right / total)
        for group, values in shares.items():
            number = found["accuracy" + f"_{group}" * bool(group)][b]
            assert number == pytest.approx(np.mean(values), abs=1e-6) if values else np.isnan(number)


def test_confusions_by_plain_loops() -> None:
    case = many_images()
    ids = np.array([1, 2, 3, 4])
    boxes = classified(case, 3, right=0.3)
    pairs = Counter(zip(boxes.category_ids.tolist(), boxes.best_ids.tolist(), strict=True))
    totals = Counter(boxes.category_ids.tolist())
    found = confusions(boxes, ids)
    assert {(ids[c.category], ids[c.other]): (c.taken, c.boxes) for c in found} == {
        (own, best): (n, totals[own]) for (own, best), n in pairs.items() if own != best
    }
    often = [c for c in found if c.taken >= 3]
    assert found[: len(often)] == often and [c.taken / c.boxes for c in often] == sorted(
        (c.taken / c.boxes for c in often), reverse=True
    )
    chosen = largest(found)[:2]
    counts = matrix(boxes, ids, chosen)
    for row, k in zip(counts, chosen, strict=True):
        expected = [pairs[int(ids[k]), int(ids[other])] for other in chosen]
        assert row.tolist() == [*expected, totals[int(ids[k])] - sum(expected)]


def evaluated(folder: Path, case: dict[str, Any], boxes: TrueBoxes | None, capsys: Any = None, lost: int = 2) -> str:
    """An evaluation of inference that lost every `lost`th object, and of a classification of the true boxes."""
    with DetectionWriter(folder / "detections") as writer:
        for image in case["images"]:
            own = [a for a in case["annotations"] if a["image_id"] == image["id"]]
            own = [a for a in own if a["id"] % lost]
            corners = [[a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], 41.0] for a in own]
            writer.add(image["id"], corners, [0.9] * len(own), [a["category_id"] for a in own])
    if boxes is not None:
        boxes.save(folder / FILE)
    evaluate_and_report(case, folder / "detections", folder, iou_types=["bbox"], resamples=50)
    return "" if capsys is None else str(capsys.readouterr().out)


def test_what_is_written_beside_ap(tmp_path: Path, capsys: Any) -> None:
    case = many_images()
    boxes = classified(case, 1)
    text = evaluated(tmp_path, case, boxes, capsys)
    truth = load_annotations(case, masks=False)
    numbers = json.loads((tmp_path / "metrics.json").read_text())["true_boxes"]
    assert numbers == accuracies(boxes, truth) and list(numbers) == [
        *("accuracy", "accuracy_r", "accuracy_c", "accuracy_f")
    ]
    spread = json.loads((tmp_path / "evaluation.json").read_text())["intervals"]["true_boxes"]
    assert spread == {k: list(v) for k, v in accuracy_intervals(boxes, truth, 50).items()}
    low, high = spread["accuracy"]
    assert low < numbers["accuracy"] < high
    assert f"accuracy_f   {numbers['accuracy_f']:6.3f}" in text and "1 rare categories" in text
    # Confusions, and each lost object with its cause and what the classifier says at its true box.
    with (tmp_path / "confusions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(confusions(boxes, truth.category_ids)) and (tmp_path / "confusions.png").is_file()
    assert rows[0]["name"] != rows[0]["taken_for_name"] and float(rows[0]["share"]) == pytest.approx(
        int(rows[0]["count"]) / int(rows[0]["boxes"]), abs=1e-6
    )
    with (tmp_path / "misses.csv").open(newline="") as file:
        misses = list(csv.DictReader(file))
    lost = [a for a in case["annotations"] if a["id"] % 2 == 0]
    assert {int(row["annotation_id"]) for row in misses} == {a["id"] for a in lost}
    assert [row["frequency"] for row in misses] == sorted((row["frequency"] for row in misses), key="rcf".index)
    at = int(np.flatnonzero(boxes.annotation_ids == int(misses[0]["annotation_id"]))[0])
    assert float(misses[0]["own_score"]) == pytest.approx(float(boxes.scores[at]), rel=1e-3)
    assert misses[0]["best"] == f"class {boxes.best_ids[at]}" and float(misses[0]["area_share"]) == pytest.approx(
        1600 / 90**2, rel=1e-3
    )
    # Evaluated into another folder, which can be compared, too.
    evaluate_and_report(case, tmp_path / "detections", tmp_path / "x", iou_types=["bbox"], resamples=0, errors=False)
    again = read_true_boxes(tmp_path / "x")
    assert again is not None and again.scores.tolist() == boxes.scores.tolist()
    evaluate_and_report(case, [], tmp_path / "x", iou_types=["bbox"], resamples=0, errors=False)
    assert read_true_boxes(tmp_path / "x") is None
    # Without the classification: no such numbers, and nothing of them is left.
    (tmp_path / FILE).unlink()
    evaluate_and_report(case, tmp_path / "detections", tmp_path, iou_types=["bbox"], resamples=0, errors=False)
    assert "true_boxes" not in json.loads((tmp_path / "metrics.json").read_text())
    assert not (tmp_path / "confusions.csv").exists() and not (tmp_path / "confusions.png").exists()
    (tmp_path / FILE).write_bytes(b"x")
    with pytest.raises(UserError, match=r"true_boxes.npz: cannot be read"):
        read_true_boxes(tmp_path)


def test_paired_differences_of_accuracy_and_categories(tmp_path: Path) -> None:
    case = many_images()
    worse, better = classified(case, 1, right=0.2), classified(case, 2, right=0.9)
    evaluated(tmp_path / "a", case, worse)
    evaluated(tmp_path / "b", case, better)
    text = compare_folders(tmp_path / "a", tmp_path / "b", resamples=40, table=tmp_path / "classes.csv")
    truth = load_annotations(case, masks=False)
    values = [accuracies(boxes, truth)["accuracy_f"] for boxes in (worse, better)]
    line = next(line for line in text.splitlines() if line.startswith("accuracy_f"))
    assert line.split()[1:4] == [f"{values[0]:.3f}", f"{values[1]:.3f}", f"{values[1] - values[0]:+.3f}"]
    assert line.endswith("100.0% of resamples") and "categories that gained most accuracy" in text
    with (tmp_path / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    once = np.ones((len(truth.image_ids), 1), dtype=np.int32)
    ids = (truth.image_ids, truth.category_ids)
    own = [resampled_accuracy(boxes, *ids, once)[:, 0] for boxes in (worse, better)]
    for k, row in enumerate(rows[:3]):
        assert float(row["accuracy_difference"]) == pytest.approx(own[1][k] - own[0][k], abs=1e-6)
        assert float(row["AP_difference"]) == 0 and row["AP_A"] == row["AP_B"]
        # Three images say nothing of how much a category's number would move.
        assert bool(row["accuracy_low"]) == bool(row["AP_low"]) == (k < 2)
    assert FEWEST > 3 and rows[3]["AP_A"] == rows[3]["accuracy_A"] == ""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")
    (tmp_path / "run/eval").symlink_to(tmp_path / "a")
    assert compare_folders(tmp_path / "run", tmp_path / "b", 5).startswith(f"A: {tmp_path}/run/eval\n")
    other = replace(better, annotation_ids=better.annotation_ids + 1)
    other.save(tmp_path / "b" / FILE)
    assert "not compared: they are of other annotations" in compare_folders(tmp_path / "a", tmp_path / "b", 5)
