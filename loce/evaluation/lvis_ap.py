"""Average precision and recall from matches (LVIS, arXiv 1908.03195, Sec. 3; COCO; AP-fixed, AP-pool: 2102.01066).

AP of a category is the mean over 10 IoU thresholds (.50:.05:.95) of the precision envelope read at 101 recalls; AP is
the mean over the categories that have objects (protocol pool: of the one ranking of all, pooling.py). Same numbers as
`lvis.LVISEval` and `pycocotools.COCOeval` except where those trip over their own bookkeeping: the area of a mask is the
mask's, also when the result carries a box, an annotation with id 0 is an annotation like any other, and no results at
all give 0.

Legend: T = 10 IoU thresholds, R = 101 recalls, K categories, A = 4 areas, m overlapping detections of one category.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from loce.data.annotations.lvis import LVISAnnotations
from loce.evaluation.annotations import GroundTruth, load_annotations
from loce.evaluation.calibration import errors, reliability
from loce.evaluation.detections import Detections, check_detections, read_results, suspicions
from loce.evaluation.matching import AREA_NAMES, PROTOCOLS, THRESHOLDS, Matches, Protocol, match
from loce.evaluation.pooling import members, pooled
from loce.evaluation.stream import read_detections
from loce.utils.errors import UserError
from loce.utils.progress import phase, print_line, watched

IOU_TYPES = ("bbox", "segm", "boundary")
RECALLS = np.linspace(0.0, 1.0, 101)
FEW = (1, 10)  # detections of an image and category, for COCO's AR@1 and AR@10
_EPSILON = np.spacing(1)
_MANY = 10_000  # overlapping detections of a ranking, beyond which areas are counted one by one to save memory


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of `evaluate_lvis`.

    metrics: AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AR@300, ARs@300, ARm@300, ARl@300 (the number is the
    protocol's cap; protocol "coco" has AR@1 and AR@10 as well) as fractions, -1 where undefined. precision
    (T, R, K, A), recall (T, K, A): -1 where a category has no objects, K in ascending order of category id. matches:
    what was found; ranked: the same, of the four pools where the protocol is pooled; reliability: of calibration.py.
    per_category: K dicts with id, name, frequency, images, instances, AP, AP50, AR, detections, detection_score (mean
    of the detections that count: not Eq. 2's), found_score (of those that found an object at IoU .5); AP, AP50, AR are
    -1 without objects, the scores nan without detections.
    """

    metrics: dict[str, float]
    precision: np.ndarray
    recall: np.ndarray
    per_category: list[dict[str, Any]]
    protocol: Protocol
    iou_type: str
    matches: Matches
    ranked: Matches
    reliability: np.ndarray | None

    @property
    def calibration(self) -> dict[str, float]:
        """ECE, ECEr, ..., MCEf as fractions, -1 where undefined; nothing where scores are no probabilities."""
        if self.reliability is None:
            return {}
        found = errors(self.reliability.sum(axis=0, keepdims=True, dtype=np.float64))
        return {name: float(value[0]) if np.isfinite(value[0]) else -1.0 for name, value in found.items()}

    @property
    def truth(self) -> GroundTruth:
        """The ground truth as the protocol sees it."""
        return self.matches.truth


@phase("evaluation")
def evaluate_lvis(
    annotations: str | Path | Mapping[str, Any] | LVISAnnotations | GroundTruth,
    results: str | Path | list[dict[str, Any]] | Detections,
    iou_type: str = "bbox",
    max_detections: int | None = None,
    protocol: str = "lvis",
    allow_misplaced: bool = False,
) -> Evaluation:
    """Evaluate detections on LVIS- or COCO-style ground truth; nothing that is passed in is changed.

    annotations: path, loaded dict or GroundTruth; results: path of a results JSON or of a folder that inference wrote,
    list of result dicts, or Detections; iou_type: "bbox", "segm" or "boundary" (see iou.py); protocol: "lvis",
    "fixed" (AP-fixed), "pool" (AP-pool) or "coco". max_detections: cap per image for "lvis", per image and category for
    "coco"; None is the protocol's own, 300 and 100, since a number for both would be wrong for one. "fixed" and "pool"
    keep the best 10,000 detections of a category whatever their images, so a cap beside them is refused.
    allow_misplaced: masks of annotations may lie elsewhere than their boxes. NumPy's numbers and arrays are read as
    JSON's are. Raises UserError for everything that is wrong with the input, with the first five offenders of each
    kind; what only looks wrong is a line on standard error.
    """
    rules = choose_protocol(protocol, max_detections)
    if iou_type not in IOU_TYPES:
        raise UserError(f'iou_type: {iou_type!r} is not known; choose "bbox", "segm" or "boundary"')
    truth = load_annotations(annotations, iou_type != "bbox", allow_misplaced)
    source = str(results) if isinstance(results, (str, Path)) else "results"
    detections = load_results(results, truth, source)
    for warning in [note for note in truth.notes if note.startswith("WARNING")] + suspicions(detections, truth, source):
        print_line(warning, sys.stderr)
    return evaluate_loaded(truth, detections, iou_type, [rules])[0]


