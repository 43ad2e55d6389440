"""LOCE, Sec. 3.3, Eq. 5: the bounding box generator, and which instances it is run on (supplement, Sec. 1).

Shape suffixes: N ground-truth instances, K chosen instances; 16 sign patterns; 4 = x1, y1, x2, y2 in pixels.
"""

from functools import lru_cache

import torch
from torch import Tensor

SIGN_PATTERNS = 16  # +-x1, +-y1, +-x2, +-y2


def dense_boxes(
    boxes: Tensor,
    image_size: tuple[float, float],
    eta: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sixteen boxes around each ground-truth box, one for each choice of signs in Eq. 5.

    boxes: (N, 4) float xyxy in pixels; image_size: (height, width) in pixels of the image they lie in; eta: (N, 16, 4)
    in [0, 1], drawn uniformly when it is not given, an own number for each coordinate of each box (the released code
    has 16 x 4 for all boxes together); generator: of the boxes' device.
    Returns (N, 16, 4) in the dtype of `boxes`, clipped to [0, width] and [0, height]. The sign patterns are in the
    order (-,-,-,-), (-,-,-,+), (-,-,+,-), ..., (+,+,+,+) over (x1, y1, x2, y2).

    A box may come out thinner than a pixel (a small instance, or one cut off by the border): see `valid`. Without
    clipping the IoU with the instance is at least 4/9, when all four sides move inwards by a whole sixth.
    """
    height, width = image_size
    if eta is None:
        shape = (len(boxes), SIGN_PATTERNS, 4)
        eta = torch.rand(shape, generator=generator, dtype=boxes.dtype, device=boxes.device)
    side_N2 = boxes[:, 2:] - boxes[:, :2]
    reach_N14 = torch.cat([side_N2, side_N2], dim=1)[:, None] / 6
    dense_N164 = boxes[:, None] + _signs(boxes.dtype, boxes.device) * eta * reach_N14
    x_N162 = dense_N164[..., 0::2].clamp(0, width)
    y_N162 = dense_N164[..., 1::2].clamp(0, height)
    return torch.stack([x_N162, y_N162], dim=-1).flatten(-2)


def valid(boxes: Tensor, min_side: float = 1.0) -> Tensor:
    """Which boxes (..., 4) xyxy have both sides at least `min_side` pixels long: (...) bool.

    Thinner ones have no useful features, and their regression target is infinite at side 0.
    """
    return ((boxes[..., 2:] - boxes[..., :2]) >= min_side).all(dim=-1)


def choose_instances(labels: Tensor, per_class: int, generator: torch.Generator | None = None) -> Tensor:
    """At most `per_class` random instances of each class of one image (supplement, Sec. 1), before anything is pooled.

    labels: (N,) long on the CPU, where the data loader leaves them, so that nothing waits for a device; a negative
    label is never chosen. Returns (K,) long indices in ascending order. Within a class each subset is equally likely.
    """
    if labels.device.type != "cpu":
        raise ValueError(f"choose_instances works on the host: labels are on {labels.device}, expected cpu")
    shuffled_N = torch.randperm(len(labels), generator=generator)
    order_N = shuffled_N[labels[shuffled_N].argsort(stable=True)]  # by class, in random order within a class
    sorted_N = labels[order_N]
    rank_N = torch.arange(len(labels)) - torch.searchsorted(sorted_N, sorted_N)
    return order_N[(rank_N < per_class) & (sorted_N >= 0)].sort().values


@lru_cache
@torch.inference_mode(False)
def _signs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(16, 4) of -1 and +1, the last column changing fastest; computed on the device, since a copy would wait."""
    pattern_161 = torch.arange(SIGN_PATTERNS, device=device)[:, None]
    bit_4 = torch.arange(3, -1, -1, device=device)
    return ((pattern_161 >> bit_4) & 1).to(dtype) * 2 - 1
