"""LOCE, Sec. 3.1 and 3.3: what a classification head is given and what it must do, one head for each method.

Shape suffixes: N rows (RoIs, then memory features), D features, C classes, L logits (the head's business).
"""

import abc
from dataclasses import dataclass

from torch import Tensor, nn

from loce.classes import IGNORED, ClassStats


@dataclass
class RoIs:
    """What a head may know of the N rows it classifies, besides their features.

    labels_N: long, foreground 0..C-1, background C, IGNORED for a row that takes part in nothing.
    instances_N: long, index of the row's ground-truth instance over the whole batch; -1 for background, for ignored
        rows and for rows from the memory.
    from_memory_N: bool, true for rows drawn from the feature memory.
    indicator: (C+1,) float without gradient, larger for classes that are learned better: the mean score (Eq. 2) or
        training instance counts (supplement, Sec. 1); None when nothing keeps track of one.
    progress: share of the training that is done, in [0, 1].
    """

    labels_N: Tensor  # noqa: N815
    instances_N: Tensor  # noqa: N815
    from_memory_N: Tensor  # noqa: N815
    indicator: Tensor | None = None
    progress: float = 0.0

    @property
    def count(self) -> Tensor:
        """() long: rows that take part, at least 1; what losses are divided by."""
        return (self.labels_N != IGNORED).sum().clamp(min=1)


class Head(nn.Module, abc.ABC):
    """A classification head, built as `HEADS[name](in_features, stats)`.

    All three methods accept N = 0, keep N as it is, and wait for no device. State besides the parameters lives in
    buffers. `num_classes` is C.
    """

    def __init__(self, in_features: int, stats: ClassStats) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_classes = len(stats)

    @abc.abstractmethod
    def forward(self, x_ND: Tensor) -> Tensor:
        """Features (N, D) of the shared FCs -> logits (N, L)."""

    @abc.abstractmethod
    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """Named scalar losses in fp32, to be added up; each is 0, with a gradient of 0, when no row takes part."""

    @abc.abstractmethod
    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, L) -> class scores (N, C) in fp32, each in [0, 1], without the background."""
