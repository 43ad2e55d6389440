"""One run from its options to its results: set up, train (or go on), evaluate. Both training scripts call `train`."""

import time
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch

from loce.checkpoint import save as resume
from loce.config import Config, UserError, dump
from loce.data.build import val_annotations
from loce.engine import divergence, validation
from loce.engine import dry_run as trials
from loce.engine import preflight as start
from loce.engine.inference import evaluate_model
from loce.engine.log import RunLog, open_boards
from loce.engine.loop import BadStepError
from loce.engine.ranks import session
from loce.engine.summary import introduce
from loce.engine.trainer import (
    Job,
    advance,
    equilibrium_of_classes,
    fill,
    filled,
    open_log,
    prepare,
    save,
    set_done,
    snapshot_due,
)
from loce.utils import distributed
from loce.utils import signals as stopping
from loce.utils.errors import DivergedError, Stopped
from loce.utils.files import write_text
from loce.utils.progress import say

STOPPED = "stopped.txt"  # in the run folder while a run that was asked to stop waits to go on
LAST_TRIES, LAST_WAIT = 20, 30.0  # of saving the last checkpoint; seconds between them


def train(config: Config) -> None:
    """Train to the end, from the newest checkpoint in the run folder where there is one, and evaluate."""
    with session(config.device) as device:
        try:
            if config.train.dry_run or config.train.overfit:
                return (trials.dry_run if config.train.dry_run else trials.overfit)(config, device)
            job = _prepare(config, device)
            if job.done < sum(job.lengths):
                _train(job)
            elif distributed.is_main():
                say(f"{job.folder}: training is finished already")
            if config.train.evaluate:
                _evaluate(job)
        except Stopped as request:
            if distributed.is_main():  # for scripts that put the job back into its queue: torchrun hides the exit code
                write_text(Path(config.output) / STOPPED, f"stopped by {request}; the same command goes on\n")
            raise


def _evaluate(job: Job) -> None:
    folder, config = job.folder / "eval", job.config
    annotations = val_annotations(config)
    evaluate_model(job.model, config, folder, f"{job.folder} after {job.done} iterations", annotations)
    if distributed.is_main():
        boards = open_boards(job.folder, None, dump(config) if config.train.wandb else "")
        values = validation.results(job.model, config, folder, annotations)
        for board in boards:
            if problem := board.show(job.done, values):
                say(f"WARNING: {problem}")
            board.close()


def _prepare(config: Config, device: torch.device) -> Job:
    """Everything that can be wrong is found here, before the first step."""
    found = start.check(config)
    try:
        job = prepare(config, device, found.annotations, found.newest)
        if job.done < sum(job.lengths):
            resume.require_room(job.folder, config, job.model)
    except UserError:
        found.undo()
        raise
    if distributed.is_main():
        (job.folder / STOPPED).unlink(missing_ok=True)
    return job


def _train(job: Job) -> None:
    log = open_log(job, job.folder)
    introduce(job, log)
    if job.config.memory.enabled and not job.resumed:
        with stopping.deferred(), log.apart():
            fill(job)
            log.line(filled(job.model))
            save(job, log)  # filling takes long on LVIS and is never done twice
    for epoch, end in enumerate(accumulate(job.lengths), start=1):
        evaluated = validation.due(job.config.train, epoch)
        if job.done <= end and (evaluated or epoch == len(job.lengths)):
            _advance(job, log, end)
            if evaluated:
                with log.apart():
                    log.scalars(end, validation.evaluate_epoch(job.model, job.config, job.folder, epoch, end))
    log.close()


def _advance(job: Job, log: RunLog, last: int) -> None:
    """Train until `last` iterations are done. DivergedError, and a report on disk, where a step has a bad value."""
    with stopping.deferred():
        try:
            advance(job, log, last, partial(_after_step, job, log))
        except BadStepError as error:
            summary = divergence.report(job.folder, job.model, error.step, job.config.train.precision, job.image_name)
            log.line(summary, shown=False)
            raise DivergedError(summary) from None


def _after_step(job: Job, log: RunLog, done: int, stop: bool) -> None:
    set_done(job, done)
    if snapshot_due(done, sum(job.lengths)):
        log.snapshot(done, equilibrium_of_classes(job.model))
    if stop or done in accumulate(job.lengths) or done % job.config.train.checkpoint_every == 0:
        saved = save(job, log)
        if done == sum(job.lengths) and not saved and not stop:
            _save_at_last(job, log)
    if stop:
        raise Stopped(stopping.asked[0] if stopping.asked else "a signal to another rank")


def _save_at_last(job: Job, log: RunLog, tries: int = LAST_TRIES, wait: float = LAST_WAIT) -> None:
    """Nothing comes after the last iteration: wait for room. UserError where there is none in the end."""
    for _ in range(tries):
        log.line(f"training is done, but not saved; the next try is in {wait:g} s")
        time.sleep(wait)
        if save(job, log):
            return
    raise UserError(
        f"{job.folder}: training is done, but its last checkpoint could not be saved. Make room on the disk and give "
        "the same command again: it goes on from the checkpoint before"
    )
