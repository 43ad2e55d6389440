"""Ground truth of an evaluation, a view of `data.annotations`, and LVIS's federated rule (arXiv 1908.03195, Sec. 3).

Legend: I images and K categories, both in ascending order of id; G annotations, ordered by image and category.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from loce.data.annotations.lvis import LVISAnnotations
from loce.data.annotations.requirements import evaluation_problems
from loce.data.annotations.segmentations import Segmentations
from loce.utils.classes import IGNORED, ClassStats, frequency_groups
from loce.utils.errors import UserError, raise_problems


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """Annotations of one data set; `load_annotations` makes it.

    image_ids (I,), category_ids (K,) int64 ascending; sizes (I, 2) height, width; names K; frequency (K,) "r"/"c"/"f";
    label_ids (K,) int64, category ids in the file's order; image, category (G,) indices; boxes (G, 4) x, y, width,
    height in px; areas (G,) px^2; ignore, crowd (G,) bool; ids (G,); masks: all segmentations of the file, or None when
    they were left out, and rows (G,) int64 into them; negative, not_exhaustive (I, K) bool or None for COCO-style
    files; notes: what a reader of the numbers should know; source: where it came from; image_names: I texts; part:
    which of the file's images these are, "20 of 400 images", or "".
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    category_ids: np.ndarray
    label_ids: np.ndarray
    names: list[str]
    frequency: np.ndarray
    ids: np.ndarray
    image: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    ignore: np.ndarray
    crowd: np.ndarray
    masks: Segmentations | None
    rows: np.ndarray
    negative: np.ndarray | None
    not_exhaustive: np.ndarray | None
    notes: list[str] = field(default_factory=list)
    source: str = ""
    image_names: list[str] = field(default_factory=list)
    part: str = ""

    def __len__(self) -> int:
        return len(self.image)

    @property
    def federated(self) -> bool:
        """True when the file says which categories were verified in which image (LVIS)."""
        return self.negative is not None

    def counted(self) -> np.ndarray:
        """(I, K) bool: where a detection can count under LVIS's rules: the category is there, or known not to be."""
        counted = np.ones((len(self.image_ids), len(self.category_ids)), dtype=bool)
        if self.negative is not None:
            counted = self.negative.copy()
            real = self.areas > 0  # an annotation without area does not exist under LVIS's rules
            counted[self.image[real], self.category[real]] = True
        return counted

    def some(self, chosen: np.ndarray) -> "GroundTruth":
        """Only the annotations `chosen` (indices, ascending) of the same images."""
        names = ("ids", "image", "category", "boxes", "areas", "ignore", "crowd", "rows")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    def rles(self, chosen: np.ndarray | range | list[int]) -> list[dict[str, Any]]:
        """pycocotools' codes of the masks of some annotations, each over an image of its own size."""
        assert self.masks is not None
        chosen = np.asarray(chosen, dtype=np.int64)
        codes: list[dict[str, Any]] = [{}] * len(chosen)
        sizes, kind = np.unique(self.sizes[self.image[chosen]], axis=0, return_inverse=True)
        order = np.argsort(kind.reshape(-1), kind="stable")
        bounds = np.searchsorted(kind.reshape(-1)[order], np.arange(len(sizes) + 1))
        for (height, width), (begin, end) in zip(sizes.tolist(), pairwise(bounds.tolist()), strict=True):
            own = order[begin:end]
            for place, code in zip(own, self.masks.rles(self.rows[chosen[own]].tolist(), height, width), strict=True):
                codes[place] = code
        return codes


