"""Bootstrap over images (Efron & Tibshirani 1993): intervals of AP and calibration errors.

The images are drawn with replacement; an image drawn w times counts w times. Nothing is matched again: an evaluation
keeps, per category, its detections in order of score with their images and what they found. Of protocol pool the four
pools stand in the place of the categories (pooling.py).

A resample repeats some images and lacks others, which moves the AP of categories with few objects, mostly up: on LVIS
the resampled values lie beside the number itself, by more than their spread. The spread is what is wanted, so the
percentiles are shifted until their mean is the number.

Legend: I images, K categories, B resamples, n true positives of a category at one IoU threshold, T = 10 thresholds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from loce.evaluation.calibration import errors, weighted
from loce.evaluation.lvis_ap import RECALLS, Evaluation
from loce.evaluation.pooling import POOLS, members
from loce.utils.errors import UserError
from loce.utils.files import atomic_write
from loce.utils.progress import watched

METRICS = ("AP", "APr", "APc", "APf")
LEVEL = 0.95  # of the intervals
_LATE = np.arange(101) / 100 < RECALLS  # .35, .41, ...: the official grid lies a rounding error above these fractions
_ELEMENTS = 1 << 19  # numbers of one intermediate array: they fit into a cache
_LOOKS = 2000  # true positives of a pool at which the precision of a resample is read, evenly over the ranking


@dataclass(frozen=True, kw_only=True)
class Tallies:
    """What one evaluation found, image by image: enough for AP under any weights of the images.

    image_ids (I,), category_ids, frequency (K,); protocol, iou_type: text. false_image: image index of every false
    positive candidate that ranks above the last overlapping detection of its category, in order of category and score,
    cut by false_bounds (K + 1,). over_image (M,), over_false (M,), over_true, over_change (M, T): overlapping
    detections, cut by over_bounds (K + 1,): image, candidates of the category at or before it, whether it is a true
    positive, and what it adds to that count of candidates (1 for a true positive that is none, -1 for a candidate that
    found an ignored object). object_image, object_category: of every object. reliability: see calibration.py; None in
    files of before, and where scores are no probabilities. groups: of the categories, where pools take their place;
    part: text, which images of the file these are; slices (S, 2), in_slice (S, I): attribute and value, and whether an
    image has it.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    frequency: np.ndarray
    protocol: np.ndarray
    iou_type: np.ndarray
    false_image: np.ndarray
    false_bounds: np.ndarray
    over_image: np.ndarray
    over_false: np.ndarray
    over_true: np.ndarray
    over_change: np.ndarray
    over_bounds: np.ndarray
    object_image: np.ndarray
    object_category: np.ndarray
    reliability: np.ndarray | None = None
    groups: np.ndarray | None = None
    part: np.ndarray | None = None
    slices: np.ndarray | None = None
    in_slice: np.ndarray | None = None

    @property
    def pooled(self) -> bool:
        """Whether pools take the place of categories (pooling.py)."""
        return len(self.frequency) > 0 and str(self.frequency[0]) == POOLS[0]

    @property
    def at_half(self) -> "Tallies":
        """The same at the lowest IoU threshold alone: its AP is AP50."""
        return replace(self, over_true=self.over_true[:, :1], over_change=self.over_change[:, :1])

    def save(self, path: str | Path) -> None:
        """Write an .npz file."""
        with atomic_write(path) as temporary:
            np.savez_compressed(temporary, **{k: column for k, column in vars(self).items() if column is not None})


