"""LOCE, Sec. 3.3, Eq. 6-8: the feature memory and the probabilistic sampler of memory-augmented feature sampling (MFS).

Shape suffixes: B rows to store, C classes, M slots per class, K classes drawn, F features drawn of each; 4 box deltas.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loce.utils.classes import IGNORED


def sampling_probability(mean_score: Tensor, counts: Tensor) -> Tensor:
    """Eq. 7-8: the probability of drawing each class, (C,), over the classes that have something stored.

    mean_score: (C,), or (C+1,) whose background is left out; instance counts do as well (supplement, Eq. 2-3).
    counts: (C,), stored features. All zeros when nothing is stored at all. Computed in the dtype of `mean_score`. f of
    Eq. 7 is 1 / s (Eq. 8), of s + 1e-7, since s may be 0.
    """
    weight_C = torch.where(counts > 0, (mean_score[: len(counts)] + 1e-7).reciprocal(), 0)
    return weight_C / weight_C.sum().clamp(min=torch.finfo(weight_C.dtype).tiny)


def draw_classes(probability_C: Tensor, uniform_K: Tensor) -> Tensor:
    """(K,) long: a class for each of K numbers in (0, 1], by the inverse of the distribution (C,); with replacement."""
    cumulative_C = probability_C.cumsum(0)
    # The first class with u <= cumulative sum. Its last entry may differ from 1 by rounding.
    class_K = torch.searchsorted(cumulative_C, uniform_K * cumulative_C[-1])
    return class_K.clamp(max=len(probability_C) - 1)


class FeatureMemoryBank(nn.Module):
    """One ring of the `capacity` newest features for each class (Eq. 6), with their box regression targets.

    All state is in buffers: it moves with the module and is saved with it. Storing and drawing never wait for the
    device and have shapes that do not depend on the data. A bank of 1203 x 80 vectors of 1024 numbers takes 189 MiB in
    bfloat16, 377 MiB in float32.

    features: (C*M + 1, *feature_shape) in `dtype`, row c*M + slot; box_targets: (C*M + 1, 4) fp32; written: (C,) long,
    rows ever stored, so that the next slot of a class is written % M. The spare last row takes what must not be stored,
    stands for "nothing stored", and is always 0.
    """

    features: Tensor
    box_targets: Tensor
    written: Tensor

    def __init__(
        self,
        num_classes: int,
        feature_shape: Sequence[int],
        capacity: int = 80,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.capacity = capacity
        self.spare_row = num_classes * capacity
        self.register_buffer("features", torch.zeros(self.spare_row + 1, *feature_shape, dtype=dtype))
        self.register_buffer("box_targets", torch.zeros(self.spare_row + 1, 4))
        self.register_buffer("written", torch.zeros(num_classes, dtype=torch.long))

    @property
    def counts(self) -> Tensor:
        """(C,) long: filled slots of each class, 0..capacity."""
        return self.written.clamp(max=self.capacity)

    @property
    def fill(self) -> Tensor:
        """(C,) fp32 in [0, 1]: the share of each class's slots that is filled."""
        return self.counts / self.capacity

    @torch.no_grad()
    def enqueue(self, features: Tensor, labels: Tensor, box_targets: Tensor) -> None:
        """Store rows in their order, each in its class's ring, over the oldest ones.

        features: (B, *feature_shape) of any float dtype; labels: (B,) long, rows with a negative label or with label C
        (background) are left out; box_targets: (B, 4), the regression targets of Sec. 3.3. When a class has more than
        `capacity` rows in one call, the last `capacity` of them remain.
        """
        label_B = torch.where(labels < 0, self.num_classes, labels)  # left out: a class of their own, after the others
        sorted_B, order_B = label_B.sort(stable=True)
        rank_sorted_B = torch.arange(len(label_B), device=label_B.device) - torch.searchsorted(sorted_B, sorted_B)
        rank_B = torch.empty_like(order_B).scatter_(0, order_B, rank_sorted_B)  # 0 for the first row of a class
        new_C1 = label_B.new_zeros(self.num_classes + 1).index_add_(0, label_B, torch.ones_like(label_B))

        class_B = label_B.clamp(max=self.num_classes - 1)
        row_B = class_B * self.capacity + (self.written[class_B] + rank_B) % self.capacity
        kept_B = (label_B < self.num_classes) & (rank_B >= new_C1[label_B] - self.capacity)
        row_B = torch.where(kept_B, row_B, self.spare_row)

        self.features.index_copy_(0, row_B, features.to(self.features.dtype))
        self.box_targets.index_copy_(0, row_B, box_targets.to(self.box_targets.dtype))
        self.features[self.spare_row :].zero_()
        self.box_targets[self.spare_row :].zero_()
        self.written += new_C1[: self.num_classes]

    def contents(self, label: int) -> tuple[Tensor, Tensor]:
        """What is stored of one class, oldest first: features (n, *feature_shape), box targets (n, 4).

        For inspection and tests: waits for the device.
        """
        written = int(self.written[label])  # sync: the result's shape depends on it; not part of a training step
        oldest = max(written - self.capacity, 0)
        slot = torch.arange(oldest, written, device=self.written.device) % self.capacity
        row = label * self.capacity + slot
        return self.features[row], self.box_targets[row]

    def sample(
        self,
        mean_score: Tensor,
        classes_per_draw: int = 8,
        features_per_class: int = 4,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw k = `classes_per_draw` classes by Eq. 7-8 and m = `features_per_class` stored features of each.

        Both draws are with replacement. mean_score: (C,) or (C+1,), see `sampling_probability`; generator: of the
        bank's device. Returns features (k*m, *feature_shape) in the bank's dtype, labels (k*m,) long and box_targets
        (k*m, 4) fp32, the features of one drawn class after the other. Only when the whole bank is empty the labels
        are IGNORED and the rest is 0.
        """

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64, device=self.written.device)

        return self.draw(mean_score, 1 - uniform(classes_per_draw), uniform(classes_per_draw, features_per_class))

    @torch.no_grad()
    def draw(self, mean_score: Tensor, uniform_K: Tensor, uniform_KF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`sample` with given random numbers: those for the classes in (0, 1], those for the features in [0, 1)."""
        class_K = draw_classes(sampling_probability(mean_score.double(), self.counts), uniform_K)
        return self.rows_of(class_K, uniform_KF)

    def rows_of(self, class_K: Tensor, uniform_KF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stored rows of given classes (K,), as `sample` returns them; uniform_KF: in [0, 1), which of a class."""
        count_K1 = self.counts[class_K][:, None]
        slot_KF = (uniform_KF * count_K1).long()
        stored_KF = (count_K1 > 0).expand_as(slot_KF)
        row = torch.where(stored_KF, class_K[:, None] * self.capacity + slot_KF, self.spare_row).flatten()
        labels = torch.where(stored_KF, class_K[:, None], IGNORED).flatten()
        return self.features[row], labels, self.box_targets[row]

    def extra_repr(self) -> str:
        mebibytes = sum(buffer.numel() * buffer.element_size() for buffer in self.buffers()) / 2**20
        return f"classes={self.num_classes}, capacity={self.capacity}, {math.ceil(mebibytes)} MiB"
