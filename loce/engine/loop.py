"""The training loop: what happens in which order, and nothing else."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loce.config import TrainConfig
from loce.data.loader import TrainDataset, fill_batches
from loce.engine.log import RunLog
from loce.models.mask_rcnn import MaskRCNN
from loce.utils import distributed
from loce.utils import signals as stopping
from loce.utils.errors import DivergedError, Stopped
from loce.utils.progress import progress

Batches = Iterator[list[dict[str, Any]]]
PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Step:
    """One optimiser step, for a report on why it was not taken. Losses are scalars, one dictionary a micro-step."""

    iteration: int  # steps done, had it been taken
    batches: list[list[dict[str, Any]]]  # this rank's samples, a list for each micro-step
    losses: list[dict[str, Tensor]]
    lr: float


class BadStepError(DivergedError):
    """A loss of this step, or a gradient, is not finite; the optimiser has not used it. Raised on all ranks."""

    def __init__(self, step: Step) -> None:
        super().__init__(f"training diverged: a loss or a gradient of iteration {step.iteration} is not finite")
        self.step = step


def train_one_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    epoch: int,
    iterations: range,
    log: RunLog,
    after_step: Callable[[int, bool], None],
) -> None:
    """Run the optimiser steps `iterations` (counted over the whole training).

    `after_step` gets the steps done, and whether a rank was asked to stop (the same on all ranks).
    """
    model.train()
    device = next(model.parameters()).device
    for iteration in iterations:
        step = Step(iteration + 1, [], [], learning_rate(config, iteration, epoch))
        for group in optimizer.param_groups:
            group["lr"] = step.lr
        optimizer.zero_grad(set_to_none=True)
        for micro_step in range(config.accumulate):
            started = time.perf_counter()
            step.batches.append(next(batches))
            log.waited += time.perf_counter() - started
            last = micro_step == config.accumulate - 1
            with model.no_sync() if distributed.is_wrapped(model) and not last else nullcontext():  # type: ignore[operator]
                with torch.autocast(device.type, PRECISION.get(config.precision), config.precision != "fp32"):
                    losses = model(step.batches[-1])
                scaler.scale(sum(losses.values()) / config.accumulate).backward()
            step.losses.append({name: loss.detach() for name, loss in losses.items()})
            log.bar.update(len(step.batches[-1]) * distributed.world_size())
        scaler.unscale_(optimizer)
        norm = gradient_norm(model)
        stop = _agree(step, norm, scaler)
        if config.clip_norm:
            nn.utils.clip_grads_with_norm_(model.parameters(), config.clip_norm, norm)
        scaler.step(optimizer)
        scaler.update()
        log.window += step.losses
        if step.iteration % config.log_every == 0 or step.iteration == iterations.stop:
            log.write(step.iteration, step.lr)
        after_step(step.iteration, stop)


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients together."""
    return nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)


def _agree(step: Step, norm: Tensor, scaler: torch.amp.GradScaler) -> bool:
    """Whether a rank was asked to stop. BadStepError, on all ranks, where one has a value that is not finite.

    With fp16 an infinite gradient is normal: the scaler skips that step and scales less; below 1 it is no help.
    """
    bad = ~torch.stack([loss for losses in step.losses for loss in losses.values()]).isfinite().all()
    if not scaler.is_enabled():
        bad = bad | ~norm.isfinite()
    asked = torch.full_like(norm, bool(stopping.asked))
    # sync: the optimiser must not use a bad value, and all ranks must stop at the same step. It waits for the backward
    # pass when the next batch is ready and little is left to launch.
    diverged, stop = distributed.all_reduce_sum(torch.stack([bad.to(norm.dtype), asked])).tolist()  # sync: see above
    if diverged or (scaler.is_enabled() and scaler.get_scale() < 1):
        raise BadStepError(step)
    return stop > 0


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


@torch.no_grad()
def fill_memory(
    model: MaskRCNN, dataset: TrainDataset, per_class: int, shared: bool, seed: int, images: int, workers: int
) -> None:
    """Before stage 2: store instances of every class and warm up the mean score (supplement, Sec. 1).

    Every rank fills its own bank from its own choice of images; a shared bank deals the work out. images: on a rank
    at once. `Stopped` on all ranks where one is asked to stop: a run that goes on fills again, which gives the same.
    """
    model.train()
    batches = fill_batches(dataset, per_class, shared, seed, images, workers)
    for samples in progress(batches, len(batches), "filling the feature memory"):
        model.fill_memory(samples)
        asked = torch.full((), float(bool(stopping.asked)), device=model.pixel_mean.device)
        if distributed.all_reduce_sum(asked).item():  # sync: all ranks stop at the same batch; nothing trains here
            raise Stopped(stopping.asked[0] if stopping.asked else "a signal to another rank")
