"""Which box learns from which ground truth, and which boxes take part in a loss: MMDetection's assigner and sampler.

Shapes: N boxes, G ground-truth boxes, K slots. Slots are of fixed number with a validity mask instead of index lists
of varying length, so that nothing waits for the device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NEGATIVE, BETWEEN = -1, -2  # matched index of background boxes, and of boxes that are neither

Choose = Callable[[Tensor, "Tensor | int", int], tuple[Tensor, Tensor]]


def match(iou_NG: Tensor, positive: float, negative: float, low_quality: float) -> Tensor:
    """(N,) long: the ground truth of each box, or NEGATIVE, or BETWEEN (`negative` <= best IoU < `positive`).

    A ground truth whose best IoU is at least `low_quality` also takes every box that reaches this best IoU, whatever
    the box's own best is; of several such ground truths the last one wins.
    """
    boxes, truths = iou_NG.shape
    if truths == 0 or boxes == 0:
        return iou_NG.new_full((boxes,), NEGATIVE, dtype=torch.long)
    best_N, matched_N = iou_NG.max(dim=1)
    matched_N = matched_N.masked_fill(best_N < positive, BETWEEN).masked_fill(best_N < negative, NEGATIVE)
    best_G = iou_NG.amax(dim=0)
    takes_NG = (iou_NG == best_G) & (best_G >= low_quality)
    last_N = (takes_NG * torch.arange(1, truths + 1, device=iou_NG.device)).amax(dim=1) - 1
    return torch.where(last_N >= 0, last_N, matched_N)


def choose_random(candidates_N: Tensor, limit: Tensor | int, slots: int) -> tuple[Tensor, Tensor]:
    """At most `limit` of the true entries of a mask, at random without replacement: (indices (K,), valid (K,)).

    K = min(slots, N); `limit` may live on the device and be smaller than `slots`.
    """
    keys_N = torch.rand(candidates_N.shape, device=candidates_N.device).masked_fill(~candidates_N, -1.0)
    keys_K, indices_K = keys_N.topk(min(slots, len(keys_N)))
    return indices_K, (keys_K >= 0) & (torch.arange(len(keys_K), device=keys_K.device) < limit)


def sample(matched_N: Tensor, total: int, positive_fraction: float, choose: Choose) -> tuple[Tensor, ...]:
    """Positives up to a share of `total`, filled up with negatives.

    Returns (positives (P,), valid (P,), negatives (K,), valid (K,)): indices into the N boxes in slots of fixed number.
    """
    positives_P, positive_valid_P = choose(matched_N >= 0, *[int(total * positive_fraction)] * 2)
    negatives_K, negative_valid_K = choose(matched_N == NEGATIVE, total - positive_valid_P.sum(), total)
    return positives_P, positive_valid_P, negatives_K, negative_valid_K
