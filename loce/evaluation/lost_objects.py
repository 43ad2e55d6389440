"""Causes of lost objects: what became of every object at IoU .5, and the AP that each cause would give back.

Seen in the detections alone: found, outscored, taken, cut_by_cap (as far as the results hold more than the cap),
classified_as (as far as they hold categories that were not verified), badly_localised, no_detection. With the near
misses that our own inference leaves, also removed_by_nms, the rest of cut_by_cap and classified_as, and in place of
no_detection whether there was a proposal (score_too_low) or none (no_proposal).

In the spirit of TIDE (arXiv 2008.08115): what a cause would give back is the category's AP, mean over the ten IoU
thresholds, with those objects found exactly, by the detection that the cause is about (its score) or, where there is
none, by a sure one, and all else left as it is; for outscored it is the AP without the false positives of IoU .5. What
exact boxes (masks) of the found objects would give is not in here: it is AP50 - AP.

Legend: G objects, K categories, T = 10 thresholds; L lost objects and n detections and near misses of one image; m
overlapping detections and a added ones of one category.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_utils

from loce.evaluation.annotations import positions
from loce.evaluation.detections import Detections
from loce.evaluation.iou import overlaps
from loce.evaluation.lvis_ap import RECALLS, Evaluation, counts
from loce.evaluation.matching import within_cap
from loce.evaluation.near_misses import KINDS, NearMisses, near_misses_of_image
from loce.utils.progress import watched

CAUSES = {  # in order: the first that holds is the cause
    "found": "found",
    "outscored": "found, below more false than true detections",
    "taken": "its detection went to another object of the category",
    "cut_by_cap": "right detection, cut by the cap on detections",
    "removed_by_nms": "right detection, removed by NMS",
    "classified_as": "localised, but as another category",
    "badly_localised": "right category, IoU .1 to .5",
    "score_too_low": "proposed, but no detection of any category",
    "no_proposal": "no proposal overlaps it by half",
    "no_detection": "no detection overlaps it by half",
}
_NUMBER = {name: number for number, name in enumerate(CAUSES)}
_SURE = ("score_too_low", "no_proposal", "no_detection")  # no detection whose score could be taken
LOW = 0.1  # IoU below which a detection has nothing to do with an object


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What became of every object: cause (G,) index into CAUSES or -1 for ignored objects; score (G,) of the detection
    that the cause is about, inf for none; other (G,) category index of the best other detection at IoU .5 where the
    cause is classified_as, removed_by_nms or cut_by_cap, or -1; unseen: causes that could not be known."""

    cause: np.ndarray
    score: np.ndarray
    other: np.ndarray
    unseen: tuple[str, ...]


def _by_image(evaluation: Evaluation, columns: Detections | NearMisses) -> tuple[list[np.ndarray], np.ndarray]:
    """The rows of detections or near misses in each image, and the category index of every row."""
    truth = evaluation.truth
    image, _ = positions(truth.image_ids, columns.image_ids)
    rows = np.argsort(image, kind="stable")
    ends = np.searchsorted(image[rows], np.arange(1, len(truth.image_ids)))
    return np.split(rows, ends), positions(truth.category_ids, columns.category_ids)[0]


