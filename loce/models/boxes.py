"""Box arithmetic with MMDetection's numerics: IoU, delta coding, matching with ground truth, random sampling.

Shapes: N, M boxes, G ground-truth boxes, K slots; 4 = x1, y1, x2, y2 in pixels, or dx, dy, dw, dh. A box of width w
covers [x1, x1 + w]: no "+1". Slots are of fixed number with a validity mask instead of index lists of varying length,
so that nothing waits for the device.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

RPN_STDS = (1.0, 1.0, 1.0, 1.0)
ROI_STDS = (0.1, 0.1, 0.2, 0.2)
MAX_LOG_RATIO = abs(math.log(16 / 1000))  # |dw|, |dh| at most: both shrinking and growing are limited


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def constants(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(len(values),), filled in on the device, since a tensor made from a list is a copy that waits, and kept."""
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


def box_iou(boxes_N4: Tensor, others_M4: Tensor) -> Tensor:
    """(N, M) intersection over union; the union is at least 1e-6, so boxes of no area give 0."""
    overlap_NM = overlap(boxes_N4, others_M4)
    return overlap_NM / (_area(boxes_N4)[:, None] + _area(others_M4)[None, :] - overlap_NM).clamp(min=1e-6)


def overlap(boxes_N4: Tensor, others_M4: Tensor) -> Tensor:
    """(N, M) area that two boxes share."""
    low_NM2 = torch.maximum(boxes_N4[:, None, :2], others_M4[None, :, :2])
    high_NM2 = torch.minimum(boxes_N4[:, None, 2:], others_M4[None, :, 2:])
    return (high_NM2 - low_NM2).clamp(min=0).prod(dim=2)


def _area(boxes_N4: Tensor) -> Tensor:
    return (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])


def _centre_size(boxes_N4: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes_N4[..., :2] + boxes_N4[..., 2:]) * 0.5, boxes_N4[..., 2:] - boxes_N4[..., :2]


def encode(references_N4: Tensor, boxes_N4: Tensor, stds: tuple[float, ...]) -> Tensor:
    """(N, 4) deltas that lead from each reference box to its target box, divided by `stds`; fp32.

    A reference without area gives non-finite deltas: such rows must be masked out by the caller.
    """
    centre_N2, size_N2 = _centre_size(references_N4.float())
    target_centre_N2, target_size_N2 = _centre_size(boxes_N4.float())
    deltas_N4 = torch.cat([(target_centre_N2 - centre_N2) / size_N2, torch.log(target_size_N2 / size_N2)], dim=-1)
    return deltas_N4 / constants(stds, deltas_N4.device)


