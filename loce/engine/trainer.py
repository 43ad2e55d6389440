"""Trainer state and epoch loop."""

import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loce.checkpoint.files import megabytes
from loce.checkpoint.load import Checkpoint, load_weights
from loce.checkpoint.save import restore, save
from loce.config import Config, UserError, diff, images_per_rank
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import train_dataset
from loce.data.loader import Batches, fill_batches, train_batches, training_plan
from loce.engine import divergence, validation
from loce.engine.boards import Shown
from loce.engine.log import RunLog
from loce.engine.loop import NotFiniteError, Samples, fill_memory, learning_rate, train_step
from loce.models.build import build_model, build_optimizer, load_head_files
from loce.models.mask_rcnn import MaskRCNN
from loce.utils import distributed, signals
from loce.utils.classes import GROUPS, ClassStats
from loce.utils.errors import DivergedError
from loce.utils.yaml_text import show

# Options that give weights their meaning, and that no shape shows.
UNSEEN = ("model.mask_predictor", "model.rpn.anchor_scale", "model.roi.finest_scale", "model.roi.aligned")
SNAPSHOTS = 50  # lines of equilibrium.jsonl: half a megabyte on LVIS
LAST_TRIES, LAST_WAIT = 20, 30.0  # of saving the last checkpoint; seconds between them


