"""Memory-augmented Feature Sampling (Sec. 3.3): generator -> feature memory -> probabilistic sampler, in one place.

Shapes: B boxes made from ground truth, K = k m drawn rows, D feature shape, C classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from loce.box_generator import SIGN_PATTERNS, choose_instances, dense_boxes, valid
from loce.config import MemoryConfig
from loce.memory_bank import FeatureMemoryBank
from loce.models.boxes import DRAWS, JITTER, ROI_STDS, encode, keyed
from loce.utils.classes import IGNORED
from loce.utils.distributed import all_gather_rows


class MemorySampling(nn.Module):
    """Stores features of jittered ground-truth boxes and draws rows of weak classes from them."""

    def __init__(self, num_classes: int, feature_shape: tuple[int, ...], config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        dtype = getattr(torch, config.dtype)
        self.bank = FeatureMemoryBank(num_classes, feature_shape, config.capacity, dtype)

    def choose(self, labels_N: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Rows of one image's labels (N,), still on the host, whose boxes will be stored: a few of each class."""
        return choose_instances(labels_N, self.config.instances_per_class, generator)

    @record_function("memory: jittered boxes")
    @torch.no_grad()
    def boxes(
        self,
        truths: list[Tensor],
        labels: list[Tensor],
        rows: list[Tensor],
        sizes: list[tuple[int, int]],
        keys: Sequence[int | None] = (),
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Eq. 5 for the chosen rows of each image: (boxes (16 n_i, 4) per image, labels (B,), box targets (B, 4)).

        A box under one pixel a side keeps its place with the label IGNORED. keys: of each image's random numbers.
        """
        boxes, all_labels, targets = [], [], []
        keys = keys or [None] * len(truths)
        for truths_N4, labels_N, rows_n, size, key in zip(truths, labels, rows, sizes, keys, strict=True):
            random = keyed(key, JITTER, truths_N4.device)
            dense_n164 = dense_boxes(truths_N4[rows_n], size, generator=random)
            source = truths_N4[rows_n, None].expand_as(dense_n164).reshape(-1, 4)
            dense = dense_n164.reshape(-1, 4)
            fits = valid(dense)
            boxes.append(dense)
            repeated = labels_N[rows_n].repeat_interleave(SIGN_PATTERNS)
            all_labels.append(torch.where(fits, repeated, IGNORED))
            targets.append(torch.where(fits[:, None], encode(dense, source, ROI_STDS), 0))
        return boxes, torch.cat(all_labels), torch.cat(targets)

    @record_function("memory: store and draw")
    @torch.no_grad()
    def exchange(
        self,
        features: Tensor,
        labels_B: Tensor,
        targets_B4: Tensor,
        indicator: Tensor,
        shown: Sequence[tuple[int | None, int]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Enqueue this batch's rows (Eq. 6), then draw (Eq. 7-8): (features (K, D), labels (K,), targets (K, 4)).

        k classes are drawn per 2 images of the batch over all ranks, by each image its part with random numbers of its
        own, so that the method does not depend on how images are spread over ranks. shown: of each image the key of
        its random numbers, and its position in the whole batch.
        """
        if self.config.shared:
            features, labels_B, targets_B4 = _of_all_ranks(features, labels_B, targets_B4)
        parts = [self._uniform(key, place, features.device) for key, place in shown]
        u_K1, u_KF = torch.cat(parts).split([1, self.config.features_per_class], dim=1)
        self.bank.enqueue(features, labels_B, targets_B4)
        drawn, labels_K, targets_K4 = self.bank.draw(indicator, 1 - u_K1[:, 0], u_KF)
        return drawn.to(features.dtype), labels_K, targets_K4

    def _uniform(self, key: int | None, place: int, device: torch.device) -> Tensor:
        """(K, 1 + m) what the image at this position of the batch draws with: K classes so that 2 images draw k."""
        k, m = self.config.classes_per_draw, self.config.features_per_class
        classes = (k * (place + 1) + 1) // 2 - (k * place + 1) // 2
        return torch.rand((classes, 1 + m), generator=keyed(key, DRAWS, device), dtype=torch.float64, device=device)


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
