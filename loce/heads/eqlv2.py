"""Equalization Loss v2 (CVPR 2021): sigmoid classifier, positives and negatives re-weighted by their gradients.

L = 1/R sum_r sum_j (w+_j t_rj + w-_j (1 - t_rj)) BCE(z_rj, t_rj)       R rows that take part, j over C + 1 outputs
t_rj = [y_r = j]; output C is a task of its own, "is it background?", with w+ = w- = 1
w-_j = f(g_j),  w+_j = 1 + alpha (1 - f(g_j)),  f(x) = 1 / (1 + exp(-gamma (x - mu)))
g_j = G+_j / (G-_j + 1e-10), G the sum of |sigma(z_rj) - t_rj| w_j over all rows so far: t = 1 for G+, t = 0 for G-
The weights of a step come from the steps before it and have no gradient; at the start g_j = 100, all weights are 1.
Inference: sigma(z_c) (1 - sigma(z_C)). Initialisation: weights N(0, 0.01), bias -log(999) for all C + 1 outputs (the
background's, too, though most rows are background: the first losses are large and need the warm-up). Rows from the
memory are rows like others and enter G.

State: `gradients`, G+ and G- of each class; in training, the sums of all ranks are added together in every step.

Differences from the paper / the released code:
- Unused RoI slots take no part; the released code overwrites the row weights, so that padding would count.
- The ratio is computed from G when it is needed, and is 100 while both are 0; the released code stores it, and a
  first step without rows would leave 0.
- A loss computed in evaluation mode leaves the statistics alone.
- Statistics are never forgotten, as published: a run that starts from an EQL v2 checkpoint goes on with its ratios,
  unless head.reset=true.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from loce.config import HeadConfig
from loce.heads.base import Head, RoIs, at_least_fp32, binary_cross_entropy, linear, one_hot, scores_against_background
from loce.utils.classes import IGNORED, ClassStats
from loce.utils.distributed import all_reduce_sum

START_RATIO = 100.0


class EQLv2Head(Head):
    """One linear layer to C + 1 yes-or-no questions, background last.

    `gradients`: buffer (2, C) fp32, the accumulated gradients of positives (G+) and of negatives (G-).
    """

    gradients: Tensor

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        self.fc_cls = linear(in_features, self.num_classes + 1, prior=0.001)
        self.register_buffer("gradients", torch.zeros(2, self.num_classes))

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: weighted, summed over outputs and rows that take part, divided by the number of these rows.

        In training mode the gradients of this step are added to the statistics; every rank must call.
        """
        z_NL = at_least_fp32(logits_NL)
        own_NL = one_hot(rois.labels_N, self.num_classes + 1)
        positive_L, negative_L = F.pad(self.weights(), (0, 1), value=1.0).to(z_NL)
        weight_NL = torch.where(own_NL, positive_L, negative_L) * (rois.labels_N != IGNORED)[:, None]
        if self.training:
            self._collect(z_NL.detach(), own_NL, weight_NL)
        return {"loss_cls": binary_cross_entropy(z_NL, rois.labels_N, rois.count, weight_NL)}

    @torch.no_grad()
    def weights(self) -> Tensor:
        """(2, C): w+ and w- of the step to come."""
        options = self.options.eqlv2
        positive_C, negative_C = self.gradients
        ratio_C = positive_C / (negative_C + 1e-10)
        ratio_C = torch.where(self.gradients.sum(dim=0) > 0, ratio_C, START_RATIO)
        share_C = torch.sigmoid(options.gamma * (ratio_C - options.mu))
        return torch.stack([1 + options.alpha * (1 - share_C), share_C])

    def _collect(self, z_NL: Tensor, own_NL: Tensor, weight_NL: Tensor) -> None:
        """Add the weighted gradients of this step, of all ranks. A new tensor: old ones may be in use."""
        sizes_NC = ((z_NL.sigmoid() - own_NL.to(z_NL)).abs() * weight_NL)[:, : self.num_classes]
        own_NC = own_NL[:, : self.num_classes]
        sums_2C = torch.stack([(sizes_NC * own_NC).sum(dim=0), (sizes_NC * ~own_NC).sum(dim=0)])
        self.gradients = self.gradients + all_reduce_sum(sums_2C.to(self.gradients))

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, C+1) -> (N, C) each class's sigmoid times that of "no background", fp32."""
        return scores_against_background(logits_NL)
