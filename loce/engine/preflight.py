"""Checks before the first step: all that can be wrong with a run, found at once; the lock of its run folder."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from loce.checkpoint.load import main_file
from loce.checkpoint.save import newest_of_all
from loce.config import (
    LENGTHENED,
    MAY_CHANGE,
    Config,
    UserError,
    diff,
    from_dict,
    images_per_rank,
    raise_problems,
)
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import images_in_both, train_annotations, val_annotations
from loce.data.loader import require_shared_memory
from loce.engine.boards import require_wandb
from loce.engine.inference import check_evaluation
from loce.models.backbone import require_cache
from loce.models.build import head_files
from loce.utils import distributed
from loce.utils.progress import print_line
from loce.utils.yaml_text import load_yaml, show

T = TypeVar("T")
LOCK = "lock"  # in the run folder
PARTS = ("checkpoints", "tensorboard", "eval")  # folders in a run folder that must be writable, too


@dataclass(frozen=True)
class Ready:
    """What the checks have opened. checkpoints: of each run folder, the one that training goes on from."""

    annotations: LVISAnnotations
    checkpoints: list[Path | None]


@contextmanager
def preflight(*configs: Config) -> Iterator[Ready]:
    """Check the runs of a pass, mostly one, and lock their folders until the process ends; every rank must call.

    UserError, on all ranks, with everything that any of them finds wrong. Nothing is written but the lock, and that is
    undone where something is wrong, here or in the block.
    """
    problems: list[str] = []

    def attempt(check: Callable[[], T], message: str = "{}") -> T | None:
        try:
            return check()
        except UserError as error:
            problems.append(message.format(error))
            return None

    # The run folders: whose they are, and that nobody else writes into them.
    folders, main = [Path(config.output) for config in configs], distributed.is_main()
    for folder, each in zip(folders, configs, strict=True):
        attempt(lambda: check_run_folder(folder, each))  # noqa: B023
    wanted = folders if main and not problems else []
    locks = [lock for folder in wanted if (lock := attempt(lambda: RunLock(folder)))]  # noqa: B023
    # The machine: batch and shared memory. What is not of the method is the same in all runs.
    config, train, init = configs[0], configs[0].train, configs[0].train.init
    images = attempt(lambda: images_per_rank(train, distributed.world_size()))
    if images is not None:
        attempt(lambda: require_shared_memory(config.data, images, distributed.local_world_size()))
    # What training starts from.
    found = attempt(lambda: newest_of_all(folders)) or [None] * len(folders)
    for folder, checkpoint in zip(folders, found, strict=True):
        attempt(lambda: check_resume(train.resume, folder, checkpoint))  # noqa: B023
    begins = None in found
    if begins and init:
        attempt(lambda: main_file(Path(init)), "train.init = {}; stage 1 comes first: scripts/train.py stage1.yaml")
    if begins and not init and main:
        attempt(lambda: require_cache(config.model))
    if train.wandb and main:
        attempt(require_wandb)
    # Annotations and images, of training and of evaluation.
    annotations = data = attempt(lambda: train_annotations(config))
    if begins and data is not None:
        for each in configs:
            attempt(lambda: head_files(each, data))  # noqa: B023
    if train.evaluate and (val := attempt(lambda: val_annotations(config))) is not None and data is not None:
        attempt(lambda: check_evaluation(config, val, data.stats, "the training data"))
        # Warned of before training: objects without an output, and images that were seen.
        known = {*val.notes, *data.notes}
        notes = [note for note in val.of_classes(data.stats.category_ids).notes if note not in known]
        if both := images_in_both(data, val, config.data.train_images, config.data.val_images):
            seen = f"(the first: {both[0]}): no result of unseen images"
            notes.append(f"WARNING: {len(both)} images are in {val.path}, too {seen}")
        annotations = replace(data, notes=[*data.notes, *notes])

    # All ranks together: one list of everything.
    try:
        texts = distributed.gather_texts(json.dumps(problems))
        raise_problems(list(dict.fromkeys(problem for text in texts for problem in json.loads(text))))
        assert annotations is not None
        yield Ready(annotations, found)
    except UserError:
        for lock in locks:
            lock.undo()
        raise


def check_run_folder(folder: Path, config: Config) -> None:
    """UserError where `folder` holds another run than `config` describes, or files of something else.

    An option that is newer than the run there had its default when that run began.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        taken = [name for name in ("env.txt", "metrics.jsonl", "log.txt", "checkpoints") if (folder / name).exists()]
        if taken or (folder.exists() and not folder.is_dir()):
            raise UserError(
                f"output = {folder}: is no folder of a run (no config.yaml), but holds {', '.join(taken) or 'a file'}; "
                "choose another with output=..."
            )
        return
    there = from_dict(load_yaml(file.read_text(encoding="utf-8"), str(file)), str(file))
    old, new = diff(config, there), diff(there, config)
    # A longer run is the same training that goes on for more epochs: it keeps its drops.
    epochs, drops, now = there.train.epochs, there.train.drops, config.train
    further = now.drops[len(drops) :]
    same = now.drops[: len(drops)] == drops and all(drop >= epochs for drop in further)
    allowed = MAY_CHANGE | ({*LENGTHENED} if now.epochs > epochs and same else set())
    lines = [f"  {key}: {show(old[key])} there, {show(new[key])} now" for key in new if key not in allowed]
    if {*new} - allowed <= {*LENGTHENED} and lines:
        lines.append(f"  (a longer run keeps its drops; further ones are after epoch {there.train.epochs} or later)")
    if lines:
        raise UserError(
            f"output = {folder}: holds another run, which is not overwritten. What differs:\n" + "\n".join(lines) + "\n"
            f"Go on with that run by giving its values, choose another folder with output=..., or delete {folder}."
        )


