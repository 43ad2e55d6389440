"""Greedy matching of detections to objects, after caps and the federated rule (LVIS, arXiv 1908.03195; COCO).

All (image, category) cells are matched in lock-step: first the best detection of every cell, then the second best, and
so on, for 10 IoU thresholds and 4 object sizes at once. Only detections that overlap an object by half take part.
What a detection finds depends on better ones of its cell only, and every cap keeps the best of a cell, so one matching
serves all protocols of the same rules.

Legend: N counted detections, M of them that overlap an object, P pairs, A = 4 areas, T = 10 thresholds, K categories.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from loce.evaluation.annotations import GroundTruth, positions
from loce.evaluation.detections import Detections
from loce.evaluation.iou import DILATION, box_areas, box_pairs, mask_pairs
from loce.utils.progress import watched

THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREA_NAMES = ("all", "small", "medium", "large")
AREA_RANGES = np.array([(0, 1e5**2), (0, 32**2), (32**2, 96**2), (96**2, 1e5**2)], dtype=np.float64)  # px^2, inclusive


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How detections are capped before matching: at most `cap` per `per` (image, cell = image and category, category).

    federated: LVIS's rules (only verified categories count, nothing without area exists); otherwise COCO's. pooled: the
    detections of all categories in one ranking (pooling.py).
    """

    name: str
    cap: int
    per: str
    federated: bool
    pooled: bool = False

    def __str__(self) -> str:
        per = {"image": "an image", "cell": "an image and category", "category": "a category over all images"}[self.per]
        rules = "federated LVIS rules" if self.federated else "COCO rules"
        pooled = ", all categories in one ranking" if self.pooled else ""
        return f"{self.name} (at most {self.cap:,} detections {per}, {rules}{pooled})"


# AP-fixed and AP-pool, arXiv 2102.01066: their authors' evaluator keeps 10,000 detections of a category for both.
PROTOCOLS = {
    "lvis": Protocol(name="lvis", cap=300, per="image", federated=True),
    "fixed": Protocol(name="fixed", cap=10_000, per="category", federated=True),
    "pool": Protocol(name="pool", cap=10_000, per="category", federated=True, pooled=True),
    "coco": Protocol(name="coco", cap=100, per="cell", federated=False),
}


