"""Run summary, the first lines of its log: method, data, batch, schedule, end and disk; and its first samples."""

from loce.checkpoint.files import megabytes
from loce.checkpoint.save import checkpoint_bytes, free_bytes
from loce.config import dump
from loce.engine.arm import Arm
from loce.engine.boards import Shown
from loce.engine.log import speed_known_at
from loce.engine.loop import scaled_lr
from loce.engine.trainer import Trainer
from loce.utils import distributed
from loce.utils.classes import GROUPS
from loce.utils.files import file_hash

LINE_BYTES = 5000  # of one line in log.txt, metrics.jsonl and TensorBoard together, at most
RUN_BYTES = 2e6  # of what a run writes once: options, environment, pictures, snapshots of the classes


def introduce(trainer: Trainer) -> None:
    """Log what each run is and, where it begins, draw its first samples: RUN/first_samples.jpg."""
    picture = None
    if not trainer.step and distributed.is_main():
        from loce.engine.drawing import write_picture  # drawing: where a run begins only
        from loce.engine.pictures import first_samples

        picture = first_samples(trainer.dataset, trainer.plan)
    for arm in trainer.arms:
        lines = [*arm.notes, *run_summary(trainer, arm)]
        for line in lines:
            arm.log.line(line)
        if not distributed.is_main():
            continue
        shown: dict[str, Shown] = {"run/header": "  \n".join(lines)}
        shown["run/config"] = "".join(f"    {line}\n" for line in dump(arm.config).splitlines())
        if picture is not None:
            shown["run/first_samples"], file = picture, arm.folder / "first_samples.jpg"
            try:
                write_picture(file, picture)
                arm.log.line(f"first samples, as the model will see them: {file}")
            except OSError as error:  # a full disk ends no run
                arm.log.line(f"WARNING: {file}: {error.strerror}; training goes on without this picture")
        arm.log.show(trainer.step, shown)


def run_summary(trainer: Trainer, arm: Arm) -> list[str]:
    """Method, data, model, batch, schedule and disk of this run, a line each."""
    config, train, memory, stats = arm.config, arm.config.train, arm.config.memory, arm.stats
    world, total = distributed.world_size(), trainer.total
    # Method.
    form = f"{memory.level}, {memory.capacity} per class" if memory.kind == "ring" else f"{memory.level}, Gaussians"
    bank = f"feature memory ({form}, drawn by {memory.draw})" if memory.enabled else "no memory"
    held = 0 if trainer.held_out is None else len(trainer.held_out.train_images)
    # Data: classes and instances by group.
    masks = [stats.group_mask(group) for group in GROUPS]
    groups = " / ".join(str(int(mask.sum())) for mask in masks)
    instances = [int(stats.instance_counts[mask].sum()) for mask in masks]
    # Model and batch.
    network = config.model.backbone + ("" if config.model.masks else ", boxes only")
    trained = sum(p.numel() for p in arm.model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in arm.model.parameters())
    each = train.batch_size // (world * train.accumulate)
    meta = ", and as many of the meta batch, counted in images/s" if trainer.plan.meta else ""
    rate = f"{train.optimizer}, learning rate" if train.optimizer != "sgd" else "learning rate"
    # Schedule.
    falls = f"drops after {list(train.drops)}" if train.schedule == "step" else "half a cosine after the warm-up"
    known = speed_known_at(trainer.step, total, train.log_every)
    end = f"said near iteration {known}, when the speed is known" if known else ""
    averaged = f"their moving average (train.ema={train.ema:g}) is evaluated, and what others take from a checkpoint"
    # Disk: checkpoints that are kept, the one that is being written, the best one, and the logs.
    lines, count = total // train.log_every + train.epochs, train.keep_checkpoints + 1 + bool(train.evaluate_every)
    size, logs = checkpoint_bytes([(config, arm.model)], count), lines * LINE_BYTES + RUN_BYTES
    others = [other for other in trainer.arms if other is not arm]
    of_all = checkpoint_bytes([(one.config, one.model) for one in trainer.arms], count) + len(trainer.arms) * logs
    everything = f"; up to {megabytes(of_all)} with the others" if others else ""
    kept = f"{train.keep_checkpoints} checkpoints, the next{' and the best' if train.evaluate_every else ''}"
    beside = f"in one pass with {', '.join(str(other.folder) for other in others)}: images/s and minutes are the pass's"
    return [
        *([beside] if others else []),
        f"method: {config.head.name} head, {bank}, indicator {config.indicator.kind}, {config.sampler.name} sampler",
        f"data: {trainer.annotations.path} (sha256 {file_hash(trainer.annotations.path)}), {len(trainer.dataset)} "
        f"images, {sum(instances)} instances ({' / '.join(map(str, instances))} of rare / common / frequent classes), "
        f"{len(stats)} classes: rare / common / frequent {groups}",
        *(f"data: left out: {count} {reason}" for reason, count in trainer.annotations.dropped.items()),
        *(f"data: {note}" for note in trainer.annotations.notes),
        *([f"data: {held} training images are held out, which adapt the sampling rates"] if memory.holds_out else []),
        f"model: {network}, {trained / 1e6:.2f} of {every / 1e6:.2f} M parameters train (train.freeze={train.freeze})",
        f"batch: {train.batch_size} = {world} ranks x {each} images x {train.accumulate} steps{meta}; "
        f"{rate} {scaled_lr(train):.4g} ({train.lr:g} at {train.lr_batch_size}, scaled linearly)",
        f"schedule: {train.epochs} epochs, {total} iterations, {falls}, {train.precision}, "
        f"seed {config.seed}; run folder {arm.folder}",
        *([f"weights: {averaged}"] if train.ema else []),
        *(
            [
                f"WARNING: schedule: the warm-up takes {train.warmup_iterations} iterations, the training {total}: the "
                "learning rate never gets to its value; set train.warmup_iterations to a tenth of them, or train longer"
            ]
            if train.warmup_iterations >= total
            else []
        ),
        f"expected end: {end or 'the run is over before its speed is known'}",
        f"disk: up to {megabytes(size + logs)} ({kept}: {megabytes(size)}; logs: {megabytes(logs)})"
        f"{', detections of the evaluation come on top' if train.evaluate else ''}"
        f"{everything}; {megabytes(free_bytes(arm.folder))} are free",
    ]