def choose_protocol(name: str, max_detections: int | None = None) -> Protocol:
    """The rules called `name`, with another cap if one is given; UserError where there is no such cap."""
    if name not in PROTOCOLS:
        raise UserError(f"protocol: {name!r} is not known; choose one of {', '.join(PROTOCOLS)}")
    rules = PROTOCOLS[name]
    if max_detections is None:
        return rules
    if rules.per == "category":
        raise UserError(
            f"max_detections: {max_detections} cannot stand with protocol {name}, which keeps the best {rules.cap:,} "
            "detections of a category and knows no cap per image; leave max_detections out"
        )
    if isinstance(max_detections, bool) or not isinstance(max_detections, int) or max_detections < 1:
        raise UserError(f"max_detections: {max_detections!r} is not a positive whole number")
    return Protocol(name=name, cap=max_detections, per=rules.per, federated=rules.federated)


def load_results(
    results: str | Path | list[dict[str, Any]] | Detections, truth: GroundTruth, source: str
) -> Detections:
    """Detections of any accepted form, checked against the ground truth; source: what a message calls them."""
    if isinstance(results, (str, Path)) and Path(results).is_dir():
        results = read_detections(str(results), truth.image_ids)
    detections = results if isinstance(results, Detections) else read_results(results)
    check_detections(detections, truth, source)
    return detections


def evaluate_loaded(
    truth: GroundTruth, detections: Detections, iou_type: str, protocols: Sequence[Protocol]
) -> list[Evaluation]:
    """`evaluate_lvis` by several protocols, for input that is loaded and checked (`load_results`)."""
    if ("segm" if iou_type == "boundary" else iou_type) not in detections.iou_types:
        raise UserError(f"iou_type={iou_type}: the results have no {'bbox' if iou_type == 'bbox' else 'segmentation'}")
    if iou_type != "bbox" and truth.masks is None:
        raise ValueError("the ground truth was loaded without masks")
    if not truth.federated and (names := [rules.name for rules in protocols if rules.federated]):
        raise UserError(
            f"{truth.source}: has no neg_category_ids, so protocol={names[0]} is not possible; use protocol=coco"
        )
    found: dict[Protocol, Evaluation] = {}
    with phase(f"evaluating {iou_type}"):
        for federated in (True, False):  # matched once each
            alike = [rules for rules in protocols if rules.federated == federated]
            if alike:
                matches = match(truth, detections, iou_type, alike)
                found |= {rules: _evaluation(own, rules, iou_type) for rules, own in zip(alike, matches, strict=True)}
    return [found[rules] for rules in protocols]


def _evaluation(matches: Matches, rules: Protocol, iou_type: str) -> Evaluation:
    precision, recall = accumulate(matches)
    ranked = pooled(matches) if rules.pooled else matches
    pools = accumulate(ranked) if rules.pooled else (precision, recall)
    return Evaluation(
        metrics=summarise(*pools, ranked, rules.cap),
        precision=precision,
        recall=recall,
        per_category=_per_category(matches, precision, recall),
        protocol=rules,
        iou_type=iou_type,
        matches=matches,
        ranked=ranked,
        reliability=reliability(matches),
    )


def accumulate(matches: Matches) -> tuple[np.ndarray, np.ndarray]:
    """precision (T, R, K, A) and recall (T, K, A) of all categories."""
    categories, areas = matches.objects.shape[1], matches.objects.shape[0]
    precision = -np.ones((len(THRESHOLDS), len(RECALLS), categories, areas))
    recall = -np.ones((len(THRESHOLDS), categories, areas))
    cut = np.searchsorted(matches.overlapping, matches.bounds)
    for k in watched(range(categories), categories, "precision and recall", "categories"):
        measured = np.flatnonzero(matches.objects[:, k])
        precision[:, :, k, measured], recall[:, k, measured] = 0.0, 0.0
        if cut[k] < cut[k + 1] and len(measured):
            own = slice(cut[k], cut[k + 1])
            step = areas if cut[k + 1] - cut[k] <= _MANY else 1
            for some in (slice(a, a + step) for a in range(0, areas, step)):
                true, false = counts(matches, k, own, some)
                _fill(precision[:, :, k, some], recall[:, k, some], true, false, matches.objects[some, k])
    return precision, recall


