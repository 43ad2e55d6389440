"""Annotations of LVIS v1, LVIS v0.5 and COCO files in flat arrays, and which of them training uses.

Labels are positions in the file's list of categories; image and annotation indices are positions in the file.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from loce.classes import GROUPS, ClassStats, frequency_groups
from loce.data.annotation_file import NAMED, Mistakes, read_annotation_file
from loce.data.segmentations import Segmentations
from loce.data.training_rows import clip, training_rows
from loce.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LVISAnnotations:
    """I images, A annotations, C classes.

    image_ids: (I,) int64. image_sizes: (I, 2) int32, height and width. names: I "split/file" strings, see `name`.
    annotation_ids: (A,) int64. labels: (A,) int32. image_of: (A,) int32, image index. boxes: (A, 4) float32 xyxy in
    pixels, as in the file (not clipped). areas: (A,) float32. crowd, ignore: (A,) bool. negatives, not_exhaustive:
    per image the labels that are known to be absent, or not annotated everywhere (None where the file does not say).
    train_rows: (R,) int64, the annotations training uses, image by image; first_row: (I+1,) int64 into train_rows;
    train_images: (T,) int64, the images training uses. dropped: how much of the file training leaves out, by reason.
    """

    path: str
    stats: ClassStats
    image_ids: np.ndarray
    image_sizes: np.ndarray
    name_bytes: np.ndarray
    name_bounds: np.ndarray
    annotation_ids: np.ndarray
    labels: np.ndarray
    image_of: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    ignore: np.ndarray
    segmentations: Segmentations
    negatives: "LabelLists | None"
    not_exhaustive: "LabelLists | None"
    train_rows: np.ndarray
    first_row: np.ndarray
    train_images: np.ndarray
    dropped: dict[str, int]

    @classmethod
    def open(cls, path: str | Path, rare_max: int = 10, common_max: int = 100) -> "LVISAnnotations":
        """Read a file. rare_max, common_max: bounds in images of the groups r and c where the file has no `frequency`.

        UserError: file missing or not JSON, missing sections, ids that are unknown or used twice, images without name.
        """
        return _build(str(path), rare_max, common_max)

    def __len__(self) -> int:
        return len(self.image_ids)

    def name(self, index: int) -> str:
        """Of an image, "split/file" or "file"."""
        return self.name_bytes[self.name_bounds[index] : self.name_bounds[index + 1]].tobytes().decode()

    def rows(self, index: int) -> np.ndarray:
        """The annotations of an image that training uses (int64), in file order."""
        return self.train_rows[self.first_row[index] : self.first_row[index + 1]]

    def clipped_boxes(self, rows: np.ndarray) -> np.ndarray:
        """(n, 4) float32 xyxy boxes of annotations, cut at their image's border."""
        return clip(self.boxes[rows], self.image_sizes[self.image_of[rows]])

    def image_path(self, index: int, folder: str | Path) -> Path:
        """FOLDER/split/file, or FOLDER/file where only that exists."""
        path = Path(folder, self.name(index))
        flat = Path(folder, path.name)
        return flat if not path.exists() and flat.exists() else path

    @cached_property
    def wide(self) -> np.ndarray:
        """(I,) bool: wider than high."""
        return self.image_sizes[:, 1] > self.image_sizes[:, 0]

    def missing_images(self, folder: str | Path, indices: Sequence[int] | np.ndarray | None = None) -> list[int]:
        """Images (of all, or of `indices`) that `folder` does not hold; lists folders, does not ask file by file."""
        listings: dict[Path, set[str]] = {}

        def holds(path: Path) -> bool:
            if path.parent not in listings:
                listings[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
            return path.name in listings[path.parent]

        missing = []
        for index in range(len(self)) if indices is None else indices:
            path = Path(folder, self.name(int(index)))
            if not holds(path) and not holds(Path(folder, path.name)):
                missing.append(int(index))
        return missing

    def require_images(self, folder: str | Path, indices: Sequence[int] | np.ndarray | None = None) -> None:
        """UserError with counts per split folder where images are missing."""
        missing = self.missing_images(folder, indices)
        if not missing:
            return
        total = len(self) if indices is None else len(indices)
        by_split = Counter(os.path.dirname(self.name(i)) for i in missing)
        splits = sorted({os.path.dirname(self.name(i)) for i in range(len(self))} - {""})
        lines = [
            f"{self.path}: {len(missing)} of {total} images are missing: "
            + ", ".join(f"{count} in {Path(folder, split)}" for split, count in sorted(by_split.items()))
            + f" (the first: {self.name(missing[0])}).",
            "" if Path(folder).is_dir() else f"There is no folder {folder}.",
            f"This file needs the images of {' and '.join(splits)}: put or link them into {folder}." if splits else "",
            "data.train_images and data.val_images name the folder.",
        ]
        raise UserError(" ".join(line for line in lines if line))

    def require_same_classes(self, stats: ClassStats, owner: str) -> None:
        """UserError unless this file has the classes of `stats` (of `owner`, say "the checkpoint") in the same order.

        Labels are positions in the list of categories, so another order would silently exchange classes.
        """
        pairs = [list(zip(s.category_ids.tolist(), s.names, strict=True)) for s in (self.stats, stats)]
        if pairs[0] == pairs[1]:
            return
        if len(pairs[0]) != len(pairs[1]):
            differences = f"{len(pairs[0])} categories here, {len(pairs[1])} there"
        else:
            places = [f"{mine} here, {theirs} there" for mine, theirs in zip(*pairs, strict=True) if mine != theirs]
            differences = "; ".join(places[:NAMED]) + ("; ..." if len(places) > NAMED else "")
        raise UserError(f"{self.path}: its categories are not those of {owner}, in the same order: {differences}")


@dataclass(frozen=True)
class LabelLists:
    """A list of labels per image, flat: labels (L,) int32, first (I+1,) int64."""

    labels: np.ndarray
    first: np.ndarray

    def of(self, index: int) -> np.ndarray:
        """Labels of one image."""
        return self.labels[self.first[index] : self.first[index + 1]]


def _build(path: str, rare_max: int, common_max: int) -> LVISAnnotations:
    columns, categories, _ = read_annotation_file(path)
    mistakes = columns.mistakes
    category_ids = _category_ids(categories, mistakes)
    image_ids = np.array(columns.image_ids, dtype=np.int64)
    annotation_ids = np.array(columns.annotation_ids, dtype=np.int64)
    if not len(image_ids):
        mistakes.add("empty list", "images")
    mistakes.raise_all(path)
    for kind, ids in (("image", image_ids), ("annotation", annotation_ids), ("category", category_ids)):
        _check_unique(kind, ids, mistakes)
    mistakes.raise_all(path)
    image_of = _look_up("image", image_ids, columns.annotation_images, annotation_ids, mistakes)
    labels = _look_up("category", category_ids, columns.annotation_classes, annotation_ids, mistakes)
    negatives = _label_lists(columns.negatives, category_ids, image_ids, mistakes)
    not_exhaustive = _label_lists(columns.not_exhaustive, category_ids, image_ids, mistakes)
    groups = _file_groups(categories, mistakes)
    mistakes.raise_all(path)

    names = [name.encode() for name in columns.image_names]
    xywh = np.array(columns.boxes, dtype=np.float64).reshape(-1, 4)
    sizes = np.stack([columns.heights, columns.widths], axis=1).astype(np.int32)
    crowd, ignore = (np.frombuffer(bytes(flags), np.bool_) for flags in (columns.crowd, columns.ignore))
    training = training_rows(columns, xywh, image_of, sizes)
    counted = ~(crowd | ignore)
    return LVISAnnotations(
        path=path,
        stats=_stats(categories, category_ids, labels[counted], image_of[counted], groups, (rare_max, common_max)),
        image_ids=image_ids,
        image_sizes=sizes,
        name_bytes=np.frombuffer(b"".join(names), np.uint8),
        name_bounds=np.concatenate([[0], np.cumsum([len(name) for name in names])]).astype(np.int64),
        annotation_ids=annotation_ids,
        labels=labels,
        image_of=image_of,
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32),
        areas=np.array(columns.areas, dtype=np.float32),
        crowd=crowd,
        ignore=ignore,
        segmentations=columns.segmentations.finish(),
        negatives=negatives,
        not_exhaustive=not_exhaustive,
        train_rows=training.rows,
        first_row=training.first,
        train_images=training.images,
        dropped=training.dropped,
    )


