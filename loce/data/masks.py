"""Instance masks as small crops, cut to their pixels: resized and sampled without a full-size mask.

A full-size mask of every instance of a crowded image costs hundreds of megabytes; the pixels that differ from zero
cost a few. Cutting is exact: the rasteriser fills the polygon on the whole canvas, as run lengths, and only the run
lengths are cut. (Shifting the polygon instead is not exact: the rasteriser's rounding depends on the position.)
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MARGIN = 2  # pixels of zeros around a mask, so that bilinear sampling near its edge reads what the full mask would give
Crop = tuple[np.ndarray, tuple[int, int]]  # bits (h, w) uint8 of a mask, and where they lie: (x0, y0)
SHEET_PIXELS = 1 << 21  # at most on one sheet, unless a single mask has more: a sheet becomes float to be sampled


@dataclass(frozen=True)
class CroppedMasks:
    """N masks of one resized image, cut to what they cover, on sheets: crops of similar size lie on one sheet.

    bits: (S,) uint8, all sheets one after the other. shapes: of each sheet (crops, height, width), host integers, so
    that no device has to be asked. windows: (N, 4) int64, each crop's x0, y0, width and height in the image, at least
    1 x 1. places: (N, 2) int64, its sheet and where on that. size: (height, width) of the image.

    A crop lies in the upper left corner of its part of the sheet, which is zero elsewhere; only its last column and row
    are there twice. They are zero inside the image (the margin), and at the image's right and lower border they make
    RoIAlign see what it sees at the border of the full mask, for boxes that were clipped to the image.
    """

    bits: Tensor
    shapes: tuple[tuple[int, int, int], ...]
    windows: Tensor
    places: Tensor
    size: tuple[int, int]

    @staticmethod
    def pack(crops: Sequence[Crop], size: tuple[int, int]) -> "CroppedMasks":
        """From crops (bits (h, w) uint8, corner (x0, y0)) of an image of `size` (height, width)."""
        windows = [(x0, y0, bits.shape[1], bits.shape[0]) for bits, (x0, y0) in crops]
        places = np.zeros((len(crops), 2), np.int64)
        sheets: list[np.ndarray] = []
        for rows in _of_similar_size([bits.shape for bits, _ in crops]):
            places[rows] = [(len(sheets), slot) for slot in range(len(rows))]
            sheets.append(_sheet([crops[row][0] for row in rows]))
        flat = np.concatenate([sheet.ravel() for sheet in sheets]) if sheets else np.zeros(0, np.uint8)
        shapes = tuple((len(sheet), sheet.shape[1], sheet.shape[2]) for sheet in sheets)
        table = torch.tensor(windows, dtype=torch.int64).reshape(-1, 4)
        return CroppedMasks(torch.from_numpy(flat), shapes, table, torch.from_numpy(places), size)

    def __len__(self) -> int:
        return self.windows.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "CroppedMasks":
        """The same masks on another device."""
        bits, windows, places = (x.to(device, non_blocking=non_blocking) for x in self._tensors())
        return CroppedMasks(bits, self.shapes, windows, places, self.size)

    def pin_memory(self) -> "CroppedMasks":
        """In page-locked memory (a DataLoader calls this)."""
        bits, windows, places = (x.pin_memory() for x in self._tensors())
        return CroppedMasks(bits, self.shapes, windows, places, self.size)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """As of a tensor: another stream than the one that made it uses it."""
        for x in self._tensors():
            x.record_stream(stream)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.bits, self.windows, self.places

    def sheets(self) -> list[Tensor]:
        """Each sheet, (crops, height, width) uint8."""
        parts = self.bits.split([math.prod(shape) for shape in self.shapes])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def crops(self) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """As they were packed, (bits (h, w) uint8, corner (x0, y0)): for drawing and tests, waits for the device."""
        sheets = self.sheets()
        for (sheet, slot), (x0, y0, width, height) in zip(self.places.tolist(), self.windows.tolist(), strict=True):
            yield sheets[sheet][slot, :height, :width], (x0, y0)

    def full(self) -> Tensor:
        """(N, H, W) uint8 at full size: for drawing and tests, not for training."""
        masks = self.bits.new_zeros((len(self), *self.size))
        for mask, (crop, (x0, y0)) in zip(masks, self.crops(), strict=True):
            mask[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = crop
        return masks


def _of_similar_size(shapes: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
    """Rows of crops (h, w) whose longer sides differ by less than a factor of 2; a group fits on one sheet.

    Crops of 5 x 3, 20 x 30 and 6 x 7 pixels have longer sides of 3, 5 and 3 bits: rows [0, 2] and [1].
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for row, shape in enumerate(shapes):
        groups[max(shape).bit_length()].append(row)
    for rows in groups.values():
        height, width = (max(shapes[row][side] for row in rows) + 1 for side in (0, 1))
        number = max(1, SHEET_PIXELS // (height * width))
        yield from (rows[first : first + number] for first in range(0, len(rows), number))


def _sheet(crops: Sequence[np.ndarray]) -> np.ndarray:
    """(crops, height, width) uint8: see `CroppedMasks`."""
    height, width = (max(crop.shape[side] for crop in crops) + 1 for side in (0, 1))
    sheet = np.zeros((len(crops), height, width), np.uint8)
    for part, crop in zip(sheet, crops, strict=True):
        h, w = crop.shape
        part[:h, :w] = crop
        part[h, :w] = crop[-1]
        part[: h + 1, w] = part[: h + 1, w - 1]
    return sheet


def cut_runs(runs: np.ndarray, height: int) -> Crop:
    """The tight crop of a mask given as run lengths: (bits (h, w) uint8, (x0, y0)); (0, 0) bits for an empty mask.

    runs: (R,) int64, zeros first, going down the columns of a canvas of `height` rows. With 3 rows and runs [4, 3, 5]:

        start, stop   [4], [7]               the ones are pixels 4 to 6: column 1 below its top, and the top of column 2
        x0, x1        4 // 3, 6 // 3 + 1     columns 1 to 2; y0, y1 = 0, 3, since a run goes on in the next column
        edges         [4, 7] - 3 = [1, 4]    counted from the first pixel of column 1
        lengths       [1, 3, 2]              0 1 1 | 1 0 0, the two columns of the crop
    """
    ends = np.cumsum(runs)
    stop = ends[1::2]
    start = stop - runs[1::2]
    filled = stop > start
    start, stop = start[filled], stop[filled]
    if not len(start):
        return np.zeros((0, 0), np.uint8), (0, 0)
    x0, x1 = int(start[0] // height), int((stop[-1] - 1) // height) + 1
    if (start // height == (stop - 1) // height).all():
        y0, y1 = int((start % height).min()), int(((stop - 1) % height).max()) + 1
    else:  # a run that goes on in the next column touches the lower and the upper border
        y0, y1 = 0, height
    edges = np.stack([start, stop], axis=1).ravel() - x0 * height
    lengths = np.diff(edges, prepend=0, append=(x1 - x0) * height)
    bits = np.repeat(np.arange(len(lengths), dtype=np.uint8) & 1, lengths)
    return bits.reshape(x1 - x0, height)[:, y0:y1].T, (x0, y0)


def nearest_source(old: int, new: int) -> np.ndarray:
    """(new,) int64: the source pixel of each pixel when `old` pixels are resized to `new` by OpenCV's INTER_NEAREST.

    floor(i * old / new), with the ratio rounded the way OpenCV rounds it (in doubles, as 1 / (new / old)).
    """
    return np.minimum(np.floor(np.arange(new) * (1.0 / (new / old))).astype(np.int64), old - 1)


def resize_crop(
    bits: np.ndarray,
    corner: tuple[int, int],
    source_x: np.ndarray,
    source_y: np.ndarray,
    flip: bool,
    size: tuple[int, int] | None = None,
) -> Crop:
    """The crop (bits (h, w), corner (x0, y0)) of a mask after a nearest resize of the whole mask and a flip.

    source_x, source_y: `nearest_source` of both sides, or the part of it that is shown; size: (height, width) of the
    canvas that this lies on, from its upper left corner on; None: it is all of it. The result has a zero margin, cut at
    the canvas's border; a mask without pixels becomes one zero. Along x, from 8 pixels to 4, for a crop of the columns
    3 to 5:

        source_x      [0, 2, 4, 6]           the column that each new pixel shows
        left, right   2, 3                   where 3 and 3 + 3 belong in it: new pixel 2 alone shows the crop
        x0, x1        0, 4                   with MARGIN = 2 on both sides, inside the image
        picked        column 4 - 3 = 1       of the crop, put at 2 - 0 of the result
    """
    (left, right), (top, bottom) = (
        np.searchsorted(source, [first, first + count])
        for source, first, count in zip((source_x, source_y), corner, bits.shape[::-1], strict=True)
    )
    if left == right or top == bottom:
        return np.zeros((1, 1), np.uint8), (0, 0)
    picked = bits[np.ix_(source_y[top:bottom] - corner[1], source_x[left:right] - corner[0])]
    if flip:
        left, right, picked = len(source_x) - right, len(source_x) - left, picked[:, ::-1]
    height, width = size or (len(source_y), len(source_x))
    x0, x1 = max(0, left - MARGIN), min(width, right + MARGIN)
    y0, y1 = max(0, top - MARGIN), min(height, bottom + MARGIN)
    resized = np.zeros((y1 - y0, x1 - x0), np.uint8)
    resized[top - y0 : bottom - y0, left - x0 : right - x0] = picked
    return resized, (int(x0), int(y0))