def tally(evaluation: Evaluation, slices: Mapping[tuple[str, str], np.ndarray] = MappingProxyType({})) -> Tallies:
    """The tallies of an evaluation; slices: (attribute, value) -> indices of images."""
    matches, truth = evaluation.ranked, evaluation.ranked.truth
    categories = len(truth.category_ids)
    over_bounds = np.searchsorted(matches.overlapping, matches.bounds)
    # False positive candidates of each category, and how many of them rank above each overlapping detection.
    false_image, over_false, false_bounds = [], [], [0]
    for k in range(categories):
        over = matches.overlapping[over_bounds[k] : over_bounds[k + 1]]
        rows = slice(matches.bounds[k], over[-1] + 1 if len(over) else matches.bounds[k])
        candidate = matches.false_positive[rows, 0]
        false_image.append(matches.image[rows][candidate])
        over_false.append(np.cumsum(candidate)[over - matches.bounds[k]])
        false_bounds.append(false_bounds[-1] + len(false_image[-1]))
    # What overlapping detections change of that: true positives, candidates that found an ignored object.
    true = matches.matched[:, 0] & ~matches.ignored[:, 0]
    wrongly = matches.matched[:, 0] & matches.false_positive[matches.overlapping, 0][:, None]
    objects = ~matches.object_ignored[:, 0]
    in_slice = np.zeros((len(slices), len(truth.image_ids)), dtype=bool)
    for row, chosen in zip(in_slice, slices.values(), strict=True):
        row[chosen] = True
    return Tallies(
        image_ids=truth.image_ids,
        category_ids=truth.category_ids,
        frequency=truth.frequency,
        protocol=np.array(str(evaluation.protocol)),
        iou_type=np.array(evaluation.iou_type),
        false_image=np.concatenate(false_image).astype(np.int32),
        false_bounds=np.array(false_bounds),
        over_image=matches.image[matches.overlapping].astype(np.int32),
        over_false=np.concatenate(over_false).astype(np.int32),
        over_true=true,
        over_change=true.astype(np.int8) - wrongly.astype(np.int8),
        over_bounds=over_bounds,
        object_image=truth.image[objects].astype(np.int32),
        object_category=truth.category[objects].astype(np.int32),
        reliability=evaluation.reliability,
        groups=evaluation.truth.frequency,
        part=np.array(evaluation.truth.part),
        slices=np.array(list(slices)) if slices else None,
        in_slice=in_slice if slices else None,
    )


def load_tallies(path: str | Path) -> Tallies:
    """Read what `Tallies.save` wrote; UserError when it is something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Tallies(**{name: file[name] for name in file.files})
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({error}); run scripts/evaluate.py again") from None


def draw_weights(images: int, resamples: int, seed: int, inside: np.ndarray | None = None) -> np.ndarray:
    """(I, B) int32: how often each image is drawn in each resample; inside (I,) bool: the images that can be."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((images, resamples), dtype=np.int32)
    chosen = np.arange(images) if inside is None else np.flatnonzero(inside)
    for b in range(resamples):
        weights[chosen, b] = np.bincount(rng.integers(0, len(chosen), len(chosen)), minlength=len(chosen))
    return weights


def as_they_are(images: int, inside: np.ndarray | None = None) -> np.ndarray:
    """(I, 1) int32: the weights of the data set as it is, every image, or those `inside`, once."""
    return (np.ones(images, dtype=bool) if inside is None else inside).astype(np.int32)[:, None]


