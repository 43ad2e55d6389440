"""Adaptive Class Suppression Loss (ACSL, CVPR 2021, arXiv 2104.00885): a class is a negative where it is confident.

    loss_cls = 1/R sum over rows, sum over C + 1 outputs of w BCE(z_j, [y = j])        R: rows that take part
    foreground row: w = 1 for its own class and for every output, the background's too, with sigma(z_j) >= 0.7; else 0
    background row: w = 1 for background and frequent classes; for common classes in floor(0.1 B) rows drawn without
    replacement from the B background rows of the batch, for rare classes in floor(0.01 B) rows drawn anew; else 0

Scores: sigma(z_c), without a factor of the background. Initialisation: weights N(0, 0.01), bias -log 99; published as
a second stage that starts from the softmax classifier of the first and trains nothing but this layer. Rows from the
memory are rows like others.

State: none.

Differences from the paper / the released code:
- The rows are drawn on the device, from this process's own ones, by generators that a restart repeats.
- The released option for the loss's weight does nothing and is left out.
"""

import torch
from torch import Tensor

from loce.config import HeadConfig
from loce.heads.base import Head, RoIs, at_least_fp32, binary_cross_entropy, linear, one_hot
from loce.utils.classes import IGNORED, ClassStats

PRIOR = 0.01


class ACSLHead(Head):
    """One linear layer to C + 1 sigmoids, background last.

    `rare_L`, `common_L`: (C+1,) bool, the outputs of these groups.
    """

    rare_L: Tensor  # noqa: N815
    common_L: Tensor  # noqa: N815

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        self.fc_cls = linear(in_features, self.num_classes + 1, PRIOR)
        for name, group in (("rare_L", "r"), ("common_L", "c")):
            mask_L = torch.tensor([*stats.group_mask(group).tolist(), False])
            self.register_buffer(name, mask_L, persistent=False)

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: the losses of the entries that take part, divided by the number of rows that do."""
        section, labels_N, z_NL = self.options.acsl, rois.labels_N, at_least_fp32(logits_NL)
        background_N = labels_N == self.num_classes
        common_N = draw_rows(background_N, section.common_share, rois.generator)
        rare_N = draw_rows(background_N, section.rare_share, rois.generator)
        weight_NL = self.weights(z_NL.detach(), labels_N, common_N, rare_N)
        return {"loss_cls": binary_cross_entropy(z_NL, labels_N, rois.count, weight_NL)}

    def weights(self, z_NL: Tensor, labels_N: Tensor, common_N: Tensor, rare_N: Tensor) -> Tensor:
        """(N, C+1) bool: the entries that take part; common_N, rare_N (N,) bool: background rows drawn for a group."""
        confident_NL = z_NL.sigmoid() >= self.options.acsl.threshold
        foreground_NL = confident_NL | one_hot(labels_N, self.num_classes + 1)
        background_NL = ~(self.common_L | self.rare_L) | (self.common_L & common_N[:, None])
        background_NL = background_NL | (self.rare_L & rare_N[:, None])
        taking_part_NL = torch.where((labels_N == self.num_classes)[:, None], background_NL, foreground_NL)
        return taking_part_NL & (labels_N != IGNORED)[:, None]

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, C+1) -> sigmoids (N, C) of the foreground classes, fp32."""
        return at_least_fp32(logits_NL[:, : self.num_classes]).sigmoid()


@torch.no_grad()
def draw_rows(among_N: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """(N,) bool: floor(share B) of the B rows marked in `among_N`, drawn without replacement."""
    uniform_N = torch.rand(len(among_N), generator=generator, device=among_N.device, dtype=torch.float64)
    place_N = torch.where(among_N, uniform_N, torch.inf).argsort().argsort()
    return among_N & (place_N < (among_N.sum().double() * share).floor())
