"""Annotations of LVIS v1, LVIS v0.5 and COCO files in flat arrays, read once for training, evaluation and checks.

Labels are positions in the file's list of categories; image and annotation indices are positions in the file.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from loce.data.annotations.image_files import Listings, other_places, shared_names, there_instead
from loce.data.annotations.lookups import (
    LabelLists,
    category_ids,
    check_unique,
    equal_names,
    file_counts,
    file_groups,
    label_lists,
    look_up,
    tell_apart,
)
from loce.data.annotations.plausible import likely_cause, misplaced_masks, outlines, suspicious_boxes
from loce.data.annotations.reader import Columns, read_annotation_file
from loce.data.annotations.segmentations import BAD_PART, Segmentations
from loce.data.annotations.training_rows import clip, sensible_boxes, training_rows
from loce.utils.classes import IGNORED, ClassStats, frequency_groups
from loce.utils.errors import FEW, UserError, first_few


@dataclass(frozen=True, kw_only=True)
class LVISAnnotations:
    """I images, A annotations, C classes.

    image_ids: (I,) int64. image_sizes: (I, 2) int32, height and width. names: I "split/file" strings, see `name`.
    annotation_ids: (A,) int64. labels: (A,) int32. image_of: (A,) int32, image index. xywh: (A, 4) float64 boxes x, y,
    width, height in pixels, as in the file; NaN where they are not four numbers. areas: (A,) float64, of the mask or
    the box where the file gives none, NaN where it is no number. crowd, ignore: (A,) bool. negatives, not_exhaustive:
    per image the labels that are known to be absent, or not annotated everywhere (None where the file does not say).
    file_counts: (C,) int64 images of each class as the file gives them, or None.
    train_rows: (R,) int64, the annotations training uses, image by image; first_row: (I+1,) int64 into train_rows;
    train_images: (T,) int64, the images training uses. ignored_rows: (Q,) int64 ascending by image, annotations whose
    region is neither object nor background (crowds). with_masks: segmentations were read, for training and evaluation
    by masks. has_mask: (A,) bool. empty_masks, misplaced: annotations whose
    mask has no pixel, or lies elsewhere than its box; tiny_masks: whose mask is where its box is, but
    fills no pixel; masks_compared: of how many; mask_cause: what probably happened. bad_masks: how many masks, or
    parts, cannot be used, by reason.
    dropped: how much of the file training leaves out, by reason; examples: the first indices of each. own_groups: the
    file gives the groups. suspicion: what the boxes may be, or "". notes: what else users should know of the content.
    absent: images that are not on disk, which the user allows. every: the file with all of its classes, where
    `of_classes` left some out.
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
    xywh: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    ignore: np.ndarray
    segmentations: Segmentations
    negatives: LabelLists | None
    not_exhaustive: LabelLists | None
    file_counts: np.ndarray | None
    train_rows: np.ndarray
    first_row: np.ndarray
    train_images: np.ndarray
    ignored_rows: np.ndarray
    with_masks: bool
    has_mask: np.ndarray
    empty_masks: np.ndarray
    tiny_masks: np.ndarray
    misplaced: np.ndarray
    masks_compared: int
    mask_cause: str
    bad_masks: dict[str, int]
    dropped: dict[str, int]
    examples: dict[str, list[int]]
    own_groups: bool
    suspicion: str
    notes: list[str]
    absent: Sequence[int] = ()
    every: "LVISAnnotations | None" = None

    @classmethod
    def open(
        cls,
        source: str | Path | Mapping[str, Any],
        rare_max: int = 10,
        common_max: int = 100,
        keep_empty: bool = False,
        box_masks: bool = False,
        *,
        masks: bool = True,
        named: bool = True,
        annotated: bool = True,
    ) -> "LVISAnnotations":
        """Read a file, or a dict with its content, which is left as it is.

        rare_max, common_max: bounds in images of the groups r and c where the file has no `frequency`; keep_empty:
        train on images without objects; box_masks: where a mask cannot be used, the box is the mask. masks=False
        leaves the segmentations out, and boxes are all that is used; named=False takes images without a file name, for
        what reads no images; annotated=False takes a file without a list `annotations`, for predictions.
        UserError: file missing or not JSON, missing sections, unknown ids, image or category ids used twice, images
        without name, flags and lists that are none.
        """
        columns, categories = read_annotation_file(source, masks, annotated)
        path = "annotations" if isinstance(source, Mapping) else str(source)
        return _build(path, columns, categories, (rare_max, common_max), keep_empty, box_masks, named)

    def __len__(self) -> int:
        return len(self.image_ids)

    def name(self, index: int) -> str:
        """Of an image, "split/file" or "file"."""
        return self.name_bytes[self.name_bounds[index] : self.name_bounds[index + 1]].tobytes().decode()

    def rows(self, index: int) -> np.ndarray:
        """The annotations of an image that training uses (int64), in file order."""
        return self.train_rows[self.first_row[index] : self.first_row[index + 1]]

    def ignored(self, index: int) -> np.ndarray:
        """The annotations of an image whose regions training ignores (int64)."""
        first, last = np.searchsorted(self.image_of[self.ignored_rows], [index, index + 1])
        return self.ignored_rows[first:last]

    def first_ids(self, reason: str) -> list[int]:
        """Ids of the first annotations (or images, where the reason is about images) that are left out for a reason."""
        ids = self.image_ids if reason.startswith("images") else self.annotation_ids
        return ids[self.examples[reason]].tolist()

    def corners(self, rows: np.ndarray) -> np.ndarray:
        """(n, 4) float32 xyxy boxes of annotations, as in the file (not cut)."""
        xywh = self.xywh[rows]
        return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)

    def clipped_boxes(self, rows: np.ndarray) -> np.ndarray:
        """(n, 4) float32 xyxy boxes of annotations, cut at their image's border."""
        return clip(self.corners(rows), self.image_sizes[self.image_of[rows]])

    def image_path(self, index: int, folder: str | Path, exists: Callable[[str], bool] = os.path.exists) -> Path:
        """Where an image lies in `folder`: under its name or, where no file has that, at one of `other_places`."""
        return Path(self._place(index, str(folder), exists))

    def _place(self, index: int, folder: str, exists: Callable[[str], bool]) -> str:
        name = self.name(index)
        path = os.path.join(folder, name)
        if exists(path):
            return path
        others = (os.path.join(folder, place) for place in other_places(name, self.shared_names))
        return next((other for other in others if exists(other)), path)

    @cached_property
    def shared_names(self) -> frozenset[str]:
        """See `image_files.shared_names`."""
        return shared_names(self.name(index) for index in range(len(self)))

    @cached_property
    def wide(self) -> np.ndarray:
        """(I,) bool: wider than high."""
        return self.image_sizes[:, 1] > self.image_sizes[:, 0]

    def missing_images(self, folder: str | Path) -> list[int]:
        """Images, of those that are used, that `folder` does not hold; lists folders, does not ask file by file."""
        holds, folder, absent = Listings().holds, os.path.normpath(folder), set(self.absent)
        used = [index for index in range(len(self)) if index not in absent]
        return [index for index in used if not holds(self._place(index, folder, holds))]

    def there_instead(self, missing: Sequence[int], folder: str | Path) -> str:
        """A sentence for missing images that lie there under nearly their name; "" where there is none such."""
        holds, rest = Listings().holds, np.setdiff1d(np.arange(len(self)), missing).tolist()
        taken = {place for index in rest if holds(place := self._place(index, str(folder), holds))}
        return there_instead([self.name(index) for index in missing], self.shared_names, folder, taken)

    def without_images(self, missing: Sequence[int], folder: str | Path) -> "LVISAnnotations":
        """The same file, where training and evaluation leave out the images `missing` in `folder`."""
        if not missing:
            return self
        left = np.setdiff1d(self.train_images, missing)
        dropped = self.dropped | {f"images that are missing in {folder} (data.allow_missing)": len(missing)}
        return replace(self, train_images=left, dropped=dropped, absent=sorted({*self.absent, *missing}))

    def only(self, images: Sequence[int]) -> "LVISAnnotations":
        """The same file, where training and evaluation use these images alone; facts of the classes stay."""
        rest = np.setdiff1d(np.arange(len(self)), images).tolist()
        return replace(self, train_images=np.array(sorted(images)), absent=rest)

    def of_classes(self, ids: np.ndarray) -> "LVISAnnotations":
        """The same file as a detector of the classes `ids` (C,) sees it, in the file's order: labels and `stats` are of
        these, annotations of others have the label IGNORED and are in no training row; a note names them. Evaluation is
        of `every`, of which negatives, not_exhaustive and file_counts stay, too.
        """
        every, kept = self.stats, np.isin(self.stats.category_ids, ids)
        if kept.all():
            return self
        columns = ("category_ids", "image_counts", "instance_counts", "groups")
        names = tuple(name for name, stays in zip(every.names, kept.tolist(), strict=True) if stays)
        stats = replace(every, names=names, **{column: getattr(every, column)[kept] for column in columns})
        label_of = np.where(kept, np.cumsum(kept) - 1, IGNORED).astype(np.int32)
        # Images stay in training unless all that they show is left out.
        rows = self.train_rows[kept[self.labels[self.train_rows]]]
        counts = np.bincount(self.image_of[rows], minlength=len(self))
        emptied = (counts == 0) & (np.diff(self.first_row) > 0)
        # Objects that nobody can find are told.
        absent = [name for name, stays in zip(every.names, kept.tolist(), strict=True) if not stays]
        note = f"{len(absent)} categories without a training instance have no output (data.drop_empty): "
        note += first_few(absent)
        if lost := int(every.instance_counts[~kept].sum()):
            note = f"WARNING: {note}; {lost} objects of theirs are in {self.path}: they count as missed"
        return replace(
            self,
            stats=stats,
            labels=label_of[self.labels],
            train_rows=rows,
            first_row=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            train_images=self.train_images[~emptied[self.train_images]],
            notes=[*self.notes, note],
            every=self.every or self,
        )

    def without_empty(self) -> "LVISAnnotations":
        """`of_classes` that have an instance here; as it is where none has."""
        counts = self.stats.instance_counts
        return self.of_classes(self.stats.category_ids[counts > 0]) if counts.any() else self

    def require_images(self, folder: str | Path) -> None:
        """UserError with counts per split folder where images are missing."""
        missing = self.missing_images(folder)
        if not missing:
            return
        by_split = Counter(os.path.dirname(self.name(i)) for i in missing)
        splits = sorted({os.path.dirname(self.name(i)) for i in range(len(self))} - {""})
        lines = [
            f"{self.path}: {len(missing)} of {len(self)} images are missing: "
            + ", ".join(f"{count} in {Path(folder, split)}" for split, count in sorted(by_split.items()))
            + f" (the first: {first_few([self.name(i) for i in missing[:FEW]])}).",
            self.there_instead(missing, folder),
            "" if Path(folder).exists() else f"There is no folder {folder}.",
            f"This file needs the images of {' and '.join(splits)}: put or link them into {folder}." if splits else "",
            "data.train_images and data.val_images name the folder; data.allow_missing=true goes on without them.",
        ]
        raise UserError(" ".join(line for line in lines if line))

    def require_same_classes(self, stats: ClassStats, owner: str, more: bool = False) -> None:
        """UserError unless this file has the classes of `stats` (of `owner`, say "the checkpoint") in the same order.

        more: it may have others, too (`data.drop_empty`). Labels are positions in the list of categories, so another
        order would silently exchange classes.
        """
        pairs = [list(zip(s.category_ids.tolist(), s.names, strict=True)) for s in (self.stats, stats)]
        wanted = set(pairs[1])
        if pairs[0] == pairs[1] or (more and [pair for pair in pairs[0] if pair in wanted] == pairs[1]):
            return
        if len(pairs[0]) != len(pairs[1]):
            differences = f"{len(pairs[0])} categories here, {len(pairs[1])} there"
        else:
            places = [f"{mine} here, {theirs} there" for mine, theirs in zip(*pairs, strict=True) if mine != theirs]
            differences = first_few(places, between="; ")
        raise UserError(f"{self.path}: its categories are not those of {owner}, in the same order: {differences}")


