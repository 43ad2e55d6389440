"""How the time of a LOCE step grows with the number of classes, of instances in an image, and with the memory's size.

    python benchmarks/growth.py [rounds=3] [device=cuda] [model=full] ...

Two images; model=small: the tiny backbone, 256 x 427 pixels and 64 regions an image, so that the backbone does not hide
what grows; model=full: the recipe loce.yaml at 800 x 1333. Values of one axis take turns. Writes growth.json and one
figure for each axis; `steepest` is the largest slope between neighbours in log-log scale: 1 would be linear.
"""

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from detectors import SIZES, Ours, make_scenes, our_samples
from matplotlib.figure import Figure
from sides import seconds

from loce.config import read_options, run_script
from loce.report.figures import save_figure
from loce.utils.distributed import setup
from loce.utils.environment import environment
from loce.utils.files import write_text
from loce.utils.options import Count

SMALL = ("model.backbone=tiny", "model.norm=group", "model.weights=none")
SMALL_REGIONS = 64
LABELS = {"classes": "classes", "instances": "instances in an image", "capacity": "features a class, M"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Step times along three axes."""

    classes: tuple[Count, ...] = (50, 200, 1203, 5000)
    instances: tuple[Count, ...] = (1, 10, 50, 200, 500)
    capacity: tuple[Count, ...] = (10, 80, 320)
    model: Literal["small", "full"] = "small"
    rounds: Count = 3
    device: str = "auto"  # auto | cpu | cuda
    threads: Count = 1  # of PyTorch, on the CPU
    output: str = "benchmarks/results/growth.json"
    figures: str = "docs/images"  # folder


def make_step(options: Options, device: torch.device, axis: str, value: int) -> Callable[[], object]:
    """A step with one number changed from 1203 classes, 13 instances, M = 80."""
    numbers = {"classes": 1203, "instances": 13, "capacity": 80} | {axis: value}
    words = SMALL if options.model == "small" else ()
    words += (f"memory.capacity={numbers['capacity']}", "memory.dtype=bfloat16")
    regions = SMALL_REGIONS if options.model == "small" else 512
    scenes = make_scenes(2, SIZES[options.model], instances=numbers["instances"])
    for scene in scenes:
        scene.labels = scene.labels % numbers["classes"]
    side = Ours("loce.yaml", device, *words, regions=regions, classes=numbers["classes"])
    side.give_proposals(scenes)
    samples = our_samples(scenes)
    return lambda: side.step(samples)


def measure(options: Options, device: torch.device, axis: str) -> list[list[float]]:
    """Seconds of a step, for each value of an axis those of all rounds."""
    values = getattr(options, axis)
    times: list[list[float]] = [[] for _ in values]
    for place, value in enumerate(values):  # models of 5000 classes do not fit in memory beside all others
        step = make_step(options, device, axis, value)
        step()
        times[place] = [seconds(step, device) for _ in range(options.rounds)]
        print(f"{axis} = {value}: {statistics.median(times[place]):.3f} s", flush=True)
    return times


def steepest(values: tuple[int, ...], medians: list[float]) -> float:
    """Largest slope between neighbours, log-log."""
    points = list(zip(values, medians, strict=True))
    pairs = pairwise(points)
    return max((math.log(b[1] / a[1]) / math.log(b[0] / a[0]) for a, b in pairs), default=0.0)


def draw(axis: str, values: tuple[int, ...], times: list[list[float]], title: str, path: Path) -> None:
    """Median step time with the range of the rounds, and what linear growth from the first value would be."""
    figure = Figure((4.6, 3.2))
    axes = figure.subplots()
    medians = [statistics.median(x) for x in times]
    spread = [
        [m - min(x) for m, x in zip(medians, times, strict=True)],
        [max(x) - m for m, x in zip(medians, times, strict=True)],
    ]
    axes.errorbar(values, medians, spread, marker="o", color="#30638e", capsize=3, label="a step")
    linear = [medians[0] * v / values[0] for v in values]
    axes.plot(values, linear, "--", color="#999999", label="linear")
    axes.set(xscale="log", yscale="log", xlabel=LABELS[axis], ylabel="seconds", title=title)
    axes.set_ylim(min(medians) / 2, max(medians) * 4)
    axes.minorticks_off()
    axes.set_xticks(values, [str(value) for value in values])
    marks = [m * 10**e for e in range(-3, 4) for m in (1, 2, 5) if min(medians) / 2 <= m * 10**e <= max(medians) * 4]
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    save_figure(figure, path)


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    device = setup(options.device)
    torch.set_num_threads(options.threads)
    found = {}
    for axis in LABELS:
        values, times = getattr(options, axis), measure(options, device, axis)
        slope = steepest(values, [statistics.median(x) for x in times])
        found[axis] = {"values": values, "seconds": times, "steepest": slope}
        draw(
            axis,
            values,
            times,
            f"LOCE step, {options.model} model, {device.type}",
            Path(options.figures, f"growth_{axis}.png"),
        )
        print(f"{axis}: steepest slope {slope:.2f} (1: linear)", flush=True)
    facts = dict(line.split(": ", 1) for line in environment(device).splitlines())
    result = {"benchmark": "growth", "environment": facts, "options": dataclasses.asdict(options), "axes": found}
    write_text(options.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
