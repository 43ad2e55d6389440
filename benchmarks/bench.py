"""How fast and how small, against the usual way: one table of all comparisons that make sense on this machine.

    python benchmarks/bench.py [size=small] [rows=[stage1,nms]] [rounds=3] [device=cuda] ...

Everything is made here: images, annotations, weights. size=full is LVIS v1's (1203 classes, 2 images of 800 x 1333 with
13 instances each on average); size=small has the same classes, a tenth of the pixels and regions, and smaller files.
On a CPU times are CPU seconds, which other programs disturb least; only ratios say something. The sides of a row take
turns in one process (memory rows: in processes of their own). Results are added to benchmarks/results/speed.json, with
commit and hardware for each row, and the table shows all that it holds of this size: rows may be measured one by one,
and rows=[] only shows. What needs a GPU is "not measured" on a CPU.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from data_rows import augmentation, loader, mask_memory, opening
from detector_rows import (
    Setting,
    boxes,
    evaluation,
    gpu_rows,
    inference,
    loce_cost,
    loce_step,
    mask_head,
    memory_bank,
    nms,
    stage1,
    stage2,
)
from sides import Row, save, saved, table

from loce.config import UserError, read_options, run_script
from loce.utils.distributed import setup
from loce.utils.options import Count

ROWS: dict[str, Callable[[Setting], list[Row]]] = {
    "loce_step": loce_step,
    "memory": memory_bank,
    "loce_cost": loce_cost,
    "stage2": stage2,
    "stage1": stage1,
    "boxes": boxes,
    "mask_head": mask_head,
    "inference": inference,
    "evaluation": evaluation,
    "nms": nms,
    "masks": mask_memory,
    "loader": loader,
    "augmentation": augmentation,
    "opening": opening,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared."""

    size: Literal["small", "full"] = "full"
    rows: tuple[str, ...] = tuple(ROWS)
    rounds: Count = 3
    device: str = "auto"  # auto | cpu | cuda
    threads: Count = 1  # of PyTorch, on the CPU
    output: str = "benchmarks/results/speed.json"


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    if unknown := set(options.rows) - set(ROWS):
        raise UserError(f"rows: {', '.join(sorted(unknown))} not known; choose from {', '.join(ROWS)}")
    device = setup(options.device)
    torch.set_num_threads(options.threads)
    setting = Setting(device, options.size, options.rounds)
    for name in options.rows:
        started = time.monotonic()
        rows = ROWS[name](setting)
        save(rows, dataclasses.asdict(options), device, options.output)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    missing = gpu_rows() if device.type == "cpu" else []
    print(f"\nsize={options.size}: all rows in {options.output}\n")
    print(table(saved(options.output, options.size) + missing))


if __name__ == "__main__":
    run_script(main)
