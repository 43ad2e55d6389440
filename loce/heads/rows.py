"""LOCE, Sec. 3.1: rows of a batch and their targets, in the form that the losses of several heads use.

Shape suffixes: N rows, L columns (classes, or logits).
"""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, also under autocast; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def one_hot(labels_N: Tensor, columns: int) -> Tensor:
    """(N, L) bool, true where the column is the row's label; all false for a label outside 0..L-1, such as IGNORED."""
    return labels_N[:, None] == torch.arange(columns, device=labels_N.device)
