"""What a stage-2 step of LOCE sends to other processes, against their number: bytes, counted by the system.

    python benchmarks/traffic.py [world=[2,4,8]]

All processes are on this machine and its CPU, so only bytes mean anything, no times: gloo sends through sockets, and
Linux counts what each process writes (/proc/self/io). Tiny backbone, 1203 classes, 2 images of 13 instances in each
process, with memories of their own and with a shared one. Writes traffic.json and a figure; its lines are what a ring
of W processes must send: 2 (W - 1) / W times the gradients, and W - 1 times the rows for a shared memory.

Started by torchrun it is one of the processes: traffic.py SHARED, and rank 0 prints JSON.
"""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from detectors import Ours, make_scenes, our_samples
from growth import SMALL, SMALL_REGIONS
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel

from loce.config import read_options, run_script
from loce.report.figures import save_figure
from loce.utils import distributed
from loce.utils.environment import environment
from loce.utils.files import write_text
from loce.utils.options import Count

STEPS = 3
INSTANCES = 13
PREDICTED = 16  # processes, at most


@dataclass(frozen=True, kw_only=True)
class Options:
    """Numbers of processes that are tried."""

    world: tuple[Count, ...] = (2, 4)
    output: str = "benchmarks/results/traffic.json"
    figures: str = "docs/images"  # folder


def sent() -> int:
    """Bytes that this process has written so far, files included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def one_process(shared: str) -> None:
    """Some steps; rank 0 prints what a step sends (mean over the processes), and the bytes of its parts."""
    device = distributed.setup("cpu")
    torch.set_num_threads(1)
    words = (*SMALL, "memory.dtype=bfloat16", f"memory.shared={shared}")
    scenes = make_scenes(2, (256, 427), seed=distributed.rank(), instances=INSTANCES)
    side = Ours("loce.yaml", device, *words, regions=SMALL_REGIONS)
    side.give_proposals(scenes)
    gradients = sum(p.numel() * 4 for p in side.model.parameters() if p.requires_grad)
    side.model = DistributedDataParallel(side.model, broadcast_buffers=False)  # type: ignore[assignment]
    samples = our_samples(scenes)
    side.step(samples)
    distributed.barrier()
    before = sent()
    for _ in range(STEPS):
        side.step(samples)
    distributed.barrier()
    total = distributed.all_reduce_sum(torch.tensor([float(sent() - before)], dtype=torch.float64))
    rows = 2 * INSTANCES * 16 * (1024 * 4 + 8 + 16)  # features, label, box targets
    found = {"sent": float(total) / STEPS / distributed.world_size(), "gradients": gradients, "rows": rows}
    if distributed.is_main():
        print(json.dumps(found))
    distributed.teardown()


def measure(world: int, shared: str) -> dict[str, float]:
    """Of so many processes."""
    launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}")
    command = (sys.executable, *launch, __file__, shared)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def draw(found: dict[str, list[dict[str, float]]], worlds: tuple[int, ...], path: Path) -> None:
    """Measured points, and what is predicted for up to PREDICTED processes."""
    figure = Figure((4.6, 3.2))
    axes = figure.subplots()
    steps = list(range(1, PREDICTED + 1))
    for shared, colour, label in (("true", "#d1495b", "shared memory"), ("false", "#30638e", "memories of their own")):
        one = found[shared][0]
        rows = one["rows"] if shared == "true" else 0
        predicted = [2 * (w - 1) / w * one["gradients"] + (w - 1) * rows for w in steps]
        axes.plot(steps, [x / 1e6 for x in predicted], "--", color=colour, linewidth=1, label=f"{label}, predicted")
        axes.plot(worlds, [x["sent"] / 1e6 for x in found[shared]], "o", color=colour, label=f"{label}, measured")
    title = "What a process sends in a stage-2 step\n(tiny backbone, 1203 classes)"
    axes.set(xlabel="processes", ylabel="MB", title=title, xticks=[1, 2, 4, 8, 16])
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


def main() -> None:
    if "WORLD_SIZE" in os.environ:
        one_process(sys.argv[1])
        return
    options = read_options(Options, sys.argv[1:])
    found = {shared: [measure(world, shared) for world in options.world] for shared in ("false", "true")}
    for shared, rows in found.items():
        for world, row in zip(options.world, rows, strict=True):
            print(f"shared={shared}, {world} processes: {row['sent'] / 1e6:.1f} MB a process and step")
    draw(found, options.world, Path(options.figures, "growth_processes.png"))
    facts = dict(line.split(": ", 1) for line in environment(torch.device("cpu")).splitlines())
    result = {"benchmark": "traffic", "environment": facts, "options": dataclasses.asdict(options), "processes": found}
    write_text(options.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
