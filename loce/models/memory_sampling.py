"""Memory-augmented feature sampling (LOCE, Sec. 3.3): box generator, feature memory and probabilistic sampler together.

Shapes: B boxes made from ground truth, K = k m rows drawn from the memory, D feature shape, C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from loce.box_generator import SIGN_PATTERNS, choose_instances, dense_boxes, valid
from loce.config import MemoryConfig
from loce.memory_bank import FeatureMemoryBank
from loce.models.boxes import DRAWS, JITTER, ROI_STDS, encode, generator_for
from loce.utils.classes import IGNORED
from loce.utils.distributed import all_gather_rows


class MemoryRows(NamedTuple):
    """Rows drawn from the memory: features (K, D), labels (K,) and box targets (K, 4)."""

    features: Tensor
    labels: Tensor
    box_targets: Tensor


class ImageSeed(NamedTuple):
    """Where the random numbers of an image come from: its seed, None for the global generator, and its position in the
    whole batch, over all ranks."""

    seed: int | None
    batch_index: int


class MemorySampling(nn.Module):
    """Stores features of jittered ground-truth boxes and draws rows of weak classes from them."""

    def __init__(self, num_classes: int, feature_shape: tuple[int, ...], config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        dtype = getattr(torch, config.dtype)
        self.bank = FeatureMemoryBank(num_classes, feature_shape, config.capacity, dtype)

    def choose_rows(self, labels_N: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Which of an image's instances are stored, a few of each class: indices into its labels (N,), on the host."""
        return choose_instances(labels_N, self.config.instances_per_class, generator)

    @record_function("memory: jittered boxes")
    @torch.no_grad()
    def boxes(
        self,
        boxes: list[Tensor],
        labels: list[Tensor],
        store_rows: list[Tensor],
        sizes: list[tuple[int, int]],
        seeds: Sequence[int | None] = (),
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Eq. 5 for the instances to store: (boxes (16 n_i, 4) of each image, labels (B,), box targets (B, 4)).

        boxes, labels: ground truth of each image; store_rows: (n_i,) indices into it; sizes: (height, width); seeds: of
        each image's random numbers. A box under one pixel a side is not left out, but has the label IGNORED.
        """
        jittered, jittered_labels, targets = [], [], []
        seeds = seeds or [None] * len(boxes)
        for boxes_N4, labels_N, rows_n, size, seed in zip(boxes, labels, store_rows, sizes, seeds, strict=True):
            generator = generator_for(seed, JITTER, boxes_N4.device)
            own_n4 = boxes_N4[rows_n]
            dense_n164 = dense_boxes(own_n4, size, generator=generator)
            dense = dense_n164.flatten(0, 1)
            fits = valid(dense)
            target = encode(dense, own_n4.repeat_interleave(SIGN_PATTERNS, dim=0), ROI_STDS)
            jittered.append(dense)
            jittered_labels.append(torch.where(fits, labels_N[rows_n].repeat_interleave(SIGN_PATTERNS), IGNORED))
            targets.append(torch.where(fits[:, None], target, 0))
        return jittered, torch.cat(jittered_labels), torch.cat(targets)

    @record_function("memory: store")
    @torch.no_grad()
    def store(self, features: Tensor, labels_B: Tensor, box_targets_B4: Tensor) -> None:
        """Enqueue rows of this batch (Eq. 6): features (B, D); with `memory.shared` those of all ranks."""
        if self.config.shared:
            features, labels_B, box_targets_B4 = _of_all_ranks(features, labels_B, box_targets_B4)
        self.bank.enqueue(features, labels_B, box_targets_B4)

    @record_function("memory: draw")
    @torch.no_grad()
    def draw(self, indicator: Tensor, images: Sequence[ImageSeed]) -> MemoryRows:
        """Draw classes that are weak by the indicator (C+1,), and stored rows of them (Eq. 7-8).

        k classes are drawn per 2 images of the batch over all ranks, by each image its part with random numbers of its
        own, so that the method does not depend on how images are spread over ranks.
        """
        uniforms = torch.cat([self._uniform(image, indicator.device) for image in images])
        u_K1, u_KF = uniforms.split([1, self.config.features_per_class], dim=1)
        return MemoryRows(*self.bank.draw(indicator, 1 - u_K1[:, 0], u_KF))

    def _uniform(self, image: ImageSeed, device: torch.device) -> Tensor:
        """(K, 1 + m) uniform numbers that an image draws with: K classes, so that 2 images draw k."""
        k, m = self.config.classes_per_draw, self.config.features_per_class
        classes = (k * (image.batch_index + 1) + 1) // 2 - (k * image.batch_index + 1) // 2
        generator = generator_for(image.seed, DRAWS, device)
        return torch.rand((classes, 1 + m), generator=generator, dtype=torch.float64, device=device)


def _of_all_ranks(features: Tensor, labels_B: Tensor, targets_B4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of all ranks, in order of rank; a rank with fewer rows adds IGNORED ones."""
    rows = all_gather_rows(torch.full((), len(labels_B), device=labels_B.device))
    missing = int(rows.max()) - len(labels_B)  # sync: every rank must send the same number of rows
    labels_B = F.pad(labels_B, (0, missing), value=IGNORED)
    features = torch.cat([features, features.new_zeros((missing, *features.shape[1:]))])
    targets_B4 = F.pad(targets_B4, (0, 0, 0, missing))
    return (
        all_gather_rows(features).flatten(0, 1),
        all_gather_rows(labels_B).flatten(),
        all_gather_rows(targets_B4).flatten(0, 1),
    )
