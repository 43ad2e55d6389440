"""NorCal (NeurIPS 2021, arXiv 2107.02170): softmax scores, calibrated by class counts after training.

    loss_cls = CE(z, y)                                                          as the softmax head
    scores   = (e^{z_c} / n_c^gamma) / (e^{z_bg} + sum_j e^{z_j} / n_j^gamma)    foreground c, background untouched

n_c: training images of class c (`head.norcal.counts=instances`: instances), at least 1. gamma = 0 is the plain softmax.
Nothing changes in training, and parameters are named as the softmax head's: any finished softmax checkpoint can be
evaluated with this head. While training, also for the mean score of the feature memory, scores are the plain
softmax's.

State: none; the counts are facts of the training set. Rows from the memory are rows like others.

Differences from the paper / the released code:
- The paper tunes gamma on training images for each model, and the release's command line has 0 as its default; here
  it is 0.6.
- Only the exponential form of the calibration factor is here, and always with normalisation over C + 1.
"""

import torch
from torch import Tensor

from loce import posthoc
from loce.config import HeadConfig
from loce.heads.softmax import SoftmaxHead
from loce.utils.classes import ClassStats


class NorCalHead(SoftmaxHead):
    """The softmax head with calibrated scores; `shift_C` (C,) is gamma log n."""

    shift_C: Tensor  # noqa: N815

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        chosen = self.options.norcal
        counts_C = stats.image_counts if chosen.counts == "images" else stats.instance_counts
        shift_C = torch.from_numpy(posthoc.norcal_shift(counts_C, chosen.gamma)).float()
        self.register_buffer("shift_C", shift_C, persistent=False)

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, C+1) -> calibrated scores (N, C), fp32; while training, the plain softmax's."""
        return super().scores(logits_NL if self.training else posthoc.norcal(logits_NL, self.shift_C))
