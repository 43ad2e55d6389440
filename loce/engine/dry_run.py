"""Dry run and overfitting: short trainings that test a recipe before the long one.

`train.dry_run` and `train.overfit` have a folder of their own in the run folder, which each replaces; nothing else
there is touched.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loce.checkpoint.load import weights_hash
from loce.checkpoint.save import newest, require_room
from loce.config import Config, SamplerConfig, UserError
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import val_annotations
from loce.data.dataset import unaugmented
from loce.engine.arm import Arm
from loce.engine.inference import evaluate_models
from loce.engine.preflight import check_run_folder, preflight
from loce.engine.summary import introduce
from loce.engine.trainer import Trainer
from loce.utils import distributed
from loce.utils.progress import peak_memory, print_line

STEPS = 2  # of a dry run
VALIDATION = 4  # images that a dry run evaluates
OVERFIT_EPOCHS, OVERFIT_STEPS = 10, 100  # epochs, and iterations of each
LEARNED = 0.1  # share of the first loss; less is near zero


def dry_run(config: Config, device: torch.device) -> None:
    """Two steps on the images with the most objects, save, resume, evaluation. RuntimeError where resuming differs."""
    config = _in_folder(config, "dry_run", epochs=max(config.train.epochs, STEPS))
    with preflight(config) as found:
        trainer = Trainer([config], device, found.annotations, saves=False)
        arm = trainer.arms[0]
        require_room([(arm.folder, config, arm.model)])
    trainer.open_log()
    introduce(trainer)
    arm.log.line("dry run: options, data, weights and disk are in order")

    # A step, a checkpoint, and the step after it.
    crowded = found.annotations.only(_crowded(found.annotations, STEPS * config.train.batch_size).tolist())
    trainer.set_data(crowded)
    trainer.fill_memory()
    started = time.monotonic()
    trainer.fit(1)
    arm.log.line(f"dry run: step 1, on the images with the most objects: {time.monotonic() - started:.1f} s")
    if not trainer.save():
        raise UserError(f"output = {arm.folder.parent}: no checkpoint can be saved there, see above")
    trainer.fit(STEPS)
    once, weights, peak = _last_losses(arm.folder), weights_hash(arm.model), peak_memory()
    speed = _last_line(arm.folder)["images_per_second"]
    trainer.close_log()
    del trainer, arm  # one model on the device is enough

    # The same step again, from the checkpoint.
    trainer = Trainer([config], device, found.annotations, [newest(Path(config.output))], saves=False)
    arm = trainer.arms[0]
    trainer.set_data(crowded)
    trainer.open_log()
    trainer.fit(STEPS)
    verdict = _compared(once, _last_losses(arm.folder), weights == weights_hash(arm.model), device)
    arm.log.line(f"dry run: step 2, again from that checkpoint: {verdict}")

    # Evaluation of a few images; only the log and what was found stay.
    if config.train.evaluate:
        annotations = val_annotations(config)
        usable = np.setdiff1d(np.arange(len(annotations)), annotations.absent)
        few = annotations.only(usable[: max(VALIDATION, distributed.world_size())].tolist())
        _evaluate(arm, f"a dry run of {arm.folder}", few)
        arm.log.line(f"dry run: evaluation of a few validation images: {arm.folder / 'eval'}")
    arm.log.line(f"dry run: peak memory of a process: {peak:.1f} GiB in training, {peak_memory():.1f} GiB in all")
    arm.log.line(f"dry run: step 2 trained {speed:.3g} images/s, these being the ones with the most objects")
    trainer.close_log()
    distributed.barrier()
    if distributed.is_main():
        for part in ("checkpoints", "tensorboard"):
            shutil.rmtree(arm.folder / part)
        print_line(f"dry run: passed; apart from {arm.folder}, nothing in {arm.folder.parent} was touched")


def overfit(config: Config, device: torch.device) -> None:
    """Overfit `train.overfit` images, without flips, jitter, weight decay; logs the loss and the AP on them."""
    config, most = _overfit_config(config), config.train.overfit
    with preflight(config) as found:
        trainer = Trainer([config], device, found.annotations, saves=False)
        arm = trainer.arms[0]
    count = min(most, len(found.annotations.train_images))
    images = np.random.default_rng(config.seed).choice(found.annotations.train_images, count, replace=False)
    trainer.set_data(found.annotations.only(images.tolist()), OVERFIT_STEPS)
    trainer.open_log()
    introduce(trainer)
    trainer.fill_memory()
    trainer.fit()
    trainer.save()
    _evaluate(arm, f"{arm.folder}, on the {count} images that it was trained on", trainer.annotations)
    for line in _verdict(arm.folder, count) if distributed.is_main() else ():
        arm.log.line(line)
    trainer.close_log()


def _evaluate(arm: Arm, source: str, annotations: LVISAnnotations) -> None:
    with arm.averaged():
        evaluate_models([arm.evaluated("eval")._replace(source=source)], annotations, resamples=0, errors=False)


def _in_folder(config: Config, name: str, **train: Any) -> Config:
    """The options of a short training in RUN/`name`, emptied. UserError where RUN would not take the real run."""
    real = dataclasses.replace(config, train=dataclasses.replace(config.train, dry_run=False, overfit=0))
    check_run_folder(Path(config.output), real)
    folder = Path(config.output, name)
    if distributed.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    distributed.barrier()
    changes = {"resume": "auto", "evaluate_every": 0, "log_every": 1, "wandb": False, **train}
    return dataclasses.replace(real, output=str(folder), train=dataclasses.replace(real.train, **changes))


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
    plain = {"weight_decay": 0.0, "ema": 0.0, "evaluate": False, "log_every": 25}
    short = _in_folder(config, "overfit", batch_size=batch, **schedule, **plain)
    data = dataclasses.replace(
        unaugmented(config.data),
        group_by_aspect=False,
        val_annotations=config.data.train_annotations,
        val_images=config.data.train_images,
    )
    return dataclasses.replace(short, data=data, sampler=SamplerConfig())


def _crowded(annotations: LVISAnnotations, count: int) -> np.ndarray:
    """The training images with the most objects: they need the most memory."""
    objects = np.bincount(annotations.image_of[annotations.train_rows], minlength=len(annotations))
    order = np.argsort(-objects[annotations.train_images], kind="stable")
    return annotations.train_images[order][:count]


def _last_losses(folder: Path) -> dict[str, float]:
    """The losses of the last line in metrics.jsonl."""
    return {name: value for name, value in _last_line(folder).items() if name.startswith("loss")}


def _last_line(folder: Path) -> dict[str, float]:
    """The last line in metrics.jsonl, the same on all ranks."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1] if distributed.is_main() else ""
    line: dict[str, float] = json.loads(distributed.broadcast_text(text))
    return line