def _category_ids(categories: list[Any], mistakes: Mistakes) -> np.ndarray:
    for number, category in enumerate(categories):
        if not (isinstance(category, dict) and type(category.get("id")) is int and "name" in category):
            mistakes.add("categories without a whole-number id or without a name", f"number {number}")
    if not categories:
        mistakes.add("empty list", "categories")
    ids = [c["id"] if isinstance(c, dict) and type(c.get("id")) is int else -1 for c in categories]
    return np.array(ids, dtype=np.int64)


def _check_unique(kind: str, ids: np.ndarray, mistakes: Mistakes) -> None:
    values, counts = np.unique(ids, return_counts=True)
    for value in values[counts > 1]:
        mistakes.add(f"{kind} ids used more than once", str(value))


def _look_up(
    kind: str, known: np.ndarray, wanted: Sequence[int], annotation_ids: np.ndarray, mistakes: Mistakes
) -> np.ndarray:
    """(A,) int32 positions in `known` of the ids `wanted`; an unknown one is a mistake that names its annotation."""
    ids = np.array(wanted, dtype=np.int64)
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known[order], ids), len(known) - 1)
    found = order[place]
    for row in np.flatnonzero(known[found] != ids):
        mistakes.add(f"annotations with an unknown {kind}", f"annotation {annotation_ids[row]} ({kind}_id {ids[row]})")
    return found.astype(np.int32)


