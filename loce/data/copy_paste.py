"""Simple copy-paste (Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation", CVPR 2021, arXiv 2012.07177).

Objects of one training image, cut out along their masks, are laid onto another; both are resized, flipped and cut for
the same canvas. Image = source where a pasted mask is set, else what was there; without blending, which the paper finds
to change nothing. What lies below loses its pixels: its mask is cut, and its box is that of the pixels that are left.
An object of which less than a tenth is left becomes a region that is neither object nor background; one without a pixel
is gone (the paper removes those alone, but a sliver shows no class).
"""

from typing import NamedTuple

import cv2
import numpy as np

from loce.data.masks import Crop

LEAST_LEFT = 0.1  # share of an object's pixels; with less of it, what is left is ignored


class Scene(NamedTuple):
    """Image with its objects as training shows it. N objects, M regions to ignore.

    image: (H, W, 3) uint8; boxes: (N, 4) float32 xyxy; crops: N masks, cut out (see masks.py); rows: (N,) int64 indices
    of the annotations; ignored: (M, 4) float32.
    """

    image: np.ndarray
    boxes: np.ndarray
    crops: list[Crop]
    rows: np.ndarray
    ignored: np.ndarray


def paste(scene: Scene, source: Scene) -> Scene:
    """`scene` with all objects of `source`, an image of the same size, on top; they come last."""
    covered = np.zeros(scene.image.shape[:2], np.uint8)
    for bits, (x, y) in source.crops:
        covered[y : y + bits.shape[0], x : x + bits.shape[1]] |= bits
    image = cv2.copyTo(source.image, covered, scene.image.copy())

    # What is left of the objects below.
    boxes, crops, kept, slivers = scene.boxes.copy(), list(scene.crops), [], []
    for row, (bits, (x, y)) in enumerate(crops):
        left = bits & ~covered[y : y + bits.shape[0], x : x + bits.shape[1]]
        before, after = np.count_nonzero(bits), np.count_nonzero(left)
        if after < before:
            crops[row] = left, (x, y)
            boxes[row] = box_of(crops[row]) if after else 0
        if after == before or after >= LEAST_LEFT * before:
            kept.append(row)
        elif after:
            slivers.append(row)
    return Scene(
        image=image,
        boxes=np.concatenate([boxes[kept], source.boxes]),
        crops=[*(crops[row] for row in kept), *source.crops],
        rows=np.concatenate([scene.rows[kept], source.rows]),
        ignored=np.concatenate([scene.ignored, boxes[slivers]]),
    )


def box_of(crop: Crop) -> tuple[int, int, int, int]:
    """The xyxy box of a mask's pixels, of which there are some; pixel i reaches from i to i + 1."""
    bits, (x, y) = crop
    columns, rows = np.flatnonzero(bits.any(axis=0)), np.flatnonzero(bits.any(axis=1))
    return x + int(columns[0]), y + int(rows[0]), x + int(columns[-1]) + 1, y + int(rows[-1]) + 1
