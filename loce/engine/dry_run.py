"""Small runs that try a recipe before its long one: `train.dry_run` and `train.overfit`.

Each has a folder of its own in the run folder, which it replaces each time; nothing else there is touched.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loce.checkpoint import save as resume
from loce.config import Config, SamplerConfig, UserError, dump
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import train_dataset, val_annotations
from loce.data.loader import training_plan
from loce.engine import inference
from loce.engine import preflight as start
from loce.engine.inference import evaluate_model
from loce.engine.log import RunLog, check_run_folder
from loce.engine.summary import introduce
from loce.engine.trainer import Job, advance, fill, filled, open_log, prepare, save, set_done
from loce.utils import distributed
from loce.utils.errors import Stopped
from loce.utils.progress import peak_memory, say

STEPS = 2  # of a dry run
VALIDATION = 4  # images that a dry run evaluates
OVERFIT_EPOCHS, OVERFIT_STEPS = 10, 100  # epochs, and iterations of each
LEARNED = 0.1  # share of the first loss; less is near zero


def _trial(config: Config, name: str, **train: Any) -> Config:
    """The options of a trial in RUN/`name`, emptied. UserError where the run folder would not take the real run."""
    section = dataclasses.replace(config.train, dry_run=False, overfit=0)
    real = dataclasses.replace(config, train=section)
    check_run_folder(config.output, dump(real), dump(Config()))
    folder = Path(config.output, name)
    if distributed.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    distributed.barrier()
    changes = {"resume": "auto", "evaluate_every": 0, "log_every": 1, "checkpoint_every": 1 << 30, "wandb": False}
    return dataclasses.replace(real, output=str(folder), train=dataclasses.replace(section, **{**changes, **train}))


def _advance(job: Job, log: RunLog, last: int) -> None:
    def after_step(done: int, stop: bool) -> None:
        set_done(job, done)
        if stop:
            raise Stopped("a signal")

    advance(job, log, last, after_step)


def _on(job: Job, images: np.ndarray, steps: int = 1) -> Job:
    """The same training on some of its images alone, which are shown over and over for `steps` iterations an epoch."""
    annotations, config = job.annotations.only(images.tolist()), job.config
    dataset = train_dataset(config, annotations)
    size, meta = config.train.batch_size, job.plan.meta
    plan = training_plan(dataset, config.sampler, config.data, size, config.seed, meta)
    if steps > 1:
        shown = np.resize(annotations.train_images, steps * size)
        plan = dataclasses.replace(plan, labels=dataclasses.replace(plan.labels, images=shown))
    lengths = plan.iterations(config.train.epochs)
    small = dataclasses.replace(job, annotations=annotations, dataset=dataset, plan=plan, lengths=lengths)
    set_done(small, job.done)
    return small


def dry_run(config: Config, device: torch.device) -> None:
    """Two steps on the images with the most objects, save, resume, evaluation. RuntimeError where resuming differs."""
    trial = _trial(config, "dry_run", epochs=max(config.train.epochs, STEPS))
    found = start.check(trial)
    job = prepare(trial, device, found.annotations, None)
    resume.require_room(job.folder, trial, job.model)
    images = _crowded(found.annotations, STEPS * trial.train.batch_size)
    log = open_log(job, job.folder)
    introduce(job, log)
    log.line("dry run: options, data, weights and disk are in order")
    job = _on(job, images)
    if trial.memory.enabled:
        fill(job)
        log.line(f"dry run: {filled(job.model)}")
    started = time.monotonic()
    _advance(job, log, 1)
    log.line(f"dry run: step 1, on the images with the most objects: {time.monotonic() - started:.1f} s")
    if not save(job, log):
        raise UserError(f"output = {config.output}: no checkpoint can be saved there, see above")
    _advance(job, log, STEPS)
    once, weights, peak = _last_line(job.folder), inference.weights_hash(job.model), peak_memory()
    log.close()
    del job, log  # one model on the device is enough
    again = _on(prepare(trial, device, found.annotations, resume.newest(Path(trial.output))), images)
    log = open_log(again, again.folder)
    _advance(again, log, STEPS)
    equal = weights == inference.weights_hash(again.model)
    log.line(f"dry run: step 2, again from that checkpoint: {_compared(once, _last_line(again.folder), equal, device)}")
    if trial.train.evaluate:
        _evaluate_few(again)
        log.line(f"dry run: evaluation of a few validation images: {again.folder / 'eval'}")
    log.line(f"dry run: peak memory of a process: {peak:.1f} GiB in training, {peak_memory():.1f} GiB in all")
    log.close()
    distributed.barrier()
    if distributed.is_main():
        for part in ("checkpoints", "tensorboard"):
            shutil.rmtree(again.folder / part)
        say(f"dry run: passed; apart from {again.folder}, nothing in {config.output} was touched")


def _crowded(annotations: LVISAnnotations, count: int) -> np.ndarray:
    """The training images with the most objects: they need the most memory."""
    objects = np.bincount(annotations.image_of[annotations.train_rows], minlength=len(annotations))
    order = np.argsort(-objects[annotations.train_images], kind="stable")
    return annotations.train_images[order][:count]


def _last_line(folder: Path) -> dict[str, float]:
    """The losses of the last line in metrics.jsonl, the same on all ranks."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1] if distributed.is_main() else ""
    line: dict[str, float] = json.loads(distributed.broadcast_text(text))
    return {name: value for name, value in line.items() if name.startswith("loss")}


