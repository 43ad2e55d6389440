"""Seesaw Loss (CVPR 2021): cross-entropy with mitigation and compensation factors, and an objectness branch.

L_cls = 1/R sum over foreground rows of -log(e^{z_y} / (e^{z_y} + sum_{j != y} S_yj e^{z_j})),   S_ij = M_ij C_ij
M_ij = min(1, N_j / N_i)^p                         N: rows of each class so far, this step included, at least 1
C_ij = max(1, sigma_j / max(sigma_i, 0.01))^q      sigma: softmax of the row's own C class logits; no gradient
L_obj = 1/R sum over all rows of the cross-entropy of two logits, "object" (C) and "background" (C + 1)
R is the number of all rows that take part, in both: the class loss is a quarter of a mean over foreground rows.
Classifier: z = tau <x, w> / (|x| |w|) + b for all C + 2 logits, w from N(0, 0.01), b = 0.
Inference: softmax over the C classes, times the softmax of "object". Rows from the memory count as rows of their class.

State: `counts`, N; in training, the rows of all ranks are added together in every step.

Differences from the paper / the released code:
- The released code never adds up the ranks: each goes on with its own counts, and its checkpoint keeps rank 0's.
  head.seesaw.synchronise=false gives that, but a checkpoint keeps every rank's counts, so that a run resumes exactly.
- Counts are whole numbers; in fp32 they would stop growing at 2^24, which a frequent class reaches.
- The factors are added to the logits as logarithms, taken from a log-softmax, so that nothing under- or overflows.
- A loss computed in evaluation mode counts nothing.
- The normalised mask head of the paper is the default of every method here (model.mask_predictor).
"""

import math

import torch
from torch import Tensor

from loce.config import HeadConfig
from loce.heads.base import Head, NormalisedLinear, RoIs, at_least_fp32, cross_entropy, one_hot
from loce.utils.classes import IGNORED, ClassStats
from loce.utils.distributed import all_reduce_sum

LEAST_SCORE = 0.01


class SeesawHead(Head):
    """A normalised layer to C class logits, then "object", then "background".

    `counts`: buffer (C,) long, how many rows each class has had.
    """

    counts: Tensor

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        self.fc_cls = NormalisedLinear(in_features, self.num_classes + 2, self.options.seesaw.temperature)
        self.register_buffer("counts", torch.zeros(self.num_classes, dtype=torch.long))
        self.of_rank = () if self.options.seesaw.synchronise else ("counts",)

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls` of the foreground rows and `loss_objectness`, both divided by the number of rows that take part.

        In training mode the rows are counted first; every rank must call.
        """
        labels_N, classes = rois.labels_N, self.num_classes
        own_NC = one_hot(labels_N, classes)
        if self.training:
            seen_C = own_NC.sum(dim=0)
            self.counts = self.counts + (all_reduce_sum(seen_C) if self.options.seesaw.synchronise else seen_C)
        z_NL = at_least_fp32(logits_NL)
        z_NC, object_N2 = z_NL[:, :classes], z_NL[:, classes:]
        foreground_N = own_NC.any(dim=1)
        class_N = torch.where(foreground_N, labels_N, IGNORED)
        object_N = torch.where(foreground_N, 0, torch.where(labels_N == classes, 1, IGNORED))
        adjusted_NC = z_NC + self.log_factors(z_NC, class_N.clamp(min=0))
        return {
            "loss_cls": cross_entropy(adjusted_NC, class_N, rois.count),
            "loss_objectness": cross_entropy(object_N2, object_N, rois.count),
        }

    @torch.no_grad()
    def log_factors(self, z_NC: Tensor, class_N: Tensor) -> Tensor:
        """(N, C): log S_ij for i the row's class in 0..C-1; 0 where j = i."""
        options = self.options.seesaw
        log_count_C = self.counts.clamp(min=1).to(z_NC).log()
        mitigation_NC = (log_count_C - log_count_C[class_N, None]).clamp(max=0)
        log_score_NC = z_NC.log_softmax(dim=1)
        own_N1 = log_score_NC.gather(1, class_N[:, None]).clamp(min=math.log(LEAST_SCORE))
        compensation_NC = (log_score_NC - own_N1).clamp(min=0)
        return options.p * mitigation_NC + options.q * compensation_NC

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, C+2) -> (N, C) class probability times that of an object, fp32."""
        z_NL = at_least_fp32(logits_NL)
        object_N1 = z_NL[:, self.num_classes :].softmax(dim=1)[:, :1]
        return z_NL[:, : self.num_classes].softmax(dim=1) * object_N1
