"""Training step, and what it needs: learning rate, gradient norm, agreement of the ranks; filling of the memory."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loce.config import TrainConfig
from loce.data.loader import Batches
from loce.models.mask_rcnn import MaskRCNN
from loce.utils import distributed, signals
from loce.utils.errors import DivergedError
from loce.utils.progress import progress

PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
Samples = list[dict[str, Any]]
Losses = dict[str, Tensor]


class NotFiniteError(DivergedError):
    """A loss or a gradient of a step is not finite; the optimiser has not used it. Raised on all ranks.

    batches: this rank's samples of each micro-step; losses: scalars by name, of each micro-step.
    """

    def __init__(self, batches: list[Samples], losses: list[Losses]) -> None:
        super().__init__("training diverged: a loss or a gradient is not finite")
        self.batches, self.losses = batches, losses


def train_step(
    model: nn.Module,
    batches: list[Samples],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    lr: float,
) -> tuple[list[Losses], bool]:
    """One step of the optimiser on this rank's micro-batches, usually one; the gradient is that of their mean loss.

    model: a MaskRCNN in training mode, or DistributedDataParallel around it. Returns the losses of each micro-batch
    (scalars without gradient) and whether a rank was asked to stop, the same on all ranks. NotFiniteError, on all
    ranks, where one of them has a loss or a gradient that is not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)

    # Forward and backward; gradients of several micro-batches add up, and are averaged over ranks with the last one.
    device, steps = next(model.parameters()).device, []
    for number, batch in enumerate(batches, start=1):
        adds_up = isinstance(model, DistributedDataParallel) and number < len(batches)
        with model.no_sync() if adds_up else nullcontext():  # type: ignore[operator]
            with torch.autocast(device.type, PRECISION.get(config.precision), config.precision != "fp32"):
                losses = model(batch)
            scaler.scale(sum(losses.values()) / len(batches)).backward()
        steps.append({name: loss.detach() for name, loss in losses.items()})

    # No rank takes the step where one has a bad value.
    scaler.unscale_(optimizer)
    norm = gradient_norm(model)
    finite, stop = _agree(steps, norm, scaler)
    if not finite:
        raise NotFiniteError(batches, steps)
    if config.clip_norm:
        nn.utils.clip_grads_with_norm_(model.parameters(), config.clip_norm, norm)
    scaler.step(optimizer)  # sync: with fp16 alone, PyTorch's scaler asks whether a gradient is infinite
    scaler.update()
    return steps, stop


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients together."""
    return nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)


def _agree(steps: list[Losses], norm: Tensor, scaler: torch.amp.GradScaler) -> tuple[bool, bool]:
    """Over all ranks: whether the step is good, and whether one was asked to stop.

    With fp16 an infinite gradient is normal: the scaler skips that step and scales less; below 1 it is no help.
    """
    bad = ~torch.stack([loss for losses in steps for loss in losses.values()]).isfinite().all()
    if not scaler.is_enabled():
        bad = bad | ~norm.isfinite()
    asked = torch.full_like(norm, bool(signals.asked))
    # sync: the optimiser must not use a bad value, and all ranks must stop at the same step. It waits for the backward
    # pass when the next batch is ready and little is left to launch.
    diverged, stop = distributed.all_reduce_sum(torch.stack([bad.to(norm.dtype), asked])).tolist()  # sync: see above
    hopeless = scaler.is_enabled() and scaler.get_scale() < 1  # sync: with fp16 alone, its scale lives on the device
    return not diverged and not hopeless, stop > 0


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
def fill_memory(model: MaskRCNN, batches: Batches) -> None:
    """Store instances of every class and warm up the mean score before stage 2 (supplement, Sec. 1).

    batches: of `fill_batches`; every rank fills its own bank from its own images, a shared bank deals the work out.
    `Stopped` on all ranks where one is asked to stop: a run that goes on fills again, which gives the same.
    """
    model.train()
    for samples in progress(batches, len(batches), "filling the feature memory"):
        model.fill_memory(samples)
        asked = torch.full((), float(bool(signals.asked)), device=model.pixel_mean.device)
        if distributed.all_reduce_sum(asked).item():  # sync: all ranks stop at the same batch; nothing trains here
            raise signals.stopped()