@dataclass(frozen=True, kw_only=True)
class Matches:
    """What matching found; counted detections are ordered by category, then score, and `bounds` (K + 1,) cuts them.

    row, image (N,): row in the detections, index of the image; score (N,); false_positive (N, A) bool: counts against
    the category when nothing is matched. overlapping (M,) ascending indices into N; matched, ignored (M, A, T) bool:
    took an object, took one that is ignored; taken (M, T) int32: the object taken for area "all", or -1; place (M,):
    how many better detections its cell has, None unless the cap is per cell.
    object_ignored (G, A) bool; objects (A, K): objects to find. Objects are rows of `truth`, which is the
    ground truth as the protocol sees it.
    """

    truth: GroundTruth
    bounds: np.ndarray
    row: np.ndarray
    image: np.ndarray
    score: np.ndarray
    false_positive: np.ndarray
    overlapping: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray
    taken: np.ndarray
    place: np.ndarray | None
    object_ignored: np.ndarray
    objects: np.ndarray

    def verdicts(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) bool, twice: true and false positives at IoU .5, all sizes; ignored detections are neither."""
        true, used = np.zeros((2, len(self.row)), dtype=bool)
        true[self.overlapping] = self.matched[:, 0, 0] & ~self.ignored[:, 0, 0]
        used[self.overlapping] = self.matched[:, 0, 0]
        return true, self.false_positive[:, 0] & ~used


def match(truth: GroundTruth, detections: Detections, iou_type: str, protocols: Sequence[Protocol]) -> list[Matches]:
    """Cap, filter and match all detections, once for all protocols, whose rules (federated or not) are the same."""
    federated = protocols[0].federated
    truth = _under_rules(truth, federated)
    categories = len(truth.category_ids)
    image = positions(truth.image_ids, detections.image_ids)[0].astype(np.int32)
    category = positions(truth.category_ids, detections.category_ids)[0].astype(np.int32)
    within = [within_cap(p, image, category, detections) for p in protocols]
    rows, areas = _counted(truth, detections, iou_type, federated, np.logical_or.reduce(within), image, category)
    image, category, score = image[rows], category[rows], detections.scores[rows]

    # Counted detections by category, then score.
    order = np.argsort(image, kind="stable")  # ties of score: by image, then by row
    order = order[np.argsort(-score[order], kind="stable")]
    sortable = category.astype(np.int16) if categories <= np.iinfo(np.int16).max else category  # 16 bits: radix sort
    order = order[np.argsort(sortable[order], kind="stable")]
    rows, areas, image, category, score = rows[order], areas[order], image[order], category[order], score[order]

    # What is ignored at each object size, and which unmatched detections are false positives.
    outside = (truth.areas[:, None] < AREA_RANGES[:, 0]) | (truth.areas[:, None] > AREA_RANGES[:, 1])
    object_ignored = outside | truth.ignore[:, None]
    false_positive = (areas[:, None] >= AREA_RANGES[:, 0]) & (areas[:, None] <= AREA_RANGES[:, 1])
    if federated and truth.not_exhaustive is not None:
        false_positive &= ~truth.not_exhaustive[image, category][:, None]
    # The matching itself, among pairs that overlap by half.
    dilation = DILATION[federated] if iou_type == "boundary" else 0.0
    pairs = _pairs(truth, detections, iou_type, dilation, rows, image, category)
    overlapping, matched, ignored, taken = _lock_step(*pairs, object_ignored, truth.crowd)
    objects = [
        np.bincount(truth.category[~object_ignored[:, a]], minlength=categories) for a in range(len(AREA_RANGES))
    ]
    every = Matches(
        truth=truth,
        bounds=np.searchsorted(category, np.arange(categories + 1)),
        row=rows,
        image=image,
        score=score,
        false_positive=false_positive,
        overlapping=overlapping,
        matched=matched,
        ignored=ignored,
        taken=taken,
        place=None if federated else _place(image, category)[overlapping],
        object_ignored=object_ignored,
        objects=np.array(objects),
    )
    return [_some(every, kept[rows]) for kept in within]


def _some(matches: Matches, kept: np.ndarray) -> Matches:
    """Matches of the detections `kept` (N,) bool, which are the best of their cells."""
    if kept.all():
        return matches
    found = kept[matches.overlapping]
    of_detections = ("row", "image", "score", "false_positive")
    of_overlapping = ("matched", "ignored", "taken") + (("place",) if matches.place is not None else ())
    before = np.append(0, np.cumsum(kept))  # kept detections above each
    return replace(
        matches,
        bounds=before[matches.bounds],
        overlapping=before[matches.overlapping[found]],
        **{name: getattr(matches, name)[kept] for name in of_detections},
        **{name: getattr(matches, name)[found] for name in of_overlapping},
    )


def _under_rules(truth: GroundTruth, federated: bool) -> GroundTruth:
    """LVIS: what has no area does not exist, no crowds. COCO: crowds are ignored, the key `ignore` means nothing."""
    if not federated:
        return replace(truth, ignore=truth.crowd)
    real = truth.some(np.flatnonzero(truth.areas > 0))
    return replace(real, crowd=np.zeros(len(real), dtype=bool))


def _counted(
    truth: GroundTruth,
    detections: Detections,
    iou_type: str,
    federated: bool,
    within: np.ndarray,
    image: np.ndarray,
    category: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the detections that take part, ascending, and their areas: those `within` (N,) a cap, then the rules."""
    keep = within
    if federated:
        keep = keep & truth.counted()[image, category]
    rows = np.flatnonzero(keep)
    areas = np.zeros(0)
    if iou_type == "bbox" and detections.boxes is not None:
        areas = box_areas(detections.boxes[rows])
    elif detections.masks is not None:
        areas = detections.masks.measures[1][rows].astype(np.float64)  # never a box's, also when the result has one
    if federated:
        rows, areas = rows[areas > 0], areas[areas > 0]
    return rows, areas


def within_cap(protocol: Protocol, image: np.ndarray, category: np.ndarray, detections: Detections) -> np.ndarray:
    """(N,) bool: detections (index of image and category, both (N,)) that the protocol's cap leaves."""
    scores = detections.scores
    if protocol.per == "image":
        return _best(image, scores, protocol.cap) if detections.ranks is None else detections.ranks < protocol.cap
    if protocol.per == "category":
        return _best(category, scores, protocol.cap)
    return _best(image.astype(np.int64) * (int(category.max(initial=0)) + 1) + category, scores, protocol.cap)


def _best(group: np.ndarray, scores: np.ndarray, cap: int) -> np.ndarray:
    """(N,) bool: the `cap` highest scores of each group, the earlier row among equals."""
    keep = np.ones(len(group), dtype=bool)
    if len(group) <= cap:
        return keep
    if group.dtype == np.int64:  # sparse numbers
        group = np.unique(group, return_inverse=True)[1]
    rows = np.flatnonzero(np.bincount(group)[group] > cap)
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    rows = rows[np.argsort(group[rows], kind="stable")]
    keep[rows[_rank(group[rows]) >= cap]] = False
    return keep


def _rank(groups: np.ndarray) -> np.ndarray:
    """Position of each entry in its run of equal `groups`."""
    first = np.flatnonzero(np.diff(groups, prepend=-1))
    return np.arange(len(groups)) - np.repeat(first, np.diff(np.append(first, len(groups))))


def _place(image: np.ndarray, category: np.ndarray) -> np.ndarray:
    """(N,) how many rows of the same image and category stand before each."""
    order = np.lexsort((image, category))  # stable
    place = np.empty(len(order), dtype=np.int64)
    place[order] = _rank(image[order].astype(np.int64) * (int(category.max(initial=0)) + 1) + category[order])
    return place


