"""Box arithmetic with MMDetection's numerics: IoU, delta coding, and clipping of continuous xyxy boxes.

Shapes: N, M boxes; 4 = x1, y1, x2, y2 in pixels, or dx, dy, dw, dh. A box of width w covers [x1, x1 + w]: no "+1".
"""

import math

import torch
from torch import Tensor

RPN_STDS = (1.0, 1.0, 1.0, 1.0)
ROI_STDS = (0.1, 0.1, 0.2, 0.2)
MAX_LOG_RATIO = abs(math.log(16 / 1000))  # |dw|, |dh| at most: both shrinking and growing are limited


def box_iou(boxes_N4: Tensor, others_M4: Tensor) -> Tensor:
    """(N, M) intersection over union; the union is at least 1e-6, so boxes of no area give 0."""
    area_N = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
    area_M = (others_M4[:, 2] - others_M4[:, 0]) * (others_M4[:, 3] - others_M4[:, 1])
    low_NM2 = torch.maximum(boxes_N4[:, None, :2], others_M4[None, :, :2])
    high_NM2 = torch.minimum(boxes_N4[:, None, 2:], others_M4[None, :, 2:])
    overlap_NM = (high_NM2 - low_NM2).clamp(min=0).prod(dim=2)
    return overlap_NM / (area_N[:, None] + area_M[None, :] - overlap_NM).clamp(min=1e-6)


def _centre_size(boxes_N4: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes_N4[..., :2] + boxes_N4[..., 2:]) * 0.5, boxes_N4[..., 2:] - boxes_N4[..., :2]


def encode(references_N4: Tensor, boxes_N4: Tensor, stds: tuple[float, ...]) -> Tensor:
    """(N, 4) deltas that lead from each reference box to its target box, divided by `stds`; fp32.

    A reference without area gives non-finite deltas: such rows must be masked out by the caller.
    """
    centre_N2, size_N2 = _centre_size(references_N4.float())
    target_centre_N2, target_size_N2 = _centre_size(boxes_N4.float())
    deltas_N4 = torch.cat([(target_centre_N2 - centre_N2) / size_N2, torch.log(target_size_N2 / size_N2)], dim=-1)
    return deltas_N4 / deltas_N4.new_tensor(stds)


def decode(references_N4: Tensor, deltas_N4: Tensor, stds: tuple[float, ...], image_size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) from references (..., 4) and deltas (..., 4), clipped to an image (height, width)."""
    deltas_N4 = deltas_N4.float() * deltas_N4.new_tensor(stds, dtype=torch.float32)
    centre_N2, size_N2 = _centre_size(references_N4.float())
    new_centre_N2 = centre_N2 + size_N2 * deltas_N4[..., :2]
    new_size_N2 = size_N2 * deltas_N4[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    boxes_N4 = torch.cat([new_centre_N2 - new_size_N2 * 0.5, new_centre_N2 + new_size_N2 * 0.5], dim=-1)
    return clip(boxes_N4, image_size)


def clip(boxes_N4: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) with x in [0, width] and y in [0, height]."""
    height, width = image_size
    x, y = boxes_N4[..., 0::2].clamp(0, width), boxes_N4[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)
