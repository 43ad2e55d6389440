"""Feature memory of a detector: LOCE's memory-augmented feature sampling (ICCV 2021, Sec. 3.3), BACL's FHM and FASA.

What is stored, in what form, and how classes are drawn are three options, of which methods are settings:

    LOCE   memory.kind=ring       memory.source=boxes     memory.draw=score        k = 8 classes with m = 4 features
    BACL   memory.kind=gaussian   memory.source=boxes     memory.draw=confusion    k = 8 classes with m = 12 vectors
    FASA   memory.kind=gaussian   memory.source=regions   memory.draw=adaptive     one vector of a class

Drawn rows join the batch as foreground rows. With memory.loss_weight=w > 0 (FASA: 0.1) their loss stands apart: that of
the batch's own rows plus w times the mean over the drawn ones. Box regression learns from stored features, which have
targets, and not from a Gaussian's; a Gaussian's rows do not count in its divisor.

The ring: loce/memory_bank.py. Gaussians: loce/gaussian_memory.py. FASA's rates: loce/adaptive_rates.py.

Shapes: B rows to store, K = k m rows drawn from the memory, D feature shape, C classes.

State: the ring, or mean and variance; each rank its own unless memory.shared. FASA's rates, the same on all ranks.

Differences from the paper / the released code:
- A class of which nothing is stored is never drawn; in the released BACL (and LOCE) such a draw gives nothing.
- BACL's and FASA's draws are for every 2 images of the whole batch, as LOCE's, and not for every GPU; random numbers
  are keyed by image. With memory.shared, mean and variance are of the rows of all ranks; the released codes keep one
  of each rank, and save that of rank 0.
- BACL's boxes are jittered as LOCE's are here: an own random number for each box, at most 5 instances of a class and
  image, clipped to the image, none under a pixel a side.
- In a second stage the memory is filled before it begins (memory.fill_instances), which FHM and FASA are not.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from loce.adaptive_rates import AdaptiveRates
from loce.box_generator import SIGN_PATTERNS, choose_instances, dense_boxes, valid
from loce.config import MemoryConfig
from loce.gaussian_memory import GaussianMemory, confusion_probability
from loce.memory_bank import FeatureMemoryBank, draw_classes
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
    """Stores features of the batch's objects and draws rows of weak classes from them.

    rates: of memory.draw=adaptive, else None; instance_counts: (C,) of the training set, which they start from.
    """

    bank: FeatureMemoryBank | GaussianMemory

    def __init__(
        self,
        num_classes: int,
        feature_shape: tuple[int, ...],
        config: MemoryConfig,
        instance_counts: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        self.config, self.feature_shape = config, feature_shape
        if config.kind == "ring":
            dtype = getattr(torch, config.dtype)
            self.bank = FeatureMemoryBank(num_classes, feature_shape, config.capacity, dtype)
        else:
            self.bank = GaussianMemory(num_classes, feature_shape, config.momentum)
        self.rates: AdaptiveRates | None = None
        if config.draw == "adaptive":
            counts = np.ones(num_classes) if instance_counts is None else instance_counts
            self.rates = AdaptiveRates(counts, config.adaptive.power, config.adaptive.scale)

    @property
    def has_boxes(self) -> bool:
        """Whether what is drawn has box targets: a stored feature has, a Gaussian's vector has none."""
        return self.config.kind == "ring"

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
    def draw(
        self,
        indicator: Tensor,
        images: Sequence[ImageSeed],
        own_share: Tensor | None = None,
    ) -> MemoryRows:
        """Draw rows: of classes that are weak by the indicator (C+1,) (Eq. 7-8), or as `memory.draw` says.

        k classes are drawn per 2 images of the batch over all ranks, by each image its part with random numbers of its
        own, so that the method does not depend on how images are spread over ranks. own_share: (C,) K_cc of the head,
        for memory.draw=confusion.
        """
        drawing = [image for image in images if self.rates is None or image.batch_index % 2 == 0]
        if not drawing:
            return self.no_rows()
        drawn = [self._random(image, indicator.device) for image in drawing]
        chosen_K, random = (torch.cat(part) for part in zip(*drawn, strict=True))
        if self.rates is not None:  # classes
            return MemoryRows(*self.bank.rows_of(chosen_K, random))
        if self.config.draw == "score":  # else uniform numbers that choose them
            return MemoryRows(*self.bank.draw(indicator, 1 - chosen_K, random))
        assert own_share is not None
        probability_C = confusion_probability(own_share.double(), self.bank.counts)
        return MemoryRows(*self.bank.rows_of(draw_classes(probability_C, 1 - chosen_K), random))

    def no_rows(self) -> MemoryRows:
        """What is drawn while nothing is."""
        empty = self.bank.counts[:0]
        shape = () if self.config.kind == "ring" else self.feature_shape
        return MemoryRows(*self.bank.rows_of(empty, torch.zeros((0, 1, *shape), device=empty.device)))

    def _random(self, image: ImageSeed, device: torch.device) -> tuple[Tensor, Tensor]:
        """What an image draws K classes with, and m rows of each.

        Of a ring (K,) and (K, m) uniform numbers; of Gaussians (K,) uniform and (K, m, *D) normal ones. Two images have
        k classes. With adaptive rates it is the classes themselves, and one image of two draws them.
        """
        generator, m = generator_for(image.seed, DRAWS, device), self.config.features_per_class
        if self.rates is not None:
            uniform_C = torch.rand(self.bank.num_classes, generator=generator, device=device)
            chosen_K = self.rates.draw(uniform_C, self.bank.counts)
        else:
            k = self.config.classes_per_draw
            classes = (k * (image.batch_index + 1) + 1) // 2 - (k * image.batch_index + 1) // 2
            shape = (classes, 1 + m if self.config.kind == "ring" else 1)
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
            chosen_K, slots = uniform[:, 0], uniform[:, 1:]
            if self.config.kind == "ring":
                return chosen_K, slots
        return chosen_K, torch.randn((len(chosen_K), m, *self.feature_shape), generator=generator, device=device)


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
