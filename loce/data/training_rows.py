"""Which annotations and images training uses, and how many it leaves out for which reason.

The rules are MMDetection 2.8's (boxes, areas, crowds, small and empty images), plus one: a box that is under 1 pixel
wide or high inside the image is dropped even if it is larger as a whole, since its regression target is not sensible.
"""

from dataclasses import dataclass

import numpy as np

from loce.data.annotation_file import Columns
from loce.data.segmentations import BAD_RLE

MIN_SIDE = 32  # pixels; smaller images are left out of training


@dataclass(frozen=True)
class TrainingRows:
    """rows: (R,) int64 annotations used, image by image; first: (I+1,) int64 into rows; images: (T,) int64 images used.

    dropped: reason -> number, of annotations, polygon parts or images; every annotation counts once.
    """

    rows: np.ndarray
    first: np.ndarray
    images: np.ndarray
    dropped: dict[str, int]


def training_rows(columns: Columns, xywh: np.ndarray, image_of: np.ndarray, sizes: np.ndarray) -> TrainingRows:
    """Sort out what training uses.

    xywh: (A, 4) float64 boxes; image_of: (A,) image of each annotation; sizes: (I, 2) image heights and widths.
    """
    dropped: dict[str, int] = {}
    kept = np.ones(len(xywh), dtype=bool)
    for reason, holds in _drop_reasons(columns, xywh, sizes[image_of]).items():
        dropped[reason] = int((kept & holds).sum())
        kept &= ~holds
    rows = np.flatnonzero(kept)
    rows = rows[np.argsort(image_of[rows], kind="stable")]
    counts = np.bincount(image_of[rows], minlength=len(sizes))
    small = sizes.min(axis=1) < MIN_SIDE
    dropped |= columns.segmentations.dropped
    dropped[f"images with a side under {MIN_SIDE} pixels"] = int(small.sum())
    dropped["images without an annotation that training uses"] = int(((counts == 0) & ~small).sum())
    return TrainingRows(
        rows=rows,
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        images=np.flatnonzero((counts > 0) & ~small),
        dropped={reason: count for reason, count in dropped.items() if count},
    )


def _drop_reasons(columns: Columns, xywh: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Reason -> (A,) bool; the first reason that holds is the one counted. sizes: (A, 2) of each annotation's image."""
    corner, sides = xywh[:, :2], xywh[:, 2:]
    beyond = np.maximum(0, corner + sides - sizes[:, ::-1])
    inside = sides - np.maximum(0, -corner) - beyond  # exactly the width and height where the image holds the box
    return {
        "crowd regions": np.frombuffer(bytes(columns.crowd), np.bool_),
        "annotations marked `ignore`": np.frombuffer(bytes(columns.ignore), np.bool_),
        "boxes that are not four numbers": np.isnan(xywh).any(axis=1),
        "boxes under 1 pixel wide or high": ~(sides >= 1).all(axis=1),
        "boxes outside the image": ~(inside > 0).all(axis=1),
        "boxes under 1 pixel wide or high inside the image": ~(inside >= 1).all(axis=1),
        "annotations whose area is not positive": ~(np.array(columns.areas) > 0),
        "annotations without a usable segmentation": ~_usable(columns, sizes),
    }


def _usable(columns: Columns, sizes: np.ndarray) -> np.ndarray:
    """(A,) bool: there is a polygon, or a run-length code of the image's size."""
    usable = columns.segmentations.usable()
    for row, height, width in columns.segmentations.rle_sizes:
        if (height, width) != tuple(sizes[row]):
            usable[row] = False
            columns.segmentations.dropped[BAD_RLE] += 1
    return usable


def clip(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(n, 4) float32 xyxy boxes cut to [0, width] and [0, height]; sizes: (n, 2) heights and widths."""
    return np.minimum(np.maximum(boxes, 0), sizes[:, [1, 0, 1, 0]].astype(np.float32))
