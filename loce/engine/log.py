"""Run log: config.yaml, env.txt, log.txt, metrics.jsonl, equilibrium.jsonl and curves of a run folder; throughput."""

import json
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from loce.config import Config, dump
from loce.engine.boards import Shown, open_boards
from loce.utils import distributed
from loce.utils.environment import available_cores, environment
from loce.utils.errors import UserError
from loce.utils.files import PatientFile, json_text, write_text
from loce.utils.progress import bar, clock, eta, peak_memory, print_line

T = TypeVar("T")
START_UP = 20  # iterations in which workers start and memory is claimed: they say nothing of the speed
ENOUGH = 50  # iterations after them
MOST_WAITING = 0.3  # share of the time; more is worth a warning


class RunLog:
    """Log of a run: mean losses of every few iterations, speed, memory, what is drawn. Rank 0 writes; all must call.

    ends: iterations done after each epoch; batch_size: images of an iteration over all ranks; done: iterations done
    (0: from the beginning; else the log is cut there, so that no line is lost or doubled); pending: `unwritten` of the
    run that goes on; shown: also on the screen, as one log of a pass is. UserError where the folder `config.output`
    cannot be written.
    """

    def __init__(
        self,
        config: Config,
        ends: Sequence[int],
        batch_size: int,
        done: int = 0,
        pending: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
        shown: bool = True,
    ) -> None:
        self.folder, self.shown = Path(config.output), shown
        self._ends, self._batch_size = list(ends), batch_size
        self._start, self._done, self._line_at = done, done, done  # iterations: at first, now, at the last line
        columns = {name: values.to(device).unbind() for name, values in (pending or {}).items()}
        self._losses = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self._throughput = Throughput(done, ends[-1], more_workers(config.data.workers))
        self._writing = distributed.is_main()
        if self._writing:
            try:
                self._open(config, device)
            except OSError as error:
                raise UserError(
                    f"output = {self.folder}: cannot be written ({error}); choose another with output=..."
                ) from error
        self._bar = bar("training", ends[-1] * batch_size, done * batch_size, "images", shown)
        self._waited = 0.0  # seconds, for images, since the last line
        self._started = self._line_time = time.monotonic()

    def _open(self, config: Config, device: torch.device | str) -> None:
        self._troubled: set[str] = set()  # files that could not be written
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.yaml", dump(config))
        with (self.folder / "env.txt").open("a", encoding="utf-8") as file:
            file.write(environment(device, distributed.world_size()) + "\n\n")
        for name in ("metrics.jsonl", "equilibrium.jsonl"):
            cut_metrics(self.folder / name, self._done)
        names = ("metrics.jsonl", "equilibrium.jsonl", "log.txt")
        self._metrics, self._classes, self._text = self._files = [PatientFile(self.folder / name) for name in names]
        self._boards = open_boards(self.folder, self._done + 1, config)

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The items; the time until each is there counts as waiting for images."""
        iterator = iter(items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            yield item

    def step(self, losses: list[dict[str, Tensor]]) -> None:
        """An iteration is done. losses: of each micro-batch, scalars on the device, the same names on all ranks."""
        self._done += 1
        self._losses += losses
        self._bar.update(self._batch_size)

    def unwritten(self) -> dict[str, Tensor]:
        """The losses since the last line, (passes,) each: in a checkpoint, since no line may depend on when it was."""
        names = self._losses[0] if self._losses else ()
        return {name: torch.stack([losses[name] for losses in self._losses]).cpu() for name in names}  # sync: a save

    def write(self, lr: float, more: Mapping[str, Shown]) -> dict[str, float]:
        """A line on the iterations since the last one; the mean losses, equal on all ranks.

        more: numbers for it ("mean_score/r": 0.02), and tensors (N,) whose spread is shown.
        """
        means = mean_losses(self._losses)
        seconds = max(time.monotonic() - self._line_time, 1e-9)
        speed = (self._done - self._line_at) * self._batch_size / seconds
        share, memory = min(self._waited / seconds, 1.0), peak_memory()
        values = {**means, "lr": lr, **more, "images_per_second": speed, "data_share": share, "peak_memory_gib": memory}
        self.scalars(self._done, values)

        epoch, step, length = self.place(self._done)
        losses = " ".join(f"{name} {value:.4g}" for name, value in means.items())
        left = eta(self._started, self._done - self._start, self._ends[-1] - self._done)
        self._bar.set_postfix_str(f"epoch {epoch}/{len(self._ends)} loss {means['loss']:.4g} lr {lr:.3g}")
        self.line(
            f"epoch {epoch}/{len(self._ends)} iter {step}/{length} {losses} lr {lr:.3g} "
            f"{speed:.1f} images/s data {share:.0%} {memory:.1f} GiB eta {left}",
            shown=bool(self._bar.disable),
        )
        for message in self._throughput.add(self._line_at, self._done, seconds, self._waited):
            self.line(message)
        self._losses, self._waited = [], 0.0
        self._line_at, self._line_time = self._done, time.monotonic()
        return means

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block is no training: neither the speed nor the expected end counts its time."""
        begun = time.monotonic()
        yield
        spent = time.monotonic() - begun
        self._started, self._line_time = self._started + spent, self._line_time + spent

    def place(self, iteration: int) -> tuple[int, int, int]:
        """(epoch from 1, iteration within it from 1, the epoch's iterations) of the iteration that was the n-th."""
        epoch = bisect_left(self._ends, iteration)
        first = self._ends[epoch - 1] if epoch else 0
        return epoch + 1, iteration - first, self._ends[epoch] - first

    def scalars(self, iteration: int, values: Mapping[str, Shown]) -> None:
        """The numbers as a line of metrics.jsonl, null where they are not finite, and all as `show`."""
        if not self._writing:
            return
        epoch, step, length = self.place(iteration)
        record: dict[str, Any] = {"iteration": iteration, "epoch": epoch - 1 + step / length}
        record |= {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self._warn("metrics.jsonl", self._metrics.write(json_text(record) + "\n"))
        self.show(iteration, values)

    def show(self, iteration: int, values: Mapping[str, Shown]) -> None:
        """Numbers, tensors, pictures and texts on the pages of TensorBoard. Rank 0 only."""
        for board in self._boards if self._writing else ():
            self._warn(board.name, board.show(iteration, values))

    def snapshot(self, iteration: int, values: dict[str, list[float]]) -> None:
        """One line of equilibrium.jsonl: lists with a number for each class; null where it is not finite."""
        if self._writing:
            line = json_text({"iteration": iteration, **values}, separators=(",", ":"))
            self._warn("equilibrium.jsonl", self._classes.write(line + "\n"))

    def line(self, text: str, shown: bool = True) -> None:
        """A line of log.txt, also printed unless `shown` is False. Rank 0 only."""
        if self._writing:
            self._warn("log.txt", self._text.write(text + "\n"))
            if shown and self.shown:
                print_line(text)

    def _warn(self, what: str, problem: str) -> None:
        """Warn of a file that could not be written, once until writing works again."""
        if problem and what not in self._troubled:
            print_line(
                f"WARNING: {problem}. Training goes on; what is to be written is kept until there is room for it"
            )
        self._troubled = self._troubled | {what} if problem else self._troubled - {what}

    def sync(self) -> None:
        """Wait until all lines would survive a crash of the machine, before a checkpoint takes them for granted."""
        for file in self._files if self._writing else ():
            self._warn(Path(file.path).name, file.sync())

    def close(self) -> None:
        """Close bar and files; may be called twice."""
        self._bar.close()
        if self._writing:
            self.line(f"{self._done}/{self._ends[-1]} iterations done, {clock(time.monotonic() - self._started)}")
            for file in self._files:
                self._warn(Path(file.path).name, file.close())
            for board in self._boards:
                board.close()
            self._writing = False


def mean_losses(steps: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each loss over forward passes and ranks, and their sum as `loss`."""
    names = sorted(steps[0])
    totals = torch.stack([torch.stack([losses[name].float() for losses in steps]).mean() for name in names]).double()
    means = (distributed.all_reduce_sum(totals) / distributed.world_size()).tolist()  # sync: log line
    return {"loss": sum(means), **dict(zip(names, means, strict=True))}


def cut_metrics(path: Path, iteration: int) -> None:
    """Drop the lines after `iteration`, and a last line that was never finished.

    So is the line of an evaluation at `iteration` itself, which is written again.
    """
    if not path.exists():
        return
    keep = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            record = json.loads(line)
            evaluated = any(name.startswith("eval/") for name in record)
            if record["iteration"] + evaluated > iteration:
                break
            keep += len(line)
    os.truncate(path, keep)


class Throughput:
    """Expected end of a run, and a warning where it waits for its images; each comes once, as a line for the log.

    start, total: iterations of the whole training, done and to do; remedy: what helps where images come too slowly.
    """

    def __init__(self, start: int, total: int, remedy: str) -> None:
        self.start, self.total, self.remedy = start, total, remedy
        self.said_end = self.warned = False
        self.iterations, self.seconds, self.waited = 0, 0.0, 0.0

    def add(self, before: int, done: int, seconds: float, waited: float) -> list[str]:
        """Take up the iterations `before` to `done`; lines for the log, mostly none."""
        if before < self.start + START_UP:
            return []
        self.iterations, self.seconds = self.iterations + done - before, self.seconds + seconds
        self.waited += waited
        if self.iterations < ENOUGH:
            return []
        lines, left = [], self.seconds / self.iterations * (self.total - done)
        if not self.said_end and done < self.total:
            end, minutes = datetime.fromtimestamp(time.time()) + timedelta(seconds=left), round(left / 60)
            lines.append(
                f"expected end {end:%Y-%m-%d %H:%M}, {minutes // 60}:{minutes % 60:02} h from now, without evaluations"
            )
            self.said_end = True
        share = min(self.waited / max(self.seconds, 1e-9), 1.0)
        if not self.warned and share > MOST_WAITING:
            lines.append(f"WARNING: {share:.0%} of the time is waiting for images. {self.remedy}")
            self.warned = True
        self.iterations, self.seconds, self.waited = 0, 0.0, 0.0  # counted anew: a disk may become slow later
        return lines


def speed_known_at(start: int, total: int, log_every: int) -> int:
    """The iteration whose line is followed by the expected end; 0 where the run is over before."""
    first = -(-(start + START_UP) // log_every) * log_every  # the line that counting begins with
    known = -(-(first + ENOUGH) // log_every) * log_every
    return known if known < total else 0


def more_workers(workers: int, cores: int | None = None, processes: int | None = None) -> str:
    """What helps where data workers are too slow, with so many cores and processes on this machine (None: as it is)."""
    cores, processes = cores or available_cores(), processes or distributed.local_world_size()
    best = max(1, cores // processes)
    if workers < best:
        return f"Set data.workers={best} (now {workers}; {cores} cores for {processes} processes on this machine)"
    return (
        f"data.workers={workers} keeps all {cores} cores busy: put the images on a faster disk, or store them smaller "
        "than the camera's (short side of data.short_edges' largest)"
    )
