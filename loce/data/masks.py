"""Instance masks as small crops: cut to what they cover, resized there, sampled there.

A full-size mask of every instance of a crowded image costs hundreds of megabytes; the pixels that differ from zero
cost a few. Cutting is exact: the rasteriser fills the polygon on the whole canvas, as run lengths, and only the run
lengths are cut. (Shifting the polygon instead is not exact: the rasteriser's rounding depends on the position.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MARGIN = 2  # pixels of zeros around a mask, so that bilinear sampling near its edge reads what the full mask would give


@dataclass(frozen=True)
class CroppedMasks:
    """N masks of one resized image.

    bits: (S,) uint8, all crops row by row, one after the other. windows: (N, 4) int64, each crop's x0, y0, width and
    height in the image; at least 1 x 1. size: (height, width) of the image. largest: (height, width) that holds every
    crop, host integers, so that no device has to be asked.
    """

    bits: Tensor
    windows: Tensor
    size: tuple[int, int]
    largest: tuple[int, int]

    @staticmethod
    def pack(crops: Sequence[tuple[np.ndarray, tuple[int, int]]], size: tuple[int, int]) -> "CroppedMasks":
        """From crops (bits (h, w) uint8, corner (x0, y0)) of an image of `size` (height, width)."""
        windows = [(x0, y0, bits.shape[1], bits.shape[0]) for bits, (x0, y0) in crops]
        flat = np.concatenate([bits.ravel() for bits, _ in crops]) if crops else np.zeros(0, np.uint8)
        largest = (max((w[3] for w in windows), default=1), max((w[2] for w in windows), default=1))
        table = torch.tensor(windows, dtype=torch.int64).reshape(-1, 4)
        return CroppedMasks(torch.from_numpy(flat), table, size, largest)

    def __len__(self) -> int:
        return self.windows.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "CroppedMasks":
        """The same masks on another device."""
        bits, windows = (x.to(device, non_blocking=non_blocking) for x in (self.bits, self.windows))
        return CroppedMasks(bits, windows, self.size, self.largest)

    def pin_memory(self) -> "CroppedMasks":
        """In page-locked memory (a DataLoader calls this)."""
        return CroppedMasks(self.bits.pin_memory(), self.windows.pin_memory(), self.size, self.largest)

    def flip(self) -> "CroppedMasks":
        """Mirrored left to right."""
        x0, y0, width, height = self.windows.unbind(1)
        area = width * height
        row = torch.repeat_interleave(area, output_size=self.bits.numel())
        position = torch.arange(self.bits.numel(), device=self.bits.device) - self._first()[row]
        column = position % width[row]
        bits = torch.empty_like(self.bits)
        bits[self._first()[row] + position - column + width[row] - 1 - column] = self.bits
        windows = torch.stack([self.size[1] - x0 - width, y0, width, height], dim=1)
        return CroppedMasks(bits, windows, self.size, self.largest)

    def crops(self, rows: Tensor) -> Tensor:
        """Crops of instances `rows` (K,) long as (K, h, w) float32 with (h, w) = `largest`; the rest is zero.

        One column and row more than the window repeat its edge. They are zero inside the image (the margin), and at
        the image's right and lower border they make RoIAlign see what it sees at the border of the full mask, for
        boxes that were clipped to the image. Shift boxes by windows[rows, :2].
        """
        windows = self.windows[rows]
        width, height = windows[:, 2, None, None], windows[:, 3, None, None]
        y = torch.arange(self.largest[0], device=self.bits.device)[None, :, None]
        x = torch.arange(self.largest[1], device=self.bits.device)[None, None, :]
        index = torch.minimum(y, height - 1) * width + torch.minimum(x, width - 1)
        values = self.bits[index + self._first()[rows, None, None]]
        return values.float() * ((y <= height) & (x <= width))

    def full(self) -> Tensor:
        """(N, H, W) uint8 at full size: for drawing and tests, not for training."""
        masks = self.bits.new_zeros((len(self), *self.size))
        first = 0
        for mask, (x0, y0, width, height) in zip(masks, self.windows.tolist(), strict=True):
            area = width * height
            mask[y0 : y0 + height, x0 : x0 + width] = self.bits[first : first + area].reshape(height, width)
            first += area
        return masks

    def _first(self) -> Tensor:
        """(N,) where each crop starts in `bits`."""
        area = self.windows[:, 2] * self.windows[:, 3]
        return area.cumsum(0) - area


def cut_runs(runs: np.ndarray, height: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The tight crop of a mask given as run lengths: (bits (h, w) uint8, (x0, y0)); (0, 0) bits for an empty mask.

    runs: (R,) int64, zeros first, going down the columns of a canvas of `height` rows.
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
    bits: np.ndarray, corner: tuple[int, int], source_x: np.ndarray, source_y: np.ndarray, flip: bool
) -> tuple[np.ndarray, tuple[int, int]]:
    """The crop (bits (h, w), corner (x0, y0)) of a mask after a nearest resize of the whole mask and a flip.

    source_x, source_y: `nearest_source` of both sides. The result has a zero margin, cut at the image's border; a mask
    without pixels becomes one zero.
    """
    (left, right), (top, bottom) = (
        np.searchsorted(source, [first, first + count])
        for source, first, count in zip((source_x, source_y), corner, bits.shape[::-1], strict=True)
    )
    if left == right or top == bottom:
        return np.zeros((1, 1), np.uint8), (0, 0)
    x0, x1 = max(0, left - MARGIN), min(len(source_x), right + MARGIN)
    y0, y1 = max(0, top - MARGIN), min(len(source_y), bottom + MARGIN)
    resized = np.zeros((y1 - y0, x1 - x0), np.uint8)
    picked = bits[np.ix_(source_y[top:bottom] - corner[1], source_x[left:right] - corner[0])]
    resized[top - y0 : bottom - y0, left - x0 : right - x0] = picked
    if flip:
        return resized[:, ::-1], (int(len(source_x) - x1), int(y0))
    return resized, (int(x0), int(y0))
