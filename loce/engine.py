"""The training loop: what happens in which order, and nothing else."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from loce import distributed
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
    epoch: int,
    iterations: range,
    log: RunLog,
    after_step: Callable[[int], None],
) -> None:
    """Run the optimiser steps `iterations` (counted over the whole training); `after_step` gets the steps done."""
    model.train()
    device = next(model.parameters()).device
    for iteration in iterations:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, iteration, epoch)
        optimizer.zero_grad(set_to_none=True)
        for micro_step in range(config.accumulate):
            started = time.perf_counter()
            samples = next(batches)
            log.waited += time.perf_counter() - started
            last = micro_step == config.accumulate - 1
            with model.no_sync() if distributed.is_wrapped(model) and not last else nullcontext():  # type: ignore[operator]
                with torch.autocast(device.type, PRECISION.get(config.precision), config.precision != "fp32"):
                    losses = model(samples)
                scaler.scale(sum(losses.values()) / config.accumulate).backward()
            log.window.append({name: loss.detach() for name, loss in losses.items()})
            log.bar.update(len(samples) * distributed.world_size())
        scaler.unscale_(optimizer)
        if config.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        done = iteration + 1
        if done % config.log_every == 0 or done == iterations.stop:
            check_finite(log.write(done, learning_rate(config, iteration, epoch)))
        after_step(done)


def scaled_lr(config: TrainConfig) -> float:
    """The learning rate for the total batch: linear in the batch size (arXiv 1706.02677)."""
    return config.lr * config.batch_size / config.lr_batch_size


def learning_rate(config: TrainConfig, iteration: int, epoch: int) -> float:
    """The learning rate of an iteration (from 0, over the whole training) in an epoch (from 0).

    Linear warm-up from `warmup_factor`, and a fall by `drop_factor` after each of the epochs in `drops`.
    """
    rate = scaled_lr(config) * config.drop_factor ** sum(epoch >= drop for drop in config.drops)
    if iteration < config.warmup_iterations:
        share = iteration / config.warmup_iterations
        rate *= 1 - (1 - share) * (1 - config.warmup_factor)
    return rate


def check_finite(means: dict[str, float]) -> None:
    """DivergedError, naming the losses, where one of them is not finite (the same means on every rank)."""
    bad = [f"{name} = {value}" for name, value in means.items() if value != value or abs(value) == float("inf")]
    if bad:
        raise DivergedError("training diverged: " + ", ".join(bad) + ". Lower train.lr, or set train.clip_norm=35.")


@torch.no_grad()
def fill_memory(
    model: MaskRCNN, dataset: TrainDataset, per_class: int, shared: bool, seed: int, images: int, workers: int
) -> None:
    """Before stage 2: store instances of every class and warm up the mean score (supplement, Sec. 1).

    Every rank fills its own bank from its own choice of images; a shared bank deals the work out. images: on a rank
    at once.
    """
    model.train()
    batches = fill_batches(dataset, per_class, shared, seed, images, workers)
    for samples in progress(batches, len(batches), "filling the feature memory"):
        model.fill_memory(samples)
