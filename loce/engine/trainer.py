"""What a training works with: built from the options, brought to where a checkpoint stands, and trained on."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from loce.checkpoint import save as resume
from loce.checkpoint.files import megabytes
from loce.checkpoint.load import Checkpoint, load_weights
from loce.config import Config, UserError, diff, dump, images_per_rank
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import train_dataset
from loce.data.loader import TrainDataset, train_batches, training_plan
from loce.data.samplers import TrainingPlan
from loce.engine import pace
from loce.engine.boards import Shown
from loce.engine.log import RunLog
from loce.engine.loop import fill_memory, train_one_epoch
from loce.engine.validation import best_checkpoint
from loce.models.build import build_model, build_optimizer, load_head_files
from loce.models.mask_rcnn import MaskRCNN
from loce.utils import distributed
from loce.utils.classes import GROUPS, ClassStats
from loce.utils.environment import available_cores
from loce.utils.errors import DivergedError
from loce.utils.yaml_text import show

# Options that give weights their meaning, and that no shape shows.
UNSEEN = ("model.mask_predictor", "model.rpn.anchor_scale", "model.roi.finest_scale", "model.roi.aligned")

SNAPSHOTS = 50  # lines of equilibrium.jsonl: half a megabyte on LVIS


@dataclass
class Job:
    """What a training works with."""

    config: Config
    device: torch.device
    annotations: LVISAnnotations
    dataset: TrainDataset
    plan: TrainingPlan
    lengths: list[int]  # iterations of each epoch
    model: MaskRCNN
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    report: list[str]  # lines on what was loaded
    done: int = 0  # iterations
    resumed: bool = False
    window: dict[str, torch.Tensor] = field(default_factory=dict)  # losses of done iterations without their line

    @property
    def stats(self) -> ClassStats:
        """Of the training data."""
        return self.annotations.stats

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output)

    def image_name(self, image_id: int) -> str:
        """The training file's name of an image."""
        return self.annotations.name(int((self.annotations.image_ids == image_id).argmax()))


def prepare(config: Config, device: torch.device, annotations: LVISAnnotations, newest: Path | None) -> Job:
    """Everything that trains, from the checkpoint `newest` or, where that is None, from the beginning."""
    dataset = train_dataset(config, annotations)
    torch.manual_seed(config.seed)
    model = build_model(config, annotations.stats, pretrained=newest is None and not config.train.init)
    meta = model.roi_heads.classifier.meta_batch
    plan = training_plan(dataset, config.sampler, config.data, config.train.batch_size, config.seed, meta)
    report = []
    if newest is None:
        load_head_files(config, annotations, model)
    if config.train.init and newest is None:
        report = _load(config, model, annotations.stats)
    model.to(device)
    optimizer = build_optimizer(model, config.train)
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
    lengths = plan.iterations(config.train.epochs)
    job = Job(config, device, annotations, dataset, plan, lengths, model, optimizer, scaler, report)
    # What the model chooses at random is keyed by image; a head's own random numbers differ between ranks.
    torch.manual_seed(config.seed * 1000003 + distributed.rank())
    if newest is not None:
        _resume(job, newest)
    return job


def _resume(job: Job, folder: Path) -> None:
    state, changes = resume.restore(folder, job.config, job.model, job.device)
    job.optimizer.load_state_dict(state["optimizer"])
    job.scaler.load_state_dict(state["scaler"])
    set_done(job, state["iteration"])
    job.resumed, job.window = True, state["window"]
    line = f"going on from {folder}, {job.done} of {sum(job.lengths)} iterations are done"
    job.report = [line, *changes]


def open_log(job: Job, folder: Path) -> RunLog:
    """The log of this training in `folder`, cut to what is done."""
    return RunLog(
        folder,
        dump(job.config),
        epoch_lengths=job.lengths,
        batch_size=job.plan.rows,
        start=job.done,
        device=job.device,
        extra=partial(equilibrium_scalars, job.model, job.stats),
        window=job.window,
        cure=pace.more_workers(job.config.data.workers, available_cores(), distributed.local_world_size()),
        wandb=job.config.train.wandb,
    )


def fill(job: Job) -> None:
    """Fill the feature memory of a second stage that begins."""
    config, memory = job.config, job.config.memory
    images, workers = images_per_rank(config.train, distributed.world_size()), config.data.workers
    fill_memory(job.model, job.dataset, memory.fill_instances, memory.shared, config.seed, images, workers)


def advance(job: Job, log: RunLog, last: int, after_step: Callable[[int, bool], None]) -> None:
    """Train until `last` iterations are done; `after_step` as in `train_one_epoch`."""
    train = job.config.train
    wrapped: torch.nn.Module = job.model
    if distributed.world_size() > 1:
        with warnings.catch_warnings():  # torch 2.15 renames the option; the new name would share rank 0's memory bank
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(job.model, broadcast_buffers=False)
    batches = train_batches(
        job.dataset,
        job.plan,
        epochs=train.epochs,
        accumulate=train.accumulate,
        start_iteration=job.done,
        workers=job.config.data.workers,
    )
    stream = iter(batches)
    for epoch, end in enumerate(accumulate(job.lengths)):
        part = range(job.done, min(end, last))
        if len(part):
            train_one_epoch(wrapped, stream, job.optimizer, job.scaler, train, epoch, part, log, after_step)
    for message in batches.told:
        log.line(f"data: {message}", shown=False)


def save(job: Job, log: RunLog) -> bool:
    """Save; False, with a warning, where the disk does not take it. DivergedError where there is a value not finite."""
    numbers = [x for x in job.model.state_dict().values() if x.is_floating_point()]
    bad = ~torch.stack([x.isfinite().all() for x in numbers]).all()
    if distributed.all_reduce_sum(bad.float()).item():  # sync: a save
        raise DivergedError("training diverged: a weight or a buffer is not finite; the checkpoints before are good")
    log.sync()
    best = best_checkpoint(job.folder)
    state = {"iteration": job.done, "optimizer": job.optimizer.state_dict(), "scaler": job.scaler.state_dict()}
    saved = resume.save(job.folder, job.config, job.stats, job.model, state, log.unwritten(), best)
    if saved.problems:
        log.line(
            f"WARNING: no checkpoint of iteration {job.done}: {'; '.join(saved.problems)}. The checkpoints before are "
            f"untouched, training goes on; the next try is at the next checkpoint"
        )
    else:
        log.line(f"checkpoint {saved.folder.name}: {megabytes(saved.bytes)} in {saved.seconds:.2f} s")
    return not saved.problems


def set_done(job: Job, done: int) -> None:
    """So many iterations are done."""
    job.done, job.model.roi_heads.progress = done, done / sum(job.lengths)


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


def filled(model: MaskRCNN) -> str:
    """A line on what the memory holds after it was filled."""
    assert model.roi_heads.memory is not None
    bank = model.roi_heads.memory.bank
    counts = bank.counts.cpu()
    return (
        f"feature memory: {int(counts.sum())} rows, {int((counts > 0).sum())} of {len(counts)} classes have some, "
        f"{sum(b.numel() * b.element_size() for b in bank.buffers()) / 2**20:.0f} MiB"
    )


def _load(config: Config, model: MaskRCNN, stats: ClassStats) -> list[str]:
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
    words = [f"{key}={show(value)}" for key, value in diff(config, start.config).items() if key in UNSEEN]
    if words:
        lines.append(f"WARNING: {init} was made with {' '.join(words)}, this run says otherwise: its weights fit worse")
    return lines
