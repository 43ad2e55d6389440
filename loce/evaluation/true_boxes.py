"""Classification of the true boxes: class-balanced accuracy by group, and what classes are taken for.

The classifier sees every annotated box of the evaluated images in place of a proposal, so that localisation plays no
part. A box is right where the highest score of all classes is its own; background is left out, since that there is an
object is given. The accuracy of a category is the share of its boxes that are right, and of a group the mean over its
categories that have boxes, each counting the same (balanced accuracy, Brodersen et al., ICPR 2010).

Legend: G boxes, I images, K categories, B weightings of the images.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loce.evaluation.annotations import GroundTruth, positions
from loce.evaluation.bootstrap import METRICS, group_means
from loce.evaluation.stream import TRUE_BOXES, read_table
from loce.utils.classes import ClassStats
from loce.utils.errors import UserError
from loce.utils.files import atomic_write, csv_text

FILE = "true_boxes.npz"  # in an evaluation's folder, beside the folder of detections, which may go
KEY = "true_boxes"  # of metrics.json and of the intervals in evaluation.json
NAMES = {name: "_".join(["accuracy", *name[2:]]) for name in METRICS}  # AP -> accuracy, APr -> accuracy_r, ...
MATRIX = 20  # categories of a confusion matrix
OFTEN = 3  # boxes from which on a confusion is more than an accident


@dataclass(frozen=True, kw_only=True)
class TrueBoxes:
    """What a classifier makes of G annotated boxes: image_ids, annotation_ids, category_ids (G,) int64; best_ids (G,)
    int64, the category of the highest score; scores, best_scores (G,) float32, of their own category and of that."""

    image_ids: np.ndarray
    annotation_ids: np.ndarray
    category_ids: np.ndarray
    best_ids: np.ndarray
    scores: np.ndarray
    best_scores: np.ndarray

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def right(self) -> np.ndarray:
        """(G,) bool."""
        return self.best_ids == self.category_ids

    def save(self, path: Path) -> None:
        """Write an .npz file."""
        with atomic_write(path) as temporary:
            np.savez_compressed(temporary, **vars(self))

    def of(self, truth: GroundTruth) -> "TrueBoxes":
        """Those of the images and categories of a ground truth."""
        here = positions(truth.image_ids, self.image_ids)[1] & positions(truth.category_ids, self.category_ids)[1]
        return TrueBoxes(**{name: column[here] for name, column in vars(self).items()})


def inferred_true_boxes(folder: Path, annotation_ids: np.ndarray) -> TrueBoxes | None:
    """Those that stand beside the detections in a folder, in the order of the file's annotation_ids; None where older
    versions began to write it."""
    columns = read_table(folder, TRUE_BOXES)
    if columns is None:
        return None
    by_id = np.argsort(annotation_ids)
    order = np.argsort(by_id[np.searchsorted(annotation_ids, columns["annotation_ids"], sorter=by_id)])
    return TrueBoxes(**{name: column[order] for name, column in columns.items()})


def read_true_boxes(folder: Path) -> TrueBoxes | None:
    """Those of an evaluation; None where it has none (results of another program, folders of older versions)."""
    if not (folder / FILE).is_file():
        return None
    try:
        with np.load(folder / FILE, allow_pickle=False) as file:
            return TrueBoxes(**{name: file[name] for name in file.files})
    except Exception as error:
        raise UserError(f"{folder / FILE}: cannot be read ({error}); delete it and evaluate again") from None


def resampled_accuracy(
    boxes: TrueBoxes,
    image_ids: np.ndarray,
    category_ids: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """(K, B) accuracy of each category when image i counts weights[i, b] times (I, B); nan where no box is left.

    image_ids (I,), category_ids (K,) ascending, as all of these have them.
    """
    image, _ = positions(image_ids, boxes.image_ids)
    category, _ = positions(category_ids, boxes.category_ids)
    order = np.argsort(category, kind="stable")
    cut = np.searchsorted(category[order], np.arange(len(category_ids) + 1))
    found = np.full((len(category_ids), weights.shape[1]), np.nan, dtype=np.float32)
    for k in np.flatnonzero(np.diff(cut)):
        own = order[cut[k] : cut[k + 1]]
        times = weights[image[own]]
        total = times.sum(axis=0)
        share = times[boxes.right[own]].sum(axis=0) / np.maximum(total, 1)
        found[k] = np.where(total > 0, share, np.nan)
    return found


def group_accuracies(accuracy: np.ndarray, frequency: np.ndarray) -> dict[str, np.ndarray]:
    """NAMES -> (B,) class-balanced accuracy from that of categories (K, B); nan for a group without boxes."""
    return {NAMES[name]: values for name, values in group_means(accuracy, frequency).items()}


class Confusion(NamedTuple):
    """Boxes of one category (index) that are taken for another: `taken` of all its `boxes`."""

    category: int
    other: int
    taken: int
    boxes: int


def confusions(boxes: TrueBoxes, category_ids: np.ndarray) -> list[Confusion]:
    """All of them: first those of at least three boxes, the largest share of a category's boxes first."""
    own, best = (positions(category_ids, ids)[0] for ids in (boxes.category_ids, boxes.best_ids))
    totals = np.bincount(own, minlength=len(category_ids))
    wrong = np.flatnonzero(~boxes.right)
    pairs = Counter(zip(own[wrong].tolist(), best[wrong].tolist(), strict=True))
    found = [Confusion(k, other, count, int(totals[k])) for (k, other), count in pairs.items()]
    return sorted(found, key=lambda c: (c.taken < OFTEN, -c.taken / c.boxes, -c.taken, c.category, c.other))


