"""Softmax classifier (LOCE, ICCV 2021, Sec. 3.1, Eq. 1): the baseline, and the head of stage 1.

One linear layer to C + 1 logits, background last; weights N(0, 0.01), biases 0.
Loss: -log softmax(z_N)[y_N], summed over the rows that take part and divided by their number. Score: softmax(z)[c].

State: none.

Differences from the paper / the released code: none.
"""

from torch import Tensor

from loce.config import HeadConfig
from loce.heads.base import Head, RoIs, cross_entropy, linear
from loce.utils.classes import ClassStats


class SoftmaxHead(Head):
    """One linear layer to C + 1 logits, background last, trained with the cross-entropy."""

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        self.fc_cls = linear(in_features, self.num_classes + 1)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Features (N, D) -> logits (N, C+1)."""
        return self.fc_cls(x_ND)

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: Eq. 1, summed over the rows that take part and divided by their number."""
        return {"loss_cls": cross_entropy(logits_NL, rois.labels_N, rois.count)}

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, C+1) -> softmax probabilities (N, C) of the foreground classes, fp32."""
        return logits_NL.float().softmax(dim=1)[:, : self.num_classes]
