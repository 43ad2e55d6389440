"""What can be wrong with a run is found before its first step, and all of it is told at once."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from loce.checkpoint import save as resume
from loce.checkpoint.load import main_file
from loce.config import Config, DataConfig, UserError, dump, images_per_rank, raise_problems
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import train_annotations, val_annotations
from loce.data.check import images_in_both
from loce.data.worker_limits import require_shared_memory
from loce.engine.inference import check_evaluation
from loce.engine.log import check_run_folder
from loce.engine.runlock import RunLock
from loce.engine.wandb_log import require_wandb
from loce.models.backbone import require_cache
from loce.models.build import head_files
from loce.utils import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """What the checks have opened. newest: the checkpoint that training goes on from; lock: on rank 0."""

    annotations: LVISAnnotations
    newest: Path | None
    lock: RunLock | None

    def undo(self) -> None:
        """Leave the run folder as it was found, for a run that does not begin after all."""
        if self.lock is not None:
            self.lock.undo()


class _Checks:
    """Runs checks and keeps what they find wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def run(self, check: Callable[[], T]) -> T | None:
        """What a check gives; None where it finds a mistake of the user."""
        try:
            return check()
        except UserError as error:
            self.problems.append(str(error))
            return None


def _initial(init: str) -> None:
    """UserError where there is no checkpoint to start from."""
    try:
        main_file(Path(init))
    except UserError as error:
        raise UserError(f"train.init = {error}; stage 1 comes first: scripts/train.py stage1.yaml") from None


def check(config: Config) -> Start:
    """Every rank must call. UserError, on all ranks, with everything that any of them finds wrong.

    Nothing is written but the lock in the run folder, and that is undone where something is wrong.
    """
    checks, folder, init = _Checks(), Path(config.output), config.train.init
    checks.run(lambda: check_run_folder(folder, dump(config), dump(Config())))
    lock = checks.run(lambda: RunLock(folder)) if distributed.is_main() and not checks.problems else None
    images = checks.run(lambda: images_per_rank(config.train, distributed.world_size()))
    if images is not None:
        checks.run(lambda: require_shared_memory(config.data, images, distributed.local_world_size()))
    newest = checks.run(lambda: resume.newest(folder))
    checks.run(lambda: check_resume(config.train.resume, folder, newest))
    if newest is None and init:
        checks.run(lambda: _initial(init))
    if newest is None and not init and distributed.is_main():
        checks.run(lambda: require_cache(config.model))
    if config.train.wandb and distributed.is_main():
        checks.run(require_wandb)
    annotations = checks.run(lambda: train_annotations(config))
    train = annotations
    if newest is None and train is not None:
        checks.run(lambda: head_files(config, train))
    if config.train.evaluate:
        validation = checks.run(lambda: val_annotations(config))
        if annotations is not None and validation is not None:
            stats = annotations.stats
            checks.run(lambda: check_evaluation(config, validation, stats, "the training data"))
            annotations = _with_overlap(config.data, annotations, validation)
    texts = distributed.gather_texts(json.dumps(checks.problems))
    problems = list(dict.fromkeys(problem for text in texts for problem in json.loads(text)))
    if problems and lock is not None:
        lock.undo()
    raise_problems(problems)
    assert annotations is not None
    return Start(annotations, newest, lock)


def _with_overlap(data: DataConfig, train: LVISAnnotations, val: LVISAnnotations) -> LVISAnnotations:
    """The training annotations, with a note where evaluation will use images that training has seen."""
    both = images_in_both(train, val, data.train_images, data.val_images)
    if not both:
        return train
    note = f"WARNING: {len(both)} images are in {val.path}, too (the first: {both[0]}): no result of unseen images"
    return replace(train, notes=[*train.notes, note])


def check_resume(wish: str, folder: Path, newest: Path | None) -> None:
    """UserError where a run that must be new has a checkpoint, or one that must go on has none."""
    if wish == "never" and newest is not None:
        raise UserError(
            f"train.resume = never: {folder} holds {newest.name} and is not overwritten; choose another folder with "
            f"output=..., go on with train.resume=auto, or delete {folder}"
        )
    if wish == "must" and newest is None:
        raise UserError(f"train.resume = must: {folder} has no finished checkpoint to go on from; check output=...")
