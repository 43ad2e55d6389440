"""Calibration errors against loops over detections, their intervals, and what people get of them."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loce.evaluation import Evaluation, evaluate_lvis
from loce.evaluation.bootstrap import intervals, load_tallies, means_under, tally
from loce.evaluation.calibration import BINS, NAMES
from loce.evaluation.comparison import compare
from loce.evaluation.report import READING, evaluate_and_report
from tests.evaluation.cases import official_lvis, random_case


def slowly(official: Any, groups: str, weights: dict[int, int]) -> tuple[float, float]:
    """ECE and MCE of the groups from what the official evaluator matched; an image counts as often as its weight."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    categories, images = official.params.cat_ids, official.params.img_ids
    for k, category in enumerate(categories):
        for i, image in enumerate(images):
            cell = official.eval_imgs[k * len(official.params.area_rng) * len(images) + i]
            if cell is None or official.lvis_gt.cats[category]["frequency"] not in groups:
                continue
            for n, score in enumerate(cell["dt_scores"]):
                if not cell["dt_ignore"][0, n]:
                    own = bins[min(int(score * BINS), BINS - 1)]
                    own += [(score, bool(cell["dt_matches"][0, n]))] * weights[image]
    total = sum(len(own) for own in bins)
    if not total:
        return float("nan"), float("nan")
    gaps = [(len(own), abs(sum(hit - score for score, hit in own) / len(own))) for own in bins if own]
    return sum(count * gap for count, gap in gaps) / total, max(gap for _, gap in gaps)


@pytest.mark.usefixtures("numpy_float")
def test_errors_count_bins() -> None:
    for seed in range(12):
        truth, results = random_case(seed, crowded=seed == 0)
        if not results:
            continue
        official, evaluation = official_lvis(truth, results, "bbox"), evaluate_lvis(truth, results)
        weights = np.random.default_rng(seed).integers(0, 3, (len(truth["images"]), 2))
        weights[:, 0] = 1
        fast = means_under(tally(evaluation), weights)
        for b in range(2):
            drawn = dict(zip(evaluation.truth.image_ids.tolist(), weights[:, b].tolist(), strict=True))
            for group, groups in {"": "rcf", "r": "r", "c": "c", "f": "f"}.items():
                for name, slow in zip(("ECE", "MCE"), slowly(official, groups, drawn), strict=True):
                    assert fast[name + group][b] == pytest.approx(slow, abs=1e-5, nan_ok=True)
        for name, value in evaluation.calibration.items():
            assert value == pytest.approx(fast[name][0], abs=1e-5) or (value == -1 and np.isnan(fast[name][0]))


def test_a_lower_error_is_better(small: dict[str, Any]) -> None:
    def evaluation(score: float) -> Evaluation:
        box = [10.0, 10.0, 40.0, 40.0]
        return evaluate_lvis(small, [{"image_id": i, "category_id": 2, "score": score, "bbox": box} for i in (3, 7)])

    unsure, sure = evaluation(0.3), evaluation(0.9)
    assert unsure.calibration["ECEf"] == unsure.calibration["MCE"] == pytest.approx(0.7, abs=1e-6)
    assert unsure.calibration["ECEr"] == -1.0
    row = compare(tally(unsure), tally(sure), resamples=20)["ECE"]
    assert row["difference"] == pytest.approx(-0.6, abs=1e-6) and row["better"] == 1.0


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, results = random_case(10, crowded=True)
    evaluation = evaluate_and_report(truth, results, tmp_path, ["bbox"], "fixed", resamples=20, errors=False)["bbox"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())["bbox"]
    assert {name: metrics[name] for name in NAMES} == pytest.approx(evaluation.calibration)
    spread = json.loads((tmp_path / "evaluation.json").read_text())["intervals"]["bbox"]
    assert spread["ECE"][0] <= metrics["ECE"] <= spread["ECE"][1]
    rows = list(csv.DictReader((tmp_path / "calibration.csv").open()))
    assert len(rows) == 3 * BINS and {row["of"] for row in rows} == {"bbox, protocol fixed"}
    true, false = evaluation.matches.verdicts()
    assert sum(int(row["detections"]) for row in rows) == (true | false).sum()
    assert (tmp_path / "calibration.png").stat().st_size > 10_000
    assert READING in capsys.readouterr().out


def test_scores_that_are_no_probabilities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, results = random_case(10, crowded=True)
    logits = [{**d, "score": 5 * d["score"]} for d in results]
    evaluation = evaluate_and_report(truth, logits, tmp_path, ["bbox"], resamples=0, errors=False)["bbox"]
    assert not evaluation.calibration and not (tmp_path / "calibration.csv").exists()
    assert "scores below 0 or above 1 are no probabilities" in capsys.readouterr().out
    loaded = load_tallies(tmp_path / "tallies_bbox.npz")
    assert loaded.reliability is None and set(intervals(loaded, 5)) == {"AP", "APr", "APc", "APf"}
