"""Annotations and images that training uses, and counts of what it leaves out, by reason.

The rules are MMDetection 2.8's (boxes, areas, crowds, small and empty images), plus one: a box that is under 1 pixel
wide or high inside the image is dropped even if it is larger as a whole, since its regression target is not sensible.
"""

from dataclasses import dataclass

import numpy as np

from loce.utils.errors import FEW

MIN_SIDE = 32  # pixels; smaller images are left out of training
BAD_BOX = "boxes that are not four numbers"


@dataclass(frozen=True)
class TrainingRows:
    """rows: (R,) int64 annotations used, image by image; first: (I+1,) int64 into rows; images: (T,) int64 images used.

    ignored: (Q,) int64 annotations whose region is neither object nor background, image by image. dropped: reason ->
    number, of annotations or images. examples: reason -> the first rows of annotations (or of images, where the reason
    is about images).
    """

    rows: np.ndarray
    first: np.ndarray
    images: np.ndarray
    ignored: np.ndarray
    dropped: dict[str, int]
    examples: dict[str, list[int]]


def training_rows(
    xywh: np.ndarray,
    areas: np.ndarray,
    image_of: np.ndarray,
    sizes: np.ndarray,
    crowd: np.ndarray,
    ignore: np.ndarray,
    usable: np.ndarray,
    keep_empty: bool = False,
) -> TrainingRows:
    """Sort out what training uses.

    xywh: (A, 4) float64 boxes; areas: (A,); image_of: (A,) image of each annotation; sizes: (I, 2) image heights and
    widths; crowd, ignore: (A,) bool, no single objects; usable: (A,) bool, what is needed of the
    segmentation is there; keep_empty: images without objects are used, too.
    """
    bad_boxes = _bad_boxes(xywh, sizes[image_of])
    reasons = {"crowd regions": crowd, "annotations marked `ignore`": ignore} | bad_boxes
    reasons["annotations whose area is not positive (where none is given, it is computed)"] = ~(areas > 0)
    reasons["annotations without a usable segmentation"] = ~usable
    # Every annotation counts once, with the first reason that holds.
    found: dict[str, np.ndarray] = {}
    kept = np.ones(len(xywh), dtype=bool)
    for reason, holds in reasons.items():
        found[reason] = np.flatnonzero(kept & holds)
        kept &= ~holds
    # The regions of crowds are no background, as far as they have one.
    ignored = (crowd | ignore) & ~np.logical_or.reduce([*bad_boxes.values()])
    rows, regions = (part[np.argsort(image_of[part], kind="stable")] for part in map(np.flatnonzero, (kept, ignored)))
    # Images that are large enough and show something.
    counts = np.bincount(image_of[rows], minlength=len(sizes))
    small = sizes.min(axis=1) < MIN_SIDE
    empty = (counts == 0) & (not keep_empty)
    found[f"images with a side under {MIN_SIDE} pixels"] = np.flatnonzero(small)
    found["images without an annotation that training uses"] = np.flatnonzero(empty & ~small)
    return TrainingRows(
        rows=rows,
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        images=np.flatnonzero(~empty & ~small),
        ignored=regions,
        dropped={reason: len(rows) for reason, rows in found.items() if len(rows)},
        examples={reason: rows[:FEW].tolist() for reason, rows in found.items()},
    )


def _bad_boxes(xywh: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Reason -> (A,) bool; the first reason that holds is the one counted. sizes: (A, 2) of each annotation's image."""
    corner, sides = xywh[:, :2], xywh[:, 2:]
    beyond = np.maximum(0, corner + sides - sizes[:, ::-1])
    inside = sides - np.maximum(0, -corner) - beyond  # exactly the width and height where the image holds the box
    return {
        BAD_BOX: np.isnan(xywh).any(axis=1),
        "boxes under 1 pixel wide or high": ~(sides >= 1).all(axis=1),
        "boxes outside the image": ~(inside > 0).all(axis=1),
        "boxes under 1 pixel wide or high inside the image": ~(inside >= 1).all(axis=1),
    }


def sensible_boxes(xywh: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(A,) bool: boxes without any of the reasons above."""
    return ~np.logical_or.reduce([*_bad_boxes(xywh, sizes).values()])


def clip(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(n, 4) float32 xyxy boxes cut to [0, width] and [0, height]; sizes: (n, 2) heights and widths."""
    return np.minimum(np.maximum(boxes, 0), sizes[:, [1, 0, 1, 0]].astype(np.float32))
