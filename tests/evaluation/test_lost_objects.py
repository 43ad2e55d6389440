"""Causes of lost objects: one scene with every cause, and what each gives back against evaluating again."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from loce.evaluation import evaluate_lvis, read_results
from loce.evaluation.lost_objects import CAUSES, average_precision, confusions, explain, given_back
from loce.evaluation.lvis_ap import counts
from loce.evaluation.near_misses import near_misses_of_image
from loce.evaluation.report import evaluate_and_report
from tests.evaluation.cases import random_case, without

NAMES = list(CAUSES)
BOX = [10.0, 10.0, 20.0, 20.0]


def scene() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One image a cause, named by image id = its number in CAUSES; category 1 is lost, category 2 the other."""
    ids = [
        number for number, name in enumerate(NAMES) if name not in ("removed_by_nms", "score_too_low", "no_proposal")
    ]
    images = [
        {"id": i, "height": 100, "width": 100, "neg_category_ids": [2], "not_exhaustive_category_ids": []} for i in ids
    ]
    annotations = [{"id": i + 1, "image_id": i, "category_id": 1, "bbox": BOX, "area": 400.0} for i in ids]
    taken = NAMES.index("taken")  # two objects on one place, one detection
    annotations.append({**annotations[0], "id": 99, "image_id": taken})
    categories = [{"id": 1, "name": "cup", "frequency": "r"}, {"id": 2, "name": "bowl", "frequency": "f"}]

    def detection(name: str, category: int, score: float, box: list[float]) -> dict[str, Any]:
        return {"image_id": NAMES.index(name), "category_id": category, "score": score, "bbox": box}

    far, near = [60.0, 60.0, 9.0, 9.0], [22.0, 10.0, 20.0, 20.0]  # IoU 0 and .25
    results = [
        detection("found", 1, 0.9, BOX),
        detection("outscored", 1, 0.1, BOX),
        *(detection("outscored", 1, 0.5, far) for _ in range(4)),
        detection("taken", 1, 0.95, BOX),
        detection("cut_by_cap", 1, 0.01, BOX),
        *(detection("cut_by_cap", 2, 0.02, far) for _ in range(300)),
        detection("classified_as", 2, 0.8, BOX),
        detection("classified_as", 2, 0.3, BOX),
        detection("classified_as", 1, 0.04, near),
        detection("badly_localised", 1, 0.03, near),
        detection("no_detection", 1, 0.02, far),
    ]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    for annotation in annotations:
        annotation["segmentation"] = [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]
    return truth, results


def test_every_cause_is_told_apart() -> None:
    truth, results = scene()
    evaluation = evaluate_lvis(truth, results)
    outcomes = explain(evaluation, read_results(results))
    image_ids = evaluation.truth.image_ids[evaluation.truth.image]
    causes: dict[str, list[str]] = {}
    for image, cause in zip(image_ids.tolist(), outcomes.cause.tolist(), strict=True):
        causes.setdefault(NAMES[image], []).append(NAMES[cause])
    assert sorted(causes.pop("taken")) == ["found", "taken"]
    assert causes == {name: [name] for name in causes}
    assert set(causes) == set(NAMES) - {"taken", "removed_by_nms", "score_too_low", "no_proposal"}
    scores = {NAMES[outcomes.cause[g]]: outcomes.score[g] for g in range(len(outcomes.cause))}
    assert (scores["cut_by_cap"], scores["classified_as"], scores["no_detection"]) == (0.01, 0.8, np.inf)
    assert confusions(evaluation, outcomes, 0) == "bowl (1)"
    assert outcomes.unseen == ("removed_by_nms", "score_too_low", "no_proposal")