def explain(evaluation: Evaluation, detections: Detections, near_misses: NearMisses | None = None) -> Outcomes:
    """The outcome of every object. detections: what was evaluated; near_misses: what else inference saw, or None.

    Near misses are compared by their boxes, whatever the IoU type.
    """
    truth, matches = evaluation.truth, evaluation.matches
    size = len(truth)
    unseen = ("no_detection",) if near_misses is not None else ("removed_by_nms", "score_too_low", "no_proposal")
    outcomes = Outcomes(cause=np.full(size, -1), score=np.full(size, np.inf), other=np.full(size, -1), unseen=unseen)
    # Objects that were found, and those below more false than true detections.
    hit = matches.taken[:, 0] >= 0
    counted = ~matches.object_ignored[:, 0]
    found = matches.taken[hit, 0]
    outcomes.score[found] = matches.score[matches.overlapping[hit]]
    outcomes.cause[found] = np.where(_precision(evaluation)[matches.overlapping[hit]] < 0.5, _NUMBER["outscored"], 0)
    outcomes.cause[~counted] = -1
    lost = np.flatnonzero(counted & (outcomes.cause < 0))
    outcomes.cause[lost] = _NUMBER["no_detection" if near_misses is None else "no_proposal"]

    # The lost ones, image by image, from the detections there and the near misses.
    own_rows, own_category = _by_image(evaluation, detections)
    own_image, _ = positions(truth.image_ids, detections.image_ids)
    kept = within_cap(evaluation.protocol, own_image, own_category, detections)
    seen = near_misses_of_image(0, {}) if near_misses is None else near_misses
    seen_rows, seen_category = _by_image(evaluation, seen)
    images = np.unique(truth.image[lost])
    cut = np.searchsorted(truth.image[lost], np.append(images, len(truth.image_ids)))
    for n, i in enumerate(watched(images.tolist(), len(images), "causes of lost objects", "images")):
        objects, rows, more = lost[cut[n] : cut[n + 1]], own_rows[i], seen_rows[i]
        overlap = np.concatenate(
            [_overlap(evaluation, detections, rows, objects), overlaps(seen.boxes[more], truth.boxes[objects])]
        )
        kinds = np.concatenate([np.where(kept[rows], _KEPT, KINDS.index("cut_by_cap")), seen.kinds[more]])
        category = np.concatenate([own_category[rows], seen_category[more]])
        scores = np.concatenate([detections.scores[rows], seen.scores[more]])
        _judge(outcomes, truth.category[objects], objects, overlap, kinds, category, scores)
    return outcomes


_KEPT = len(KINDS)  # a detection that was evaluated


