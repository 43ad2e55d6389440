"""RoIAlign from the pyramid level that fits each box (FPN, arXiv 1612.03144, Eq. 1; MMDetection's rounding).

Shapes: N boxes over the batch, D channels, S output side.
"""

import torch
from torch import Tensor
from torchvision.ops import roi_align

POOL_STRIDES = (4, 8, 16, 32)  # P2..P5; P6 serves the RPN only


def pyramid_level(boxes_N4: Tensor, finest_scale: float) -> Tensor:
    """(N,) long in 0..3: floor(log2(sqrt(w h) / finest_scale + 1e-6)), cut to the levels there are."""
    scale_N = (boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(dim=1).clamp(min=0).sqrt()
    return (scale_N / finest_scale + 1e-6).log2().floor().clamp(0, len(POOL_STRIDES) - 1).long()


def pool(features: list[Tensor], boxes: list[Tensor], side: int, finest_scale: float) -> Tensor:
    """(N, D, S, S) features of the boxes (n_i, 4) of each image, in their order. A box without area gives zeros."""
    image_N = torch.cat([b.new_full((len(b),), i) for i, b in enumerate(boxes)])
    boxes_N4 = torch.cat(boxes)
    level_N = pyramid_level(boxes_N4, finest_scale)
    regions_N5 = torch.cat([image_N[:, None], boxes_N4], dim=1)
    pooled = features[0].new_zeros((len(boxes_N4), features[0].shape[1], side, side))
    for level, stride in enumerate(POOL_STRIDES):
        rows = (level_N == level).nonzero()[:, 0]  # sync: how many boxes each level gets
        part = roi_align(features[level].float(), regions_N5[rows], side, 1 / stride, 0, True)
        pooled = pooled.index_copy(0, rows, part.to(pooled.dtype))
    return pooled
