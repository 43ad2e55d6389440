"""Equalization Loss (CVPR 2020), Eq. 3-4: sigmoid classifier whose tail classes ignore objects of other classes.

L = 1/R sum_r sum_c w_rc BCE(z_rc, [y_r = c])         R rows that take part, c over the C classes, no background logit
w_rc = 1 - E(r) T(f_c) (1 - [y_r = c])
E(r) = 1 for foreground rows, 0 for background: background always counts as a negative, for tail classes too
T(f_c) = 1 if f_c < lambda, else 0; f_c = images with class c / annotated training images, lambda = head.eql.threshold
Inference: sigma(z_c). Initialisation: weights N(0, 0.01), bias -log(999), that is sigma(z) = 0.001: the sum over 1203
sigmoids would be huge at 0.5. Rows from the memory are foreground rows.

State: none that training changes; `tail`, which classes are spared, is a buffer.

Differences from the paper / the released code:
- The form for detection only; the softmax form with random sparing is for image classification.
- f_c is counted in the training data; the released code has a table of LVIS v0.5.
- Unused RoI slots take no part. The release (Detectron2) has none; EQL in EQL v2's repository would count them as
  background.
"""

import torch
from torch import Tensor

from loce.config import HeadConfig
from loce.heads.base import Head, RoIs, at_least_fp32, binary_cross_entropy, linear, one_hot
from loce.utils.classes import IGNORED, ClassStats


class EQLHead(Head):
    """One linear layer to C logits, each class a yes-or-no question of its own.

    `tail`: buffer (C,) bool, classes in a smaller share of the training images than the threshold.
    """

    tail: Tensor

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        self.fc_cls = linear(in_features, self.num_classes, prior=0.001)
        spared = stats.image_counts < self.options.eql.threshold * stats.image_total
        self.register_buffer("tail", torch.from_numpy(spared))

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: Eq. 3, summed over classes and rows that take part, divided by the number of these rows."""
        own_NC = one_hot(rois.labels_N, self.num_classes)
        foreground_N1 = own_NC.any(dim=1, keepdim=True)
        spared_NC = foreground_N1 & self.tail & ~own_NC
        counts_NC = (rois.labels_N != IGNORED)[:, None] & ~spared_NC
        return {"loss_cls": binary_cross_entropy(logits_NL, rois.labels_N, rois.count, counts_NC)}

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, C) -> sigmoids (N, C), fp32; they add up to anything."""
        return at_least_fp32(logits_NL).sigmoid()