def corners(box: list[float]) -> np.ndarray:
    return np.array([[box[0], box[1], box[0] + box[2], box[1] + box[3]]])


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_what_inference_can_add(iou_type: str) -> None:
    """Each near miss beside an object without any detection, and beside one that is localised badly."""
    truth, results = scene()
    results = [{**d, "segmentation": rectangle(d["bbox"])} for d in results]
    evaluation, detections = evaluate_lvis(truth, results, iou_type), read_results(results)

    def fate(lost: str, *found: tuple[str, int, float, list[float]]) -> tuple[str, float, int]:
        """Of the object called `lost`, from near misses (kind, category, score, box)."""
        parts = {kind: (corners(box), [score], [category]) for kind, category, score, box in found}
        outcomes = explain(evaluation, detections, near_misses_of_image(NAMES.index(lost), parts))
        assert outcomes.unseen == ("no_detection",)
        g = int(np.flatnonzero(evaluation.truth.image_ids[evaluation.truth.image] == NAMES.index(lost))[0])
        return NAMES[outcomes.cause[g]], float(outcomes.score[g]), int(outcomes.other[g])

    near, far = [11.0, 10.0, 20.0, 20.0], [50.0, 12.0, 20.0, 20.0]
    proposed = ("proposed", 1, 0.001, near)
    none, badly, other = "no_detection", "badly_localised", "classified_as"
    assert fate(none) == fate(none, ("proposed", 1, 0.9, far)) == ("no_proposal", np.inf, -1)
    assert fate(none, proposed) == ("score_too_low", np.inf, -1)
    for kind in ("removed_by_nms", "cut_by_cap"):
        right = (kind, 1, 0.25, near)
        for lost in (none, badly, other):
            assert fate(lost, right, proposed) == (kind, 0.25, 1 if lost == other else -1)
        assert fate(none, (kind, 1, 0.25, far)) == fate(none, (kind, 2, 0.25, near)) == ("no_proposal", np.inf, -1)
    wrong = (other, 2, 0.25, near)
    assert fate(none, wrong, proposed) == fate(badly, wrong) == (other, 0.25, 1)
    assert fate(other, wrong) == (other, np.float64(0.8), 1)  # the better of the two
    assert fate(none, wrong, ("removed_by_nms", 1, 0.125, near)) == ("removed_by_nms", 0.125, 1)
    assert fate("taken", ("removed_by_nms", 1, 0.125, near))[0] in ("found", "taken")


def rectangle(box: list[float]) -> dict[str, Any]:
    mask = np.zeros((100, 100), dtype=np.uint8, order="F")
    x, y, w, h = (int(side) for side in box)
    mask[y : y + h, x : x + w] = 1
    return mask_utils.encode(mask)


def test_no_near_misses_at_all_are_known_too() -> None:
    """Inference that looked and saw nothing: then there was no proposal."""
    evaluation, detections = evaluate_lvis(scene()[0], []), read_results([])
    outcomes = explain(evaluation, detections, near_misses_of_image(1, {}))
    assert {NAMES[cause] for cause in outcomes.cause} == {"no_proposal"}
    with pytest.raises(ValueError, match="not in tuple"):
        near_misses_of_image(1, {"seen": (np.zeros((0, 4)), [], [])})


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_each_object_has_one_fate_and_ap50_is_the_evaluators(iou_type: str) -> None:
    for seed in range(30):
        truth, results = random_case(seed)
        evaluation = evaluate_lvis(truth, results, iou_type)
        outcomes = explain(evaluation, read_results(results))
        assert ((outcomes.cause >= 0) == ~evaluation.matches.object_ignored[:, 0]).all()
        for k, row in enumerate(evaluation.per_category):
            found = (
                (evaluation.truth.category == k) & (outcomes.cause >= 0) & (outcomes.cause <= NAMES.index("outscored"))
            )
            if row["AP50"] >= 0:
                assert found.sum() == round(evaluation.recall[0, k, 0] * evaluation.matches.objects[0, k])


def test_average_precision_is_the_evaluators() -> None:
    for seed in range(50):
        evaluation = evaluate_lvis(*random_case(seed, crowded=seed % 10 == 0))
        matches = evaluation.matches
        cut = np.searchsorted(matches.overlapping, matches.bounds)
        for k in np.flatnonzero(matches.objects[0]):
            true, false = (column[:, 0] for column in counts(matches, int(k), slice(cut[k], cut[k + 1])))
            ap = average_precision(true, false, int(matches.objects[0, k]))
            assert ap == pytest.approx(evaluation.per_category[k]["AP"], abs=1e-9)