class Trainer:
    """State of one run (model, optimiser, data, how many iterations are done) and its only epoch loop, `fit`.

    checkpoint: the folder that training goes on from; None: it begins, from the weights of `train.init` where given.
    saves: write checkpoints on the way; a dry run and overfitting do not. UserError where the weights do not fit.
    """

    log: RunLog  # from `open_log` on

    def __init__(
        self,
        config: Config,
        device: torch.device,
        annotations: LVISAnnotations,
        checkpoint: Path | None = None,
        saves: bool = True,
    ) -> None:
        self.config, self.device, self.saves, self.folder = config, device, saves, Path(config.output)

        # Model and optimiser; `notes` says what was loaded.
        torch.manual_seed(config.seed)
        begins = checkpoint is None
        self.model = build_model(config, annotations.stats, pretrained=begins and not config.train.init)
        self.notes: list[str] = []
        if begins:
            load_head_files(config, annotations, self.model)
        if begins and config.train.init:
            self.notes = load_initial_weights(config, self.model, annotations.stats)
        self.model.to(device)
        self.optimizer = build_optimizer(self.model, config.train)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")

        # Data and position. The model's choices are keyed by image; a head's own random numbers differ between ranks.
        self.set_data(annotations)
        torch.manual_seed(config.seed * 1000003 + distributed.rank())
        self.step, self.resumed = 0, not begins
        self._pending: dict[str, torch.Tensor] = {}  # losses of iterations done without their line in the log
        if checkpoint is not None:
            self._resume(checkpoint)

    def set_data(self, annotations: LVISAnnotations, steps: int = 0) -> None:
        """What is trained on. steps: iterations of an epoch, in which the images are shown over and over; 0: once."""
        config = self.config
        self.annotations, self.dataset = annotations, train_dataset(config, annotations)
        size, meta = config.train.batch_size, self.model.roi_heads.classifier.meta_batch
        self.plan = training_plan(self.dataset, config.sampler, config.data, size, config.seed, meta)
        if steps:
            images = np.resize(annotations.train_images, steps * size)
            self.plan = replace(self.plan, labels=replace(self.plan.labels, images=images))
        self.ends = list(accumulate(self.plan.iterations(config.train.epochs)))  # iterations done after each epoch
        self._loader: Batches | None = None  # and what goes through it, from the first step on
        self._stream: Iterator[Samples] = iter(())

    def _resume(self, folder: Path) -> None:
        state, changes = restore(folder, self.config, self.model, self.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self._pending = state["iteration"], state["window"]
        self.notes = [f"going on from {folder}, {self.step} of {self.total} iterations are done", *changes]

    @property
    def total(self) -> int:
        """Iterations of the whole training."""
        return self.ends[-1]

    @property
    def stats(self) -> ClassStats:
        """Classes of the training data."""
        return self.annotations.stats

    def open_log(self) -> None:
        """Begin to write into the run folder; its log is cut to the iterations that are done."""
        self.log = RunLog(self.config, self.ends, self.plan.rows, self.step, self._pending, self.device)

    def fill_memory(self) -> None:
        """Fill the feature memory of a second stage that begins, and save: on LVIS it takes long."""
        config, memory = self.config, self.config.memory
        if not memory.enabled or self.resumed:
            return
        images = images_per_rank(config.train, distributed.world_size())
        options = (memory.fill_instances, memory.shared, config.seed, images, config.data.workers)
        with signals.deferred(), self.log.paused():
            fill_memory(self.model, fill_batches(self.dataset, *options))
            self.log.line(memory_contents(self.model))
            if self.saves:
                self.save()

    def fit(self, last: int | None = None) -> None:
        """Train from where it stands to the end, or until `last` iterations are done; every rank must call.

        Stopped, after a save, where a rank was asked to stop; DivergedError, after a report in RUN/nan_report, where a
        step is not finite; UserError where the last checkpoint cannot be saved.
        """
        train, last = self.config.train, self.total if last is None else last
        model = _wrapped(self.model)
        with signals.deferred():
            for epoch, end in enumerate(self.ends):
                self.model.train()
                for batches in self.log.waiting(self.batches(min(end, last))):
                    # The optimiser step. A method may depend on the share of the training that is done.
                    self.model.roi_heads.progress = self.step / self.total
                    lr = learning_rate(train, self.step, epoch)
                    try:
                        losses, stop = train_step(model, batches, self.optimizer, self.scaler, train, lr)
                    except NotFiniteError as error:
                        raise self._diverged(error, lr) from None
                    self.step += 1

                    # Log, and checkpoint where one is due.
                    self.log.step(losses)
                    if self.step % train.log_every == 0 or self.step in (end, last):
                        self.log.write(lr, equilibrium_scalars(self.model, self.stats))
                    if snapshot_due(self.step, self.total):
                        self.log.snapshot(self.step, equilibrium_of_classes(self.model))
                    if self.saves and (stop or self.step == end or self.step % train.checkpoint_every == 0):
                        self.save(last=self.step == self.total and not stop)
                    if stop:
                        raise signals.stopped()
                if self.step == end and validation.due(train, epoch + 1):
                    self._evaluate(epoch + 1)
        self._end_loader()

    def batches(self, last: int) -> Iterator[list[Samples]]:
        """This rank's micro-batches of each step until `last` are done; one set of workers for all epochs."""
        if self.step < last and self._loader is None:
            train, workers = self.config.train, self.config.data.workers
            options = {"epochs": train.epochs, "accumulate": train.accumulate, "workers": workers}
            self._loader = train_batches(self.dataset, self.plan, start_iteration=self.step, **options)
            self._stream = iter(self._loader)
        for _ in range(self.step, last):
            yield [next(self._stream) for _ in range(self.config.train.accumulate)]

    def _end_loader(self) -> None:
        """End the data workers, and note what they had to say."""
        for message in self._loader.warned if self._loader is not None else ():
            self.log.line(f"data: {message}", shown=False)
        self._loader, self._stream = None, iter(())

    def _evaluate(self, epoch: int) -> None:
        """Evaluate between two epochs; a signal ends it at once, since the checkpoint is there."""
        self._end_loader()
        with signals.at_once(), self.log.paused():
            found = validation.evaluate_epoch(self.model, self.config, self.folder, epoch, self.step)
            self.log.scalars(self.step, found)

    def _diverged(self, error: NotFiniteError, lr: float) -> DivergedError:
        """The end of a training whose next step is not finite; a report on disk says where the value came from."""
        precision = self.config.train.precision
        summary = divergence.report(self.folder, self.model, error, self.step + 1, lr, precision, self.image_name)
        self.log.line(summary, shown=False)
        return DivergedError(summary)

    def image_name(self, image_id: int) -> str:
        """The training file's name of an image."""
        return self.annotations.name(int((self.annotations.image_ids == image_id).argmax()))

    def save(self, last: bool = False) -> bool:
        """Write a checkpoint; False, with a warning, where the disk does not take it. Every rank must call.

        last: nothing comes after it, so it is tried again for ten minutes, then UserError. DivergedError where a value
        is not finite.
        """
        numbers = [x for x in self.model.state_dict().values() if x.is_floating_point()]
        bad = ~torch.stack([x.isfinite().all() for x in numbers]).all()
        if distributed.all_reduce_sum(bad.float()).item():  # sync: a save
            raise DivergedError(
                "training diverged: a weight or a buffer is not finite; the checkpoints before are good"
            )
        self.log.sync()
        self.model.roi_heads.progress = self.step / self.total
        state = {"iteration": self.step, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        best, pending = validation.best_checkpoint(self.folder), self.log.unwritten()
        for attempt in range(1 + LAST_TRIES if last else 1):
            if attempt:
                self.log.line(f"training is done, but not saved; the next try is in {LAST_WAIT:g} s")
                time.sleep(LAST_WAIT)
            saved = save(self.folder, self.config, self.stats, self.model, state, pending, best)
            if not saved.problems:
                self.log.line(f"checkpoint {saved.folder.name}: {megabytes(saved.bytes)} in {saved.seconds:.2f} s")
                return True
            self.log.line(
                f"WARNING: no checkpoint of iteration {self.step}: {'; '.join(saved.problems)}. The checkpoints before "
                "are untouched, training goes on; the next try is at the next checkpoint"
            )
        if last:
            raise UserError(
                f"{self.folder}: training is done, but its last checkpoint could not be saved. Make room on the disk "
                "and give the same command again: it goes on from the checkpoint before"
            )
        return False


def _wrapped(model: MaskRCNN) -> nn.Module:
    """The model, with gradients that are averaged over the ranks where there are several."""
    if distributed.world_size() == 1:
        return model
    with warnings.catch_warnings():  # torch 2.15 renames the option; the new name would share rank 0's memory bank
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)


def load_initial_weights(config: Config, model: MaskRCNN, stats: ClassStats) -> list[str]:
    """Take over the weights of `train.init`; lines that say what was loaded. UserError where frozen parts lack."""
    init = config.train.init
    start = Checkpoint.open(init)
    found = load_weights(start, model, stats, config.head.reset)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    lacking = sorted(frozen & set(found["new"]))
    if lacking:
        raise UserError(
            f"train.init = {init}: has no {', '.join(lacking[:5])}, which would stay random: they are frozen"
        )
    counts = ", ".join(f"{len(names)} {what}" for what, names in found.items())
    lines = [f"weights from {init}: {counts}; {len(frozen)} tensors are frozen"]
    if start.unfinished:
        lines.append(f"WARNING: {start.path} is of an unfinished run: {start.iterations} iterations were done")
    lines += [f"weights: {what}: {name}" for what in ("new", "dropped") for name in found[what]]
    options = [f"{key}={show(value)}" for key, value in diff(config, start.config).items() if key in UNSEEN]
    if options:
        lines.append(
            f"WARNING: {init} was made with {' '.join(options)}, this run says otherwise: its weights fit worse"
        )
    return lines


def equilibrium_scalars(model: MaskRCNN, stats: ClassStats) -> dict[str, Shown]:
    """Mean score and memory fill by rare, common and frequent classes, and of all classes (C,), for the log."""
    roi = model.roi_heads
    values = {"mean_score": roi.tracker.scores[:-1].cpu()}  # sync: log line
    if roi.memory is not None:
        values["memory_fill"] = roi.memory.bank.fill.cpu()  # sync: log line
    masks = {group: torch.from_numpy(stats.group_mask(group)) for group in GROUPS}
    means = {f"{k}/{g}": float(v[m].mean()) for k, v in values.items() for g, m in masks.items() if m.any()}
    return {**means, **{f"{name}/classes": value for name, value in values.items()}}


def snapshot_due(done: int, total: int) -> bool:
    """Whether equilibrium.jsonl has a line of iteration `done`: at most SNAPSHOTS, evenly over all, and the last one.

    Checkpoints have no say, so that the lines are the same however often a run was stopped.
    """
    return done * SNAPSHOTS // total > (done - 1) * SNAPSHOTS // total


def equilibrium_of_classes(model: MaskRCNN) -> dict[str, list[float]]:
    """Mean score (four digits) and rows in the memory (this rank's) of every class, for equilibrium.jsonl."""
    roi = model.roi_heads
    scores = roi.tracker.scores[:-1].tolist()  # sync: a snapshot
    values: dict[str, list[float]] = {"mean_score": [float(f"{score:.4g}") for score in scores]}
    if roi.memory is not None:
        values["memory"] = roi.memory.bank.counts.tolist()  # sync: a snapshot
    return values


def memory_contents(model: MaskRCNN) -> str:
    """A line on what the feature memory holds."""
    assert model.roi_heads.memory is not None
    bank = model.roi_heads.memory.bank
    counts = bank.counts.cpu()
    return (
        f"feature memory: {int(counts.sum())} rows, {int((counts > 0).sum())} of {len(counts)} classes have some, "
        f"{sum(b.numel() * b.element_size() for b in bank.buffers()) / 2**20:.0f} MiB"
    )
