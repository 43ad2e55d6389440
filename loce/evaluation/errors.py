"""Why is AP low? What became of every object at IoU .5, and the AP50 that each cause would give back.

Seen in the detections alone: found, outscored, taken, cut_by_cap (as far as the results hold more than the cap),
classified_as, badly_localised, no_detection. Seen only with what inference can add: removed_by_nms, and for
no_detection whether there was a proposal (score_too_low) or none (no_proposal). In the spirit of TIDE (arXiv
2008.08115): what a cause would give back is the category's AP50 with those objects found, by the detection that the
cause is about (its score) or, where there is none, by a sure one, and all else left as it is; for outscored it is the
AP50 without false positives.

Legend: G objects, N detections, K categories, L lost objects of one image.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_utils

from loce.evaluation.annotations import positions
from loce.evaluation.detections import Detections, offsets_of
from loce.evaluation.iou import ground_rle, overlaps
from loce.evaluation.lvis_ap import RECALLS, Evaluation
from loce.evaluation.matching import within_cap
from loce.progress import watched

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
LOW = 0.1  # IoU below which a detection has nothing to do with an object


@dataclass(frozen=True, kw_only=True)
class Removed:
    """Detections that inference dropped, with boxes: by NMS where `by_nms` (N,) bool is true, else by the cap."""

    detections: Detections
    by_nms: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Fates:
    """What became of every object: cause (G,) index into CAUSES or -1 for ignored objects; score (G,) of the detection
    that the cause is about, inf for none; other (G,) category index it was classified as, or -1; unseen: causes that
    could not be told apart."""

    cause: np.ndarray
    score: np.ndarray
    other: np.ndarray
    unseen: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _ByImage:
    """Rows of some detections grouped by image, with their category index."""

    rows: np.ndarray
    bounds: np.ndarray
    category: np.ndarray

    def of(self, image: int) -> np.ndarray:
        return self.rows[self.bounds[image] : self.bounds[image + 1]]


def _by_image(evaluation: Evaluation, image_ids: np.ndarray, category_ids: np.ndarray) -> _ByImage:
    truth = evaluation.truth
    image, _ = positions(truth.image_ids, image_ids)
    rows = np.argsort(image, kind="stable")
    category, _ = positions(truth.category_ids, category_ids)
    return _ByImage(rows=rows, bounds=offsets_of(np.bincount(image, minlength=len(truth.image_ids))), category=category)


def _removed_rows(evaluation: Evaluation, removed: Removed | None) -> _ByImage | None:
    if removed is None:
        return None
    return _by_image(evaluation, removed.detections.image_ids, removed.detections.category_ids)


def explain(
    evaluation: Evaluation,
    detections: Detections,
    removed: Removed | None = None,
    proposals: tuple[np.ndarray, np.ndarray] | None = None,
) -> Fates:
    """The fate of every object. detections: what was evaluated, better not filtered by category, or confusions with
    categories that were not verified cannot be seen. proposals: image ids (P,) and boxes (P, 4) x, y, width, height.
    Removed detections and proposals are compared by their boxes, whatever the IoU type.
    """
    truth, matches = evaluation.truth, evaluation.matches
    size = len(truth)
    unseen = ("removed_by_nms",) * (removed is None) + ("score_too_low", "no_proposal") * (proposals is None)
    fates = Fates(cause=np.full(size, -1), score=np.full(size, np.inf), other=np.full(size, -1), unseen=unseen)
    hit = matches.object_50 >= 0
    counts = ~matches.object_ignored[:, 0]
    found = matches.object_50[hit]
    fates.score[found] = matches.score[matches.overlapping[hit]]
    fates.cause[found] = np.where(_precision(evaluation)[matches.overlapping[hit]] < 0.5, _NUMBER["outscored"], 0)
    fates.cause[~counts] = -1
    lost = np.flatnonzero(counts & (fates.cause < 0))
    own = _by_image(evaluation, detections.image_ids, detections.category_ids)
    image, _ = positions(truth.image_ids, detections.image_ids)
    kept = within_cap(evaluation.protocol, image, own.category, detections.scores)
    gone = _removed_rows(evaluation, removed)
    boxes = None if proposals is None else _by_image(evaluation, proposals[0], np.zeros_like(proposals[0]))

    images = np.unique(truth.image[lost])
    cut = np.searchsorted(truth.image[lost], np.append(images, len(truth.image_ids)))
    for n, i in enumerate(watched(images.tolist(), len(images), "causes of lost objects", "images")):
        objects = lost[cut[n] : cut[n + 1]]
        rows = own.of(i)
        overlap = _overlap(evaluation, detections, rows, objects)
        _from_detections(
            fates, truth.category, objects, overlap, own.category[rows], detections.scores[rows], kept[rows]
        )
        if removed is not None and gone is not None:
            _from_removed(fates, truth.category, truth.boxes, objects, removed, gone.of(i), gone.category)
        if proposals is not None and boxes is not None:
            none = objects[fates.cause[objects] == _NUMBER["no_detection"]]
            near = (overlaps(proposals[1][boxes.of(i)], truth.boxes[none]) >= 0.5).any(axis=0)
            fates.cause[none] = np.where(near, _NUMBER["score_too_low"], _NUMBER["no_proposal"])
    return fates


def _columns_50(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """(N,) bool: true and false positives at IoU .5 among the counted detections."""
    matches = evaluation.matches
    true, used = np.zeros(len(matches.row), dtype=bool), np.zeros(len(matches.row), dtype=bool)
    used[matches.overlapping] = matches.matched[:, 0, 0]
    true[matches.overlapping] = matches.matched[:, 0, 0] & ~matches.ignored[:, 0, 0]
    return true, matches.false_positive[:, 0] & ~used


def _precision(evaluation: Evaluation) -> np.ndarray:
    """(N,) precision at IoU .5 of the category's detections down to each."""
    bounds = evaluation.matches.bounds
    positives, negatives = (
        np.cumsum(column) - np.repeat(np.append(0, np.cumsum(column))[bounds[:-1]], np.diff(bounds))
        for column in _columns_50(evaluation)
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
    grounds = [ground_rle(evaluation.truth, int(row)) for row in objects]
    return mask_utils.iou(detections.masks.rles(rows), grounds, [0] * len(objects))


def _from_detections(
    fates: Fates,
    object_category: np.ndarray,
    objects: np.ndarray,
    overlap: np.ndarray,
    category: np.ndarray,
    scores: np.ndarray,
    kept: np.ndarray,
) -> None:
    """Causes of the lost `objects` (L,) of one image from IoU (n, L) with its detections."""
    same = category[:, None] == object_category[objects]
    half = overlap >= 0.5
    tests = {  # the reverse of the order of CAUSES: what is written last stays
        "badly_localised": same & (overlap >= LOW) & kept[:, None],
        "classified_as": ~same & half & kept[:, None],
        "cut_by_cap": same & half & ~kept[:, None],
        "taken": same & half & kept[:, None],
    }
    fates.cause[objects] = _NUMBER["no_detection"]
    for name, holds in tests.items() if len(category) else ():
        some = holds.any(axis=0)
        best = np.where(holds, scores[:, None], -np.inf)[:, some].argmax(axis=0)
        fates.cause[objects[some]], fates.score[objects[some]] = _NUMBER[name], scores[best]
        fates.other[objects[some]] = category[best] if name == "classified_as" else -1


def _from_removed(
    fates: Fates,
    object_category: np.ndarray,
    object_boxes: np.ndarray,
    objects: np.ndarray,
    removed: Removed,
    rows: np.ndarray,
    category: np.ndarray,
) -> None:
    """Objects whose right detection was there but dropped; "taken" and what the results themselves tell stay."""
    open_ = objects[fates.cause[objects] > _NUMBER["removed_by_nms"]]
    if not len(open_) or not len(rows):
        return
    assert removed.detections.boxes is not None
    half = overlaps(removed.detections.boxes[rows], object_boxes[open_]) >= 0.5
    right = half & (category[rows][:, None] == object_category[open_])
    for name, chosen in (("removed_by_nms", removed.by_nms[rows]), ("cut_by_cap", ~removed.by_nms[rows])):
        holds = right & chosen[:, None]
        some = holds.any(axis=0)
        scores = np.where(holds, removed.detections.scores[rows][:, None], -np.inf)[:, some].max(
            axis=0, initial=-np.inf
        )
        fates.cause[open_[some]], fates.score[open_[some]], fates.other[open_[some]] = _NUMBER[name], scores, -1


def average_precision(score: np.ndarray, true: np.ndarray, false: np.ndarray, objects: int) -> float:
    """AP at one IoU threshold of detections with `score`, `true`, `false` (n,); neither true nor false: ignored."""
    order = np.argsort(-score, kind="stable")
    positives, negatives = np.cumsum(true[order]), np.cumsum(false[order])
    precision = positives / np.maximum(positives + negatives, 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(positives / objects, RECALLS, side="left")
    return float(np.append(envelope, 0.0)[place].mean())


def given_back(evaluation: Evaluation, fates: Fates) -> dict[str, np.ndarray]:
    """(K,) AP50 that each cause but "found" would give back (see the file's head), nan without objects."""
    matches, truth = evaluation.matches, evaluation.truth
    true, false = _columns_50(evaluation)
    back = {name: np.full(len(truth.category_ids), np.nan) for name in CAUSES if name != "found"}
    for k in np.flatnonzero(matches.objects[0]):
        own = slice(matches.bounds[k], matches.bounds[k + 1])
        columns, objects = (matches.score[own], true[own], false[own]), int(matches.objects[0, k])
        now = average_precision(*columns, objects)
        back["outscored"][k] = average_precision(columns[0], columns[1], np.zeros_like(columns[2]), objects) - now
        mine = truth.category == k
        for name in list(back)[1:]:
            score = fates.score[mine & (fates.cause == _NUMBER[name])]
            added = (
                np.append(columns[0], score),
                np.append(columns[1], np.ones(len(score), dtype=bool)),
                np.append(columns[2], np.zeros(len(score), dtype=bool)),
            )
            back[name][k] = average_precision(*added, objects) - now if len(score) else 0.0
    return back


def confusions(evaluation: Evaluation, fates: Fates, category: int | np.integer, top: int = 3) -> str:
    """What objects of a category (index) were taken for: "cup (5), bowl (2)"."""
    others = fates.other[(evaluation.truth.category == category) & (fates.other >= 0)].tolist()
    return ", ".join(f"{evaluation.truth.names[k]} ({n})" for k, n in Counter(others).most_common(top))