def counts(matches: Matches, k: int, own: slice, areas: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives (m, A, T) of category k down to each of its detections that overlaps an object.

    No other detection is needed: between two of these precision only falls and recall stands still.
    """
    place = matches.overlapping[own] - matches.bounds[k]
    candidates = matches.false_positive[matches.bounds[k] : matches.bounds[k + 1], areas]
    matched = matches.matched[own, areas]
    wrongly = matched & candidates[place][:, :, None]  # these found something after all
    false = np.cumsum(candidates, axis=0, dtype=np.int64)[place][:, :, None] - np.cumsum(wrongly, axis=0)
    true = np.cumsum(matched & ~matches.ignored[own, areas], axis=0)
    return true, false


def _fill(precision: np.ndarray, recall: np.ndarray, true: np.ndarray, false: np.ndarray, objects: np.ndarray) -> None:
    """Write one category's precision (T, R, A) and recall (T, A) from counts (m, A, T).

    Precision at recall r is read at the c-th true positive, with c the first count of c / objects >= r.
    """
    ratio = true / (false + true + _EPSILON)
    envelope = np.maximum.accumulate(ratio[::-1], axis=0)[::-1]
    total = true[-1]
    some = objects > 0
    recall[:, some] = (total[some] / objects[some, None]).T
    needed = np.array([_needed(int(number)) for number in objects])  # (A, R)
    # Places of all true positives, the columns (area, threshold) one after the other.
    hit = np.diff(true, axis=0, prepend=0).reshape(len(true), -1).T
    place = np.nonzero(hit)[1]
    before = (np.cumsum(total) - total.reshape(-1)).reshape(total.shape)
    a, t, r = np.nonzero((needed[:, None] <= total[:, :, None]) & (total > 0)[:, :, None])
    count = needed[a, r]
    index = np.where(count > 0, place[np.maximum(before[a, t] + count - 1, 0)], 0) if len(a) else a
    precision[t, r, a] = envelope[index, a, t]


@cache
def _needed(objects: int) -> np.ndarray:
    """(R,) the first count of true positives that reaches each recall, of so many objects."""
    return np.searchsorted(np.arange(objects + 1) / max(objects, 1), RECALLS)


def summarise(precision: np.ndarray, recall: np.ndarray, matches: Matches, cap: int) -> dict[str, float]:
    """The 13 numbers from precision (T, R, K, A) and recall (T, K, A); with COCO's cap, recall at 1 and 10 as well."""
    every, *groups = (members(matches.truth.frequency, group) for group in ("", "r", "c", "f"))
    of_groups = {group: precision[:, :, chosen, 0] for group, chosen in zip("rcf", groups, strict=True)}
    precision, recall = precision[:, :, every], recall[:, every]

    def mean(values: np.ndarray) -> float:
        values = values[values > -1]
        return float(values.mean()) if len(values) else -1.0

    metrics = {"AP": mean(precision[..., 0]), "AP50": mean(precision[0, ..., 0]), "AP75": mean(precision[5, ..., 0])}
    for a, name in enumerate(AREA_NAMES[1:], start=1):
        metrics[f"AP{name[0]}"] = mean(precision[..., a])
    metrics |= {f"AP{group}": mean(values) for group, values in of_groups.items()}
    if matches.place is not None:
        metrics |= {f"AR@{few}": mean(recall_within(matches, few)) for few in FEW if few < cap}
    for a, name in enumerate(AREA_NAMES):
        metrics[f"AR{name[0] if a else ''}@{cap}"] = mean(recall[..., a])
    return metrics


def recall_within(matches: Matches, few: int) -> np.ndarray:
    """(T, K) recall of objects of all sizes by the `few` best detections of each image and category; -1: no objects.

    A worse detection never changes what a better one found, so nothing is matched again.
    """
    assert matches.place is not None
    true = matches.matched[:, 0] & ~matches.ignored[:, 0] & (matches.place < few)[:, None]
    down_to = np.concatenate([np.zeros((1, true.shape[1]), dtype=np.int64), np.cumsum(true, axis=0)])
    found = np.diff(down_to[np.searchsorted(matches.overlapping, matches.bounds)], axis=0).T
    objects = matches.objects[0]
    return np.where(objects > 0, found / np.maximum(objects, 1), -1.0)


def _per_category(matches: Matches, precision: np.ndarray, recall: np.ndarray) -> list[dict[str, Any]]:
    """K dicts; see `Evaluation`."""
    truth, size = matches.truth, len(matches.truth.category_ids)
    cells = np.unique(truth.image.astype(np.int64) * size + truth.category) % size
    images, instances = np.bincount(cells, minlength=size), np.bincount(truth.category, minlength=size)
    found, _ = matches.verdicts()
    # Means over thresholds and recalls, for objects of all sizes.
    ap, ap50, ar = precision[..., 0].mean(axis=(0, 1)), precision[0, ..., 0].mean(axis=0), recall[..., 0].mean(axis=0)
    rows = []
    for k in range(size):
        own = slice(matches.bounds[k], matches.bounds[k + 1])
        score, hit = matches.score[own], found[own]
        rows.append(
            {
                "id": int(truth.category_ids[k]),
                "name": truth.names[k],
                "frequency": str(truth.frequency[k]),
                "images": int(images[k]),
                "instances": int(instances[k]),
                "AP": float(ap[k]),
                "AP50": float(ap50[k]),
                "AR": float(ar[k]),
                "detections": len(score),
                "detection_score": float(score.mean(dtype=np.float64)) if len(score) else float("nan"),
                "found_score": float(score[hit].mean(dtype=np.float64)) if hit.any() else float("nan"),
            }
        )
    return rows
