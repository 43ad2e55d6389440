"""Logit adjustment (ICLR 2021), Eq. 10: the logit-adjusted softmax cross-entropy.

    loss_cls = CE(z + tau log pi, y)        sum over rows / their number
    scores   = softmax(z)[:C]               the adjustment is of the loss; do not add the post-hoc one (Eq. 9) to it

pi_c ~ n_c: training instances of class c, at least 1 (a class that is never seen is taken as seen once). Background is
left out of the shift (0): its true share, three quarters of the regions and more, would lower its logits so far that
every class would flood the image with detections. A factor on pi then moves all of foreground against background, so
it is fixed: pi is n over its geometric mean, and the shifts tau log pi of the foreground classes sum to 0. Classifier:
the softmax head's, N(0, 0.01), bias 0.

State: none; the prior is a fact of the training set. Rows from the memory are rows like others.

Differences from the paper / the released code:
- Detection is not defined there; background and scale as above. With tau = 1 this is balanced softmax but for the
  scale, which there is the arithmetic mean (both reasons are in the files).
- The release shifts by log(pi^tau + 1e-12). Here nothing is added, since a count of at least 1 rules out pi = 0. With
  tau = 1 the two agree to 1e-6 on LVIS v1; with tau = 2 the 1e-12 raises the shift of a class of one instance by 1.
"""

import torch
from torch import Tensor

from loce.config import HeadConfig
from loce.heads.base import RoIs, at_least_fp32, cross_entropy
from loce.heads.softmax import SoftmaxHead
from loce.posthoc import log_prior
from loce.utils.classes import ClassStats


class LogitAdjustmentHead(SoftmaxHead):
    """The layer, parameter names and scores of the softmax head; `shift_L` (C+1,) is tau log pi, background 0."""

    shift_L: Tensor  # noqa: N815

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        shift_C = self.options.logit_adjustment.tau * log_prior(stats.instance_counts)
        self.register_buffer("shift_L", torch.tensor([*shift_C, 0.0], dtype=torch.float32), persistent=False)

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: Eq. 10, summed over the rows that take part and divided by their number."""
        logits_NL = at_least_fp32(logits_NL) + self.shift_L
        return {"loss_cls": cross_entropy(logits_NL, rois.labels_N, rois.count)}
