"""LOCE, Sec. 3.1: rows of a batch and their targets, in the form that the losses of several heads use.

Shape suffixes: N rows, L columns (classes, or logits).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from loce.heads.base import RoIs
from loce.utils.classes import IGNORED


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, also under autocast; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def one_hot(labels_N: Tensor, columns: int) -> Tensor:
    """(N, L) bool, true where the column is the row's label; all false for a label outside 0..L-1, such as IGNORED."""
    return labels_N[:, None] == torch.arange(columns, device=labels_N.device)


def cross_entropy(logits_NL: Tensor, rois: RoIs, weight_L: Tensor | None = None) -> Tensor:
    """(): Eq. 1 in at least fp32, each row times its class's weight (L,), over the number of rows that take part.

    The divisor is `rois.count` with weights too; torch's weighted mean would divide by the sum of the weights.
    """
    logits = at_least_fp32(logits_NL)
    weight = None if weight_L is None else weight_L.to(logits.dtype)
    total = F.cross_entropy(logits, rois.labels_N, weight, ignore_index=IGNORED, reduction="sum")
    return total / rois.count
