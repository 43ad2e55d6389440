"""Inverse Image Frequency (IIF, IEEE TIP 2023, arXiv 2209.04861): logits times a weight that grows with rarity.

    loss_cls = CE(w z, y) over the rows that take part, divided by their number          scores = softmax(w z)[:C]
    w_c by head.iif.variant, n of I (images, or instances with head.iif.counts=instances); w_background = 1:
    raw log(I/n) | smooth log((I+1)/(n+1)) + 1 | prob log((I-n)/n) | base2, base10 log(I/n) | normit -Phi^-1(n/I)
    gombit -log(-log(1 - n/I))

Classifier: linear, weights 0.001, bias 0; head.iif.normalised=true: normalised with temperature 8, weights N(0, 0.01).
Rows from the memory are rows like others. On a trained softmax model without training: `loce.posthoc.iif`.

State: none; the weights are facts of the training set.

Differences from the paper / the released code:
- I counts the images of the training file, those without objects too, as the released table does.
- A class without images takes the weight of one with a single image (the released one is infinite).
"""

import torch
from torch import Tensor, nn

from loce.config import HeadConfig
from loce.heads.base import Head, NormalisedLinear, RoIs, cross_entropy, linear
from loce.posthoc import iif, inverse_frequency
from loce.utils.classes import ClassStats


class IIFHead(Head):
    """One layer to C + 1 logits, background last; `weight_C` (C,) scales those of the foreground."""

    weight_C: Tensor  # noqa: N815

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        section, outputs = self.options.iif, self.num_classes + 1
        self.fc_cls: nn.Module
        if section.normalised:
            self.fc_cls = NormalisedLinear(in_features, outputs, section.temperature)
        else:
            self.fc_cls = linear(in_features, outputs)
            nn.init.constant_(self.fc_cls.weight, 0.001)
        images = (stats.image_counts, stats.file_images or stats.image_total)
        counts = images if section.counts == "images" else (stats.instance_counts, int(stats.instance_counts.sum()))
        weight_C = torch.from_numpy(inverse_frequency(*counts, section.variant)).float()
        self.register_buffer("weight_C", weight_C, persistent=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Features (N, D) -> logits (N, C+1), not scaled."""
        return self.fc_cls(x_ND)

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: cross-entropy of the scaled logits over the rows that take part, divided by their number."""
        return {"loss_cls": cross_entropy(iif(logits_NL, self.weight_C), rois.labels_N, rois.count)}

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, C+1) -> softmax of the scaled logits (N, C), fp32."""
        return iif(logits_NL, self.weight_C).softmax(dim=1)[:, : self.num_classes]
