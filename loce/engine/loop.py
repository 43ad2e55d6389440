"""Training step, and what it needs: learning rate, gradient norm, agreement of the ranks; filling of the memory."""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from loce.adaptive_rates import groups
from loce.config import TrainConfig
from loce.data.loader import Batches
from loce.gaussian_memory import GaussianMemory
from loce.models.mask_rcnn import MaskRCNN
from loce.models.together import Together
from loce.utils import distributed, signals
from loce.utils.errors import DivergedError
from loce.utils.progress import progress

PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
Samples = list[dict[str, Any]]
Losses = dict[str, Tensor]


class Learner(Protocol):
    """What trains: a detector, its optimiser and, with fp16, the scaler of its loss (arm.py)."""

    model: MaskRCNN
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


class NotFiniteError(DivergedError):
    """A loss or a gradient of a step is not finite; no optimiser has used it. Raised on all ranks.

    bad: of each arm, whether it is concerned; batches: this rank's samples of each micro-step; losses: of each arm and
    micro-step, scalars by name; stop: a rank was asked to stop.
    """

    def __init__(self, bad: list[bool], batches: list[Samples], losses: list[list[Losses]], stop: bool) -> None:
        super().__init__("training diverged: a loss or a gradient is not finite")
        self.bad, self.batches, self.losses, self.stop = bad, batches, losses, stop


def train_step(
    model: nn.Module,
    arms: Sequence[Learner],
    batches: list[Samples],
    config: TrainConfig,
    lr: float,
) -> tuple[list[list[Losses]], bool]:
    """One step of the optimiser on this rank's micro-batches, usually one; the gradient is that of their mean loss.

    model: the arm's MaskRCNN in training mode; of several arms, Together of theirs; or DistributedDataParallel around
    it. Returns the losses of each arm and micro-batch (scalars without gradient) and whether a rank was asked to stop,
    the same on all ranks. NotFiniteError, on all ranks, where one of them has a loss or a gradient that is not finite.
    """
    # Forward and backward; gradients of several micro-batches add up, and are averaged over ranks with the last one.
    device, steps = next(model.parameters()).device, []
    for number, batch in enumerate(batches, start=1):
        adds_up = isinstance(model, DistributedDataParallel) and number < len(batches)
        with model.no_sync() if adds_up else nullcontext():  # type: ignore[operator]
            with torch.autocast(device.type, PRECISION.get(config.precision), config.precision != "fp32"):
                losses = model(batch)
            losses = losses if isinstance(losses, list) else [losses]
            once = {id(loss): loss for own in losses for loss in own.values()}  # what arms share is one tensor
            arms[0].scaler.scale(sum(once.values()) / len(batches)).backward()
        steps.append([{name: loss.detach() for name, loss in own.items()} for own in losses])

    # No rank takes the step where one has a bad value.
    for arm in arms:
        arm.scaler.unscale_(arm.optimizer)
    each, norms = [list(own) for own in zip(*steps, strict=True)], [gradient_norm(arm.optimizer) for arm in arms]
    bad, stop = _agree(each, norms, arms[0].scaler)
    if any(bad):
        raise NotFiniteError(bad, batches, each, stop)
    if config.clip_norm:
        nn.utils.clip_grads_with_norm_(model.parameters(), config.clip_norm, norms[0])
    optimizer_step(arms, lr)
    return each, stop


