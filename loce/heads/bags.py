"""Balanced Group Softmax (CVPR 2020), Sec. 4: one softmax for each group of classes with like numbers of instances.

Group 0: background, and "others", that is any object. Groups 1..K: classes by training instances, cut at
head.bags.bounds (< 10, < 100, < 1000, the rest), each with its own "others": background and other groups' classes.
L = sum_g 1/R_g sum over the kept rows of group g of -log softmax_g(z)_t    R_g kept rows; t the row's class if it is
    in g, else the "others" of g
Kept: all rows in group 0. In another one all rows of its classes, n of them, and at most floor(beta n) others drawn at
random (beta = head.bags.others_ratio); none where n = 0.
Inference: softmax_g(c)(z)_c softmax_0(z)_object. The probability of "others" is dropped, and scores do not add up to 1.
Logits: C classes, background, "others" of groups 0..K; LVIS v1: 1203 + 1 + 5. Initialisation: weights N(0, 0.01), bias
0. Published as a second stage: everything but this layer is frozen, and the layer starts anew (head.reset). Rows from
the memory are rows like others.

State: none that training changes; `groups`, the group of every logit, is a buffer.

Differences from the paper / the released code:
- Others are drawn on the device with torch's generator, by each process of its own rows (NumPy's on the host there).
- Groups are made from the training set's own counts; the released table of LVIS v0.5 is written for 1231 outputs.
- An empty group keeps its "others" logit, which never learns and is never read.
- The published runs start from a detector trained on COCO, ours from stage 1.
"""

import numpy as np
import torch
from torch import Tensor

from loce.config import HeadConfig
from loce.heads.base import Head, RoIs, at_least_fp32, linear
from loce.utils.classes import IGNORED, ClassStats
from loce.utils.distributed import mean_count


class BAGSHead(Head):
    """One linear layer, whose logits belong to groups.

    `groups`: buffer (L,) long, L = C + 1 + G, the group 0..G-1 of each logit.
    """

    groups: Tensor

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        bounds = self.options.bags.bounds
        group_C = 1 + np.searchsorted(bounds, stats.instance_counts, side="right")
        self.num_groups = len(bounds) + 2
        groups = [*group_C.tolist(), 0, *range(self.num_groups)]
        self.register_buffer("groups", torch.tensor(groups))
        self.fc_cls = linear(in_features, len(groups))

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: the groups' cross-entropies, each divided by its own number of kept rows, added up."""
        z_NL, labels_N = at_least_fp32(logits_NL), rois.labels_N
        taking_part_N1 = (labels_N != IGNORED)[:, None]
        safe_N1 = torch.where(taking_part_N1, labels_N[:, None], self.num_classes)
        every_G = torch.arange(self.num_groups, device=labels_N.device)
        inside_NG = taking_part_N1 & (self.groups[safe_N1] == every_G)
        target_NG = torch.where(inside_NG, safe_N1, self.num_classes + 1 + every_G)
        loss_NG = self._log_totals(z_NL) - z_NL.gather(1, target_NG)
        kept_NG = inside_NG | self._draw_others(inside_NG, taking_part_N1, rois.generator)
        loss_G = torch.where(kept_NG, loss_NG, 0).sum(dim=0) / mean_count(kept_NG.sum(dim=0))
        return {"loss_cls": loss_G.sum()}

    def _log_totals(self, z_NL: Tensor) -> Tensor:
        """(N, G): log sum_{j in g} e^{z_j}."""
        totals = [z_NL.masked_fill(self.groups != g, -torch.inf).logsumexp(dim=1) for g in range(self.num_groups)]
        return torch.stack(totals, dim=1)

    def _draw_others(
        self, inside_NG: Tensor, taking_part_N1: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """(N, G) bool: the "others" of each group that count, drawn without replacement and without waiting."""
        outside_NG = taking_part_N1 & ~inside_NG
        random_NG = torch.rand(inside_NG.shape, generator=generator, device=inside_NG.device)
        rank_NG = random_NG.masked_fill(~outside_NG, 2.0).argsort(dim=0).argsort(dim=0)
        most_G = (self.options.bags.others_ratio * inside_NG.sum(dim=0).double()).floor()
        most_G[:1].fill_(torch.inf)  # group 0 has no limit
        return outside_NG & (rank_NG < most_G)

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, L) -> (N, C) probability within the own group times that of an object, fp32."""
        z_NL, classes = at_least_fp32(logits_NL), self.num_classes
        totals_NG = self._log_totals(z_NL)
        log_object_N1 = z_NL[:, classes + 1 : classes + 2] - totals_NG[:, :1]
        return (z_NL[:, :classes] - totals_NG[:, self.groups[:classes]] + log_object_N1).exp()
