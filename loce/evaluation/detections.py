"""Detections in flat arrays, and reading and checking of COCO's results format."""

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pycocotools import mask as coco_mask

from loce.data.annotations.json_file import open_json
from loce.data.annotations.plausible import suspicious_boxes
from loce.data.annotations.reader import LONGEST, Mistakes, short
from loce.data.annotations.run_lengths import measure_codes
from loce.data.annotations.segmentations import pack_code, ranges
from loce.data.annotations.values import as_list, is_whole, pack_numbers, pack_rows, pack_whole, require_types
from loce.evaluation.annotations import GroundTruth, positions
from loce.utils.errors import FEW, UserError, first_few, raise_problems
from loce.utils.files import atomic_write
from loce.utils.progress import watched

T = TypeVar("T")
_KINDS: dict[type, str] = {dict: "an object, as annotation files are", str: "a text", type(None): "null"}
ENCODE = "write what pycocotools.mask.encode gives, its counts decoded as ASCII"
_MEND = "leave these rows out, or mend what made them: a diverged model, most often"
FARTHEST_BOX = 1e12  # pixels; beyond, areas and unions overflow or lose their pixels
_COMPARED = 200  # rows whose boxes are compared with their masks
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

    @cached_property
    def measures(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) bool: the code is sound and fills its image; (N,) int64: its area in px^2."""
        return measure_codes(self.counts, self.offsets, self.sizes)

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
    masks: N masks or None. Among equal scores of an image the earlier row ranks first. ranks: (N,) int32, how many
    better detections the image had before unverified categories were left out, or None where these rows are all.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray | None = None
    masks: Masks | None = None
    ranks: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("category_ids", "scores", "boxes", "masks", "ranks"):
            column = getattr(self, name)
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

    def some(self, rows: np.ndarray) -> "Detections":
        """Some rows, ascending."""
        masks = None
        if self.masks is not None:
            starts, ends = self.masks.offsets[rows], self.masks.offsets[rows + 1]
            counts = self.masks.counts[ranges(starts, ends)]
            masks = Masks(counts=counts, offsets=offsets_of(ends - starts), sizes=self.masks.sizes[rows])
        names = ("image_ids", "category_ids", "scores", "boxes", "ranks")
        columns = {name: None if (column := getattr(self, name)) is None else column[rows] for name in names}
        return Detections(**columns, masks=masks)  # type: ignore[arg-type]

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
    ranks = [part.ranks for part in parts if part.ranks is not None]
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
        ranks=np.concatenate(ranks) if len(ranks) == len(parts) else None,
    )


def has_names_for_ids(path: str | Path) -> bool:
    """Whether a results file is one of scripts/predict.py, which knows files and no image ids."""
    with open(path, "rb") as file:
        head = file.read(1 << 16).lstrip()
    return head[:1] == b"[" and b'"file"' in head and b'"image_id"' not in head


def read_results(results: str | Path | list[dict[str, Any]], images: Mapping[str, int] | None = None) -> Detections:
    """Detections from a JSON file in the official results format or from a list of such dicts (left as they are).

    images: name -> id, for results that name the `file` of their image instead; the longest end of a path that one
    image alone has decides.
    UserError with the first five offenders of each kind of mistake, and how many there are, where rows are malformed.
    """
    mistakes, parts, row = Mistakes(), [], 0
    if isinstance(results, (str, Path)):
        source = str(results)
        with open_json(source, "results file") as (stream, work):
            if stream.peek() != "[":
                kind = _KINDS.get(type(stream.value()), "a single value")
                stream.end()
                raise UserError(f"{source}: is {kind}, not a list of results")
            id_of = _by_end(images or {})
            for part in stream.elements():
                if images is not None:
                    part = [_with_id(entry, number, id_of, mistakes) for number, entry in enumerate(part, row)]
                parts.append(_columns(part, row, mistakes))
                row, work.done = row + len(part), stream.offset >> 20
            stream.end()
    elif isinstance(results, (list, tuple)):
        source = "results"
        for row in range(0, len(results), _PART):
            parts.append(_columns(results[row : row + _PART], row, mistakes))
    else:
        raise UserError(f"results must be a path, a list of result dicts or Detections, not {type(results).__name__}")
    mistakes.raise_all(source)
    return concatenate(parts)


def _by_end(images: Mapping[str, int]) -> dict[str, int]:
    """Every end of the names of images that one image alone has: "b.jpg" and "a/b.jpg" of "a/b.jpg"."""
    ends = [("/".join(name.split("/")[n:]), i) for name, i in images.items() for n in range(name.count("/") + 1)]
    often = Counter(end for end, _ in ends)
    return {end: i for end, i in ends if often[end] == 1}


def _with_id(entry: Any, row: int, id_of: Mapping[str, int], mistakes: Mistakes) -> Any:
    """A result with the id of the image whose file it names."""
    if not isinstance(entry, Mapping) or not isinstance(name := entry.get("file"), str):
        return entry
    parts = name.replace("\\", "/").split("/")
    found = next((id_of[end] for n in range(len(parts)) if (end := "/".join(parts[n:])) in id_of), None)
    if found is None:
        mistakes.add("results whose file is no image of the annotation file, or may be several", f"row {row}: {name}")
    return {**entry, "image_id": -1 if found is None else found}


def _columns(entries: Sequence[Any], first: int, mistakes: Mistakes) -> Detections:
    """One part of a results list as columns; rows are counted from `first`. What is wrong is added to `mistakes`."""
    none = np.zeros(0, dtype=np.int64)
    empty = Detections(image_ids=none, category_ids=none, scores=np.zeros(0))
    before = mistakes.counts.total()
    # Results in memory may be other mappings than dicts; what is none ends here.
    if set(map(type, entries)) != {dict}:
        for row, entry in enumerate(entries, first):
            if not isinstance(entry, Mapping):
                mistakes.add("results that are no objects", f"row {row}: {short(entry)}")
        if not len(entries) or mistakes.counts.total() > before:
            return empty

    def column(key: str, pack: Callable[[list[Any]], T], plain: Callable[[Any], Any], what: str) -> T | None:
        """`pack` of the values of a key; where it does not take them as they are, of their `plain` forms."""
        try:
            return pack(list(map(itemgetter(key), entries)))
        except (TypeError, ValueError, OverflowError, KeyError):
            values = [plain(entry.get(key)) for entry in entries]
        bad = [row for row, value in enumerate(values) if value is None]
        for row in bad:
            entry = entries[row]
            told = f"row {first + row} (image {short(entry.get('image_id'))}): {short(entry.get(key))}"
            mistakes.add(f"results whose {key} is not {what}", told)
        return None if bad else pack(values)

    # A column a key; boxes and masks where any row has one (then all must).
    image_ids = column("image_id", pack_whole, _plain_whole, "a whole number of 64 bits")
    category_ids = column("category_id", pack_whole, _plain_whole, "a whole number of 64 bits")
    scores = column("score", pack_numbers, _plain_float, "a number")
    boxes = masks = None
    if any("bbox" in entry for entry in entries):
        boxes = column("bbox", partial(pack_rows, width=4), _plain_box, "[x, y, width, height], four numbers")
    if any("segmentation" in entry for entry in entries):
        what = f"a run-length code with size and counts that fill it (not polygons); {ENCODE}"
        masks = column("segmentation", _pack_masks, _plain_mask, what)
    if not any("bbox" in entry or "segmentation" in entry for entry in entries):
        mistakes.add("results that have neither bbox nor segmentation", f"row {first}")
    if mistakes.counts.total() > before or image_ids is None or category_ids is None or scores is None:
        return empty
    return Detections(image_ids=image_ids, category_ids=category_ids, scores=scores, boxes=boxes, masks=masks)


def _pack_masks(values: list[Any]) -> Masks:
    require_types(values, dict)
    counts, sizes = [value["counts"] for value in values], [value["size"] for value in values]
    require_types(counts, str)
    require_types(sizes, list)
    text = "".join(counts)
    if set(map(len, sizes)) != {2} or set(map(type, chain.from_iterable(sizes))) != {int} or not text.isascii():
        raise ValueError("not a compressed code")
    sides = np.frombuffer(array("q", chain.from_iterable(sizes)), np.int64).reshape(-1, 2)
    if sides.min() < 1 or sides.max() > LONGEST:
        raise ValueError("no size of an image")
    lengths = np.fromiter(map(len, counts), dtype=np.int64, count=len(counts))
    flat = np.frombuffer(text.encode(), dtype=np.uint8)
    return Masks(counts=flat, offsets=offsets_of(lengths), sizes=sides.astype(np.int32))


def _plain_whole(value: Any) -> int | None:
    value = as_list(value)
    return int(value) if is_whole(value) else None


def _plain_float(value: Any) -> float | None:
    """NaN and infinity are numbers here: `check_detections` tells them apart."""
    value = as_list(value)  # of an array without dimensions its number
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _plain_box(value: Any) -> list[float] | None:
    sides = as_list(value)
    sides = [_plain_float(side) for side in sides] if isinstance(sides, list) and len(sides) == 4 else [None]
    return None if None in sides else sides


def _plain_mask(value: Any) -> dict[str, Any] | None:
    packed = pack_code(value)
    return None if packed is None else {"counts": packed[0].decode(), "size": list(packed[1])}


def check_detections(detections: Detections, truth: GroundTruth, source: str) -> None:
    """UserError naming the first five offenders of each kind: ids that `truth` does not have, bad numbers and masks."""
    row, known = positions(truth.image_ids, detections.image_ids)
    problems = []
    # Ids that the annotation file does not have.
    unknown = np.unique(detections.image_ids[~known])
    if len(unknown):
        total = len(np.unique(detections.image_ids))
        problems.append(
            f"{len(unknown)} of the {total} image ids are not in {truth.source}: {first_few(unknown)}; "
            "use the annotation file of the split that the results were made for"
        )
    unknown = np.unique(detections.category_ids[~positions(truth.category_ids, detections.category_ids)[1]])
    if len(unknown):
        problems.append(
            f"category ids that are not in {truth.source}: {first_few(unknown)}; "
            "write the file's category ids, not class indices"
        )
    # Scores and boxes that are no numbers, or cannot be meant.
    problems += _bad_rows(
        detections, ~np.isfinite(detections.scores), "scores that are NaN or infinite", detections.scores, _MEND
    )
    if detections.boxes is not None:
        finite = np.isfinite(detections.boxes).all(axis=1)
        problems += _bad_rows(detections, ~finite, "boxes that are NaN or infinite", detections.boxes, _MEND)
        far = finite & (np.abs(detections.boxes) > FARTHEST_BOX).any(axis=1)
        problems += _bad_rows(detections, far, "boxes that no image can hold", detections.boxes, _MEND)
        negative = finite & (detections.boxes[:, 2:] < 0).any(axis=1)
        what = "boxes with negative width or height (bbox is [x, y, width, height], not corners)"
        problems += _bad_rows(detections, negative, what, detections.boxes, "write x2 - x1 and y2 - y1")
    # Masks of another size than their image, or with broken codes.
    if (masks := detections.masks) is not None:
        wrong = known & (masks.sizes != truth.sizes[row]).any(axis=1)
        what = "masks whose RLE size is not the [height, width] of their image"
        mend = "paste masks into an image of the annotated size before they are encoded"
        problems += _bad_rows(detections, wrong, what, masks.sizes, mend)
        what = "masks whose run-length code is broken or does not fill its image"
        problems += _bad_rows(detections, ~masks.measures[0], what, masks.sizes, ENCODE)
    raise_problems([f"{source}: {problem}" for problem in problems])


def suspicions(detections: Detections, truth: GroundTruth, source: str) -> list[str]:
    """Warnings about boxes that are valid but hardly x, y, width, height in pixels."""
    if detections.boxes is None or not len(detections):
        return []
    sizes = truth.sizes[positions(truth.image_ids, detections.image_ids)[0]]
    # Masks of some tell whether the boxes are meant otherwise.
    outline = np.full((len(detections), 4), np.nan)
    if detections.masks is not None:
        some = np.linspace(0, len(detections) - 1, min(len(detections), _COMPARED)).astype(np.int64)
        around = coco_mask.toBbox(detections.masks.rles(some))
        outline[some] = np.concatenate([around[:, :2], around[:, :2] + around[:, 2:]], axis=1)
    told = suspicious_boxes(detections.boxes, sizes, outline, "row")
    return [f"WARNING: {source}: {told}"] if told else []


def _bad_rows(detections: Detections, bad: np.ndarray, what: str, values: np.ndarray, mend: str) -> list[str]:
    rows = np.flatnonzero(bad)
    if not len(rows):
        return []
    shown = [f"row {r} (image {detections.image_ids[r]}): {values[r].tolist()}" for r in rows[:FEW]]
    return [f"{what}: {first_few(shown, len(rows))}; {mend}"]