def _label_lists(
    lists: list[Any], category_ids: np.ndarray, image_ids: np.ndarray, mistakes: Mistakes
) -> LabelLists | None:
    """The category ids given per image as labels; None where no image has such a list."""
    if all(ids is None for ids in lists):
        return None
    label_of = {int(category): label for label, category in enumerate(category_ids)}
    labels: list[int] = []
    first = [0]
    for image, ids in zip(image_ids, lists, strict=True):
        for category in ids if isinstance(ids, list) else []:
            if type(category) is not int or category not in label_of:
                mistakes.add("unknown categories in image lists (absent, not exhaustive)", f"image {image}: {category}")
            else:
                labels.append(label_of[category])
        first.append(len(labels))
    return LabelLists(np.array(labels, dtype=np.int32), np.array(first, dtype=np.int64))


def _file_groups(categories: list[dict[str, Any]], mistakes: Mistakes) -> np.ndarray | None:
    """The file's own groups; None where no category has one."""
    groups = [category.get("frequency") for category in categories]
    if all(group is None for group in groups):
        return None
    for category, group in zip(categories, groups, strict=True):
        if group not in GROUPS:
            mistakes.add("categories whose `frequency` is not r, c or f", f"{category['name']} ({group})")
    return np.array([str(group) for group in groups], dtype="<U1")


def _stats(
    categories: list[dict[str, Any]],
    category_ids: np.ndarray,
    labels: np.ndarray,
    image_of: np.ndarray,
    groups: np.ndarray | None,
    bounds: tuple[int, int],
) -> ClassStats:
    """Counts of the annotations that are no crowd, before training drops any: LVIS's own counts."""
    pairs = np.unique(image_of.astype(np.int64) * len(category_ids) + labels)
    image_counts = np.bincount(pairs % len(category_ids), minlength=len(category_ids)).astype(np.int64)
    return ClassStats(
        names=tuple(str(category["name"]) for category in categories),
        category_ids=category_ids,
        image_counts=image_counts,
        instance_counts=np.bincount(labels, minlength=len(category_ids)).astype(np.int64),
        groups=frequency_groups(image_counts, *bounds) if groups is None else groups,
        image_total=len(np.unique(image_of)),
    )
