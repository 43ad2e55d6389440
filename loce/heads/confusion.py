"""Confusion of foreground classes over a batch of all ranks, for PCB (CVPR 2022) and FCBL (arXiv 2308.02213, Sec. 3).

Shape suffixes: N rows, C classes.
"""

import torch
from torch import Tensor

from loce.heads.base import one_hot
from loce.utils.distributed import all_reduce_sum


@torch.no_grad()
def class_softmax_sums(z_NC: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """((C, C) sums, (C,) long counts) over the foreground rows of all ranks; every rank must call.

    sums: row y adds up softmax(z_NC) of the rows of class y; other rows, background and ignored ones, add nothing.
    """
    own_NC = one_hot(labels_N, z_NC.shape[1])
    sums_CC = own_NC.to(z_NC.dtype).t() @ z_NC.softmax(dim=1)
    return all_reduce_sum(sums_CC), all_reduce_sum(own_NC.sum(dim=0))
