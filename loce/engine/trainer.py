"""Trainer: data and arms of a training, and its only epoch loop."""

import gc
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import reduce
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loce.checkpoint.save import Written
from loce.config import Config, UserError, images_per_rank, raise_problems
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import hold_out, train_dataset
from loce.data.loader import Batches, fill_batches, held_out_batches, train_batches, training_plan
from loce.data.prefetch import prefetched
from loce.engine import validation
from loce.engine.arm import Arm, memory_contents
from loce.engine.log import RunLog
from loce.engine.loop import (
    Losses,
    NotFiniteError,
    Samples,
    adapt_rates,
    fill_memory,
    learning_rate,
    optimizer_step,
    train_step,
)
from loce.models.together import Together
from loce.utils import distributed, signals
from loce.utils.errors import DivergedError

SNAPSHOTS = 50  # lines of equilibrium.jsonl: half a megabyte on LVIS


class Trainer:
    """Data of a training and its arms (one, or all that train in one pass), and the only epoch loop, `fit`.

    checkpoints: the folder that each arm goes on from; None: it begins, from the weights of `train.init` where given.
    saves: write checkpoints on the way; a dry run and overfitting do not. Arms that are done with are in `finished`,
    what is said of those that diverged in `diverged`. UserError where the weights do not fit.
    """

    def __init__(
        self,
        configs: Sequence[Config],
        device: torch.device,
        annotations: LVISAnnotations,
        checkpoints: Sequence[Path | None] = (),
        saves: bool = True,
    ) -> None:
        self.config, self.device, self.saves = configs[0], device, saves  # data and training are the same in all
        self.arms: list[Arm] = []
        for config, checkpoint in zip(configs, checkpoints or [None] * len(configs), strict=True):
            self.arms.append(Arm(config, device, annotations, checkpoint, self.arms))
        self.set_data(annotations)
        for arm in self.arms:
            if arm.resumed:
                arm.notes[0] = f"{arm.notes[0]}, {arm.step} of {self.total} iterations are done"
        self.finished = [arm for arm in self.arms if arm.step == self.total]
        self.arms = [arm for arm in self.arms if arm.step < self.total]
        self.diverged: list[str] = []
        self.written: Written = {}
        self._module: nn.Module | None = None

    def set_data(self, annotations: LVISAnnotations, steps: int = 0) -> None:
        """What is trained on. steps: iterations of an epoch, in which the images are shown over and over; 0: once."""
        config = self.config
        per_class = 0 if steps else config.memory.holds_out
        trained, self.held_out = hold_out(annotations, per_class, config.seed) if per_class else (annotations, None)
        self.annotations, self.dataset = annotations, train_dataset(config, trained)
        size, meta = config.train.batch_size, self.arms[0].model.roi_heads.classifier.meta_batch
        self.plan = training_plan(self.dataset, config.sampler, config.data, size, config.seed, meta)
        if steps:
            images = np.resize(annotations.train_images, steps * size)
            self.plan = replace(self.plan, labels=replace(self.plan.labels, images=images))
        self.ends = list(accumulate(self.plan.iterations(config.train.epochs)))  # iterations done after each epoch
        self._loader: Batches | None = None  # and what goes through it, from the first step on
        self._stream: Iterator[Samples] = iter(())

    @property
    def step(self) -> int:
        """How many iterations are done."""
        return self.arms[0].step if self.arms else self.total

    @property
    def total(self) -> int:
        """Iterations of the whole training."""
        return self.ends[-1]

    def open_log(self) -> None:
        """Begin to write into the run folders; logs are cut to the iterations that are done. The first's is shown."""
        for arm in self.arms:
            run = (self.ends, self.plan.rows, self.step, arm.pending, self.device)
            arm.log = RunLog(arm.config, *run, shown=arm is self.arms[0])

    def close_log(self) -> None:
        """End what `open_log` began."""
        for arm in self.arms:
            arm.log.close()

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """What the block does is no training."""
        with ExitStack() as stack:
            for arm in self.arms:
                stack.enter_context(arm.log.paused())
            yield

    def fill_memory(self) -> None:
        """Fill the feature memories of a second stage that begins, and save: on LVIS it takes long."""
        config, images = self.config, images_per_rank(self.config.train, distributed.world_size())
        # Arms whose memories are filled from the same images are filled together.
        groups: dict[tuple[int, bool], list[Arm]] = {}
        for arm in self.arms:
            memory = arm.config.memory
            if memory.enabled and memory.fill_instances and not arm.resumed:
                groups.setdefault((memory.fill_instances, memory.shared), []).append(arm)
        with signals.deferred(), self._paused():
            for wanted, arms in groups.items():
                models = [arm.model for arm in arms]
                batches = fill_batches(self.dataset, *wanted, config.seed, images, config.data.workers)
                fill_memory(Together(models) if len(models) > 1 else models[0], batches)
            for arm in (arm for arms in groups.values() for arm in arms):
                arm.log.line(memory_contents(arm.model))
                if self.saves:
                    arm.save(self.total, written=self.written)

    def fit(self, last: int | None = None) -> None:
        """Train from where it stands to the end, or until `last` iterations are done; every rank must call.

        Stopped, after a save, where a rank was asked to stop; DivergedError, after a report in RUN/nan_report, where a
        step of the last arm is not finite; UserError where the last checkpoint cannot be saved.
        """
        train, last = self.config.train, self.total if last is None else last
        with signals.deferred():
            for epoch, end in enumerate(self.ends):
                began = time.monotonic()
                if self.step < min(end, last):
                    self._adapt_rates(epoch)
                self.module.train()
                for batches in self._waiting(self.batches(min(end, last))):
                    # The optimiser step. A method may depend on the share of the training that is done.
                    for arm in self.arms:
                        arm.model.roi_heads.progress = self.step / self.total
                    lr = learning_rate(train, self.step, epoch, self.total)
                    try:
                        losses, stop = train_step(self.module, self.arms, batches, train, lr)
                    except NotFiniteError as error:
                        losses, stop = self._go_on_without(error, lr)

                    # Log, and checkpoint where one is due.
                    for arm, own in zip(self.arms, losses, strict=True):
                        arm.count_step()
                        arm.log.step(own)
                        if self.step % train.log_every == 0 or self.step in (end, last):
                            arm.write(lr)
                        if snapshot_due(self.step, self.total):
                            arm.snapshot()
                    if self.saves and (stop or self.step == end or self.step % train.checkpoint_every == 0):
                        self.save(last=self.step == self.total and not stop)
                    if stop:
                        raise signals.stopped()
                if self.step == end and validation.due(train, epoch + 1):
                    self._evaluate(epoch + 1)
                elif self.step == end < self.total and self.saves and train.evaluate:
                    self._draw_predictions(epoch + 1, time.monotonic() - began)
        self._end_loader()

    @property
    def module(self) -> nn.Module:
        """The models of all arms as one, with gradients that are averaged over the ranks where there are several."""
        if self._module is None:
            models = [arm.model for arm in self.arms]
            self._module = _wrapped(Together(models) if len(models) > 1 else models[0])
        return self._module

    def batches(self, last: int) -> Iterator[list[Samples]]:
        """This rank's micro-batches of each step until `last` are done; one set of workers for all epochs."""
        if self.step < last and self._loader is None:
            train, workers = self.config.train, self.config.data.workers
            options = {"epochs": train.epochs, "accumulate": train.accumulate, "workers": workers}
            self._loader = train_batches(self.dataset, self.plan, start_iteration=self.step, **options)
            self._stream = prefetched(iter(self._loader), self.device)
        for _ in range(self.step, last):
            yield [next(self._stream) for _ in range(self.config.train.accumulate)]

    def _waiting(self, batches: Iterator[list[Samples]]) -> Iterator[list[Samples]]:
        """The batches; every log measures the time until each is there."""
        return reduce(lambda items, arm: arm.log.waiting(items), self.arms, batches)

    def _end_loader(self) -> None:
        """End the data workers, and note what they had to say."""
        for message in self._loader.warned if self._loader is not None else ():
            for arm in self.arms:
                arm.log.line(f"data: {message}", shown=False)
        self._loader, self._stream = None, iter(())

    def _adapt_rates(self, epoch: int) -> None:
        """Before the second epoch and later ones: the rates of memory.draw=adaptive, where this is not done yet."""
        config = self.config
        for arm in self.arms:
            memory = arm.model.roi_heads.memory
            rates = None if memory is None else memory.rates
            if rates is None or int(rates.epochs) >= epoch or self.held_out is None:
                continue
            self._end_loader()
            with self._paused():
                images = images_per_rank(config.train, distributed.world_size())
                batches = held_out_batches(train_dataset(config, self.held_out), images, config.data.workers)
                before = rates.rates.clone()
                adapt_rates(arm.model, batches, epoch)
                more, less = int((rates.rates > before).sum()), int((rates.rates < before).sum())
            rows = float(rates.rates.sum())
            arm.log.line(f"sampling rates: of {more} classes up, of {less} down; {rows:.3g} rows a draw")

    def _evaluate(self, epoch: int) -> None:
        """Evaluate between two epochs; a signal ends it at once, since the checkpoint is there."""
        self._end_loader()
        with signals.at_once(), self._paused(), ExitStack() as stack:
            for arm in self.arms:
                stack.enter_context(arm.averaged())
            runs = [arm.evaluated(f"eval_epoch_{epoch:02d}") for arm in self.arms]
            for arm, values in zip(self.arms, validation.evaluate_epoch(runs, epoch, self.step), strict=True):
                arm.log.scalars(self.step, values)

    def _draw_predictions(self, epoch: int, seconds: float) -> None:
        """After a long epoch: a picture of what is found by now, which is long before the first evaluation."""
        if not distributed.broadcast_text("long" if seconds >= validation.LONG else ""):
            return
        with signals.at_once(), self._paused():
            for arm in self.arms:
                with arm.averaged():
                    if distributed.is_main():
                        drawn = validation.draw_predictions(arm.model, arm.config, arm.folder)
                        arm.log.show(self.step, drawn)
                        arm.log.line(f"predictions after epoch {epoch}: {arm.folder / validation.PREDICTIONS}")

    def _go_on_without(self, error: NotFiniteError, lr: float) -> tuple[list[list[Losses]], bool]:
        """Report on the arms whose step is bad and drop them; the step of the others, which are as if alone."""
        bad = [arm for arm, is_bad in zip(self.arms, error.bad, strict=True) if is_bad]
        for arm, own in zip(self.arms, error.losses, strict=True):
            if arm in bad:
                self._drop(arm, arm.diverged(error.batches, own, lr, self.image_name))
        optimizer_step(self.arms, lr)
        return [own for own, is_bad in zip(error.losses, error.bad, strict=True) if not is_bad], error.stop

    def _drop(self, arm: Arm, summary: str) -> None:
        """Go on without an arm that diverged. DivergedError where no other is left."""
        self.diverged.append(summary)
        if len(self.arms) == 1:
            raise DivergedError("\n".join(self.diverged))
        arm.log.close()
        self.arms = [other for other in self.arms if other is not arm]
        self.arms[0].log.shown = True
        self.arms[0].log.line(f"WARNING: {arm.folder} ends here, the others go on: {summary}")
        self._module = None
        gc.collect()  # what averaged the gradients of all must not do so any more

    def image_name(self, image_id: int) -> str:
        """The training file's name of an image."""
        return self.annotations.name(int((self.annotations.image_ids == image_id).argmax()))

    def save(self, last: bool = False) -> bool:
        """Write a checkpoint of every arm, see `Arm.save`; were all written? Those with bad values are dropped."""
        saved, problems = [], []
        for arm in list(self.arms):
            try:
                saved.append(arm.save(self.total, last, self.written))
            except DivergedError as error:
                self._drop(arm, str(error))
            except UserError as error:
                problems.append(str(error))
        raise_problems(problems)
        return all(saved)


def _wrapped(model: nn.Module) -> nn.Module:
    """The model, with gradients that are averaged over the ranks where there are several."""
    if distributed.world_size() == 1:
        return model
    with warnings.catch_warnings():  # torch 2.15 renames the option; the new name would share rank 0's memory bank
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)


def snapshot_due(done: int, total: int) -> bool:
    """Whether equilibrium.jsonl has a line of iteration `done`: at most SNAPSHOTS, evenly over all, and the last one.

    Checkpoints have no say, so that the lines are the same however often a run was stopped.
    """
    return done * SNAPSHOTS // total > (done - 1) * SNAPSHOTS // total
