"""Foreground Classification Balance Loss (FCBL of BACL, IEEE TMM 2023, arXiv 2308.02213): margins by confusion.

    loss_cls = 1/R sum over rows, sum over C + 1 outputs of w BCE(z_j + margin_j, [y = j])        R: rows that take part
    foreground row of class y: margin_j = 0.85 log(max(K_yj, 1e-3) / max(K_jy, 1e-3)), j foreground; 0 for background
    background row: no margins
    K = A / max(g, 1): A (C, C) sums softmax(z)[:C], over foreground logits, of all rows so far by true class; g: rows
    w = 1; with head.fcbl.reweight, on foreground rows only where p_j >= p_y or p_j >= 0.7, and for background;
    p = sigma(z_j) (1 - sigma(z_background)), which are also the scores

Margins use K of before the step; afterwards A and g are updated from logits without margins. Initialisation: weights
N(0, 0.01), bias -log 999. Rows from the memory are rows like others, and enter A.

State: `sums`, A, and `rows`, g; rows of all ranks are added together in every step.

Differences from the paper / the released code:
- A rank without objects takes part in the sum over ranks (the released one leaves it out, and the others wait).
- A loss computed in evaluation mode changes no state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from loce.config import HeadConfig
from loce.heads.base import Head, RoIs, at_least_fp32, binary_cross_entropy, linear, scores_against_background
from loce.heads.confusion import class_softmax_sums
from loce.utils.classes import IGNORED, ClassStats

PRIOR = 0.001
LEAST = 1e-3  # of K


class FCBLHead(Head):
    """One linear layer to C + 1 sigmoids, background last; buffers `sums` (C, C) fp32 and `rows` (C,) long."""

    sums: Tensor
    rows: Tensor

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        classes = self.num_classes
        self.fc_cls = linear(in_features, classes + 1, PRIOR)
        self.register_buffer("sums", torch.zeros(classes, classes))
        self.register_buffer("rows", torch.zeros(classes, dtype=torch.long))

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`; in training mode the rows enter the state afterwards, and every rank must call."""
        z_NL, labels_N = at_least_fp32(logits_NL), rois.labels_N
        foreground_N = (labels_N >= 0) & (labels_N < self.num_classes)
        margin_NC = self.margins().to(z_NL.dtype)[torch.where(foreground_N, labels_N, 0)]
        margin_NL = F.pad(torch.where(foreground_N[:, None], margin_NC, 0), (0, 1))
        weight_NL = (labels_N != IGNORED)[:, None].expand_as(z_NL)
        if self.options.fcbl.reweight:
            score_NC = self.scores(z_NL.detach())
            score_N1 = score_NC.gather(1, torch.where(foreground_N, labels_N, 0)[:, None])
            strong_NC = (score_NC >= score_N1) | (score_NC >= self.options.fcbl.threshold)
            weight_NL = weight_NL & (F.pad(strong_NC, (0, 1), value=True) | ~foreground_N[:, None])
        loss = binary_cross_entropy(z_NL + margin_NL, labels_N, rois.count, weight_NL)
        if self.training:
            sums_CC, counts_C = class_softmax_sums(z_NL[:, :-1].detach(), labels_N)
            self.sums, self.rows = self.sums + sums_CC.to(self.sums), self.rows + counts_C
        return {"loss_cls": loss}

    def confusion(self) -> Tensor:
        """(C, C) K: mean softmax over foreground classes of the rows of each true class; 0 for one never seen."""
        return self.sums / self.rows.clamp(min=1)[:, None]

    def own_share(self) -> Tensor:
        """(C,) K_cc."""
        return self.confusion().diagonal()

    def margins(self) -> Tensor:
        """(C, C): row y holds margin_j of a row of class y."""
        log_CC = self.confusion().clamp(min=LEAST).log()
        return self.options.fcbl.alpha * (log_CC - log_CC.t())

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, C+1) -> (N, C): the class's sigmoid times one minus the background's, fp32."""
        return scores_against_background(logits_NL)