def mean_score_table(boxes: TrueBoxes, stats: ClassStats) -> str:
    """CSV of the paper's Figures 1 and 4, a row a class: mean score (Eq. 2) and accuracy on its true boxes.

    training_instances: 0 where unknown; mean_score, accuracy: empty without boxes.
    """
    rows: list[list[Any]] = [["id", "name", "group", "training_instances", "boxes", "mean_score", "accuracy"]]
    for category, *facts in zip(stats.category_ids, stats.names, stats.groups, stats.instance_counts, strict=True):
        own = boxes.category_ids == category
        means = [f"{column[own].mean(dtype=float):.6f}" if own.any() else "" for column in (boxes.scores, boxes.right)]
        rows.append([category, *facts, own.sum(), *means])
    return csv_text(rows)


def confusion_table(found: Sequence[Confusion], truth: GroundTruth) -> str:
    """CSV of `confusions`, a row a pair."""
    sides = ("id", "name", "frequency")
    rows: list[list[Any]] = [[*sides, *(f"taken_for_{side}" for side in sides), "count", "boxes", "share"]]
    for one in found:
        named = [[truth.category_ids[k], truth.names[k], truth.frequency[k]] for k in (one.category, one.other)]
        rows.append([*named[0], *named[1], one.taken, one.boxes, one.taken / one.boxes])
    return csv_text(rows)


def largest(found: Sequence[Confusion]) -> list[int]:
    """The categories of the first confusions, up to 20 of them."""
    seen = list(dict.fromkeys(k for one in found for k in (one.category, one.other)))
    return seen[:MATRIX]


def matrix(boxes: TrueBoxes, category_ids: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
    """(n, n + 1) int64: boxes of the n `chosen` categories by what they are taken for, the last column all others."""
    own, best = (positions(category_ids, ids)[0] for ids in (boxes.category_ids, boxes.best_ids))
    place = np.full(len(category_ids), len(chosen))
    place[list(chosen)] = np.arange(len(chosen))
    mine = place[own] < len(chosen)
    counts = np.zeros((len(chosen), len(chosen) + 1), dtype=np.int64)
    np.add.at(counts, (place[own[mine]], place[best[mine]]), 1)
    return counts