class FederatedFilter:
    """What annotations say of an image: which categories can count there (cap detections first, apply this second,
    paste masks last), and its objects.

    Labels are the categories in the file's order, or those of a detector that has fewer; `label_ids` (C,) turns them
    into category ids.
    """

    def __init__(
        self,
        annotations: "str | Path | Mapping[str, Any] | LVISAnnotations | GroundTruth",
        label_ids: np.ndarray | None = None,
    ):
        truth = load_annotations(annotations, masks=False)
        self.label_ids = truth.label_ids if label_ids is None else label_ids
        self._column = np.searchsorted(truth.category_ids, self.label_ids)
        self._label = np.full(len(truth.category_ids), IGNORED)
        self._label[self._column] = np.arange(len(self.label_ids))
        self._truth, self._bounds = truth, np.searchsorted(truth.image, np.arange(len(truth.image_ids) + 1))
        self._row = {int(image): row for row, image in enumerate(truth.image_ids)}
        self._counted = truth.counted()

    def allowed(self, image_id: int) -> np.ndarray:
        """(C,) bool over labels, all true for COCO-style files; KeyError for an image that the file does not have."""
        return self._counted[self._row[image_id]][self._column]

    def objects(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """What can be found in an image: boxes (G, 4) float32 x1, y1, x2, y2 in px, and labels (G,) int64."""
        row, truth = self._row[image_id], self._truth
        rows = np.arange(self._bounds[row], self._bounds[row + 1])
        rows = rows[self._label[truth.category[rows]] != IGNORED]
        corners = np.concatenate([truth.boxes[rows, :2], truth.boxes[rows, :2] + truth.boxes[rows, 2:]], axis=1)
        return corners.astype(np.float32), self._label[truth.category[rows]]


def load_annotations(
    annotations: "str | Path | Mapping[str, Any] | LVISAnnotations | GroundTruth",
    masks: bool = True,
    allow_misplaced: bool = False,
) -> GroundTruth:
    """Ground truth from a path, a loaded dict (left as it is), annotations that were read, or itself.

    masks=False leaves segmentations out; allow_misplaced: many masks may lie elsewhere than their boxes. UserError with
    everything that keeps the file from being read, or an evaluation from meaning anything.
    """
    if isinstance(annotations, GroundTruth):
        return annotations
    if not isinstance(annotations, LVISAnnotations):
        annotations = LVISAnnotations.open(annotations, masks=masks, named=False)
    raise_problems(evaluation_problems(annotations, masks, allow_misplaced=allow_misplaced))
    # Objects of all categories are to be found, also of those that a detector has no output for.
    return _view(annotations.every or annotations, masks, list(annotations.notes))


def _view(file: LVISAnnotations, masks: bool, notes: list[str]) -> GroundTruth:
    """The same columns in ascending order of image and category id; what is to be known of them is added to `notes`."""
    image_order, category_order = np.argsort(file.image_ids), np.argsort(file.stats.category_ids)
    image, category = np.argsort(image_order)[file.image_of], np.argsort(category_order)[file.labels]
    rows = np.lexsort((category, image))  # stable: file order within an image and category
    # The federated lists as bitmaps, where the file has them.
    if file.negatives is None:
        notes.append("no neg_category_ids: not an LVIS file, so every category counts in every image (COCO-style)")
    elif file.not_exhaustive is None:
        notes.append("no not_exhaustive_category_ids: taken as none")
    negative, not_exhaustive = (
        None if lists is None else lists.bitmap(len(file.stats))[image_order][:, category_order]
        for lists in (file.negatives, file.not_exhaustive)
    )
    if negative is None:
        not_exhaustive = None
    elif not_exhaustive is None:
        not_exhaustive = np.zeros_like(negative)
    return GroundTruth(
        image_ids=file.image_ids[image_order],
        sizes=file.image_sizes[image_order].astype(np.int64),
        category_ids=file.stats.category_ids[category_order],
        label_ids=file.stats.category_ids,
        names=[file.stats.names[label] for label in category_order],
        frequency=_frequency(file, notes)[category_order],
        ids=file.annotation_ids[rows],
        image=image[rows].astype(np.int32),
        category=category[rows].astype(np.int32),
        boxes=file.xywh[rows],
        areas=file.areas[rows],
        ignore=file.ignore[rows],
        crowd=file.crowd[rows],
        masks=file.segmentations if masks else None,
        rows=rows,
        negative=negative,
        not_exhaustive=not_exhaustive,
        notes=notes,
        source=file.path,
        image_names=[file.name(index) for index in image_order.tolist()],
    )


def only_images(truth: GroundTruth, image_ids: np.ndarray, why: str) -> GroundTruth:
    """The ground truth of some of its images, with a note that says so."""
    kept = np.isin(truth.image_ids, image_ids)
    part = truth.some(np.flatnonzero(kept[truth.image]))
    return replace(
        part,
        image_ids=truth.image_ids[kept],
        sizes=truth.sizes[kept],
        image=(np.cumsum(kept) - 1)[part.image].astype(np.int32),
        negative=None if truth.negative is None else truth.negative[kept],
        not_exhaustive=None if truth.not_exhaustive is None else truth.not_exhaustive[kept],
        notes=[*truth.notes, f"PARTIAL: the numbers are of {kept.sum()} of {len(kept)} images, {why}"],
        image_names=[name for name, chosen in zip(truth.image_names, kept.tolist(), strict=True) if chosen],
        part=f"{kept.sum()} of {len(kept)} images",
    )


def with_training_groups(truth: GroundTruth, stats: ClassStats, more: bool = False) -> GroundTruth:
    """Rare, common and frequent are facts of the training set, also where the validation file says nothing of it.

    more: categories that the training set has no instance of may be missing in `stats` (`data.drop_empty`): they are
    rare. A converted checkpoint may know no training set (all counts 0): then the file's own groups stay. UserError
    where the training set has other classes.
    """
    if not stats.instance_counts.any():
        return truth
    trained = set(zip(stats.category_ids.tolist(), stats.names, strict=True))
    every = set(zip(truth.category_ids.tolist(), truth.names, strict=True))
    if trained - every or (every - trained and not more):
        raise UserError(
            f"{truth.source}: its categories are not those of the training data, from which groups r/c/f are"
        )
    group_of = dict(zip(stats.category_ids.tolist(), stats.groups.tolist(), strict=True))
    groups = np.array([group_of.get(c, "r") for c in truth.category_ids.tolist()])
    notes = [note for note in truth.notes if not note.startswith("no frequency")]
    return replace(truth, frequency=groups, notes=notes)


def positions(ascending: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each of `values` in `ascending`, and whether it is there at all (the index is then meaningless)."""
    index = np.searchsorted(ascending, values).clip(max=len(ascending) - 1)
    return index, ascending[index] == values


def _frequency(file: LVISAnnotations, notes: list[str]) -> np.ndarray:
    """(C,) "r", "c" or "f" by label: the file's own, else by its image counts, else by the images counted here."""
    if file.own_groups:
        return file.stats.groups
    if file.file_counts is not None:
        notes.append("no frequency: groups r/c/f are from image_count with LVIS's bounds (10 and 100 images)")
        return frequency_groups(file.file_counts)
    notes.append("no frequency or image_count: groups r/c/f count the images of this very file, not of training")
    cells = np.unique(file.image_of.astype(np.int64) * len(file.stats) + file.labels) % len(file.stats)
    return frequency_groups(np.bincount(cells, minlength=len(file.stats)))
