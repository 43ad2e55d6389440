"""What a run is, as the first lines of its log: method, data, batch, schedule, end and disk; and its first samples."""

from pathlib import Path

import numpy as np

from loce.checkpoint.files import megabytes
from loce.checkpoint.save import checkpoint_bytes, free_bytes
from loce.config import dump
from loce.engine.boards import Shown
from loce.engine.log import RunLog
from loce.engine.loop import scaled_lr
from loce.engine.pace import first_word
from loce.engine.pictures import first_samples, write_picture
from loce.engine.trainer import Job
from loce.utils import distributed
from loce.utils.classes import GROUPS
from loce.utils.files import file_hash

LINE_BYTES = 5000  # of one line in log.txt, metrics.jsonl and TensorBoard together, at most
RUN_BYTES = 2e6  # of what a run writes once: options, environment, pictures, snapshots of the classes


def introduce(job: Job, log: RunLog) -> None:
    """Say what this run is and, where it begins, draw its first samples: RUN/first_samples.jpg."""
    lines = [*job.report, *header(job)]
    for line in lines:
        log.line(line)
    if not log.writing:
        return
    shown: dict[str, Shown] = {"run/header": "  \n".join(lines)}
    shown["run/config"] = "".join(f"    {line}\n" for line in dump(job.config).splitlines())
    if not job.done:
        shown["run/first_samples"] = picture = first_samples(job.dataset, job.plan)
        _keep(job.folder / "first_samples.jpg", picture, log)
    log.show(job.done, shown)


def _keep(file: Path, picture: np.ndarray, log: RunLog) -> None:
    try:
        write_picture(file, picture)
        log.line(f"first samples, as the model will see them: {file}")
    except OSError as error:  # a full disk ends no run
        log.line(f"WARNING: {file}: {error.strerror}; training goes on without this picture")


def header(job: Job) -> list[str]:
    """What this run is, for people who find its log later."""
    config, stats, train = job.config, job.stats, job.config.train
    world, total = distributed.world_size(), sum(job.lengths)
    groups = " / ".join(str(int(stats.group_mask(group).sum())) for group in GROUPS)
    memory = (
        f"feature memory ({config.memory.level}, {config.memory.capacity} per class)"
        if config.memory.enabled
        else "no memory"
    )
    each = train.batch_size // (world * train.accumulate)
    trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in job.model.parameters())
    return [
        f"method: {config.head.name} head, {memory}, indicator {config.indicator.kind}, {config.sampler.name} sampler",
        f"data: {job.annotations.path} (sha256 {file_hash(job.annotations.path)}), {len(job.dataset)} images, "
        f"{_instances(job)}, {len(stats)} classes: rare / common / frequent {groups}",
        *(f"data: left out: {count} {reason}" for reason, count in job.annotations.dropped.items()),
        *(f"data: {note}" for note in job.annotations.notes),
        f"model: {config.model.backbone}, {trained / 1e6:.2f} of {every / 1e6:.2f} M parameters train "
        f"(train.freeze={train.freeze})",
        f"batch: {train.batch_size} = {world} ranks x {each} images x {train.accumulate} steps"
        f"{', and as many of the meta batch, counted in images/s' if job.plan.meta else ''}; "
        f"learning rate {scaled_lr(train):.4g} ({train.lr:g} at {train.lr_batch_size}, scaled linearly)",
        f"schedule: {train.epochs} epochs, {total} iterations, drops after {list(train.drops)}, {train.precision}, "
        f"seed {config.seed}; run folder {job.folder}",
        _end(job),
        _disk(job),
    ]


def _instances(job: Job) -> str:
    counts = [int(job.stats.instance_counts[job.stats.group_mask(group)].sum()) for group in GROUPS]
    return f"{sum(counts)} instances ({' / '.join(map(str, counts))} of rare / common / frequent classes)"


def _end(job: Job) -> str:
    said = first_word(job.done, sum(job.lengths), job.config.train.log_every)
    if said:
        return f"expected end: said near iteration {said}, when the speed is known"
    return "expected end: the run is over before its speed is known"


def _disk(job: Job) -> str:
    """Checkpoints that are kept, the one that is being written, the best one, and the logs, against what is free."""
    train = job.config.train
    size, lines = checkpoint_bytes(job.config, job.model), sum(job.lengths) // train.log_every + train.epochs
    count, logs = train.keep_checkpoints + 1 + bool(train.evaluate_every), lines * LINE_BYTES + RUN_BYTES
    kept = f"{train.keep_checkpoints} checkpoints, the next{' and the best' if train.evaluate_every else ''}"
    return (
        f"disk: up to {megabytes(count * size + logs)} ({kept}: {count} x {megabytes(size)}; logs: {megabytes(logs)})"
        f"{', detections of the evaluation come on top' if train.evaluate else ''}; "
        f"{megabytes(free_bytes(job.folder))} are free"
    )