def decode(
    references_N4: Tensor,
    deltas_N4: Tensor,
    stds: tuple[float, ...],
    image_size: tuple[int, int] | None,
) -> Tensor:
    """Boxes (..., 4) from references (..., 4) and deltas (..., 4), clipped to an image (height, width) if given."""
    deltas_N4 = deltas_N4.float() * constants(stds, deltas_N4.device)
    centre_N2, size_N2 = _centre_size(references_N4.float())
    new_centre_N2 = centre_N2 + size_N2 * deltas_N4[..., :2]
    new_size_N2 = size_N2 * deltas_N4[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    boxes_N4 = torch.cat([new_centre_N2 - new_size_N2 * 0.5, new_centre_N2 + new_size_N2 * 0.5], dim=-1)
    return boxes_N4 if image_size is None else clip(boxes_N4, image_size)


def clip(boxes_N4: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) with x in [0, width] and y in [0, height]."""
    height, width = image_size
    x, y = boxes_N4[..., 0::2].clamp(0, width), boxes_N4[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def finite(boxes_N4: Tensor) -> Tensor:
    """The boxes, (0, 0, 0, 0) in place of any with nan or inf: RoIAlign derives the size of its work from them."""
    finite_N = (boxes_N4 - boxes_N4 == 0).all(dim=1)  # `isfinite` is twice as many operations
    return torch.where(finite_N[:, None], boxes_N4, 0)


NEGATIVE, BETWEEN = -1, -2  # matched index of background boxes, and of boxes that are neither
PAIRS = 1 << 24  # of boxes and ground truths, whose IoU is held at once: about 0.6 GB with all that is made of them
COVERED = 0.5  # of its area; a background box of which an ignored region covers more is left out

ANCHORS, REGIONS, JITTER, INSTANCES, DRAWS, HEAD, BRANCHES = range(7)  # what an image's random numbers are for


def match_boxes(
    boxes_N4: Tensor,
    truths_G4: Tensor,
    positive: float,
    negative: float,
    low_quality: float,
    pairs: int = PAIRS,
) -> Tensor:
    """`match` of boxes with ground truths, `pairs` of them at a time: with many, their IoU is computed twice."""
    rows = max(1, pairs // max(1, len(truths_G4)))
    if len(boxes_N4) <= rows:
        return match(box_iou(boxes_N4, truths_G4), positive, negative, low_quality)
    parts = boxes_N4.split(rows)
    best_G = torch.stack([box_iou(part, truths_G4).amax(dim=0) for part in parts]).amax(dim=0)
    return torch.cat([match(box_iou(part, truths_G4), positive, negative, low_quality, best_G) for part in parts])


def leave_out(
    matched_N: Tensor,
    boxes_N4: Tensor,
    ignored_M4: Tensor | None,
    pairs: int = PAIRS,
) -> Tensor:
    """`matched_N`, where background boxes that lie in ignored regions (crowds) by more than half become BETWEEN."""
    if ignored_M4 is None or len(ignored_M4) == 0:
        return matched_N
    parts = boxes_N4.split(max(1, pairs // len(ignored_M4)))
    inside_N = torch.cat([(overlap(part, ignored_M4) / _area(part)[:, None]).amax(dim=1) > COVERED for part in parts])
    return matched_N.masked_fill(inside_N & (matched_N == NEGATIVE), BETWEEN)


def match(
    iou_NG: Tensor,
    positive: float,
    negative: float,
    low_quality: float,
    best_G: Tensor | None = None,
) -> Tensor:
    """(N,) long: the ground truth of each box, or NEGATIVE, or BETWEEN (`negative` <= best IoU < `positive`).

    A ground truth whose best IoU is at least `low_quality` also takes every box that reaches this best IoU, whatever
    the box's own best is; of several such ground truths the last one wins. best_G: the best IoU of each ground truth,
    where the N boxes are not all there are.
    """
    boxes, truths = iou_NG.shape
    if truths == 0 or boxes == 0:
        return iou_NG.new_full((boxes,), NEGATIVE, dtype=torch.long)
    best_N, matched_N = iou_NG.max(dim=1)
    matched_N = matched_N.masked_fill(best_N < positive, BETWEEN).masked_fill(best_N < negative, NEGATIVE)
    best_G = iou_NG.amax(dim=0) if best_G is None else best_G
    takes_NG = (iou_NG == best_G) & (best_G >= low_quality)
    last_N = (takes_NG * torch.arange(1, truths + 1, device=iou_NG.device)).amax(dim=1) - 1
    return torch.where(last_N >= 0, last_N, matched_N)


def generator_for(seed: int | None, purpose: int, device: torch.device) -> torch.Generator | None:
    """The random numbers of one image for one purpose, on `device`; None, the global generator, without a seed.

    They depend on nothing but the image's seed: not on the rank that has it, nor on what was drawn before. The host
    alone seeds a generator, so nothing waits for the device.
    """
    return None if seed is None else torch.Generator(device).manual_seed(seed + purpose)


def choose_random(
    candidates_N: Tensor,
    limit: Tensor | int,
    slots: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """At most `limit` of the true entries of a mask, at random without replacement: (indices (K,), valid (K,)).

    K = min(slots, N); `limit` may live on the device and be smaller than `slots`.
    """
    random_N = torch.rand(candidates_N.shape, generator=generator, device=candidates_N.device)
    random_N = random_N.masked_fill(~candidates_N, -1.0)
    best_K, indices_K = random_N.topk(min(slots, len(random_N)))
    return indices_K, (best_K >= 0) & (torch.arange(len(best_K), device=best_K.device) < limit)


def sample(
    matched_N: Tensor,
    total: int,
    positive_fraction: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positives up to a share of `total`, filled up with negatives, both at random.

    Returns (positives (P,), valid (P,), negatives (K,), valid (K,)): indices into the N boxes in slots of fixed number.
    """
    positives = int(total * positive_fraction)
    positives_P, positive_valid_P = choose_random(matched_N >= 0, positives, positives, generator)
    left = total - positive_valid_P.sum()
    negatives_K, negative_valid_K = choose_random(matched_N == NEGATIVE, left, total, generator)
    return positives_P, positive_valid_P, negatives_K, negative_valid_K
