"""Detections as columns: a few arrays instead of millions of dicts; the official results format, read and written."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from loce.evaluation.annotations import GroundTruth, positions
from loce.evaluation.reading import block_count, iterate_json_list, offenders
from loce.utils.errors import UserError, raise_problems
from loce.utils.files import atomic_write
from loce.utils.progress import watched

_MEND = "leave these rows out, or mend what made them: a diverged model, most often"
_PART = 10_000  # result dicts that are made or read at a time


@dataclass(frozen=True, kw_only=True)
class Masks:
    """N masks as COCO compressed RLE: row n is `counts[offsets[n]:offsets[n + 1]]` over an image of `sizes[n]`.

    counts: flat uint8 (ASCII); offsets (N + 1,) int64; sizes (N, 2) int32 height, width.
    """

    counts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    def rles(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """pycocotools' RLE dicts of some rows."""
        starts, ends, sizes = self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), self.sizes[rows].tolist()
        counts = memoryview(self.counts)  # type: ignore[arg-type]  # slices without copies
        return [{"size": z, "counts": bytes(counts[s:e])} for s, e, z in zip(starts, ends, sizes, strict=True)]

    @staticmethod
    def from_counts(counts: Sequence[bytes], sizes: np.ndarray) -> "Masks":
        """From one bytes object a mask and `sizes` (N, 2)."""
        lengths = np.fromiter(map(len, counts), dtype=np.int64, count=len(counts))
        flat = np.frombuffer(b"".join(counts), dtype=np.uint8)
        return Masks(counts=flat, offsets=offsets_of(lengths), sizes=np.asarray(sizes, dtype=np.int32).reshape(-1, 2))


