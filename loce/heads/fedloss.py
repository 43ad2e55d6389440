"""Federated Loss (CenterNet2, arXiv 2103.07461, App. D): a step trains the classes of its batch and a few drawn ones.

    loss_cls = 1/R sum over rows, sum over classes c in S of BCE(z_c, [y = c])       R: all rows that take part
    S: the labels of the batch, background counted as one; while |S| < K, classes are drawn into it without
    replacement, one after the other, with probability ~ sqrt(n_c), n_c training images. Background cannot be drawn.

Background rows are negatives of every class in S. A batch with K classes or more keeps all of them and draws none.
Inference: sigma(z_c). Initialisation: weights N(0, 0.01), bias -log((1 - p) / p) with p = head.fedloss.prior. Rows from
the memory are rows like others, and put their classes into S.

State: none.

Differences from the paper / the released code:
- One draw in place of K - |S|: the classes with the largest log sqrt(n_c) + Gumbel noise (equal in law, no wait).
- C logits; the released C + 1st has neither loss nor use. A class without images is never drawn; where fewer than
  K - |S| classes have images, all of them are in S (the released draw raises an error).
- CenterNet2 multiplies scores with the proposal's objectness; Mask R-CNN, ViTDet and Detic do not, nor does this.
- detectron2 starts from bias 0 (head.fedloss.prior=0.5).
"""

import torch
from torch import Tensor

from loce.config import HeadConfig
from loce.heads.base import Head, RoIs, at_least_fp32, binary_cross_entropy, linear, one_hot
from loce.utils.classes import IGNORED, ClassStats


class FedLossHead(Head):
    """One linear layer to C sigmoids; `log_weight_C` is log sqrt(n_c), -inf for a class without images."""

    log_weight_C: Tensor  # noqa: N815

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        self.fc_cls = linear(in_features, self.num_classes, self.options.fedloss.prior)
        log_weight_C = 0.5 * torch.tensor(stats.image_counts, dtype=torch.float64).log()
        self.register_buffer("log_weight_C", log_weight_C.float(), persistent=False)

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: the sigmoid losses of the classes in S, divided by the number of rows that take part."""
        taking_part_C = self.draw(rois.labels_N, rois.generator)
        return {"loss_cls": federated_loss(logits_NL, rois, taking_part_C)}

    @torch.no_grad()
    def draw(self, labels_N: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(C,) bool: the foreground classes in S, those of the labels and the drawn ones."""
        present_C = one_hot(labels_N, self.num_classes).any(dim=0)
        slots = self.options.fedloss.classes - (labels_N == self.num_classes).any().long()
        uniform_C = torch.rand(len(present_C), generator=generator, device=labels_N.device, dtype=torch.float64)
        key_C = self.log_weight_C - (-uniform_C.log()).log()
        key_C = torch.where(present_C, torch.inf, key_C)
        # The place of each class in the order of the keys, the largest first; classes of the batch come first of all.
        place_C = key_C.argsort(descending=True).argsort()
        return present_C | ((place_C < slots) & (key_C > -torch.inf))

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, C) -> sigmoids (N, C), fp32."""
        return at_least_fp32(logits_NL).sigmoid()


def federated_loss(logits_NC: Tensor, rois: RoIs, taking_part_C: Tensor) -> Tensor:
    """(): sum of the sigmoid losses over rows and over the classes that take part (C,), divided by `rois.count`."""
    weight_NC = taking_part_C & (rois.labels_N != IGNORED)[:, None]
    return binary_cross_entropy(logits_NC, rois.labels_N, rois.count, weight_NC)
