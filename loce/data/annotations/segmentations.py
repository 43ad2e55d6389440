"""Segmentations of a data set in flat arrays, and the masks they stand for.

Polygon corners are kept in fifths of a pixel, as integers: the COCO mask library rounds each corner to that grid before
it fills the polygon, so nothing of the mask is lost and a corner costs 4 bytes. Run-length codes, compressed or not,
are kept as compressed bytes.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from loce.data.annotations.run_lengths import decode_codes, measure_codes
from loce.data.annotations.values import as_list, is_whole, require_types

GRID = 5  # steps per pixel of the COCO rasteriser
FARTHEST = 65536.0  # pixels; a corner beyond is a mistake in the file, and would cost the rasteriser gigabytes
EXAMPLES = 5  # rows kept for each reason
_CHUNK = 1 << 20

BAD_PART = "polygon parts with fewer than 3 points, an odd number of coordinates, or no usable number in one"
BAD_SHAPE = "segmentation missing, empty or neither polygons nor a run-length code"
BAD_RLE = "run-length code broken or of another size than the image"
BAD_MASKS = (BAD_PART, BAD_SHAPE, BAD_RLE)


@dataclass(frozen=True, kw_only=True)
class Segmentations:
    """A annotations, P polygon parts; every annotation has parts or a run-length code, or neither (unusable).

    corners: (V,) int16 or int32, x, y, x, y ... in fifths of a pixel. part_bounds: (P+1,) int64 into corners.
    first_part: (A+1,) int64 into parts. rle_bytes: (R,) uint8. first_byte: (A+1,) int64 into rle_bytes.

    Example: annotation 0 is a triangle and a square, annotation 1 a run-length code of 9 bytes, annotation 2 unusable:
        part_bounds   [0, 6, 14]        x, y of 3 corners, then of 4
        first_part    [0, 2, 2, 2]      annotation 0 has parts 0 and 1, the others have none
        first_byte    [0, 0, 9, 9]      annotation 1 has bytes 0 to 8
    """

    corners: np.ndarray
    part_bounds: np.ndarray
    first_part: np.ndarray
    rle_bytes: np.ndarray
    first_byte: np.ndarray

    def usable(self) -> np.ndarray:
        """(A,) bool: there is a polygon part or a run-length code."""
        return (np.diff(self.first_part) > 0) | (np.diff(self.first_byte) > 0)

    def rles(self, rows: Iterable[int], height: int, width: int) -> list[dict[str, Any]]:
        """pycocotools' compressed codes of annotations `rows`, which are usable, on a canvas of the image's size."""
        rows = np.asarray(list(rows), dtype=np.int64)
        first, last = self.first_part[rows], self.first_part[rows + 1]
        parts = ranges(first, last)
        begin, end = self.part_bounds[parts], self.part_bounds[parts + 1]
        # Corners (pixels) that the rasteriser rounds back to exactly the stored fifths: it truncates 5 x + 0.5 towards
        # zero, hence the step down below zero.
        corners = self.corners[ranges(begin, end)].astype(np.float64)
        corners = (corners - (corners < 0)) / GRID
        polygons = np.split(corners, np.cumsum(end - begin)[:-1])
        codes = coco_mask.frPyObjects(polygons, height, width) if len(parts) else []
        cuts = np.append(0, np.cumsum(last - first)).tolist()
        owned = zip(rows.tolist(), pairwise(cuts), strict=True)
        merged = []
        for row, (begin, end) in owned:
            counts = self.rle_bytes[self.first_byte[row] : self.first_byte[row + 1]]
            own = codes[begin:end] or [{"size": [height, width], "counts": counts.tobytes()}]
            merged.append(own[0] if len(own) == 1 else coco_mask.merge(own))
        return merged

    def runs(self, rows: np.ndarray, height: int, width: int) -> list[np.ndarray]:
        """Run lengths (int64: zeros first, column by column) of annotations `rows` on a canvas of the image's size."""
        codes = [code["counts"] for code in self.rles(rows, height, width)]
        bounds = np.cumsum([0, *map(len, codes)])
        runs, first, _ = decode_codes(np.frombuffer(b"".join(codes), np.uint8), bounds)
        return [runs[begin:end].astype(np.int64) for begin, end in pairwise(first)]


def ranges(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """first[0] ... last[0] - 1, first[1] ... last[1] - 1 and so on in one line; first, last: (N,) int64."""
    lengths = last - first
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - ends + lengths, lengths)


