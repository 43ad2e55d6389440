"""One run from its options to its results: set up, train (or go on), evaluate. Both training scripts call `train`."""

import time
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch

from loce import distributed, divergence, resume, start, stopping, validation
from loce.checkpoint_files import megabytes
from loce.config import Config, UserError
from loce.engine import BadStepError
from loce.errors import DivergedError, Stopped
from loce.files import write_text
from loce.inference import evaluate_model
from loce.job import Job, advance, fill, filled, header, open_log, prepare, set_done
from loce.progress import say
from loce.runlog import RunLog
from loce.session import session

STOPPED = "stopped.txt"  # in the run folder while a run that was asked to stop waits to go on
LAST_TRIES, LAST_WAIT = 20, 30.0  # of saving the last checkpoint; seconds between them


def train(config: Config) -> None:
    """Train to the end, from the newest checkpoint in the run folder where there is one, and evaluate."""
    with session(config.device) as device:
        try:
            job = _prepare(config, device)
            if job.done < sum(job.lengths):
                _train(job)
            elif distributed.is_main():
                say(f"{job.folder}: training is finished already")
            if config.train.evaluate:
                evaluate_model(job.model, config, job.folder / "eval", f"{job.folder} after {job.done} iterations")
        except Stopped as request:
            if distributed.is_main():  # for scripts that put the job back into its queue: torchrun hides the exit code
                write_text(Path(config.output) / STOPPED, f"stopped by {request}; the same command goes on\n")
            raise


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
    for line in [*job.report, *header(job)]:
        log.line(line)
    if job.config.memory.enabled and not job.resumed:
        with stopping.deferred():
            fill(job)
            log.line(filled(job.model))
            _save(job, log)  # filling takes long on LVIS and is never done twice
    for epoch, end in enumerate(accumulate(job.lengths), start=1):
        evaluated = validation.due(job.config.train, epoch)
        if job.done <= end and (evaluated or epoch == len(job.lengths)):
            _advance(job, log, end)
            if evaluated:
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
    if stop or done in accumulate(job.lengths) or done % job.config.train.checkpoint_every == 0:
        saved = _save(job, log)
        if done == sum(job.lengths) and not saved and not stop:
            _save_at_last(job, log)
    if stop:
        raise Stopped(stopping.asked[0] if stopping.asked else "a signal to another rank")


def _save_at_last(job: Job, log: RunLog, tries: int = LAST_TRIES, wait: float = LAST_WAIT) -> None:
    """Nothing comes after the last iteration: wait for room. UserError where there is none in the end."""
    for _ in range(tries):
        log.line(f"training is done, but not saved; the next try is in {wait:g} s")
        time.sleep(wait)
        if _save(job, log):
            return
    raise UserError(
        f"{job.folder}: training is done, but its last checkpoint could not be saved. Make room on the disk and give "
        "the same command again: it goes on from the checkpoint before"
    )


def _save(job: Job, log: RunLog) -> bool:
    """Save; False, with a warning, where the disk does not take it. DivergedError where there is a value not finite."""
    numbers = [x for x in job.model.state_dict().values() if x.is_floating_point()]
    bad = ~torch.stack([x.isfinite().all() for x in numbers]).all()
    if distributed.all_reduce_sum(bad.float()).item():  # sync: a save
        raise DivergedError("training diverged: a weight or a buffer is not finite; the checkpoints before are good")
    log.sync()
    best = validation.best_checkpoint(job.folder)
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