def resampled_ap(tallies: Tallies, weights: np.ndarray) -> np.ndarray:
    """(K, B) AP of each category when image i counts weights[i, b] times (I, B); nan where no objects are left.

    Weights of one give the AP of the evaluation.
    """
    size, resamples = len(tallies.category_ids), weights.shape[1]
    ap = np.full((size, resamples), np.nan, dtype=np.float32)
    by_category = np.argsort(tallies.object_category, kind="stable")
    cut = np.searchsorted(tallies.object_category[by_category], np.arange(size + 1))
    for k in watched(range(size), size, "resampling", "categories"):
        images = tallies.object_image[by_category[cut[k] : cut[k + 1]]]
        false = slice(tallies.false_bounds[k], tallies.false_bounds[k + 1])
        over = slice(tallies.over_bounds[k], tallies.over_bounds[k + 1])
        if not len(images):
            continue
        step = max(1, _ELEMENTS // max(len(images), false.stop - false.start, over.stop - over.start))
        for b in range(0, resamples, step):
            some = weights[:, b : b + step]
            objects = some[images].sum(axis=0)
            if not objects.any():
                continue
            value = _category_ap(tallies, some, false, over, objects)
            ap[k, b : b + step] = np.where(objects > 0, value, np.nan)
    return ap


def _category_ap(tallies: Tallies, weights: np.ndarray, false: slice, over: slice, objects: np.ndarray) -> np.ndarray:
    """(B,) AP of one category.

    A resample counts a detection as often as its image was drawn. Example: detections t, f, t (true, false, true) of
    images 1, 2, 1, two objects, both in image 1; image 1 drawn twice, image 2 once:
        weights own 2, 1, 2      true t 2, 4           positives at the true ones (candidates counted so) 2, 5
        objects 4                precision 2/2, 4/5    recalls reached 2/4, 4/4: hundredths 50, 100
        grid points between      0 to 50: 51 x 1.0     51 to 100: 50 x 0.8, over 101: AP .90
    """
    thresholds = tallies.over_true.shape[1]
    total = np.zeros(weights.shape[1])
    if over.start == over.stop:
        return total
    candidates = np.zeros((false.stop - false.start + 1, weights.shape[1]), dtype=np.int32)
    np.cumsum(weights[tallies.false_image[false]], axis=0, out=candidates[1:])
    candidates = candidates[tallies.over_false[over]]
    own = weights[tallies.over_image[over]]
    tens = np.flatnonzero(objects % 10 == 0)  # only then a late recall can be hit exactly
    per_object = (100 / np.maximum(objects, 1)).astype(np.float32)
    for t in range(thresholds):
        rows = np.flatnonzero(tallies.over_true[over, t])
        if not len(rows):
            continue
        every, looks = rows, slice(None)
        if tallies.pooled and len(rows) > _LOOKS and len(objects) > 1:
            looks = np.linspace(0, len(rows) - 1, _LOOKS).round().astype(np.int64)
            rows = rows[looks]
        positives = candidates[rows]
        change = tallies.over_change[over, t]
        if change.any():
            positives = positives + np.cumsum(own * change[:, None], axis=0)[rows]
        true = np.cumsum(own[every], axis=0, dtype=np.float32)[looks]
        precision = true / np.maximum(positives, 1)
        envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        # Recalls .01, .02, ... that are reached; the small number makes up for rounding, and is under 100 / objects.
        reached = np.floor(true * per_object + np.float32(1e-4))
        if len(tens):
            hundredths = reached[:, tens].astype(np.int64)
            reached[:, tens] -= _LATE[hundredths] & (hundredths * objects[tens] == 100 * true[:, tens].astype(np.int64))
        reached[1:] -= reached[:-1].copy()
        reached[0] += 1  # recall 0
        total += np.einsum("nb,nb->b", reached, envelope)
    return total / (101 * thresholds)


def group_means(ap: np.ndarray, frequency: np.ndarray) -> dict[str, np.ndarray]:
    """AP, APr, APc, APf (B,) of each resample from AP of categories (K, B); nan for a group without objects."""
    means = {}
    for name in METRICS:
        group = ap[members(frequency, name[2:])]
        known = np.isfinite(group)
        number = known.sum(axis=0)
        means[name] = np.where(known, group, 0).sum(axis=0, dtype=np.float64) / np.where(number, number, np.nan)
    return means


def means_under(tallies: Tallies, weights: np.ndarray, ap: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """AP, APr, APc, APf and, where known, calibration errors (B,) when image i counts weights[i, b] times (I, B).

    ap: `resampled_ap` of these weights, where it is known already.
    """
    means = group_means(resampled_ap(tallies, weights) if ap is None else ap, tallies.frequency)
    return means if tallies.reliability is None else means | errors(weighted(tallies.reliability, weights))


def interval(values: np.ndarray, centre: float) -> tuple[float, float]:
    """The central 95% of resampled values, shifted so that their mean is `centre`; nan where there are none."""
    values = values[np.isfinite(values)]
    if not len(values) or not np.isfinite(centre):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - values.mean() + centre
    return round(float(low), 6), round(float(high), 6)


def difference(whole: Sequence[float], drawn: Sequence[np.ndarray], lower: bool = False) -> dict[str, float]:
    """first, second, difference (second - first), its 95% interval low, high, and better, the share of resamples in
    which the second is better; nan where undefined. drawn: of both, (B,); lower: the lower is the better."""
    first, second = (float(value) for value in whole)
    differences = drawn[1] - drawn[0]
    low, high = interval(differences, second - first)
    finite = differences[np.isfinite(differences)]
    # Centred on the difference that was measured, as the interval is.
    shifted = finite - finite.mean() + second - first if len(finite) else finite
    wins = shifted < 0 if lower else shifted > 0
    return {
        "first": first,
        "second": second,
        "difference": second - first,
        "low": low,
        "high": high,
        "better": float(wins.mean()) if len(finite) else float("nan"),
    }


def intervals(tallies: Tallies, resamples: int = 1000) -> dict[str, tuple[float, float]]:
    """95% intervals over images of what `means_under` gives, as fractions."""
    whole = means_under(tallies, as_they_are(len(tallies.image_ids)))
    drawn = means_under(tallies, draw_weights(len(tallies.image_ids), resamples, seed=0))
    return fraction_intervals(whole, drawn)


def fraction_intervals(
    whole: Mapping[str, np.ndarray], drawn: Mapping[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """`interval` of each number within 0 and 1. whole: (1,), as it is; drawn: (B,), resampled."""
    bounds = {name: interval(values, float(whole[name][0])) for name, values in drawn.items()}
    return {name: (max(low, 0.0), min(high, 1.0)) for name, (low, high) in bounds.items()}
