"""DisAlign, Distribution Alignment (CVPR 2021, arXiv 2103.16370): a frozen classifier, rescaled and shifted by class.

    z' = kappa (a z + b) + (1 - kappa) z for foreground, z' = z for background,   kappa = sigma(u . x + u_0)
    loss_cls = sum over rows of w_y CE(z', y) / sum over rows of w_y
    w_c = pi_c^-0.8 / mean_k pi_k^-0.8,  pi_c: share of class c in the training instances;  w_background = 1

z: logits of the first stage's classifier, which stays as it is; only a, b (C,), u (D,) and u_0 train, 2 C + D + 1
numbers. Initialisation: a = 1, b = 0, u from N(0, 0.01), u_0 = 0. Inference: softmax(z')[:C]. Rows from the memory are
rows like others.

State: none that training changes but the parameters; the classifier of the first stage is two buffers.

Differences from the paper / the released code:
- The divisor is the sum over all ranks, divided by their number, as for all our losses (released: each rank's own).
- Whether the released class shares are of images or of instances is not known; these are of instances, at least 1.
- The plain (linear) classifier of the first stage; the released "cosine" experiment freezes a normalised one.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loce.config import HeadConfig
from loce.heads.base import Head, RoIs, at_least_fp32, linear
from loce.utils.classes import IGNORED, ClassStats
from loce.utils.distributed import mean_count


class FrozenLinear(nn.Module):
    """A linear layer whose weight (L, D) and bias (L,) are buffers: loaded and saved, never trained."""

    weight: Tensor
    bias: Tensor

    def __init__(self, in_features: int, logits: int) -> None:
        super().__init__()
        start = linear(in_features, logits)
        self.register_buffer("weight", start.weight.detach())
        self.register_buffer("bias", start.bias.detach())

    def forward(self, x_ND: Tensor) -> Tensor:
        """Features (N, D) -> logits (N, L)."""
        return F.linear(x_ND, self.weight, self.bias)


class DisAlignHead(Head):
    """The frozen classifier `fc_cls` to C + 1 logits, background last, then scale a, shift b and the gate kappa."""

    class_weight_L: Tensor  # noqa: N815

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        self.fc_cls = FrozenLinear(in_features, self.num_classes + 1)
        self.scale = nn.Parameter(torch.ones(self.num_classes))
        self.shift = nn.Parameter(torch.zeros(self.num_classes))
        self.confidence = linear(in_features, 1)
        counts_C = np.maximum(stats.instance_counts, 1)
        weight_C = (counts_C / counts_C.sum()) ** -self.options.disalign.rho
        weight_L = torch.tensor([*(weight_C / weight_C.mean()), 1.0]).float()
        self.register_buffer("class_weight_L", weight_L, persistent=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Features (N, D) -> aligned logits (N, C+1)."""
        z_NL = self.fc_cls(x_ND)
        z_NC = z_NL[:, :-1]
        kappa_N1 = self.confidence(x_ND).sigmoid()
        aligned_NC = kappa_N1 * (self.scale * z_NC + self.shift) + (1 - kappa_N1) * z_NC
        return torch.cat([aligned_NC, z_NL[:, -1:]], dim=1)

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: cross-entropy weighted by class, divided by the sum of the rows' weights."""
        z_NL, labels_N = at_least_fp32(logits_NL), rois.labels_N
        weight_L = self.class_weight_L.to(z_NL)
        total = F.cross_entropy(z_NL, labels_N, weight_L, ignore_index=IGNORED, reduction="sum")
        weight_N = torch.where(labels_N == IGNORED, 0, weight_L[labels_N.clamp(min=0)])
        divisor = mean_count(weight_N.sum())
        return {"loss_cls": total / torch.where(divisor > 0, divisor, 1)}

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, C+1) -> softmax probabilities (N, C) of the foreground classes, fp32."""
        return at_least_fp32(logits_NL).softmax(dim=1)[:, : self.num_classes]
