"""Every segmentation of a data set in flat arrays, and the run lengths each stands for.

Polygon corners are kept in fifths of a pixel, as integers: the COCO mask library rounds each corner to that grid before
it fills the polygon, so nothing of the mask is lost and a corner costs 4 bytes. Run-length codes, compressed or not,
are kept as compressed bytes.
"""

from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

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
    """

    corners: np.ndarray
    part_bounds: np.ndarray
    first_part: np.ndarray
    rle_bytes: np.ndarray
    first_byte: np.ndarray

    def runs(self, rows: np.ndarray, height: int, width: int) -> list[np.ndarray]:
        """Run lengths (int64: zeros first, column by column) of annotations `rows` on a canvas of the image's size."""
        parts: list[np.ndarray] = []
        owned = []
        for row in rows:
            mine = range(self.first_part[row], self.first_part[row + 1])
            owned.append(slice(len(parts), len(parts) + len(mine)))
            parts.extend(self._polygon(part) for part in mine)
        codes = coco_mask.frPyObjects(parts, height, width) if parts else []
        return [self._row_runs(row, codes[part]) for row, part in zip(rows, owned, strict=True)]

    def _polygon(self, part: int) -> np.ndarray:
        """Corners (float64, pixels) that the rasteriser rounds back to exactly the stored fifths.

        It truncates 5 x + 0.5 towards zero, hence the step down below zero.
        """
        corners = self.corners[self.part_bounds[part] : self.part_bounds[part + 1]].astype(np.float64)
        return (corners - (corners < 0)) / GRID

    def _row_runs(self, row: int, codes: list[dict[str, Any]]) -> np.ndarray:
        if codes:
            return decode_runs((codes[0] if len(codes) == 1 else coco_mask.merge(codes))["counts"])
        return decode_runs(self.rle_bytes[self.first_byte[row] : self.first_byte[row + 1]].tobytes())


def decode_runs(counts: bytes) -> np.ndarray:
    """Run lengths (int64) of a compressed COCO code; ValueError where it is broken.

    A number is written in characters of 5 bits, low bits first, from "0" on; bit 6 says that more follow, the highest
    bit of the last one is the sign. From the fourth number on, the difference to the one two places before is written.
    """
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    more = (digits & 32) > 0
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or more[-1]:
        raise ValueError("not a compressed run-length code")
    last = np.flatnonzero(~more)
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > 8:
        raise ValueError("a run length of more than 8 characters")
    place = np.arange(len(digits)) - np.repeat(first, length)
    numbers = np.add.reduceat((digits & 31) << (5 * place), first)
    numbers -= np.where(digits[last] & 16, np.int64(1) << (5 * length), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


class SegmentationBuilder:
    """Takes segmentations as the JSON has them, one annotation after the other, into growing flat arrays."""

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[int]] = {}  # reason -> the first rows
        self.rle_sizes: list[tuple[int, int, int]] = []  # row, height, width: checked when the images are known
        self._corners = array("d")
        self._chunks: list[np.ndarray] = []
        self._values = 0
        self._part_bounds = array("q", [0])
        self._first_part = array("q", [0])
        self._first_byte = array("q", [0])
        self._rle_bytes = bytearray()

    def add(self, segmentation: Any) -> None:
        """The next annotation's segmentation; parts that cannot be used are counted in `dropped`."""
        if isinstance(segmentation, dict):
            self._add_rle(segmentation)
        elif isinstance(segmentation, list) and segmentation:
            for part in segmentation:
                self._add_part(part)
        else:
            self.drop(BAD_SHAPE, len(self._first_byte) - 1)
        self._first_part.append(len(self._part_bounds) - 1)
        self._first_byte.append(len(self._rle_bytes))

    def drop(self, reason: str, row: int) -> None:
        """One more mask, or part of one, of annotation `row` that cannot be used."""
        self.dropped[reason] += 1
        if self.dropped[reason] <= EXAMPLES:
            self.examples.setdefault(reason, []).append(row)

    def usable(self) -> np.ndarray:
        """(A,) bool: there is a polygon part or a run-length code."""
        return (np.diff(np.array(self._first_part)) > 0) | (np.diff(np.array(self._first_byte)) > 0)

    def _add_part(self, part: Any) -> None:
        if not _is_polygon(part):
            self.drop(BAD_PART, len(self._first_byte) - 1)
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
        try:
            height, width = (int(side) for side in code["size"])
            counts = code["counts"]
            if isinstance(counts, list):
                uncompressed = {"counts": [int(run) for run in counts], "size": [height, width]}
                if min(uncompressed["counts"]) < 0 or sum(uncompressed["counts"]) != height * width:
                    raise ValueError("runs do not fill the canvas")
                counts = coco_mask.frPyObjects(uncompressed, height, width)["counts"]
            else:
                counts = counts.encode("ascii")
                runs = decode_runs(counts)
                if runs.min() < 0 or runs.sum() != height * width:
                    raise ValueError("runs do not fill the canvas")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            self.drop(BAD_RLE, len(self._first_byte) - 1)
            return
        self.rle_sizes.append((len(self._first_byte) - 1, height, width))
        self._rle_bytes += counts

    def finish(self) -> Segmentations:
        """All that was added, as arrays."""
        self._round_corners()
        return Segmentations(
            corners=np.concatenate(self._chunks),
            part_bounds=np.array(self._part_bounds, dtype=np.int64),
            first_part=np.array(self._first_part, dtype=np.int64),
            rle_bytes=np.frombuffer(bytes(self._rle_bytes), np.uint8),
            first_byte=np.array(self._first_byte, dtype=np.int64),
        )


def _is_polygon(part: Any) -> bool:
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        return False
    try:
        return min(part) > -FARTHEST and max(part) < FARTHEST
    except TypeError:  # something in it is not a number
        return False
