"""LOCE, Sec. 3.1 and 3.3: what a classification head is given and what it must do, one head for each method.

Shape suffixes: N rows (RoIs, then memory features), D features, C classes, L logits (the head's business).
"""

import abc
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from loce.method_options import HeadConfig
from loce.utils.classes import IGNORED, META, ClassStats

__all__ = ["META", "Head", "RoIs"]


@dataclass
class RoIs:
    """What a head may know of the N rows it classifies, besides their logits.

    labels_N: long, foreground 0..C-1, background C, IGNORED for a row that takes part in nothing.
    instances_N: long, index of the row's ground-truth instance over the whole batch; -1 for background, for ignored
        rows and for rows from the memory.
    from_memory_N: bool, true for rows drawn from the feature memory.
    indicator: (C+1,) float without gradient, larger for classes that are learned better: the mean score (Eq. 2) or
        training instance counts (supplement, Sec. 1); None when nothing keeps track of one.
    progress: share of the training that is done, in [0, 1].
    features_ND: what the logits were computed from, without gradient (BALMS); None where nobody kept it.
    drawn_N: long, the class that the row's image was drawn for by bi-level sampling (SimCal); META for an image of the
        meta batch (BALMS); -1 otherwise, for rows from the memory too. None: -1 throughout.
    generator: of the logits' device, for a head that chooses at random: the same batch gives the same choice, and so
        can be repeated. None: the global one.
    """

    labels_N: Tensor  # noqa: N815
    instances_N: Tensor  # noqa: N815
    from_memory_N: Tensor  # noqa: N815
    indicator: Tensor | None = None
    progress: float = 0.0
    features_ND: Tensor | None = None  # noqa: N815
    drawn_N: Tensor | None = None  # noqa: N815
    generator: torch.Generator | None = None

    @cached_property
    def count(self) -> Tensor:
        """(): rows that take part, never 0; what losses are divided by.

        The model puts their mean over ranks in its place, see `distributed.mean_count`.
        """
        return (self.labels_N != IGNORED).sum().clamp(min=1)


class Head(nn.Module, abc.ABC):
    """A classification head, built as `HEADS[name](in_features, stats, options)`.

    All three methods accept N = 0, keep N as it is, and wait for no device. State besides the parameters lives in
    buffers. `num_classes` is C. `depth` says what a head reads: features after the two shared FCs (2), after the first
    (1), or the pooled features of a region, flattened (0); the model passes `in_features` to match, and to heads of
    depth 0, which have FCs of their own, also `width`, that of the shared FCs. `of_rank` names the buffers
    that differ between processes: a checkpoint holds those of each.
    """

    depth = 2
    of_rank: tuple[str, ...] = ()

    def __init__(
        self, in_features: int, stats: ClassStats, options: HeadConfig | None = None, width: int = 1024
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_classes = len(stats)
        self.options = options or HeadConfig()

    def adopt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of another run's model, by name, what this one starts from; a head whose layers are called otherwise says so.

        Names are the whole model's: "roi_heads.classifier.fc_cls.weight".
        """
        return weights

    @abc.abstractmethod
    def forward(self, x_ND: Tensor) -> Tensor:
        """Features (N, D) -> logits (N, L)."""

    @abc.abstractmethod
    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """Named scalar losses in fp32, to be added up; each is 0, with a gradient of 0, when no row takes part."""

    @abc.abstractmethod
    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, L) -> class scores (N, C) in fp32, each in [0, 1], without the background."""