def _compared(once: dict[str, float], again: dict[str, float], equal: bool, device: torch.device) -> str:
    same = equal and once == again
    if not same and device.type == "cpu":
        raise RuntimeError(f"a resumed step is not the same: losses {once}, then {again}")
    if same:
        return f"the same, loss {again['loss']:.4g} and all weights"
    return f"loss {once['loss']:.6g}, then {again['loss']:.6g}: a GPU need not round the same way twice"


def _evaluate_few(job: Job) -> None:
    annotations = val_annotations(job.config)
    usable = np.setdiff1d(np.arange(len(annotations)), annotations.absent)
    few = annotations.only(usable[: max(VALIDATION, distributed.world_size())].tolist())
    source = f"a dry run of {job.config.output}"
    evaluate_model(job.model, job.config, job.folder / "eval", source, few, resamples=0, errors=False)


def overfit(config: Config, device: torch.device) -> None:
    """Learn `train.overfit` images by heart; says the loss and the AP on them. Without flips, jitter, weight decay."""
    trial = _overfit_config(config)
    found = start.check(trial)
    job = prepare(trial, device, found.annotations, None)
    generator = np.random.default_rng(config.seed)
    count = min(config.train.overfit, len(found.annotations.train_images))
    job = _on(job, generator.choice(found.annotations.train_images, count, replace=False), OVERFIT_STEPS)
    log = open_log(job, job.folder)
    introduce(job, log)
    if trial.memory.enabled:
        fill(job)
    _advance(job, log, sum(job.lengths))
    save(job, log)
    source = f"{job.folder}, on the {count} images that it was trained on"
    evaluate_model(job.model, trial, job.folder / "eval", source, job.annotations, resamples=0, errors=False)
    if distributed.is_main():
        for line in _verdict(job.folder, count):
            log.line(line)
    log.close()


def _verdict(folder: Path, images: int) -> list[str]:
    """What became of the loss and how good the detections are, and what to look at where it is not enough."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = json.loads((folder / "eval" / "metrics.json").read_text(encoding="utf-8"))
    ap = ", ".join(f"{name} AP {100 * metrics[kind]['AP']:.1f}" for kind, name in (("bbox", "box"), ("segm", "mask")))
    first, last = lines[0], lines[-1]
    told = [f"overfit: loss {first['loss']:.4g} at first, {last['loss']:.4g} at last; on these {images} images {ap}"]
    if not last["loss"] < LEARNED * first["loss"]:
        worst = max((name for name in last if name.startswith("loss_")), key=lambda name: last[name])
        told.append(
            f"WARNING: not learned by heart: the loss stays above {LEARNED:.0%} of the first, most of it {worst} "
            f"({last[worst]:.4g}). Look at {folder / 'first_samples.jpg'} (are boxes, masks and names right?), try "
            "another train.lr; what train.freeze keeps as it is may be the cause, too"
        )
    return told


def _overfit_config(config: Config) -> Config:
    """Every batch shows the same images in the same way, as many at once as in the run, or fewer."""
    parts = distributed.world_size() * config.train.accumulate
    batch = min(config.train.batch_size, config.train.overfit) // parts * parts
    if not batch:
        raise UserError(
            f"train.overfit = {config.train.overfit}: must be at least processes x train.accumulate = "
            f"{distributed.world_size()} x {config.train.accumulate}"
        )
    schedule = {"epochs": OVERFIT_EPOCHS, "drops": (OVERFIT_EPOCHS * 4 // 5,), "warmup_iterations": 50}
    trial = _trial(config, "overfit", batch_size=batch, **schedule, weight_decay=0.0, evaluate=False, log_every=25)
    data = dataclasses.replace(
        config.data,
        flip=0.0,
        short_edges=(config.data.test_short_edge,),
        group_by_aspect=False,
        val_annotations=config.data.train_annotations,
        val_images=config.data.train_images,
    )
    return dataclasses.replace(trial, data=data, sampler=SamplerConfig())
