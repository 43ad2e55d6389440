"""Gumbel activation (GOL, ECCV 2022, arXiv 2207.10936) alone: C + 1 outputs, none of them dropped.

    loss_cls = 1/R sum over rows, sum over C + 1 outputs of -t log eta - (1 - t) log(1 - eta),   eta(z) = exp(-exp(-z))
    t_j = [y = j], background is output C; z cut to [-4, 10]; R: rows that take part

Scores: eta(z_c), without the background. Initialisation: weights 0.001, bias -2. Rows from the memory are rows like
others. With the dropped negatives of the same paper: head `gol`.

State: none.

Differences from the paper / the released code:
- The released code cuts the whole loss at 20, where its gradient is 0; nothing is cut here.
- The logarithms are exact, see head `gol`.
"""

import torch
from torch import Tensor, nn

from loce.config import HeadConfig
from loce.heads.base import Head, RoIs, at_least_fp32, linear, one_hot
from loce.heads.gol import gumbel_cross_entropy
from loce.utils.classes import IGNORED, ClassStats


class GumbelHead(Head):
    """One linear layer to C + 1 logits, background last."""

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        self.fc_cls = linear(in_features, self.num_classes + 1)
        nn.init.constant_(self.fc_cls.weight, 0.001)
        nn.init.constant_(self.fc_cls.bias, -2.0)

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: summed over outputs and the rows that take part, divided by the number of these rows."""
        loss_NL = gumbel_cross_entropy(at_least_fp32(logits_NL), one_hot(rois.labels_N, self.num_classes + 1))
        taking_part_N1 = (rois.labels_N != IGNORED)[:, None]
        return {"loss_cls": torch.where(taking_part_N1, loss_NL, 0).sum() / rois.count}

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, C+1) -> Gumbel activations (N, C), fp32."""
        return torch.exp(-torch.exp(-at_least_fp32(logits_NL[:, : self.num_classes])))