@dataclass(frozen=True, kw_only=True)
class Detections:
    """N detections, row by row.

    image_ids, category_ids (N,) int64, the annotation file's ids; scores (N,) float32 or float64; boxes (N, 4) float32
    or float64 as x, y, width, height in px (the results format's own, so that nothing is rounded twice), or None;
    masks: N masks or None. Among equal scores of an image the earlier row ranks first.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray | None = None
    masks: Masks | None = None

    def __post_init__(self) -> None:
        columns = {"category_ids": self.category_ids, "scores": self.scores, "boxes": self.boxes, "masks": self.masks}
        for name, column in columns.items():
            if column is not None and len(column) != len(self.image_ids):
                raise ValueError(f"{name} has {len(column)} rows, image_ids {len(self.image_ids)}")

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def iou_types(self) -> tuple[str, ...]:
        """What can be evaluated: "bbox" and "segm" as far as boxes and masks are there (both for no detections)."""
        if not len(self):
            return ("bbox", "segm")
        return ("bbox",) * (self.boxes is not None) + ("segm",) * (self.masks is not None)

    def corners(self) -> np.ndarray:
        """(N, 4) boxes as x1, y1, x2, y2."""
        assert self.boxes is not None
        return np.concatenate([self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]], axis=1)

    def save_json(self, path: str | Path) -> None:
        """Write the official results format: a list of {image_id, category_id, score, bbox, segmentation}."""
        with atomic_write(path) as temporary, temporary.open("w", encoding="ascii") as file:
            file.write("[")
            parts = range(0, len(self), _PART)
            for start in watched(parts, len(parts), f"writing {path}", f"times {_PART:,} results"):
                rows = np.arange(start, min(start + _PART, len(self)))
                text = json.dumps(list(self._dicts(rows)), separators=(",", ":"))
                file.write((",\n" if start else "") + text[1:-1])
            file.write("]\n")

    def _dicts(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        boxes = [None] * len(rows) if self.boxes is None else self.boxes[rows].tolist()
        rles = [None] * len(rows) if self.masks is None else self.masks.rles(rows)
        columns = (self.image_ids[rows].tolist(), self.category_ids[rows].tolist(), self.scores[rows].tolist())
        for image, category, score, box, rle in zip(*columns, boxes, rles, strict=True):
            entry = {"image_id": image, "category_id": category, "score": score}
            if box is not None:
                entry["bbox"] = box
            if rle is not None:
                entry["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
            yield entry


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """(N + 1,) int64 starts and end of consecutive runs of `lengths` (N,)."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def concatenate(parts: Sequence[Detections]) -> Detections:
    """All rows of all parts in order; a column is kept when every part that has rows has it."""
    parts = [part for part in parts if len(part)]
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return Detections(image_ids=none, category_ids=none, scores=np.zeros(0, dtype=np.float32))
    boxes = [part.boxes for part in parts if part.boxes is not None]
    masks = [part.masks for part in parts if part.masks is not None]
    if len(boxes) not in (0, len(parts)) or len(masks) not in (0, len(parts)):
        raise UserError("some results have a bbox (or segmentation) and others have none; write all of them alike")
    joined = None
    if masks:
        joined = Masks(
            counts=np.concatenate([m.counts for m in masks]),
            offsets=offsets_of(np.concatenate([np.diff(m.offsets) for m in masks])),
            sizes=np.concatenate([m.sizes for m in masks]),
        )
    return Detections(
        image_ids=np.concatenate([part.image_ids for part in parts]),
        category_ids=np.concatenate([part.category_ids for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        boxes=np.concatenate(boxes) if boxes else None,
        masks=joined,
    )


def read_results(results: str | Path | list[dict[str, Any]]) -> Detections:
    """Detections from a JSON file in the official results format or from a list of such dicts (left as they are).

    Raises UserError with the first offenders when entries are malformed.
    """
    blocks: Iterable[list[Any]]
    if isinstance(results, (str, Path)):
        source, blocks, total = str(results), iterate_json_list(results), block_count(results)
    elif isinstance(results, list):
        source, blocks, total = "results", [results], 1
    else:
        raise UserError(f"results must be a path, a list of result dicts or Detections, not {type(results).__name__}")
    parts = []
    for block in watched(blocks, total, f"reading {source}", "blocks"):
        for start in range(0, len(block), _PART):
            problems, part = _columns(block[start : start + _PART])
            raise_problems([f"{source}: {problem}" for problem in problems])
            parts.append(part)
    return concatenate(parts)


def _columns(entries: Sequence[Any]) -> tuple[list[str], Detections]:
    """One part of a results list as columns, and what is wrong with it."""
    empty = Detections(image_ids=np.zeros(0, int), category_ids=np.zeros(0, int), scores=np.zeros(0))
    needed = ("image_id", "category_id", "score")
    bad = [e for e in entries if not isinstance(e, Mapping) or not all(key in e for key in needed)]
    if bad:
        return [f"results without image_id, category_id and score: {offenders(bad)}"], empty
    problems = []
    column = {key: np.array([e[key] for e in entries]) for key in needed}
    for key, kinds, name in (
        ("image_id", "i", "an integer"),
        ("category_id", "i", "an integer"),
        ("score", "fi", "a number"),
    ):
        if column[key].dtype.kind not in kinds:
            bad = [e[key] for e in entries if np.array(e[key]).dtype.kind not in kinds]
            problems.append(f"{key} must be {name}: {offenders(map(repr, bad))}")
    boxes, masks = None, None
    if any("bbox" in e for e in entries):
        boxes, problem = _boxes(entries)
        problems += problem
    if any("segmentation" in e for e in entries):
        masks, problem = _masks(entries)
        problems += problem
    if boxes is None and masks is None:
        problems.append("results have neither bbox nor segmentation")
    if problems:
        return problems, empty
    scores = column["score"].astype(np.float64)
    ids = column["image_id"].astype(np.int64), column["category_id"].astype(np.int64)
    return [], Detections(image_ids=ids[0], category_ids=ids[1], scores=scores, boxes=boxes, masks=masks)


def _boxes(entries: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray | None, list[str]]:
    try:
        boxes = np.array([e["bbox"] for e in entries], dtype=np.float64)
        if boxes.shape == (len(entries), 4):
            return boxes, []
    except (KeyError, TypeError, ValueError):
        pass
    bad = [e.get("bbox") for e in entries if np.shape(e.get("bbox", ())) != (4,)]
    return None, [f"bbox must be [x, y, width, height], four numbers in every result: {offenders(bad or ['?'])}"]


def _masks(entries: Sequence[Mapping[str, Any]]) -> tuple[Masks | None, list[str]]:
    counts, sizes, bad = [], [], []
    for entry in entries:
        rle = entry.get("segmentation")
        if not isinstance(rle, Mapping) or np.shape(rle.get("size", ())) != (2,) or "counts" not in rle:
            bad.append(f"image {entry['image_id']}: {str(rle)[:60]}")
            continue
        value = rle["counts"]
        if isinstance(value, list):  # not compressed
            value = mask_utils.frPyObjects({"size": list(rle["size"]), "counts": value}, *rle["size"])["counts"]
        counts.append(value.encode("ascii", "replace") if isinstance(value, str) else bytes(value))
        sizes.append(rle["size"])
    if bad:
        return None, [
            f"segmentation must be an RLE dict with size and counts in every result (not polygons): {offenders(bad)}"
        ]
    return Masks.from_counts(counts, np.array(sizes)), []


def check_detections(detections: Detections, truth: GroundTruth, source: str) -> None:
    """UserError naming the first five offenders of each kind: ids that `truth` does not have, bad numbers and masks."""
    row, known = positions(truth.image_ids, detections.image_ids)
    problems = []
    unknown = np.unique(detections.image_ids[~known])
    if len(unknown):
        total = len(np.unique(detections.image_ids))
        problems.append(
            f"{len(unknown)} of the {total} image ids are not in {truth.source}: {offenders(unknown)}; "
            "use the annotation file of the split that the results were made for"
        )
    unknown = np.unique(detections.category_ids[~positions(truth.category_ids, detections.category_ids)[1]])
    if len(unknown):
        problems.append(
            f"category ids that are not in {truth.source}: {offenders(unknown)}; "
            "write the file's category ids, not class indices"
        )
    problems += _bad_rows(
        detections, ~np.isfinite(detections.scores), "scores that are NaN or infinite", detections.scores, _MEND
    )
    if detections.boxes is not None:
        finite = np.isfinite(detections.boxes).all(axis=1)
        problems += _bad_rows(detections, ~finite, "boxes that are NaN or infinite", detections.boxes, _MEND)
        negative = finite & (detections.boxes[:, 2:] < 0).any(axis=1)
        what = "boxes with negative width or height (bbox is [x, y, width, height], not corners)"
        problems += _bad_rows(detections, negative, what, detections.boxes, "write x2 - x1 and y2 - y1")
    if detections.masks is not None:
        wrong = known & (detections.masks.sizes != truth.sizes[row]).any(axis=1)
        what = "masks whose RLE size is not the [height, width] of their image"
        mend = "paste masks into an image of the annotated size before they are encoded"
        problems += _bad_rows(detections, wrong, what, detections.masks.sizes, mend)
    raise_problems([f"{source}: {problem}" for problem in problems])


def _bad_rows(detections: Detections, bad: np.ndarray, what: str, values: np.ndarray, mend: str) -> list[str]:
    rows = np.flatnonzero(bad)
    if not len(rows):
        return []
    shown = [f"row {r} (image {detections.image_ids[r]}): {values[r].tolist()}" for r in rows[:5]]
    return [f"{what}: {offenders(shown, len(rows))}; {mend}"]