def _pairs(
    truth: GroundTruth,
    detections: Detections,
    iou_type: str,
    dilation: float,
    rows: np.ndarray,
    image: np.ndarray,
    category: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(P,) cell, index into `rows`, object and IoU of every pair with IoU >= .5, by cell, then score, then object."""
    size = len(truth.category_ids)
    keys, starts, counts = np.unique(
        truth.image.astype(np.int64) * size + truth.category, return_index=True, return_counts=True
    )
    has_objects = np.zeros((len(truth.image_ids), size), dtype=bool)
    has_objects[truth.image, truth.category] = True
    near = np.flatnonzero(has_objects[image, category])
    key = image[near].astype(np.int64) * size + category[near]
    order = np.argsort(key, kind="stable")
    near = near[order]
    cell = np.searchsorted(keys, key[order])
    if iou_type == "bbox" and detections.boxes is not None:
        box, ground, iou = box_pairs(detections.boxes[rows[near]], starts[cell], counts[cell], truth, THRESHOLDS[0])
    elif detections.masks is not None:
        near_cells = rows[near], starts[cell], counts[cell], truth, THRESHOLDS[0], dilation
        box, ground, iou = mask_pairs(detections.masks, *near_cells)
    else:
        box, ground, iou = near, near, np.zeros(0)  # no detections at all
    return cell[box], near[box], ground, iou


def _lock_step(
    cell: np.ndarray,
    detection: np.ndarray,
    ground: np.ndarray,
    iou: np.ndarray,
    ignored: np.ndarray,
    crowd: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Greedy matching of P pairs; returns overlapping, matched, ignored, taken of `Matches`.

    A detection takes, of the objects still free that it overlaps enough, the one of highest IoU, the last in the file
    among equals; one that is ignored only if no other is left. That preference is one integer: the pair's place among
    the detection's pairs in ascending IoU, plus a bonus for objects that count. Crowds are never used up.

    Example: detections d1, d2 (by score) of one cell, objects a (counts) and b (ignored), one threshold .5:
        pairs   d1: b .6, a .7    d2: b .8, a .9      place 1, 2 and 1, 2; bonus 3, one more than a detection has pairs
        turn 1  d1 wishes b 1, a 2 + 3 = 5            the maximum is 5: (5 - 1) % 3 = 1, its second pair, so d1 takes a
        turn 2  d2 wishes b 1, a 0 (taken)            the maximum is 1 <= bonus: d2 takes b, which is ignored
    """
    areas, columns = ignored.shape[1], ignored.shape[1] * len(THRESHOLDS)
    # Each detection's run of pairs, in ascending order of preference, and its turn: its rank in its cell.
    first = np.flatnonzero(np.diff(detection, prepend=-1))  # of each overlapping detection; they stand in cell order
    rank = _rank(cell[first])
    pairs_of = np.diff(np.append(first, len(detection)))
    order = np.lexsort((ground, iou, np.repeat(np.arange(len(first)), pairs_of)))
    ground, iou = ground[order], iou[order]
    bonus = int(pairs_of.max(initial=0)) + 1
    taken = np.zeros((len(ignored), areas, len(THRESHOLDS)), dtype=bool)
    matched = np.zeros((len(first), areas, len(THRESHOLDS)), dtype=bool)
    to_ignored = np.zeros_like(matched)
    took = np.full((len(first), len(THRESHOLDS)), -1, dtype=np.int32)

    by_rank = np.argsort(rank, kind="stable")
    turns = np.split(by_rank, np.cumsum(np.bincount(rank))[:-1]) if len(rank) else []
    for turn in watched(turns, len(turns), "matching", "rounds"):  # the next best of every cell that still has one
        local = np.append(0, np.cumsum(pairs_of[turn]))
        place = np.arange(local[-1]) - np.repeat(local[:-1], pairs_of[turn])  # 0, 1, ... within each detection
        pair = np.repeat(first[turn], pairs_of[turn]) + place
        objects = ground[pair]
        free = ~taken[objects] | crowd[objects][:, None, None]
        free &= (iou[pair][:, None] >= THRESHOLDS)[:, None, :]
        wish = (place + 1)[:, None] + np.where(ignored[objects], 0, bonus)
        best = np.maximum.reduceat(np.where(free, wish.astype(np.int32)[:, :, None], 0), local[:-1], axis=0)
        hit = best > 0
        choice = ground[first[turn][:, None, None] + np.where(hit, (best - 1) % bonus, 0)]
        matched[turn], to_ignored[turn] = hit, hit & (best <= bonus)
        # Mark what was taken: one write for all areas and thresholds.
        flat = choice.reshape(len(turn), columns) * columns + np.arange(columns)
        taken.reshape(-1)[flat[hit.reshape(len(turn), columns)]] = True
        took[turn] = np.where(hit[:, 0], choice[:, 0], -1)
    by_detection = np.argsort(detection[first])
    return detection[first][by_detection], matched[by_detection], to_ignored[by_detection], took[by_detection]
