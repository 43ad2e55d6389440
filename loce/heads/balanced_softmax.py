"""Balanced Softmax (BALMS, NeurIPS 2020), Eq. 3-4: a softmax whose exponentials are weighted by class counts.

    loss_cls = -log( n_y e^{z_y} / sum_j n_j e^{z_j} ) = CE(z + log n, y)        sum over rows / their number
    scores   = softmax(z)[:C]                                                    no counts

n_c: training instances of class c, at least 1 (a class that is never seen is taken as seen once: it stays in the
sum, so that it is pushed down like a rare one). Background: n_bg = mean_c n_c. The paper corrects from the training
prior to a uniform one; here the prior to reach is uniform over the foreground classes while background keeps its
share, so the ratio of the two priors is n_c / mean(n) for foreground and 1 for background. Only ratios of n matter:
log(n / mean n) is added, 0 for background. Classifier: the softmax head's, N(0, 0.01), bias 0.

State: none; the counts are facts of the training set. Rows from the memory are rows like others.

Differences from the paper / the released code:
- The paper is about classification and has no background; its release for detection is the sigmoid form (head
  `balms`). The LOCE supplement (Eq. 1) counts background once, n_bg = 1, which is `head.name=equilibrium` with
  `indicator.kind=prior`: there scores of foreground fall by a factor n_c against background.
"""

import numpy as np
import torch
from torch import Tensor

from loce.config import HeadConfig
from loce.heads.base import RoIs, at_least_fp32, cross_entropy
from loce.heads.softmax import SoftmaxHead
from loce.utils.classes import ClassStats


class BalancedSoftmaxHead(SoftmaxHead):
    """The layer, parameter names and scores of the softmax head; `shift_L` (C+1,) is log(n / mean n), background 0."""

    shift_L: Tensor  # noqa: N815

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        counts_C = np.maximum(stats.instance_counts, 1)
        shift_L = torch.tensor([*np.log(counts_C / counts_C.mean()), 0.0], dtype=torch.float32)
        self.register_buffer("shift_L", shift_L, persistent=False)

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: Eq. 4, summed over the rows that take part and divided by their number."""
        logits_NL = at_least_fp32(logits_NL) + self.shift_L
        return {"loss_cls": cross_entropy(logits_NL, rois.labels_N, rois.count)}