@record_function("optimiser")
def optimizer_step(arms: Sequence[Learner], lr: float) -> None:
    """Move the weights of all arms. What some share is moved by the first of them, and has one state."""
    moved: dict[Tensor, dict[str, Any]] = {}  # weight -> its momentum, or AdamW's moments
    for arm in arms:
        state = arm.optimizer.state
        for group in arm.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if moved:  # in the order of the weights, as the optimiser of a run of its own has them
                learning = [p for p in group["params"] if p in moved or p.grad is not None]
                state.update({p: moved.get(p, state[p]) for p in learning})
        arm.scaler.step(arm.optimizer)  # sync: with fp16 alone, PyTorch's scaler asks whether a gradient is infinite
        moved = {**state, **moved}
        arm.scaler.update()
        arm.optimizer.zero_grad(set_to_none=True)  # a weight without gradient is not moved again


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The norm of the gradients of all that an optimiser moves together."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _agree(losses: list[list[Losses]], norms: list[Tensor], scaler: torch.amp.GradScaler) -> tuple[list[bool], bool]:
    """Over all ranks: of each arm, whether its step is bad; and whether a rank was asked to stop.

    With fp16 an infinite gradient is normal: the scaler skips that step and scales less; below 1 it is no help.
    """
    bad = [~torch.stack([x for step in own for x in step.values()]).isfinite().all() for own in losses]
    if not scaler.is_enabled():
        bad = [one | ~norm.isfinite() for one, norm in zip(bad, norms, strict=True)]
    asked = torch.full_like(norms[0], bool(signals.asked))
    # sync: the optimiser must not use a bad value, and all ranks must stop at the same step. It waits for the backward
    # pass when the next batch is ready and little is left to launch.
    *diverged, stop = distributed.all_reduce_sum(torch.stack([*bad, asked])).tolist()  # sync: see above
    hopeless = scaler.is_enabled() and scaler.get_scale() < 1  # sync: with fp16 alone, its scale lives on the device
    return [count > 0 or hopeless for count in diverged], stop > 0


def scaled_lr(config: TrainConfig) -> float:
    """The learning rate for the total batch: linear in the batch size (arXiv 1706.02677)."""
    return config.lr * config.batch_size / config.lr_batch_size


def learning_rate(config: TrainConfig, iteration: int, epoch: int, total: int) -> float:
    """The learning rate of an iteration (from 0, of `total` over the whole training) in an epoch (from 0).

    Linear warm-up from `warmup_factor`. Step: a fall by `drop_factor` after each of the epochs in `drops`. Cosine: from
    the end of the warm-up half a cosine, down to 0 after the last iteration (SGDR without restarts, arXiv 1608.03983).
    """
    warmup, rate = config.warmup_iterations, scaled_lr(config)
    if config.schedule == "step":
        rate *= config.drop_factor ** sum(epoch >= drop for drop in config.drops)
    elif iteration >= warmup:
        rate *= (1 + math.cos(math.pi * (iteration - warmup) / (total - warmup))) / 2
    if iteration < warmup:
        rate *= 1 - (1 - iteration / warmup) * (1 - config.warmup_factor)
    return rate


@torch.no_grad()
def fill_memory(model: MaskRCNN | Together, batches: Batches) -> None:
    """Store instances of every class and warm up the mean score before stage 2 (supplement, Sec. 1).

    batches: of `fill_batches`; every rank fills its own bank from its own images, a shared bank deals the work out.
    `Stopped` on all ranks where one is asked to stop: a run that goes on fills again, which gives the same.
    """
    model.train()
    for samples in progress(batches, len(batches), "filling the feature memory"):
        model.fill_memory(samples)
        _stop_together(next(model.parameters()).device)


@torch.no_grad()
def adapt_rates(model: MaskRCNN, batches: Batches, epoch: int) -> None:
    """Adapt the rates of memory.draw=adaptive to the losses of held-out images, before an epoch (from 0) begins.

    batches: of `held_out_batches`; all ranks end with the same rates. `Stopped` as in `fill_memory`.
    """
    model.eval()
    roi, device = model.roi_heads, model.pixel_mean.device
    total = torch.zeros(roi.num_classes + 1, device=device)
    for samples in progress(batches, len(batches), "losses of held-out images"):
        total += model.held_out_losses(samples)
        _stop_together(device)
    sums = distributed.all_reduce_sum(total).cpu().numpy()  # sync: between two epochs, as all that follows
    assert roi.memory is not None and roi.memory.rates is not None and isinstance(roi.memory.bank, GaussianMemory)
    group = groups(roi.memory.bank.mean.cpu().numpy()) if distributed.is_main() else np.zeros(0, np.int64)
    group = np.array(json.loads(distributed.broadcast_text(json.dumps(group.tolist()))))
    roi.memory.rates.adapt(sums[:-1] / max(sums[-1], 1), group, epoch)


def _stop_together(device: torch.device) -> None:
    """`Stopped` on all ranks where one is asked to stop."""
    asked = torch.full((), float(bool(signals.asked)), device=device)
    if distributed.all_reduce_sum(asked).item():  # sync: all ranks stop at the same batch; nothing trains here
        raise signals.stopped()