def _judge(
    outcomes: Outcomes,
    wanted: np.ndarray,
    objects: np.ndarray,
    overlap: np.ndarray,
    kinds: np.ndarray,
    category: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Causes of the lost `objects` (L,) of one image, of categories `wanted`, from the IoU (n, L) of what is there."""
    if not len(scores):
        return
    same, half = category[:, None] == wanted, overlap >= 0.5
    removed, cut, other, proposed, kept = (kinds[:, None] == number for number in range(len(KINDS) + 1))
    tests = {  # the reverse of the order of CAUSES: what is written last stays
        "score_too_low": half & proposed,
        "badly_localised": same & (overlap >= LOW) & kept,
        "classified_as": ~same & half & (kept | other),
        "removed_by_nms": same & half & removed,
        "cut_by_cap": same & half & cut,
        "taken": same & half & kept,
    }
    for name, holds in tests.items():
        some = holds.any(axis=0)
        best = np.where(holds, scores[:, None], -np.inf)[:, some].argmax(axis=0)
        outcomes.cause[objects[some]] = _NUMBER[name]
        outcomes.score[objects[some]] = np.inf if name in _SURE else scores[best]
        if name == "classified_as":
            outcomes.other[objects[some]] = category[best]
        elif name == "taken":  # localised and classified, so there is no other category
            outcomes.other[objects[some]] = -1


def _precision(evaluation: Evaluation) -> np.ndarray:
    """(N,) precision at IoU .5 of the category's detections down to each."""
    matches = evaluation.matches
    positives, negatives = (
        np.cumsum(column) - np.repeat(np.append(0, np.cumsum(column))[matches.bounds[:-1]], np.diff(matches.bounds))
        for column in matches.verdicts()
    )
    return positives / np.maximum(positives + negatives, 1)


def _overlap(evaluation: Evaluation, detections: Detections, rows: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """(len(rows), L) IoU of the evaluation's type."""
    if not len(rows):
        return np.zeros((0, len(objects)))
    if evaluation.iou_type == "bbox":
        assert detections.boxes is not None
        return overlaps(detections.boxes[rows], evaluation.truth.boxes[objects])
    assert detections.masks is not None
    return mask_utils.iou(detections.masks.rles(rows), evaluation.truth.rles(objects), [0] * len(objects))


def average_precision(true: np.ndarray, false: np.ndarray, objects: int) -> float:
    """Mean over thresholds of AP from counts of true and false positives (n, T) down to each of some detections."""
    precision = true / np.maximum(true + false, 1)
    envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    envelope = np.concatenate([envelope, np.zeros((1, true.shape[1]))])
    places = [np.searchsorted(reached, RECALLS, side="left") for reached in (true / objects).T]
    return float(np.mean([envelope[place, t].mean() for t, place in enumerate(places)]))


def given_back(evaluation: Evaluation, outcomes: Outcomes) -> dict[str, np.ndarray]:
    """(K,) AP that each cause but "found" would give back (see the file's head), nan without objects."""
    matches, truth = evaluation.matches, evaluation.truth
    back = {name: np.full(len(truth.category_ids), np.nan) for name in CAUSES if name != "found"}
    cut = np.searchsorted(matches.overlapping, matches.bounds)
    taken = np.zeros((len(truth), matches.taken.shape[1]), dtype=bool)
    hits, thresholds = np.nonzero(matches.taken >= 0)
    taken[matches.taken[hits, thresholds], thresholds] = True
    of_category = np.argsort(truth.category, kind="stable")
    bounds = np.searchsorted(truth.category[of_category], np.arange(len(truth.category_ids) + 1))
    measured = np.flatnonzero(matches.objects[0]).tolist()
    for k in watched(measured, len(measured), "what causes would give back", "categories"):
        now, objects = evaluation.per_category[k]["AP"], int(matches.objects[0, k])
        own = slice(cut[k], cut[k + 1])
        true, false = (column[:, 0] for column in counts(matches, k, own))
        back["outscored"][k] = average_precision(true, _false_above_half(evaluation, own), objects) - now
        mine = of_category[bounds[k] : bounds[k + 1]]
        for name in list(back)[1:]:
            chosen = mine[outcomes.cause[mine] == _NUMBER[name]]
            added = _with_added(evaluation, k, true, false, outcomes.score[chosen], ~taken[chosen])
            back[name][k] = average_precision(*added, objects) - now if len(chosen) else 0.0
    return back


def _false_above_half(evaluation: Evaluation, own: slice) -> np.ndarray:
    """(m, T) false positives that are none at IoU .5, down to each overlapping detection."""
    matches = evaluation.matches
    candidate = matches.false_positive[matches.overlapping[own], 0][:, None]
    matched = matches.matched[own, 0]
    return np.cumsum(candidate & matched[:, :1] & ~matched, axis=0)


def _with_added(
    evaluation: Evaluation,
    k: int,
    true: np.ndarray,
    false: np.ndarray,
    scores: np.ndarray,
    new: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Counts (m + a, T) of category k when detections with `scores` (a,) find an object each, at the thresholds where
    it is `new` (a, T)."""
    matches = evaluation.matches
    own = slice(matches.bounds[k], matches.bounds[k + 1])
    place = matches.overlapping[np.searchsorted(matches.overlapping, own.start) :][: len(true)] - own.start
    candidates = np.append(0, np.cumsum(matches.false_positive[own, 0]))
    wrongly = candidates[place + 1][:, None] - false  # candidates that found something after all
    order = np.argsort(-scores, kind="stable")
    before = np.searchsorted(-matches.score[own], -scores[order], side="right")  # detections that rank above
    above = np.searchsorted(place, before)  # of these, the overlapping ones
    zero = np.zeros((1, true.shape[1]), dtype=true.dtype)
    true_there = np.concatenate([zero, true])[above]
    false_there = candidates[before][:, None] - np.concatenate([zero, wrongly])[above]
    merged = np.argsort(np.concatenate([place, before - 0.5]), kind="stable")
    gain = np.concatenate([np.zeros(true.shape, dtype=bool), new[order]])[merged].cumsum(axis=0)
    return np.concatenate([true, true_there])[merged] + gain, np.concatenate([false, false_there])[merged]


def confusions(evaluation: Evaluation, outcomes: Outcomes, category: int | np.integer) -> str:
    """The three categories that objects of a category (index) were taken for most: "cup (5), bowl (2)"."""
    others = outcomes.other[(evaluation.truth.category == category) & (outcomes.other >= 0)].tolist()
    return ", ".join(f"{evaluation.truth.names[k]} ({n})" for k, n in Counter(others).most_common(3))
