"""Near misses: candidates at objects that inference saw and did not output; they tell why an object was lost.

A near miss is a box, x, y, width, height in px of the original image, with a category and a score. Its kind:
removed_by_nms: the best candidate of an object's category that overlaps it by half, dropped by NMS for a better one;
cut_by_cap: the same, but it was left by NMS and dropped by the cap on detections; classified_as: the best detection of
another category that overlaps an object by half and was left out since the category was not verified in the image;
proposed: the proposal that overlaps an object most, with the object's category and the score it had for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loce.evaluation.stream import NEAR_MISSES, read_table

KINDS = ("removed_by_nms", "cut_by_cap", "classified_as", "proposed")
Found = Mapping[str, tuple[Any, Any, Any]]  # kind -> boxes (n, 4) x1, y1, x2, y2; scores (n,); category ids (n,)


@dataclass(frozen=True, kw_only=True)
class NearMisses:
    """N near misses: image_ids (N,) int64, kinds (N,) uint8 index into KINDS, category_ids (N,) int64, scores (N,)
    float32, boxes (N, 4) float32 x, y, width, height. An image without rows had none."""

    image_ids: np.ndarray
    kinds: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.image_ids)

    def of_images(self, image_ids: np.ndarray) -> "NearMisses":
        """Those of some images."""
        chosen = np.isin(self.image_ids, image_ids)
        return NearMisses(**{name: column[chosen] for name, column in vars(self).items()})


def read_near_misses(folder: str | Path) -> NearMisses | None:
    """Those that stand beside the detections in a folder; None where inference left none for some of its images."""
    columns = read_table(folder, NEAR_MISSES)
    return None if columns is None else NearMisses(**columns)


def near_misses_of_image(image_id: int, found: Found) -> NearMisses:
    """What a model found in one image, arrays or CPU tensors; ValueError for a kind that is none of KINDS."""
    empty = (np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    corners, scores, categories = (
        np.concatenate(parts, dtype=parts[0].dtype, casting="unsafe")
        for parts in zip(empty, *found.values(), strict=True)
    )
    kinds = [number for kind, columns in found.items() for number in [KINDS.index(kind)] * len(columns[1])]
    return NearMisses(
        image_ids=np.full(len(scores), image_id, dtype=np.int64),
        kinds=np.array(kinds, dtype=np.uint8),
        category_ids=categories,
        scores=scores,
        boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
    )
