"""Some optimiser steps of a small detector on any number of ranks; run under torchrun, each rank writes what it saw.

The whole batches are the same for any number of ranks, each of which takes its part.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from loce.config import EvalConfig, HeadConfig, IndicatorConfig, MemoryConfig, ModelConfig, TrainConfig
from loce.data.masks import CroppedMasks
from loce.engine.loop import train_step
from loce.models.backbone import TRUNKS
from loce.models.build import build_optimizer
from loce.models.mask_rcnn import MaskRCNN, build_roi_heads
from loce.utils import distributed
from tests.conftest import stats_of
from tests.models.conftest import CLASSES, SMALL
from tests.models.small_trunks import SMALL_TRUNKS, small

BATCH, SIZE = 4, (64, 96)
SHARED = MemoryConfig(enabled=True, shared=True, capacity=30, instances_per_class=1)
BACL = MemoryConfig(enabled=True, shared=True, kind="gaussian", draw="confusion", features_per_class=12)
FASA = MemoryConfig(enabled=True, shared=True, kind="gaussian", source="regions", draw="adaptive", loss_weight=0.1)
ONE_DRAW = MemoryConfig(enabled=True, shared=True, capacity=30, classes_per_draw=1, level="roi")


@dataclass(frozen=True)
class Case:
    """objects: of each image of the batch, in each step."""

    head: str
    memory: MemoryConfig
    freeze: str
    objects: tuple[tuple[int, ...], ...]
    model: ModelConfig = SMALL


TRUNKS.update(SMALL_TRUNKS)
CASES = {
    "stage 1": Case("softmax", MemoryConfig(), "none", ((3, 1, 2, 4),) * 4),
    "LOCE": Case("equilibrium", SHARED, "trunk", ((3, 1, 2, 4),) * 4),
    "BACL": Case("fcbl", BACL, "trunk", ((3, 1, 2, 4),) * 4),
    "FASA": Case("softmax", FASA, "none", ((0, 0, 2, 0), (3, 1, 2, 4), (0, 2, 0, 0), (3, 1, 2, 4))),
    # Ranks without objects, and so without positives and rows to store: some, all but one, and at first all, so that
    # the memory is empty. With one draw for two images every other image draws none.
    "empty ranks": Case("equilibrium", ONE_DRAW, "trunk", ((0, 0, 0, 0), (2, 3, 0, 0), (0, 0, 0, 1), (0, 1, 2, 0))),
    "stochastic depth": Case("softmax", MemoryConfig(), "none", ((3, 1, 2, 4),) * 2, small("swin_t", frozen_stages=1)),
    "never an object": Case("softmax", SHARED, "none", ((0, 0, 0, 0),) * 2),
}


def image(step: int, place: int, objects: int) -> dict[str, Any]:
    """A training sample with rectangles as masks; several of a class, so that the ones to store are chosen."""
    generator = torch.Generator().manual_seed(100 * step + place)
    corner = torch.rand(objects, 2, generator=generator) * torch.tensor([60.0, 30.0])
    boxes = torch.cat([corner, corner + 12 + torch.rand(objects, 2, generator=generator) * 20], dim=1)
    bitmaps = []
    for x1, y1, x2, y2 in boxes.round().int().tolist():
        bitmap = np.zeros(SIZE, np.uint8)
        bitmap[y1:y2, x1:x2] = 1
        bitmaps.append((bitmap, (0, 0)))
    return {
        "image": torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8),
        "boxes": boxes,
        "labels": torch.randint(0, 3, (objects,), generator=generator),
        "masks": CroppedMasks.pack(bitmaps, SIZE),
        "seed": 1000 * step + 10 * place,
        "batch_index": place,
    }


def build(case: Case) -> tuple[MaskRCNN, torch.nn.Module]:
    """The detector, the same on all ranks, and what its steps go through."""
    torch.manual_seed(1)
    options = (HeadConfig(name=case.head), IndicatorConfig(), case.memory)
    model = MaskRCNN(
        case.model, build_roi_heads(case.model, *options, stats_of(CLASSES)), EvalConfig(), (64, 96)
    ).train()
    model.freeze(case.freeze)
    torch.manual_seed(distributed.rank())  # what is not keyed by image would differ between ranks
    several = distributed.world_size() > 1
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if several else model
    return model, wrapped


def own_images(step: int, objects: tuple[int, ...]) -> list[dict[str, Any]]:
    """This rank's part of a batch."""
    batch, images = [image(step, *each) for each in enumerate(objects)], BATCH // distributed.world_size()
    return batch[distributed.rank() * images :][:images]


def collectives(name: str) -> list[str]:
    """What a whole optimiser step of a case, with memories of each rank's own, asks of other ranks, in order."""
    case = replace(CASES[name], memory=replace(CASES[name].memory, shared=False))
    (model, wrapped), config = build(case), TrainConfig()
    optimizer = build_optimizer(model, config)
    arm = SimpleNamespace(model=model, optimizer=optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False))
    for step, objects in enumerate(case.objects[:3]):  # DDP orders its buckets in the second one
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            train_step(wrapped, [arm], [own_images(step, objects)], config, 0.02)
    return [event.name for event in seen.events() if event.name.startswith("c10d::")]


def follow(case: Case) -> list[dict[str, Tensor]]:
    """After each step: losses (means over ranks), gradients, mean scores and the memory, by name."""
    model, wrapped = build(case)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    seen = []
    for step, objects in enumerate(case.objects):
        optimizer.zero_grad()
        losses = wrapped(own_images(step, objects))
        sum(losses.values()).backward()
        found = {name: distributed.all_reduce_sum(loss) / distributed.world_size() for name, loss in losses.items()}
        found |= {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        buffers = dict(model.roi_heads.named_buffers())
        found |= {name: value.clone() for name, value in buffers.items() if "tracker" in name or "memory" in name}
        seen.append(found)
        optimizer.step()
    return seen


def main() -> None:
    distributed.setup("cpu")
    found: dict[str, Any] = {name: follow(case) for name, case in CASES.items()}
    found["collectives"] = {name: collectives(name) for name in ("stage 1", "LOCE")}
    torch.save(found, Path(sys.argv[1], f"{distributed.rank()}.pt"))
    distributed.barrier()
    distributed.teardown()


if __name__ == "__main__":
    main()
