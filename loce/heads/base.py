"""Classification head interface and what several heads share (LOCE, Sec. 3.1 and 3.3).

Shape suffixes: N rows (RoIs, then memory features), D features, C classes, L logits (the head's business).
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loce.config import HeadConfig
from loce.utils.classes import IGNORED, META, ClassStats

__all__ = ["META", "Head", "NormalisedLinear", "RoIs", "at_least_fp32", "cross_entropy", "linear", "one_hot"]


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
    sampled_class_N: long, the class that the row's image was drawn for by bi-level sampling (SimCal); META for an image
        of the meta batch (BALMS); -1 otherwise, for rows from the memory too. None: -1 throughout.
    generator: of the logits' device, for a head that chooses at random: the same batch gives the same choice, and so
        can be repeated. None: the global one.
    """

    labels_N: Tensor  # noqa: N815
    instances_N: Tensor  # noqa: N815
    from_memory_N: Tensor  # noqa: N815
    indicator: Tensor | None = None
    progress: float = 0.0
    features_ND: Tensor | None = None  # noqa: N815
    sampled_class_N: Tensor | None = None  # noqa: N815
    generator: torch.Generator | None = None

    @cached_property
    def count(self) -> Tensor:
        """(): rows that take part, never 0; what losses are divided by.

        The model puts their mean over ranks in its place, see `distributed.mean_count`.
        """
        return (self.labels_N != IGNORED).sum().clamp(min=1)

    def part(self, rows: slice, count: Tensor) -> "RoIs":
        """Some of the rows as a batch of their own, whose losses are divided by `count`."""
        part = replace(
            self,
            labels_N=self.labels_N[rows],
            instances_N=self.instances_N[rows],
            from_memory_N=self.from_memory_N[rows],
            features_ND=None if self.features_ND is None else self.features_ND[rows],
            sampled_class_N=None if self.sampled_class_N is None else self.sampled_class_N[rows],
        )
        part.count = count
        return part


class Head(nn.Module, abc.ABC):
    """A classification head, built as `HEADS[name](in_features, stats, options)`.

    `forward`, `losses` and `scores` accept N = 0, keep N as it is, and wait for no device. State besides the parameters
    lives in buffers. `num_classes` is C. What a head needs from others it says by attributes:

    depth: what it reads: features after the two shared FCs (2), after the first (1), or the pooled features of a
        region, flattened (0). The model passes `in_features` to match, and to heads of depth 0, which have FCs of their
        own, also `width`, that of the shared FCs.
    needs_indicator: its loss reads `rois.indicator`, which must be positive for every class.
    meta_batch: half of the images in training are a meta batch, drawn anew, with META in `rois.sampled_class_N`.
    of_rank: names of the buffers that differ between processes: a checkpoint holds those of each.
    """

    fc_cls: nn.Module
    depth = 2
    needs_indicator = False
    meta_batch = False
    of_rank: tuple[str, ...] = ()

    def __init__(
        self,
        in_features: int,
        stats: ClassStats,
        options: HeadConfig | None = None,
        width: int = 1024,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_classes = len(stats)
        self.options = options or HeadConfig()

    @classmethod
    def from_files(cls, options: HeadConfig, annotations: Path | str, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Values of buffers, by name, that are read from files when a training begins; a checkpoint holds them later.

        annotations, names: training file and its classes, to which the files must belong; UserError where they do not.
        """
        return {}

    def adopt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of another run's model, by name, what this one starts from; a head whose layers are called otherwise says so.

        Names are the whole model's: "roi_heads.classifier.fc_cls.weight".
        """
        return weights

    def forward(self, x_ND: Tensor) -> Tensor:
        """Features (N, D) -> logits (N, L), by the layer `fc_cls` where a head has no others."""
        return self.fc_cls(x_ND)

    @abc.abstractmethod
    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """Named scalar losses in fp32, to be added up; each is 0, with a gradient of 0, when no row takes part."""

    @abc.abstractmethod
    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, L) -> class scores (N, C) in fp32, each in [0, 1], without the background."""

    def own_share(self) -> Tensor:
        """(C,) K_cc: the mean share, of a softmax over foreground classes, that rows of class c gave to c; 0: no rows.

        Of heads that keep a confusion matrix, for a memory that draws by it (memory.draw=confusion).
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no confusion matrix")


def linear(in_features: int, logits: int, prior: float | None = None) -> nn.Linear:
    """A linear layer with weights from N(0, 0.01).

    prior: the sigmoid that every logit starts from, bias = -log((1 - prior) / prior); None: bias 0, for a softmax.
    """
    layer = nn.Linear(in_features, logits)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, 0.0 if prior is None else -math.log((1 - prior) / prior))
    return layer


class NormalisedLinear(nn.Module):
    """z_c = temperature * <x, w_c> / ((|x| + eps) (|w_c| + eps)) + b_c: cosines, weights from N(0, 0.01), b = 0.

    Lengths are taken in fp32, also under autocast; the product runs in autocast's type. bias: whether there is a b.
    """

    eps = 1e-6

    def __init__(
        self,
        in_features: int,
        logits: int,
        temperature: float,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(torch.empty(logits, in_features))
        nn.init.normal_(self.weight, std=0.01)
        self.bias = nn.Parameter(torch.zeros(logits)) if bias else None

    def forward(self, x_ND: Tensor) -> Tensor:
        """Features (N, D) -> logits (N, L)."""
        x_ND = self.temperature * x_ND / (_length(x_ND) + self.eps)
        weight_LD = self.weight / (_length(self.weight) + self.eps)
        return F.linear(x_ND, weight_LD, self.bias)


def _length(rows: Tensor) -> Tensor:
    """(N, 1) length of each row, in at least fp32."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=dtype)


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, also under autocast; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def one_hot(labels_N: Tensor, columns: int) -> Tensor:
    """(N, L) bool, true where the column is the row's label; all false for a label outside 0..L-1, such as IGNORED."""
    return labels_N[:, None] == torch.arange(columns, device=labels_N.device)


def binary_cross_entropy(logits_NL: Tensor, labels_N: Tensor, count: Tensor, weight_NL: Tensor) -> Tensor:
    """(): sigmoid losses of all entries times `weight_NL`, targets one-hot, over `count`; in at least fp32.

    weight_NL: (N, L) bool or float, 0 for an entry, such as one of an ignored row, that takes no part.
    """
    z_NL = at_least_fp32(logits_NL)
    target_NL = one_hot(labels_N, z_NL.shape[1]).to(z_NL)
    return F.binary_cross_entropy_with_logits(z_NL, target_NL, weight_NL.to(z_NL), reduction="sum") / count


def scores_against_background(logits_NL: Tensor) -> Tensor:
    """(N, C): sigma(z_c) (1 - sigma(z_background)) of C + 1 sigmoid logits, background last, in at least fp32."""
    z_NL = at_least_fp32(logits_NL)
    return z_NL[:, :-1].sigmoid() * torch.sigmoid(-z_NL[:, -1:])


def cross_entropy(
    logits_NL: Tensor,
    labels_N: Tensor,
    count: Tensor,
    weight_L: Tensor | None = None,
) -> Tensor:
    """(): Eq. 1 in at least fp32, each row times its class's weight (L,), over `count`, as a rule `rois.count`.

    The divisor does not change with weights; torch's weighted mean would divide by the sum of the weights.
    """
    logits = at_least_fp32(logits_NL)
    weight = None if weight_L is None else weight_L.to(logits.dtype)
    return F.cross_entropy(logits, labels_N, weight, ignore_index=IGNORED, reduction="sum") / count
