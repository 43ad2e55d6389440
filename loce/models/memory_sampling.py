"""Memory-augmented Feature Sampling (Sec. 3.3): generator -> feature memory -> probabilistic sampler, in one place.

Shapes: B boxes made from ground truth, K = k m drawn rows, D feature shape, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loce.box_generator import SIGN_PATTERNS, choose_instances, dense_boxes, valid
from loce.classes import IGNORED
from loce.config import MemoryConfig
from loce.distributed import all_gather_rows
from loce.memory_bank import FeatureMemoryBank
from loce.models.boxes import ROI_STDS, encode


class MemorySampling(nn.Module):
    """Stores features of jittered ground-truth boxes and draws rows of weak classes from them."""

    def __init__(self, num_classes: int, feature_shape: tuple[int, ...], config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.bank = FeatureMemoryBank(num_classes, feature_shape, config.capacity, getattr(torch, config.dtype))

    def choose(self, labels_N: Tensor) -> Tensor:
        """Rows of one image's labels (N,), still on the host, whose boxes will be stored: a few of each class."""
        return choose_instances(labels_N, self.config.instances_per_class)

    @torch.no_grad()
    def boxes(
        self, truths: list[Tensor], labels: list[Tensor], rows: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Eq. 5 for the chosen rows of each image: (boxes (16 n_i, 4) per image, labels (B,), box targets (B, 4)).

        A box under one pixel a side keeps its place with the label IGNORED.
        """
        boxes, all_labels, targets = [], [], []
        for truths_N4, labels_N, rows_n, size in zip(truths, labels, rows, sizes, strict=True):
            dense_n164 = dense_boxes(truths_N4[rows_n], size)
            source = truths_N4[rows_n, None].expand_as(dense_n164).reshape(-1, 4)
            dense = dense_n164.reshape(-1, 4)
            fits = valid(dense)
            boxes.append(dense)
            repeated = labels_N[rows_n].repeat_interleave(SIGN_PATTERNS)
            all_labels.append(torch.where(fits, repeated, IGNORED))
            targets.append(torch.where(fits[:, None], encode(dense, source, ROI_STDS), 0))
        return boxes, torch.cat(all_labels), torch.cat(targets)

    @torch.no_grad()
    def exchange(
        self, features: Tensor, labels_B: Tensor, targets_B4: Tensor, indicator: Tensor, images: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Enqueue this batch's rows (Eq. 6), then draw (Eq. 7-8): (features (K, D), labels (K,), targets (K, 4)).

        k classes are drawn per 2 images, so that the method does not depend on how images are spread over ranks.
        """
        if self.config.shared:
            features, labels_B, targets_B4 = _of_all_ranks(features, labels_B, targets_B4)
        self.bank.enqueue(features, labels_B, targets_B4)
        draws = max(1, round(self.config.classes_per_draw * images / 2))
        drawn, labels_K, targets_K4 = self.bank.sample(indicator, draws, self.config.features_per_class)
        return drawn.to(features.dtype), labels_K, targets_K4


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