def _build(
    path: str,
    columns: Columns,
    categories: list[Any],
    bounds: tuple[int, int],
    keep_empty: bool,
    box_masks: bool,
    named: bool,
) -> LVISAnnotations:
    # A mistake of one kind may cause others, so each kind is reported before the next is looked for: ids first.
    mistakes = columns.mistakes
    own_ids = category_ids(categories, mistakes)
    image_ids = np.array(columns.image_ids, dtype=np.int64)
    if not len(image_ids) and not mistakes.counts:
        mistakes.add("empty list", "images")
    mistakes.raise_all(path)
    check_unique("image", image_ids, mistakes)
    check_unique("category", own_ids, mistakes)
    if named:
        columns.nameless.raise_all(path)
    mistakes.raise_all(path)
    annotation_ids, notes = tell_apart(np.array(columns.annotation_ids, dtype=np.int64))
    image_of = look_up("image", image_ids, columns.annotation_images, annotation_ids, mistakes)
    labels = look_up("category", own_ids, columns.annotation_classes, annotation_ids, mistakes)
    negatives = label_lists("neg_category_ids", columns.negatives, own_ids, image_ids, mistakes)
    if negatives is not None:
        for row in [row for row, ids in enumerate(columns.negatives) if ids is None]:
            mistakes.add("images without neg_category_ids, which others have", f"image {image_ids[row]}")
    if columns.not_exhaustive and 0 < (lacking := sum(ids is None for ids in columns.not_exhaustive)) < len(image_ids):
        notes.append(f"{lacking} images without not_exhaustive_category_ids, which others have: taken as none")
    not_exhaustive = label_lists("not_exhaustive_category_ids", columns.not_exhaustive, own_ids, image_ids, mistakes)
    groups = file_groups(categories, mistakes)
    mistakes.raise_all(path)

    # Columns as arrays.
    names = [name.encode() for name in columns.image_names]
    xywh = np.array(columns.boxes, dtype=np.float64).reshape(-1, 4)
    sizes = np.stack([columns.heights, columns.widths], axis=1).astype(np.int32)
    crowd, ignore = (np.frombuffer(bytes(flags), np.bool_) for flags in (columns.crowd, columns.ignore))
    # Run-length codes are checked against their images here; then masks against boxes.
    masks = columns.segmentations.finish(sizes[image_of])
    has_mask = masks.usable()
    areas = np.array(columns.areas, dtype=np.float64)
    for row in columns.without_area:
        size = sizes[image_of[row]].tolist()
        areas[row] = coco_mask.area(masks.rles([row], *size)[0]) if has_mask[row] else xywh[row, 2] * xywh[row, 3]
    # What training uses; masks that lie elsewhere than their boxes, and what the boxes may be.
    usable = has_mask | box_masks | (not columns.masks)
    training = training_rows(xywh, areas, image_of, sizes, crowd, ignore, usable, keep_empty)
    bad_masks = dict(columns.segmentations.dropped) if columns.masks else {}
    filled = training.rows[~has_mask[training.rows]] if columns.masks else training.rows[:0]
    if len(filled):
        ids = first_few(annotation_ids[filled])
        notes.append(f"{len(filled)} annotations have no mask that can be used: their box is the mask ({ids})")
    compared = has_mask & sensible_boxes(xywh, sizes[image_of]) & columns.masks
    outline = outlines(masks, sizes[image_of])
    empty, misplaced, tiny = misplaced_masks(masks, outline, xywh, sizes[image_of], compared)
    odd = np.sort(np.concatenate([empty, misplaced]))
    cause = likely_cause(outline[odd], xywh[odd], sizes[image_of][odd]) if len(odd) else ""
    suspicion = suspicious_boxes(xywh, sizes[image_of], outline, "annotation", annotation_ids)
    counted = ~(crowd | ignore)
    found = LVISAnnotations(
        path=path,
        stats=_stats(categories, own_ids, labels[counted], image_of[counted], groups, bounds, len(image_ids)),
        image_ids=image_ids,
        image_sizes=sizes,
        name_bytes=np.frombuffer(b"".join(names), np.uint8),
        name_bounds=np.concatenate([[0], np.cumsum([len(name) for name in names])]).astype(np.int64),
        annotation_ids=annotation_ids,
        labels=labels,
        image_of=image_of,
        xywh=xywh,
        areas=areas,
        crowd=crowd,
        ignore=ignore,
        segmentations=masks,
        negatives=negatives,
        not_exhaustive=not_exhaustive,
        file_counts=file_counts(categories),
        train_rows=training.rows,
        first_row=training.first,
        train_images=training.images,
        ignored_rows=training.ignored,
        with_masks=columns.masks,
        has_mask=has_mask & columns.masks,
        empty_masks=empty,
        tiny_masks=tiny,
        misplaced=misplaced,
        masks_compared=int(compared.sum()),
        mask_cause=cause,
        dropped=training.dropped | {r: n for r, n in bad_masks.items() if r == BAD_PART or not box_masks},
        bad_masks=bad_masks,
        examples=training.examples | columns.segmentations.examples,
        own_groups=groups is not None,
        suspicion=suspicion,
        notes=[*notes, *equal_names(categories), *([f"WARNING: {suspicion}"] if suspicion else [])],
    )
    return replace(found, notes=[*found.notes, f"WARNING: {told}"]) if (told := misplaced_text(found)) else found


def _stats(
    categories: list[Mapping[str, Any]],
    category_ids: np.ndarray,
    labels: np.ndarray,
    image_of: np.ndarray,
    groups: np.ndarray | None,
    bounds: tuple[int, int],
    file_images: int,
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
        file_images=file_images,
    )


def misplaced_text(annotations: LVISAnnotations) -> str:
    """How many masks are empty or elsewhere than their boxes, which and why; "" where none is."""
    parts = []
    for rows, what in (
        (annotations.empty_masks, "are empty"),
        (annotations.misplaced, "lie elsewhere than their boxes"),
        (annotations.tiny_masks, "are too small to fill a pixel"),
    ):
        if len(rows):
            parts.append(f"{len(rows)} {what} (annotations {first_few(annotations.annotation_ids[rows])})")
    if not parts:
        return ""
    cause = f"; {annotations.mask_cause}" if annotations.mask_cause else ""
    return f"of {annotations.masks_compared} masks {' and '.join(parts)}{cause}"