def test_what_is_given_back_is_what_evaluating_again_gives() -> None:
    """The slow twin: add a perfect detection, with the score that the cause says, for every object of a cause."""
    checked = 0
    for seed in range(60):
        truth, results = random_case(seed)
        rng = np.random.default_rng(seed)
        scores = (rng.permutation(len(results)) + 1) / (len(results) + 1)
        results = [{**d, "score": float(s)} for d, s in zip(without(results, "segmentation"), scores, strict=True)]
        evaluation = evaluate_lvis(truth, results)
        outcomes = explain(evaluation, read_results(results))
        back, ground = given_back(evaluation, outcomes), evaluation.truth
        for k in np.flatnonzero(evaluation.matches.objects[0]):
            for name in ("taken", "classified_as", "badly_localised", "no_detection"):
                chosen = np.flatnonzero((ground.category == k) & (outcomes.cause == NAMES.index(name)))
                added = [
                    {
                        "image_id": int(ground.image_ids[ground.image[g]]),
                        "category_id": int(ground.category_ids[k]),
                        "score": float(min(outcomes.score[g], 2.0)),
                        "bbox": ground.boxes[g].tolist(),
                    }
                    for g in chosen
                ]
                again = evaluate_lvis(truth, results + added)
                expected = again.per_category[k]["AP"] - evaluation.per_category[k]["AP"]
                flat = (ground.boxes[chosen, 2:] == 0).any()  # a detection like that would not count
                if len({d["score"] for d in added}) == len(added) and not flat:  # ties would be ordered by image
                    checked += len(added) > 0
                    assert len(added) == 0 or back[name][k] == pytest.approx(expected, abs=1e-9), (seed, k, name)
    assert checked > 50


def test_outscored_gives_back_what_false_positives_cost() -> None:
    truth, results = scene()
    evaluation = evaluate_lvis(truth, results)
    back = given_back(evaluation, explain(evaluation, read_results(results)))
    right = [d for d in results if d["bbox"] == BOX or d["category_id"] == 2]
    assert evaluate_lvis(truth, right).per_category[0]["AP"] == pytest.approx(
        evaluation.per_category[0]["AP"] + back["outscored"][0]
    )
    assert np.isnan(back["outscored"][1])  # no objects


def test_outscored_is_the_ap_without_what_is_false_at_half() -> None:
    """The slow twin: evaluate again without these detections."""
    checked = 0
    for seed in range(60):
        truth, results = random_case(seed)
        truth["images"] = [{**image, "not_exhaustive_category_ids": []} for image in truth["images"]]
        results = without(results, "segmentation")
        evaluation = evaluate_lvis(truth, results)
        matches = evaluation.matches
        false = matches.false_positive[:, 0].copy()
        false[matches.overlapping[matches.matched[:, 0, 0]]] = False
        if (matches.matched[:, 0] & ~matches.matched[:, 0, :1]).any():
            continue  # found at a higher threshold only
        again = evaluate_lvis(truth, [d for row, d in enumerate(results) if row not in set(matches.row[false])])
        back = given_back(evaluation, explain(evaluation, read_results(results)))["outscored"]
        for k in np.flatnonzero(matches.objects[0]):
            expected = again.per_category[k]["AP"] - evaluation.per_category[k]["AP"]
            assert back[k] == pytest.approx(expected, abs=1e-9), (seed, k)
            checked += expected > 0
    assert checked > 10


def test_files_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, results = scene()
    evaluate_and_report(truth, results, tmp_path, resamples=0)
    text = capsys.readouterr().out
    assert "what became of the objects at IoU .5" in text
    assert "note: the results hold verified categories only" in text
    with (tmp_path / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["level"] for row in rows] == ["group"] * 4 + ["category"]
    assert [row["name"] for row in rows] == ["all", "rare", "common", "frequent", "cup"]
    assert rows[4]["classified_as_what"] == "bowl (1)"
    for row in (rows[0], rows[1], rows[4]):
        assert sum(int(row[name] or 0) for name in CAUSES) == int(row["objects"]) == 8
        assert row["removed_by_nms"] == row["back_no_proposal"] == ""  # not known, which is not 0
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    evaluate_and_report(truth, [], tmp_path / "none", resamples=0)
    with (tmp_path / "none" / "errors.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["no_detection"] == "8"