class SegmentationBuilder:
    """Flat arrays that grow by the segmentation of one annotation after the other, as the JSON has it."""

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[int]] = {}  # reason -> the first rows
        self._corners = array("d")
        self._chunks: list[np.ndarray] = []
        self._values = 0
        self._part_bounds = array("q", [0])
        self._first_part = array("q", [0])
        self._code_rows, self._code_sizes = array("q"), array("q")  # size: height, width, as the code says
        self._code_bounds = array("q", [0])
        self._codes = bytearray()

    def add_all(self, segmentations: Sequence[Any]) -> None:
        """Those of the next annotations: at once where all are polygons as they should be."""
        try:
            require_types(segmentations, list)
            parts = list(chain.from_iterable(segmentations))
            require_types(parts, list)
            lengths, counts = np.array([*map(len, parts)]), np.array([*map(len, segmentations)])
            corners = array("d", chain.from_iterable(parts))
        except (TypeError, OverflowError):
            corners = array("d")
        fine = len(corners) and counts.min() > 0 and lengths.min() >= 6 and not (lengths % 2).any()
        if not fine or not (np.abs(np.frombuffer(corners)) < FARTHEST).all():  # not NaN either
            for segmentation in segmentations:
                self.add(segmentation)
            return
        self._corners.extend(corners)
        self._part_bounds.frombytes((self._values + np.cumsum(lengths)).tobytes())
        self._first_part.frombytes((self._first_part[-1] + np.cumsum(counts)).tobytes())
        self._values += len(corners)
        if len(self._corners) > _CHUNK:
            self._round_corners()

    def add(self, segmentation: Any) -> None:
        """The next annotation's segmentation; parts that cannot be used are counted in `dropped`."""
        parts = as_list(segmentation)
        if isinstance(segmentation, dict):
            self._add_rle(segmentation)
        elif isinstance(parts, list) and parts:
            for part in parts:
                self._add_part(as_list(part))
        else:
            self._drop(BAD_SHAPE)
        self._first_part.append(len(self._part_bounds) - 1)

    def add_none(self, number: int = 1) -> None:
        """Those of the next annotations, which are not needed."""
        self._first_part.extend([len(self._part_bounds) - 1] * number)

    def _drop(self, reason: str, row: int | None = None) -> None:
        """One more mask, or part of one, of an annotation (None: the next one) that cannot be used."""
        self.dropped[reason] += 1
        row, rows = len(self._first_part) - 1 if row is None else row, self.examples.setdefault(reason, [])
        if len(rows) < EXAMPLES and row not in rows:
            rows.append(row)

    def _add_part(self, part: Any) -> None:
        if not _is_polygon(part):
            self._drop(BAD_PART)
            return
        self._corners.extend(part)
        self._values += len(part)
        self._part_bounds.append(self._values)
        if len(self._corners) > _CHUNK:
            self._round_corners()

    def _round_corners(self) -> None:
        fifths = np.trunc(GRID * np.array(self._corners, dtype=np.float64) + 0.5)
        small = not fifths.size or np.abs(fifths).max() < np.iinfo(np.int16).max
        self._chunks.append(fifths.astype(np.int16 if small else np.int32))
        self._corners = array("d")

    def _add_rle(self, code: dict[str, Any]) -> None:
        packed = pack_code(code)
        if packed is None:
            self._drop(BAD_RLE)
            return
        counts, size = packed
        self._codes += counts
        self._code_rows.append(len(self._first_part) - 1)
        self._code_bounds.append(len(self._codes))
        self._code_sizes.extend(size)

    def finish(self, sizes: np.ndarray | None = None) -> Segmentations:
        """All that was added, as arrays. sizes: (A, 2) height and width of each annotation's image, if known.

        Run-length codes that do not fill their image are dropped here, where images are known.
        """
        self._round_corners()
        rows, counts = np.array(self._code_rows, dtype=np.int64), np.frombuffer(bytes(self._codes), np.uint8)
        bounds, said = np.array(self._code_bounds), np.array(self._code_sizes, dtype=np.int64).reshape(-1, 2)
        good = measure_codes(counts, bounds, said)[0]
        if sizes is not None:
            good &= (said == sizes[rows]).all(axis=1)
        for row in rows[~good].tolist():
            self._drop(BAD_RLE, row)
        lengths = np.zeros(len(self._first_part) - 1, dtype=np.int64)
        lengths[rows] = np.diff(bounds) * good
        return Segmentations(
            corners=np.concatenate(self._chunks),
            part_bounds=np.array(self._part_bounds, dtype=np.int64),
            first_part=np.array(self._first_part, dtype=np.int64),
            rle_bytes=counts[np.repeat(good, np.diff(bounds))],
            first_byte=np.append(0, np.cumsum(lengths)),
        )


def pack_code(code: Any) -> tuple[bytes, tuple[int, int]] | None:
    """Compressed counts and (height, width) of a run-length code of either kind; None where it cannot be one.

    Compressed counts are not looked into: `measure_codes` does that for many at a time.
    """
    size, counts = (as_list(code.get("size")), as_list(code.get("counts"))) if isinstance(code, dict) else (None, None)
    # Numbers may stand in arrays without dimensions.
    size, counts = ([as_list(item) for item in part] if isinstance(part, list) else part for part in (size, counts))
    if not isinstance(size, list) or len(size) != 2 or not all(is_whole(side) and 0 < side < FARTHEST for side in size):
        return None
    height, width = int(size[0]), int(size[1])
    if isinstance(counts, list):
        if not all(is_whole(run) and run >= 0 for run in counts) or sum(map(int, counts)) != height * width:
            return None
        packed = coco_mask.frPyObjects({"counts": list(map(int, counts)), "size": [height, width]}, height, width)
        return packed["counts"], (height, width)
    if not isinstance(counts, (str, bytes, bytearray)) or not counts.isascii():
        return None
    return counts.encode() if isinstance(counts, str) else bytes(counts), (height, width)


def _is_polygon(part: Any) -> bool:
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        return False
    try:
        return min(part) > -FARTHEST and max(part) < FARTHEST and abs(sum(part)) < FARTHEST * len(part)  # no NaN
    except (TypeError, ValueError):  # something in it is not a number, or an array
        return False