def check_resume(resume: str, folder: Path, found: Path | None) -> None:
    """UserError where a run that must be new has a checkpoint, or one that must go on has none."""
    if resume == "never" and found is not None:
        raise UserError(
            f"train.resume = never: {folder} holds {found.name} and is not overwritten; choose another folder with "
            f"output=..., go on with train.resume=auto, or delete {folder}"
        )
    if resume == "must" and found is None:
        raise UserError(f"train.resume = must: {folder} has no finished checkpoint to go on from; check output=...")


class RunLock:
    """The right to write into a run folder. UserError where it cannot be written, or another job writes into it.

    A lock of `fcntl.lockf` belongs to the process alone, and the system ends it with the process: forked workers that
    outlive a killed job do not hold it. The file system may not know locks (some network file systems): then there is
    a warning and no protection.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK
        self.made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            parts = [folder / part for part in PARTS if (folder / part).exists()]
            closed = [str(part) for part in parts if not os.access(part, os.W_OK | os.X_OK)]
            if closed:
                raise PermissionError(errno.EACCES, f"no right to write into {', '.join(closed)}")
            self.descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._take(folder)
        except OSError as error:
            self._remove_folders()
            raise UserError(
                f"output = {folder}: cannot be written ({error.strerror}); choose another with output=..."
            ) from error

    def _take(self, folder: Path) -> None:
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.pread(self.descriptor, 1000, 0).decode(errors="replace").strip()
                os.close(self.descriptor)
                raise UserError(
                    f"output = {folder}: another job writes into it ({holder or 'which has not said who it is'}); "
                    "wait for it, stop it, or choose another folder with output=..."
                ) from error
            print_line(
                f"WARNING: {self.file}: this file system has no locks ({error.strerror}): start no second job here"
            )
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {started}\n".encode(), 0)

    def undo(self) -> None:
        """Give it back as if the job had never begun; folders that were made for it go, if nothing else is in them."""
        if self.made:
            self.file.unlink(missing_ok=True)
        os.close(self.descriptor)
        self._remove_folders()

    def _remove_folders(self) -> None:
        for folder in self.made:
            try:
                folder.rmdir()
            except OSError:
                return  # somebody else's file is in there
