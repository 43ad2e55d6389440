"""Effective Class-Margin Loss (ECM, ECCV 2022, arXiv 2301.09724): margins that bound each class's ranking error.

    loss_cls = 1/R sum over rows, sum over C + 1 outputs of w_c BCE(2 z_c + d_c, [y = c])        R: rows that take part
    d_c = g+_c - g-_c,  g+_c = log(1 + (N_c / o_c)^(1/4)),  g-_c = log(1 + (o_c / N_c)^(1/4))
    so that d_c = log(N_c / o_c) / 4
    w_c = a_c log(1 + 1 / a_c),  a_c = o_c / N_c,  o_c = sum_k N_k - N_c
    N_c: training instances; of the background 6.3313 times all of them (the authors' measured ratio of rows)

Scores: sigma(z_c) (1 - sigma(z_background)), without margins and without the factor 2. Classifier: normalised, tau
= 20, weights N(0, 0.01), bias 0 (head.ecm.normalised=false: plain). Rows from the memory are rows like others.

State: none; margins and weights are facts of the training set.

Differences from the paper / the released code:
- The weights are computed in float64 with log1p. The released ones are made in float32, where (1 + a) / a rounds: on
  LVIS 1.11 for classes of 1 to 5 instances, 0.93 for 6; the exact ones are within 0.003 of 1 for all classes.
- A sigmoid of 2 z + d, which never overflows; the released exponentials do beyond |z| = 40.
- A class without instances counts as one with one (the released loss is nan).
- Published with a warm-up of 10,000 iterations from 1e-4 and gradients clipped at 5: see the recipe.
"""

import numpy as np
import torch
from torch import Tensor, nn

from loce.config import HeadConfig
from loce.heads.base import (
    Head,
    NormalisedLinear,
    RoIs,
    at_least_fp32,
    binary_cross_entropy,
    linear,
    scores_against_background,
)
from loce.utils.classes import IGNORED, ClassStats


class ECMHead(Head):
    """One layer to C + 1 sigmoids, background last; `margin_L` is d, `weight_L` is w."""

    margin_L: Tensor  # noqa: N815
    weight_L: Tensor  # noqa: N815

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        section, outputs = self.options.ecm, self.num_classes + 1
        self.fc_cls: nn.Module
        if section.normalised:
            self.fc_cls = NormalisedLinear(in_features, outputs, section.temperature)
        else:
            self.fc_cls = linear(in_features, outputs)
        counts_C = np.maximum(stats.instance_counts, 1).astype(np.float64)
        n_L = np.append(counts_C, section.background_ratio * counts_C.sum())
        ratio_L = (n_L.sum() - n_L) / n_L  # a
        self.register_buffer("margin_L", torch.from_numpy(-np.log(ratio_L) / 4).float(), persistent=False)
        self.register_buffer("weight_L", torch.from_numpy(ratio_L * np.log1p(1 / ratio_L)).float(), persistent=False)

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: the weighted losses of all outputs, divided by the number of rows that take part."""
        z_NL = 2 * at_least_fp32(logits_NL) + self.margin_L
        weight_NL = torch.where((rois.labels_N != IGNORED)[:, None], self.weight_L, 0)
        return {"loss_cls": binary_cross_entropy(z_NL, rois.labels_N, rois.count, weight_NL)}

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, C+1) -> (N, C): the class's sigmoid times one minus the background's, fp32."""
        return scores_against_background(logits_NL)
