"""Gaussian feature memory (FASA, ICCV 2021, arXiv 2102.12867; BACL's FHM, TMM 2023, arXiv 2308.02213).

    b_c, v_c      mean and unbiased variance of class c's features in a batch; v_c = 0 of a single one
    mean_c     <- a mean_c     + (1 - a) b_c,   a = memory.momentum = 0.9; the first time b_c itself
    variance_c <- a variance_c + (1 - a) v_c,   the first time v_c itself
    drawn         x = mean_c + sqrt(variance_c) noise, noise ~ N(0, 1) in each coordinate

A class of which nothing is stored yet is not drawn. It has the interface of LOCE's ring (memory_bank.py), but for box
targets: what is drawn belongs to no box. The papers' own numbers of these equations were not at hand.

Shape suffixes: B rows to store, C classes, E = C + 1, D feature shape, K classes drawn, F vectors of each.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loce.memory_bank import draw_classes, sampling_probability
from loce.utils.classes import IGNORED


class GaussianMemory(nn.Module):
    """A running mean and variance of each class's features, coordinate by coordinate; all state in buffers.

    mean, variance: (C, *feature_shape) fp32, 0 where nothing is stored; used: (C,) bool. 1203 classes with vectors of
    1024 numbers take 10 MiB. Storing and drawing never wait for the device, and no gradient enters.
    """

    mean: Tensor
    variance: Tensor
    used: Tensor

    def __init__(self, num_classes: int, feature_shape: Sequence[int], momentum: float = 0.9) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(num_classes, *feature_shape))
        self.register_buffer("variance", torch.zeros(num_classes, *feature_shape))
        self.register_buffer("used", torch.zeros(num_classes, dtype=torch.bool))

    @property
    def counts(self) -> Tensor:
        """(C,) long: 1 where a class has a mean and a variance, else 0."""
        return self.used.long()

    @property
    def fill(self) -> Tensor:
        """(C,) fp32: as `counts`."""
        return self.used.float()

    @torch.no_grad()
    def enqueue(self, features: Tensor, labels: Tensor, box_targets: Tensor | None = None) -> None:
        """Move the Gaussians of the classes that a batch holds.

        features: (B, *feature_shape) of any float dtype; labels: (B,) long, rows with a negative label or with label C
        (background) are left out; box_targets: not used, as in `FeatureMemoryBank.enqueue`.
        """
        classes, x_BD = self.num_classes, features.float()
        label_B = torch.where(labels < 0, classes, labels)  # left out: a class of their own, after the others
        count_E = label_B.new_zeros(classes + 1).index_add_(0, label_B, torch.ones_like(label_B))
        zeros_ED = x_BD.new_zeros(classes + 1, *x_BD.shape[1:])
        count_E1 = count_E.reshape(-1, *[1] * (x_BD.dim() - 1))
        batch_ED = zeros_ED.index_add(0, label_B, x_BD) / count_E1.clamp(min=1)
        spread_ED = zeros_ED.index_add(0, label_B, (x_BD - batch_ED[label_B]) ** 2) / (count_E1 - 1).clamp(min=1)

        # A class that is not in the batch stays; one that comes for the first time takes the batch's values over.
        kept = torch.where(self.used, self.momentum, 0.0)
        kept = torch.where(count_E[:classes] > 0, kept, 1.0).reshape(-1, *[1] * (x_BD.dim() - 1))
        self.mean = kept * self.mean + (1 - kept) * batch_ED[:classes]
        self.variance = kept * self.variance + (1 - kept) * spread_ED[:classes]
        self.used = self.used | (count_E[:classes] > 0)

    @torch.no_grad()
    def draw(self, mean_score: Tensor, uniform_K: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw classes by 1/s as `FeatureMemoryBank.draw` does, uniform_K in (0, 1], and `rows_of` them."""
        class_K = draw_classes(sampling_probability(mean_score.double(), self.counts), uniform_K)
        return self.rows_of(class_K, noise)

    @torch.no_grad()
    def rows_of(self, class_K: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors of given classes (K,); noise: (K, F, *feature_shape) from N(0, 1).

        Returns features (K*F, *feature_shape) fp32, labels (K*F,) long and box targets (K*F, 4), which are all 0, the
        vectors of one class after the other. A class without a Gaussian has the label IGNORED and features 0.
        """
        used_K = self.used[class_K]
        features = self.mean[class_K][:, None] + self.variance[class_K][:, None].sqrt() * noise
        features = torch.where(used_K.reshape(-1, *[1] * (noise.dim() - 1)), features, 0).flatten(0, 1)
        labels = torch.where(used_K, class_K, IGNORED)[:, None].expand(noise.shape[:2]).flatten()
        return features, labels, features.new_zeros(len(labels), 4)

    def extra_repr(self) -> str:
        mebibytes = sum(buffer.numel() * buffer.element_size() for buffer in self.buffers()) / 2**20
        return f"classes={self.num_classes}, momentum={self.momentum}, {math.ceil(mebibytes)} MiB"


def confusion_probability(own_share_C: Tensor, counts_C: Tensor) -> Tensor:
    """BACL: the probability of drawing each class, in proportion to 1 - K_cc, over classes with something stored, (C,).

    own_share_C: K_cc, the mean share that a class's rows give to their own class; 0 for one that was never seen, which
    is then drawn most of all. At least 1e-7, so that there is a distribution where every class is recognised.
    """
    weight_C = torch.where(counts_C > 0, (1 - own_share_C).clamp(min=1e-7), 0)
    return weight_C / weight_C.sum().clamp(min=torch.finfo(weight_C.dtype).tiny)
