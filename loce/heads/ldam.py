"""LDAM-DRW (NeurIPS 2019, arXiv 1906.07413), Sec. 3, Alg. 1: margins by class counts, deferred re-weighting.

    z_c      = s cos(w_c, x)                                 no bias; background has a vector of its own
    loss_cls = sum over rows of v_y CE(z - s D_y [c = y], y) / their number
    D_c      = D_max (min_j n_j / n_c)^(1/4)                 background: 0
    v_c      = 1 before `reweight_from` of the training; then ~ (1 - b) / (1 - b^{n_c}), with a mean of 1 over the
               training instances; background: 1
    scores   = softmax(z)[:C]                                no margin

n_c: training instances of class c, at least 1. s = 30, D_max = 0.5, b = 0.9999, reweight_from = 0.8. Classifier: random
directions of length 1 (only the direction of w_c counts; its length sets how fast it turns).

State: none; what is deferred follows from the progress of the training, which a resumed run knows. Rows from the memory
are rows like others.

Differences from the paper / the released code:
- Detection is not defined there. Background is not a rare class: it has no margin and weight 1.
- Weights have a mean of 1 over instances, not over classes: on LVIS v1 an object of a frequent class would weigh 0.0012
  beside a background of 1, and late in the training the detector would forget it. So a class with one instance weighs
  about 1000; the recipes clip the gradient.
- The weighted sum is divided by the number of rows, as in the unweighted part of the training; torch's weighted mean,
  which the release uses, divides by the sum of the weights.
- Weights start at 80 % of the iterations, where the release has epoch 160 of 200.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loce.config import HeadConfig, ReweightedOptions
from loce.heads.base import Head, NormalisedLinear, RoIs, at_least_fp32, cross_entropy, one_hot
from loce.heads.reweighted import class_weights
from loce.utils.classes import ClassStats


class LDAMHead(Head):
    """A cosine classifier to C + 1 logits, background last; `margin_L` (C+1,) is D, `weight_L` (C+1,) is v."""

    margin_L: Tensor  # noqa: N815
    weight_L: Tensor  # noqa: N815

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        chosen = self.options.ldam
        self.fc_cls = NormalisedLinear(in_features, self.num_classes + 1, chosen.scale, bias=False)
        with torch.no_grad():
            self.fc_cls.weight.copy_(F.normalize(torch.rand_like(self.fc_cls.weight) * 2 - 1))
        counts_C = np.maximum(stats.instance_counts, 1)
        margin_C = chosen.max_margin * (counts_C.min() / counts_C) ** 0.25
        weight_C = class_weights(counts_C, ReweightedOptions(by="effective_number", beta=chosen.beta))
        self.register_buffer("margin_L", torch.tensor([*margin_C, 0.0], dtype=torch.float32), persistent=False)
        self.register_buffer("weight_L", torch.tensor([*weight_C, 1.0], dtype=torch.float32), persistent=False)

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: cross-entropy with margins, from `reweight_from` on with class weights, over the rows' number."""
        own_NL = one_hot(rois.labels_N, self.num_classes + 1)
        logits_NL = at_least_fp32(logits_NL) - self.options.ldam.scale * own_NL * self.margin_L
        deferred = rois.progress < self.options.ldam.reweight_from
        weight_L = None if deferred else self.weight_L
        return {"loss_cls": cross_entropy(logits_NL, rois.labels_N, rois.count, weight_L)}

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, C+1) -> softmax probabilities (N, C) of the foreground classes, fp32."""
        return logits_NL.float().softmax(dim=1)[:, : self.num_classes]
