"""LOCE, Sec. 3.2, Eq. 3-4: the head trained with the Equilibrium Loss; inference is the plain softmax (Sec. 3.2)."""

from torch import Tensor

from loce.equilibrium_loss import equilibrium_loss
from loce.heads.base import RoIs
from loce.heads.softmax import SoftmaxHead


class EquilibriumHead(SoftmaxHead):
    """The layer, parameter names and scores of the softmax head, so that stage 2 goes on from stage 1's classifier."""

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: Eq. 3 with the margins of `rois.indicator`, divided by the number of rows that take part."""
        if rois.indicator is None:
            raise ValueError(
                "the equilibrium head needs rois.indicator: the mean score, or the instance counts, of each class"
            )
        return {"loss_cls": equilibrium_loss(logits_NL, rois.labels_N, rois.indicator)}
