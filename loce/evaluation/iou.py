"""Areas and IoU of boxes, masks and mask boundaries, for pairs that lie in the same image and category.

Boundary IoU (Cheng et al., CVPR 2021, arXiv 2103.16562) is the IoU of the pixels of two masks that lie within d pixels
of their contours; d is a share of the image's diagonal. As in its authors' evaluator distance is the larger of dx and
dy, the image's border is a contour, too, and boundary AP takes the lower of mask IoU and boundary IoU.
"""

from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from loce.data.annotations.segmentations import ranges
from loce.evaluation.annotations import GroundTruth
from loce.evaluation.detections import Masks
from loce.utils.progress import watched

DILATION = {True: 0.008, False: 0.02}  # d / diagonal, with LVIS's rules and with COCO's
_CELLS = 1000  # whose objects' masks are held at a time
_PAIRS = 1 << 20  # box pairs that are held at a time


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """(N,) float64 px^2 of boxes (N, 4) x, y, width, height."""
    return boxes[:, 2].astype(np.float64) * boxes[:, 3]


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N, M) IoU of boxes (N, 4) with others (M, 4), x, y, width, height."""
    n, m = len(boxes), len(others)
    no_crowd = np.zeros(n * m, dtype=bool)
    return _box_iou(np.repeat(boxes.astype(np.float64), m, axis=0), np.tile(others, (n, 1)), no_crowd).reshape(n, m)


def box_pairs(
    boxes: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    truth: GroundTruth,
    low: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of IoU >= `low` of each box (N, 4) with annotations starts[n] .. starts[n] + counts[n] - 1.

    Returns (P,) index of the box, ascending; (P,) index of the annotation, ascending per box; (P,) IoU, in float64 and
    in pycocotools' order of operations, so that thresholds fall alike. A crowd's IoU is over the box's own area.
    """
    ends = np.cumsum(counts)
    pieces = []
    first = 0
    while first < len(boxes):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _PAIRS, side="right")))
        box = np.repeat(np.arange(first, last), counts[first:last])
        ground = np.arange(len(box)) + np.repeat(
            starts[first:last] - (ends[first:last] - counts[first:last] - done), counts[first:last]
        )
        iou = _box_iou(boxes[box].astype(np.float64), truth.boxes[ground], truth.crowd[ground])
        keep = iou >= low
        pieces.append((box[keep], ground[keep], iou[keep]))
        first = last
    return _join(pieces)


def _box_iou(a: np.ndarray, b: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(P,) IoU of boxes a with b (P, 4), row by row."""
    width = np.minimum(a[:, 2] + a[:, 0], b[:, 2] + b[:, 0]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 3] + a[:, 1], b[:, 3] + b[:, 1]) - np.maximum(a[:, 1], b[:, 1])
    common = np.where((width > 0) & (height > 0), width * height, 0.0)
    own = a[:, 2] * a[:, 3]
    union = np.where(crowd, own, own + b[:, 2] * b[:, 3] - common)
    return np.divide(common, union, out=np.zeros_like(common), where=common > 0)


def mask_pairs(
    masks: Masks,
    rows: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    truth: GroundTruth,
    low: float,
    dilation: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `box_pairs`, for the masks of detections `rows` (N,); rows of one image and category stand together.

    dilation: > 0 for the lower of mask IoU and boundary IoU, with this share of the diagonal.
    """
    borders = np.flatnonzero(np.diff(starts, prepend=-1, append=-1))
    starts, counts = starts[borders[:-1]], counts[borders[:-1]]  # of cells from here on
    pieces = []
    for cell in watched(range(len(starts)), len(starts), "overlaps of masks", "cells (image, category)"):
        if cell % _CELLS == 0:
            # Objects of several cells at once: the C library is slow to start.
            these = slice(cell, cell + _CELLS)
            objects = ranges(starts[these], starts[these] + counts[these])
            grounds, crowd = truth.rles(objects), truth.crowd[objects].tolist()
            end = 0
        begin, end = end, end + int(counts[cell])
        first, last = borders[cell], borders[cell + 1]
        found = masks.rles(rows[first:last])
        iou = mask_utils.iou(found, grounds[begin:end], crowd[begin:end])
        if dilation and (iou >= low).any():
            # No lower mask IoU can be of a pair, so boundaries of few masks are needed.
            near, at = np.flatnonzero((iou >= low).any(axis=1)), np.flatnonzero((iou >= low).any(axis=0))
            edges = [boundary(found[n], dilation) for n in near]
            around = [boundary(grounds[begin + g], dilation) for g in at]
            lower = mask_utils.iou(edges, around, [crowd[begin + g] for g in at])
            iou[np.ix_(near, at)] = np.minimum(iou[np.ix_(near, at)], lower)
        box, ground = np.nonzero(iou >= low)
        pieces.append((first + box, starts[cell] + ground, iou[box, ground]))
    return _join(pieces)


def boundary(code: dict[str, Any], dilation: float) -> dict[str, Any]:
    """The code of a mask's pixels within max(1, round(dilation * diagonal)) px of its contour."""
    height, width = code["size"]
    distance = max(1, round(dilation * float(np.hypot(height, width))))
    x, y, w, h = (int(side) for side in mask_utils.toBbox(code))
    window = np.s_[y : y + h, x : x + w]
    mask = mask_utils.decode(code)
    inner = cv2.erode(
        np.ascontiguousarray(mask[window]),
        np.ones((2 * distance + 1, 2 * distance + 1), np.uint8),
        borderType=cv2.BORDER_CONSTANT,
        borderValue=0,
    )
    mask[window] -= inner
    coded: dict[str, Any] = mask_utils.encode(mask)
    return coded


def _join(pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    none = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))
    box, ground, iou = zip(none, *pieces, strict=True)
    return np.concatenate(box), np.concatenate(ground), np.concatenate(iou)
