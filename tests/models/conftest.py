"""A small detector and small batches; every test of the model parts starts from the same random state."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from loce.config import EvalConfig, HeadConfig, IndicatorConfig, MemoryConfig, ModelConfig, RoIConfig, RPNConfig
from loce.data.masks import CroppedMasks
from loce.models.mask_rcnn import MaskRCNN, build_roi_heads
from loce.models.roi_heads import FirstStage, RoIHeads, Rows, Targets
from loce.utils.classes import ClassStats

CLASSES = 6
SMALL = ModelConfig(
    backbone="tiny",
    weights="none",
    norm="group",
    frozen_stages=0,
    fpn_channels=16,
    fc_features=24,
    mask_channels=16,
    mask_convs=1,
    rpn=RPNConfig(pre_nms_train=60, pre_nms_test=60, post_nms=40, batch_per_image=32),
    roi=RoIConfig(batch_per_image=24),
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_stats(make_stats: Callable[[int], ClassStats]) -> ClassStats:
    return make_stats(CLASSES)


@pytest.fixture
def make_model(small_stats: ClassStats) -> Callable[..., MaskRCNN]:
    """Small detector: head name, memory and indicator options, what is frozen; the same weights for the same head."""

    def make(
        head: str = "softmax",
        memory: MemoryConfig | None = None,
        indicator: IndicatorConfig | None = None,
        freeze: str = "none",
        config: ModelConfig = SMALL,
    ) -> MaskRCNN:
        torch.manual_seed(1)
        options = (indicator or IndicatorConfig(), memory or MemoryConfig())
        model = MaskRCNN(
            config, build_roi_heads(config, HeadConfig(name=head), *options, small_stats), EvalConfig(), (64, 128)
        )
        model.freeze(freeze)
        return model

    return make


@pytest.fixture
def make_sample() -> Callable[..., dict[str, Any]]:
    """A training sample: random image of (height, width), rectangles as masks."""

    def make(
        boxes: list[list[float]], labels: list[int], size: tuple[int, int] = (64, 96), seed: int = 0
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        bitmaps = []
        for x1, y1, x2, y2 in boxes:
            bitmap = np.zeros(size, np.uint8)
            bitmap[round(y1) : round(y2), round(x1) : round(x2)] = 1
            bitmaps.append((bitmap, (0, 0)))
        return {
            "image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8),
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.long),
            "masks": CroppedMasks.pack(bitmaps, size),
            "image_id": seed,
            "scale": (1.0, 1.0),
            "size": size,
        }

    return make


@pytest.fixture
def batch(make_sample: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """Two images of different sizes with three and two instances."""
    return [
        make_sample([[4, 6, 40, 50], [30, 20, 90, 60], [50, 5, 70, 25]], [0, 3, 5], (64, 96), 1),
        make_sample([[10, 10, 60, 50], [5, 30, 35, 62]], [3, 4], (64, 80), 2),
    ]


def first(
    candidates: torch.Tensor, limit: torch.Tensor | int, slots: int, _: object = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Instead of random choice: the first ones."""
    slots = min(slots, len(candidates))
    indices = candidates.nonzero()[:, 0][: min(int(limit), slots)]
    chosen = torch.zeros(slots, dtype=torch.long)
    chosen[: len(indices)] = indices
    return chosen, torch.arange(slots) < len(indices)


def losses_and_rows(
    roi_heads: RoIHeads, features: list[torch.Tensor], proposals: list[torch.Tensor], truths: list[Targets]
) -> tuple[dict[str, torch.Tensor], Rows]:
    """Losses of the two images of `batch` on one rank, and what they were computed from."""
    rows = roi_heads.forward_rows(FirstStage(features, proposals, truths, [(64, 96), (64, 80)]))
    return roi_heads.losses(rows, rows.sums), rows


def truth_of(sample: dict[str, Any], batch_index: int = 0) -> Targets:
    """Ground truth as the second stage gets it, all of it to be stored."""
    rows = torch.arange(len(sample["labels"]))
    return Targets(sample["boxes"], sample["labels"], sample["masks"], rows, batch_index=batch_index)


@pytest.fixture
def truths(batch: list[dict[str, Any]]) -> list[Targets]:
    return [truth_of(sample, index) for index, sample in enumerate(batch)]


@pytest.fixture
def features() -> list[torch.Tensor]:
    """P2..P5 of two images."""
    return [torch.randn(2, 16, 64 // stride, 96 // stride) for stride in (4, 8, 16, 32)]


@pytest.fixture
def proposals(truths: list[Targets]) -> list[torch.Tensor]:
    """Near the ground truth, and anywhere."""
    made = []
    for truth, (height, width) in zip(truths, [(64, 96), (64, 80)], strict=True):
        near = (truth.boxes.repeat(6, 1) + torch.randn(6 * len(truth.boxes), 4) * 2).clamp(min=0)
        corner = torch.rand(60, 2) * torch.tensor([width * 0.7, height * 0.7])
        far = torch.cat([corner, corner + 3 + torch.rand(60, 2) * 20], dim=1)
        made.append(torch.cat([near, far]))
    return made
