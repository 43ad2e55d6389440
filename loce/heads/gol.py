"""GOL (ECCV 2022, arXiv 2207.10936) and DropLoss (AAAI 2021, arXiv 2104.06402): background seldom pushes the tail down.

    loss_cls = 1/R sum over rows, sum over classes c of (1 - T_c m_c (1 - t_c)) B(z_c, t_c)      R: all rows taking part
    T_c = [images of c / images with objects < lambda]     t_c = [y = c]     q: share of tail rows in foreground
    m_c = 1 for a foreground row, [u > q] for a background row, u uniform for each row and class; 0 without foreground
    activation=gumbel (GOL):      eta(z) = exp(-exp(-z)),  B = -t log eta - (1 - t) log(1 - eta),  z cut to [-4, 10]
    activation=sigmoid (DropLoss): B the binary cross-entropy of sigma(z)

So a tail class is never a negative of another class's object, and one of the background with probability q.
Inference: eta(z), not cut, or sigma(z). Initialisation: gumbel weights 0.001 and bias -2 (eta = 6e-4), sigmoid weights
N(0, 0.01) and bias -log 999. Rows from the memory are rows like others.

State: none.

Differences from the paper / the released code:
- log eta and log(1 - eta) are computed as -exp(-z) and log(-expm1(-exp(-z))). The released code takes the logarithm of
  eta, which loses digits above z = 6, and whose gradient vanishes for positives below z = -3.3 where the true one is
  largest (54.6 at z = -4); here it has its true value.
- Shared FCs and box regressor keep their own initial values; with the released option they take PyTorch's default.
- DropLoss's published v0.5 value of lambda is 0.00177, also in its released v1 configuration; v1's own is 0.0010062.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loce.config import HeadConfig
from loce.heads.base import Head, RoIs, at_least_fp32, linear, one_hot
from loce.utils.classes import IGNORED, ClassStats

LEAST, MOST = -4.0, 10.0  # logits of the Gumbel loss
DROPLOSS_PRIOR = 0.001


class GOLHead(Head):
    """One linear layer to C logits; `tail_C` tells the classes T that are spared."""

    tail_C: Tensor  # noqa: N815

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        self.gumbel = self.options.gol.activation == "gumbel"
        self.fc_cls = linear(in_features, self.num_classes, DROPLOSS_PRIOR)
        if self.gumbel:
            nn.init.constant_(self.fc_cls.weight, 0.001)
            nn.init.constant_(self.fc_cls.bias, -2.0)
        tail_C = stats.image_counts < self.options.gol.threshold * stats.image_total
        self.register_buffer("tail_C", torch.from_numpy(tail_C), persistent=False)

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: the weighted losses of all classes, divided by the number of rows that take part."""
        uniform_NC = torch.rand(logits_NL.shape, generator=rois.generator, device=logits_NL.device)
        weight_NC = self.weights(rois.labels_N, uniform_NC)
        z_NC = at_least_fp32(logits_NL)
        target_NC = one_hot(rois.labels_N, self.num_classes)
        if self.gumbel:
            loss_NC = gumbel_cross_entropy(z_NC, target_NC)
        else:
            loss_NC = F.binary_cross_entropy_with_logits(z_NC, target_NC.to(z_NC), reduction="none")
        return {"loss_cls": torch.where(weight_NC, loss_NC, 0).sum() / rois.count}

    @torch.no_grad()
    def weights(self, labels_N: Tensor, uniform_NC: Tensor) -> Tensor:
        """(N, C) bool: the entries that take part, 1 - T m (1 - t), by uniform numbers u in [0, 1)."""
        own_NC = one_hot(labels_N, self.num_classes)
        foreground_N = own_NC.any(dim=1)
        # Without foreground 0 / 0 = nan, and no u is above nan: everything takes part.
        tail_share = (own_NC & self.tail_C).sum() / foreground_N.sum()
        drop_NC = foreground_N[:, None] | (uniform_NC > tail_share)
        return (own_NC | ~(self.tail_C & drop_NC)) & (labels_N != IGNORED)[:, None]

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, C) -> (N, C) Gumbel activation, or sigmoid, fp32."""
        z_NC = at_least_fp32(logits_NL)
        return torch.exp(-torch.exp(-z_NC)) if self.gumbel else z_NC.sigmoid()


def gumbel_cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """-t log eta - (1 - t) log(1 - eta) of each entry, eta = exp(-exp(-z)), z cut to [-4, 10]; target bool."""
    log_eta = -torch.exp(-z.clamp(LEAST, MOST))
    return torch.where(target, -log_eta, -torch.log(-torch.expm1(log_eta)))
