"""What a training step asks of a GPU, counted without one: launches, waits of the host, bytes copied.

    python benchmarks/launches.py [size=small] [sides=[ours_stage1,ours_loce,torchvision]]

A GPU is kept busy only while the host is ahead of it, and each wait ends that. The steps run on the device of
pretend_device.py, which says what counts as a launch and as a wait; a foreach operation counts as one launch. Both
sides train on the same two images (sizes and regions as in bench.py) and take a whole step: copies, forward, backward,
optimiser, and what decides whether the step is good. Ours are as the data loader leaves them, in page-locked memory;
torchvision's as its reference training leaves them. One step goes before the counted one.
"""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from detectors import REGIONS, SIZES, Ours, Theirs, make_scenes, our_samples, their_targets
from pretend_device import CUDA, PretendDevice, reason
from torch.utils.data._utils.pin_memory import pin_memory

from loce.config import UserError, read_options, run_script
from loce.engine.loop import train_step
from loce.utils.environment import environment
from loce.utils.files import write_text

SIDES = ("ours_stage1", "ours_loce", "torchvision")
RECIPES = {"ours_stage1": "stage1.yaml", "ours_loce": "loce.yaml", "torchvision": "stage1.yaml"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is counted."""

    size: Literal["small", "full"] = "small"
    sides: tuple[str, ...] = SIDES
    precision: Literal["fp32", "bf16"] = "fp32"
    output: str = "benchmarks/results/launches.json"


def step_of(side: str, options: Options, device: torch.device = CUDA) -> Callable[[], Any]:
    """One training step of a side, on a device."""
    scenes = make_scenes(2, SIZES[options.size])
    samples, (images, targets) = pin_memory(our_samples(scenes)), their_targets(scenes)
    ours = Ours(RECIPES[side], device, regions=REGIONS[options.size], precision=options.precision)
    for scene in scenes:
        scene.near = scene.near.to(device)
    if side == "torchvision":
        theirs = Theirs(ours, SIZES[options.size], precision=options.precision)
        theirs.give_proposals(scenes)
        return lambda: theirs.step(images, targets)
    ours.give_proposals(scenes)
    model, scaler = ours.model.train(), torch.amp.GradScaler("cuda", enabled=False)
    arm = SimpleNamespace(model=model, optimizer=ours.optimizer, scaler=scaler)
    return lambda: train_step(model, [arm], [samples], ours.config.train, 1e-5)


def count(side: str, options: Options) -> dict[str, Any]:
    """What one step asks for."""
    with PretendDevice() as gpu:
        step = step_of(side, options)
        step()
        gpu.reset()
        step()
        waits = Counter({f"{what} ({place})": n for (what, place), n in gpu.waits.items()})
        return {
            "launches": sum(gpu.launches.values()),
            "waits": sum(n for (what, _), n in gpu.waits.items() if what != "nms"),
            "nms": sum(n for (what, _), n in gpu.waits.items() if what == "nms"),
            "pageable_copies": sum(gpu.pageable.values()),
            "bytes_to_device": gpu.bytes_to_device,
            "bytes_to_host": gpu.bytes_to_host,
            "waits_by_line": dict(waits.most_common()),
            "reasons": {place: text for _, place in gpu.waits if (text := reason(place))},
            "launches_by_operation": dict(gpu.launches.most_common()),
        }


def table(found: dict[str, dict[str, Any]]) -> str:
    """All sides in Markdown."""
    lines = [
        "| step | launches | waits | waits in NMS | pageable copies | to the device | to the host |",
        "|---" + "|---:" * 6 + "|",
    ]
    for side, row in found.items():
        numbers = [row[key] for key in ("launches", "waits", "nms", "pageable_copies")]
        sizes = f"{row['bytes_to_device'] / 1e6:.2f} MB", f"{row['bytes_to_host']} B"
        lines.append(f"| {' | '.join(map(str, (side, *numbers, *sizes)))} |")
    return "\n".join(lines)


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    if unknown := set(options.sides) - set(SIDES):
        raise UserError(f"sides: {', '.join(sorted(unknown))} not known; choose from {', '.join(SIDES)}")
    torch.set_num_threads(1)
    found = {side: count(side, options) for side in options.sides}
    for side, row in found.items():
        print(f"\n{side}")
        for line, times in row["waits_by_line"].items():
            print(f"  {times:3} {line}")
    print(f"\n{table(found)}")
    result = {
        "benchmark": "launches",
        "environment": dict(line.split(": ", 1) for line in environment("cpu").splitlines()),
        "options": dataclasses.asdict(options),
        "steps": found,
    }
    write_text(options.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
