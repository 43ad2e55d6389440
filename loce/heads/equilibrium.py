"""Equilibrium Loss (LOCE, ICCV 2021), Sec. 3.2, Eq. 3-4: cross-entropy with margins from the mean scores.

Loss: -log( s_y e^z_y / sum_j s_j e^z_j ), j over the C classes and the background, whose s is 0.01: cross-entropy of
z + log s. s is the mean score of each class (Eq. 2, loce/mean_score.py) or, with `indicator.kind=prior`, its number of
training instances (supplement, Sec. 1). Inference is the plain softmax of z: no margin.

State: the mean score, a buffer of the detector, the same on every rank.

Differences from the paper / the released code:
- The logarithm is taken of the sum in one step: the released code takes it after the division, which gives infinite
  losses where a logit lies about 100 below the largest.
- The mean score starts at 0.01 and is updated before the loss of the same step, as in the released code; the paper does
  not say. It is in the checkpoint: the released code starts it anew on resume.
- The paper updates it once for each instance. Here, as in the released code, all entries of a step are applied at once.
"""

from torch import Tensor

from loce.equilibrium_loss import equilibrium_loss
from loce.heads.base import RoIs
from loce.heads.softmax import SoftmaxHead


class EquilibriumHead(SoftmaxHead):
    """The layer, parameter names and scores of the softmax head, so that stage 2 goes on from stage 1's classifier."""

    needs_indicator = True

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: Eq. 3 with the margins of `rois.indicator`, divided by the number of rows that take part."""
        if rois.indicator is None:
            raise ValueError(
                "the equilibrium head needs rois.indicator: the mean score, or the instance counts, of each class"
            )
        total = equilibrium_loss(logits_NL, rois.labels_N, rois.indicator, reduction="sum")
        return {"loss_cls": total / rois.count}
