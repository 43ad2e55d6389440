"""Thresholds of best F1: against plain loops over all thresholds, and what is stored is read."""

import math
from pathlib import Path

import numpy as np
import pytest

from loce.evaluation import evaluate_lvis
from loce.evaluation.report import evaluate_and_report
from loce.evaluation.thresholds import FEWEST, best_thresholds, read_thresholds
from tests.evaluation.cases import random_case


def slow_f1(rows: list[tuple[float, bool]], objects: int, threshold: float) -> float:
    """2 TP / (TP + FP + objects), counted one by one."""
    true = sum(1 for score, hit in rows if score >= threshold and hit)
    kept = sum(1 for score, _ in rows if score >= threshold)
    return 2 * true / (kept + objects)


@pytest.mark.parametrize("seed", range(12))
def test_no_threshold_is_better(seed: int) -> None:
    truth, results = random_case(seed, crowded=seed % 3 == 0)
    matches = evaluate_lvis(truth, results, "bbox").matches
    thresholds, f1 = best_thresholds(matches)
    # Every detection that counts, by category, and whether it found an object.
    rows: list[list[tuple[float, bool]]] = [[] for _ in thresholds]
    place = {int(row): n for n, row in enumerate(matches.overlapping)}
    for row, score in enumerate(matches.score.tolist()):
        k = int(np.searchsorted(matches.bounds, row, side="right") - 1)
        hit, ignored = False, False
        if row in place:
            hit, ignored = (bool(x[place[row], 0, 0]) for x in (matches.matched, matches.ignored))
        if (hit and not ignored) or (not hit and matches.false_positive[row, 0]):
            rows[k].append((score, hit))
    objects = matches.objects[0].tolist()
    few = [k for k, number in enumerate(objects) if number < FEWEST]
    groups = [few, *([k] for k in range(len(objects)) if k not in few)]
    for group in groups:
        mine, number = [row for k in group for row in rows[k]], sum(objects[k] for k in group)
        if not any(hit for _, hit in mine):
            assert all(math.isnan(thresholds[k]) for k in group)
            continue
        best = max(slow_f1(mine, number, score) for score, _ in mine)
        assert {slow_f1(mine, number, thresholds[k]) for k in group} == {best}
        for k in group:
            assert not objects[k] or f1[k] == slow_f1(rows[k], objects[k], thresholds[k])


def test_what_is_stored_is_read(tmp_path: Path) -> None:
    truth, results = random_case(3)
    evaluation = evaluate_and_report(truth, results, tmp_path, resamples=0, errors=False)
    expected = best_thresholds(evaluation["segm"].matches)[0]
    ids = evaluation["segm"].truth.category_ids
    found = read_thresholds(tmp_path, ids[::-1], 0.3)
    assert found is not None
    np.testing.assert_allclose(found[::-1], np.where(np.isnan(expected), 0.3, expected), rtol=1e-5)
    assert read_thresholds(tmp_path / "nowhere", ids, 0.3) is None
