"""Profile of a training step: the time of its parts, which the model names by `record_function`.

The time of the backward pass belongs to the part whose forward operation it goes back through (autograd numbers both).
On a GPU the time is that of its kernels, else that of the processor.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from loce.config import Config
from loce.data.masks import CroppedMasks
from loce.engine.loop import Samples, train_step
from loce.models.build import build_model, build_optimizer
from loce.models.mask_rcnn import MaskRCNN
from loce.utils.classes import ClassStats, frequency_groups
from loce.utils.files import atomic_write

REST = "everything else"


@dataclass
class Part:
    """Milliseconds of one step, and the multiply-adds (10^9) of its convolutions and matrix products, forward."""

    forward: float = 0.0
    backward: float = 0.0
    gmac: float = 0.0


def long_tail(classes: int) -> ClassStats:
    """Class facts of a made-up long tail: the first class is in 2000 images, the last in one."""
    images = np.geomspace(2000, 1, classes).round().astype(np.int64)
    return ClassStats(
        names=tuple(f"class {label}" for label in range(classes)),
        category_ids=np.arange(classes, dtype=np.int64) + 1,
        image_counts=images,
        instance_counts=2 * images,
        groups=frequency_groups(images),
        image_total=100_000,
    )


def random_samples(
    images: int,
    size: tuple[int, int],
    instances: int,
    classes: int,
) -> Samples:
    """Training samples of noise, with rectangles as objects: `instances` an image, sides of 4 to 40 % of its own."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(images):
        # Rectangles inside the image; their sides are mostly short.
        limit = torch.tensor([size[1], size[0]])
        side = (limit * (0.04 + 0.36 * torch.rand(instances, 2, generator=generator) ** 2)).int().clamp(min=4)
        corner = (torch.rand(instances, 2, generator=generator) * (limit - side)).int()
        crops = [
            (np.ones((h, w), np.uint8), (x, y)) for (x, y), (w, h) in zip(corner.tolist(), side.tolist(), strict=True)
        ]
        samples.append(
            {
                "image": torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator),
                "boxes": torch.cat([corner, corner + side], dim=1).float(),
                "labels": torch.randint(classes, (instances,), generator=generator),
                "masks": CroppedMasks.pack(crops, size),
                "seed": number,
                "batch_index": number,
            }
        )
    return samples


def made_up_model(config: Config, classes: int, device: torch.device) -> MaskRCNN:
    """The recipe's detector with random weights and, where it has one, a full feature memory."""
    torch.manual_seed(config.seed)
    model = build_model(config, long_tail(classes), pretrained=False).to(device)
    for name, module in model.backbone.body.named_modules():
        if name.endswith("bn3"):  # random residual branches without batch statistics would add up to infinity
            torch.nn.init.constant_(module.weight, 0.1)
    memory = model.roi_heads.memory
    if memory is not None:
        rows = classes * (config.memory.capacity if config.memory.kind == "ring" else 2)
        features = torch.rand(rows, *memory.feature_shape, device=device)
        labels = torch.arange(rows, device=device) % classes
        memory.bank.enqueue(features, labels, torch.zeros(rows, 4, device=device))
    return model.train()


def make_step(model: MaskRCNN, config: Config) -> Callable[[Samples], None]:
    """One step of the optimiser, that of the training loop, at a learning rate that changes nothing."""
    scaler = torch.amp.GradScaler(model.pixel_mean.device.type, enabled=False)
    arm = SimpleNamespace(model=model, optimizer=build_optimizer(model, config.train), scaler=scaler)

    def step(samples: Samples) -> None:
        train_step(model, [arm], [samples], config.train, lr=0.0)

    return step


def profile_steps(
    model: MaskRCNN,
    step: Callable[[Samples], None],
    samples: Samples,
    steps: int,
    trace: Path,
) -> dict[str, Part]:
    """The parts of a step, the mean of `steps` after one to warm up; the trace goes into a file for chrome://tracing."""
    device = model.pixel_mean.device
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    step(samples)
    with profile(activities=activities, with_flops=True) as profiler:
        for _ in range(steps):
            step(samples)
    with atomic_write(trace) as temporary:
        profiler.export_chrome_trace(str(temporary))
    parts = summary(list(profiler.events() or []), device.type == "cuda")
    for part in parts.values():
        part.forward, part.backward, part.gmac = (x / steps for x in (part.forward, part.backward, part.gmac))
    return parts


def summary(events: list[Any], on_gpu: bool) -> dict[str, Part]:
    """What each part took, of the profiler's events; the parts' times add up to that of all events."""
    parts: dict[str, Part] = defaultdict(Part)
    places = [_place(event) for event in events]
    # Autograd's number of a forward operation -> its part. Operations without gradient before it have the same number.
    part_of: dict[int, str] = {}
    for event, (part, backward) in sorted(zip(events, places, strict=True), key=lambda x: x[0].time_range.start):
        if event.sequence_nr >= 0 and event.scope == 0 and backward is None:
            part_of[event.sequence_nr] = part
    for event, (part, backward) in zip(events, places, strict=True):
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
        if backward is not None:
            parts[part_of.get(backward.sequence_nr, REST)].backward += spent
        elif event.device_type.name == "CPU":
            parts[part].forward += spent
            parts[part].gmac += (event.flops or 0) / 2e9
    return dict(sorted(parts.items(), key=lambda item: -item[1].forward - item[1].backward))


def _place(event: Any) -> tuple[str, Any]:
    """The innermost part that an event lies in, and the outermost function of the backward pass, or None."""
    part, backward = REST, None
    while event is not None:
        if part == REST and event.is_user_annotation and not event.name.startswith("Optimizer."):  # PyTorch's own
            part = str(event.name)
        if event.scope == 1 or event.name.startswith("autograd::engine::evaluate_function"):
            backward = event
        event = event.cpu_parent
    return part, backward


def table(parts: dict[str, Part]) -> str:
    """Markdown: milliseconds and share of each part, multiply-adds of its forward pass."""
    whole = sum(part.forward + part.backward for part in parts.values())
    lines = ["| part | forward ms | backward ms | share | forward GMAC |", "|---|---:|---:|---:|---:|"]
    for name, part in parts.items():
        share = (part.forward + part.backward) / whole
        if share >= 0.0005:
            lines.append(f"| {name} | {part.forward:.1f} | {part.backward:.1f} | {share:.1%} | {part.gmac:.2f} |")
    total = [sum(getattr(part, name) for part in parts.values()) for name in ("forward", "backward", "gmac")]
    lines.append(f"| all | {total[0]:.1f} | {total[1]:.1f} | 100.0% | {total[2]:.2f} |")
    return "\n".join(lines)
