"""Steps of a small detector on any device, and what they leave; for the tests of the pretended device."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from loce.config import EvalConfig, HeadConfig, IndicatorConfig, MemoryConfig, ModelConfig, TrainConfig
from loce.data.prefetch import prefetched
from loce.engine.loop import train_step
from loce.models.build import build_optimizer
from loce.models.mask_rcnn import MaskRCNN, build_roi_heads
from loce.models.nms_resampling import NMSResampling
from tests.conftest import stats_of
from tests.models.conftest import CLASSES, SMALL
from tests.models.joint_steps import SIZE, image

LOCE = MemoryConfig(enabled=True, capacity=30)
CPU = torch.device("cpu")


def samples(step: int, objects: Sequence[int] = (3, 1)) -> list[dict[str, Any]]:
    """A batch as the data loader leaves it: page-locked where there is a device."""
    batch = []
    for place, count in enumerate(objects):
        sample = {**image(step, place, count), "ignored": torch.tensor([[0.0, 0.0, 20.0, 15.0]]), "sampled_class": 1}
        if torch.cuda.is_available():
            for key in ("image", "boxes", "labels", "masks", "ignored"):
                sample[key] = sample[key].pin_memory()
        batch.append(sample)
    return batch


def build(
    device: torch.device,
    head: str = "softmax",
    memory: MemoryConfig = MemoryConfig(),  # noqa: B008
    freeze: str = "none",
    resampling: str = "none",
    indicator: str = "score",
    config: ModelConfig = SMALL,
) -> MaskRCNN:
    """The detector, with the same weights on every device."""
    torch.manual_seed(1)
    stats = stats_of(CLASSES)
    options = (HeadConfig(name=head), IndicatorConfig(kind=indicator), memory)  # type: ignore[arg-type]
    model = MaskRCNN(config, build_roi_heads(config, *options, stats), EvalConfig(detections=20), SIZE)
    model.stats = stats
    if resampling != "none":
        model.rpn.resampling = NMSResampling(resampling, stats)
    model.freeze(freeze)
    return model.to(device).train()


def train(
    model: MaskRCNN,
    steps: int = 2,
    first: int = 0,
    precision: str = "fp32",
    accumulate: int = 1,
    fill: bool = False,
    ahead: bool = False,
) -> dict[str, Any]:
    """Optimiser steps, after the filling of the memory where asked for; all losses, and the state in the end.

    ahead: batches are copied to the device while the one before is trained on.
    """
    device = model.pixel_mean.device
    config = TrainConfig(precision=precision, clip_norm=10.0)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, replace(config, lr=0.02))
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0, enabled=precision == "fp16")
    arm = SimpleNamespace(model=model, optimizer=optimizer, scaler=scaler)
    losses = []
    if fill:
        with torch.no_grad():
            model.fill_memory(samples(50))
    shown = (samples(2 * step + part) for step in range(first, first + steps) for part in range(accumulate))
    shown = prefetched(shown, device) if ahead else shown
    for _ in range(steps):
        found, _ = train_step(model, [arm], [next(shown) for _ in range(accumulate)], config, 0.02)
        losses += found[0]
    return {"losses": losses, "state": dict(model.state_dict()), "momentum": optimizer.state_dict()["state"]}


def detections(model: MaskRCNN) -> list[dict[str, Any]]:
    """What the model finds in two images, with masks, near misses and class scores, in images of twice the size."""
    batch = samples(90)
    images, originals = [s["image"] for s in batch], [(2 * SIZE[0], 2 * SIZE[1])] * 2
    allowed = [torch.arange(CLASSES) % 3 > 0, None]
    objects = [(s["boxes"] * 2, s["labels"]) for s in batch]
    true_boxes = [(s["boxes"], s["labels"]) for s in batch]
    return model.eval().detect(images, [(0.5, 0.5)] * 2, originals, allowed, objects, true_boxes=true_boxes)


def same(found: Any, expected: Any, place: str = "result") -> None:
    """Fail, naming the place, where two nested containers differ in a bit, wherever their tensors are."""
    if isinstance(expected, Tensor):
        found, expected = found.detach().cpu(), expected.detach().cpu()
        assert found.dtype == expected.dtype and torch.equal(found, expected), place
    elif isinstance(expected, dict):
        assert list(found) == list(expected), place
        for key, value in expected.items():
            same(found[key], value, f"{place}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            same(found[number], value, f"{place}/{number}")
    else:
        assert found == expected, place
