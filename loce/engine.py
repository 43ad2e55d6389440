"""The training loop: what happens in which order, and nothing else."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loce.config import TrainConfig
from loce.data.loader import TrainDataset, fill_batches
from loce.models.mask_rcnn import MaskRCNN
from loce.progress import progress
from loce.runlog import RunLog

Batches = Iterator[list[dict[str, Any]]]
PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DivergedError(Exception):
    """A loss is not finite; scripts exit with 3."""


def train_one_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    learning_rate: Callable[[int], float],
    iterations: range,
    log: RunLog,
    after_step: Callable[[int], None],
) -> None:
    """Run the optimiser steps `iterations` (counted over the whole training); `after_step` gets the steps done."""
    model.train()
    device = next(model.parameters()).device
    for iteration in iterations:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration)
        optimizer.zero_grad(set_to_none=True)
        for micro_step in range(config.accumulate):
            started = time.perf_counter()
            samples = next(batches)
            log.data_time(time.perf_counter() - started)
            last = micro_step == config.accumulate - 1
            with nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
                with torch.autocast(device.type, PRECISION.get(config.precision), config.precision != "fp32"):
                    losses = model(samples)
                scaler.scale(sum(losses.values()) / config.accumulate).backward()
            log.add(losses, images=len(samples))
        scaler.unscale_(optimizer)
        if config.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        if (iteration + 1) % config.log_every == 0 or iteration + 1 == iterations.stop:
            check_finite(log.flush(iteration + 1, learning_rate(iteration)))  # sync: the log line
        after_step(iteration + 1)


def check_finite(means: dict[str, float]) -> None:
    """DivergedError, naming the losses, where one of them is not finite (the same means on every rank)."""
    bad = [f"{name} = {value}" for name, value in means.items() if value != value or abs(value) == float("inf")]
    if bad:
        raise DivergedError("training diverged: " + ", ".join(bad) + ". Lower train.lr, or set train.clip_norm=35.")


@torch.no_grad()
def fill_memory(model: MaskRCNN, dataset: TrainDataset, per_class: int, shared: bool, seed: int, workers: int) -> None:
    """Before stage 2: store instances of every class and warm up the mean score (supplement, Sec. 1).

    Every rank fills its own bank from its own choice of images; a shared bank deals the work out.
    """
    model.train()
    batches = fill_batches(dataset, per_class, shared, seed, workers)
    for samples in progress(batches, len(batches), "filling the feature memory"):
        model.fill_memory(samples)