def _compared(once: dict[str, float], again: dict[str, float], equal: bool, device: torch.device) -> str:
    """Comparison of a step and the same one resumed, in words. RuntimeError where they differ on a CPU."""
    if equal and once == again:
        return f"the same, loss {again['loss']:.4g} and all weights"
    if device.type == "cpu":
        raise RuntimeError(f"a resumed step is not the same: losses {once}, then {again}")
    return f"loss {once['loss']:.6g}, then {again['loss']:.6g}: a GPU need not round the same way twice"


def _verdict(folder: Path, images: int) -> list[str]:
    """The first and last loss, the AP, and what to look at where the loss did not fall enough."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = json.loads((folder / "eval" / "metrics.json").read_text(encoding="utf-8"))
    names = {"bbox": "box", "segm": "mask"}
    ap = ", ".join(f"{name} AP {100 * metrics[kind]['AP']:.1f}" for kind, name in names.items() if kind in metrics)
    first, last = lines[0], lines[-1]
    text = f"overfit: loss {first['loss']:.4g} at first, {last['loss']:.4g} at last; on these {images} images {ap}"
    if last["loss"] < LEARNED * first["loss"]:
        return [text]
    worst = max((name for name in last if name.startswith("loss_")), key=lambda name: last[name])
    warning = (
        f"WARNING: not learned by heart: the loss stays above {LEARNED:.0%} of the first, most of it {worst} "
        f"({last[worst]:.4g}). Look at {folder / 'first_samples.jpg'} (are boxes, masks and names right?), try "
        "another train.lr; what train.freeze keeps as it is may be the cause, too"
    )
    return [text, warning]
