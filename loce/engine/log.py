"""The run folder: what was run (config.yaml, env.txt) and what happened (log.txt, metrics.jsonl, TensorBoard), and
what became of every class (equilibrium.jsonl)."""

import json
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loce.config import MAY_CHANGE
from loce.engine.boards import Board, Shown
from loce.engine.pace import Pace
from loce.engine.wandb_log import WandbLog
from loce.utils import distributed
from loce.utils.environment import environment
from loce.utils.errors import UserError
from loce.utils.files import PatientFile, json_text, write_text
from loce.utils.progress import bar, clock, eta, peak_memory, say
from loce.utils.yaml_text import differing, dotted, load_yaml, show


class RunLog:
    """Writes the mean losses of every few iterations, and what else is worth knowing. Rank 0 writes; all must call.

    epoch_lengths: iterations of each epoch; start: iterations that are done (0: from the beginning; else the log is cut
    there, so that no line is lost or doubled); batch_size: images of an iteration over all ranks; extra: called when a
    line is written, by every rank; gives more numbers for it ("mean_score/r": 0.02), and tensors (N,) whose spread is
    shown; window: `unwritten` of the run that this one goes on from; cure: what helps where images come too slowly;
    wandb: show everything on Weights & Biases, too. Whoever trains adds to `window` the losses of each forward pass
    (scalars on the device, with the same names on all ranks), to `waited` the seconds that a step waited for its
    images, and moves `bar`, a tqdm bar of images that shows on terminals only.
    """

    def __init__(
        self,
        folder: Path | str,
        config_text: str,
        *,
        epoch_lengths: Sequence[int],
        batch_size: int,
        start: int = 0,
        device: torch.device | str = "cpu",
        extra: Callable[[], Mapping[str, Shown]] | None = None,
        window: dict[str, Tensor] | None = None,
        cure: str = "",
        wandb: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.ends, self.batch_size = list(accumulate(epoch_lengths)), batch_size
        self.iterations = self.ends[-1]
        self.start, self.done, self.extra = start, start, extra
        names, columns = list(window or {}), list((window or {}).values())
        self.window = [dict(zip(names, row, strict=True)) for row in zip(*(c.to(device) for c in columns), strict=True)]
        self.waited, self.pace = 0.0, Pace(start, self.iterations, cure)
        self.writing = distributed.is_main()
        if self.writing:
            self._open(config_text, device, wandb)
        self.bar = bar("training", self.iterations * batch_size, start * batch_size, "images")
        self.started = self.since = time.monotonic()

    def _open(self, config_text: str, device: torch.device | str, wandb: bool) -> None:
        self.troubled: set[str] = set()  # what the disk does not take
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "config.yaml", config_text)
            with (self.folder / "env.txt").open("a", encoding="utf-8") as file:
                file.write(environment(device, distributed.world_size()) + "\n\n")
            for name in ("metrics.jsonl", "equilibrium.jsonl"):
                cut_metrics(self.folder / name, self.start)
            names = ("metrics.jsonl", "equilibrium.jsonl", "log.txt")
            self.metrics, self.classes, self.text = self.files = [PatientFile(self.folder / name) for name in names]
            self.boards = open_boards(self.folder, self.start + 1, config_text if wandb else "")
        except OSError as error:
            raise UserError(
                f"output = {self.folder}: cannot be written ({error}); choose another with output=..."
            ) from error

    def unwritten(self) -> dict[str, Tensor]:
        """The losses since the last line, (passes,) each: in a checkpoint, since no line may depend on when it was."""
        names = self.window[0] if self.window else ()
        return {name: torch.stack([losses[name] for losses in self.window]).cpu() for name in names}  # sync: a save

    def write(self, iteration: int, lr: float) -> dict[str, float]:
        """Write the line of `iteration` (steps done over the whole training); the mean losses, equal on all ranks."""
        means = mean_losses(self.window)
        values: dict[str, Any] = {**means, "lr": lr, **(self.extra() if self.extra else {})}
        seconds = max(time.monotonic() - self.since, 1e-9)
        values["images_per_second"] = (iteration - self.done) * self.batch_size / seconds
        values["data_share"] = min(self.waited / seconds, 1.0)
        values["peak_memory_gib"] = peak_memory()
        self.scalars(iteration, values)
        epoch, step, length = self.place(iteration)
        losses = " ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.bar.set_postfix_str(f"epoch {epoch}/{len(self.ends)} loss {means['loss']:.4g} lr {lr:.3g}")
        self.line(
            f"epoch {epoch}/{len(self.ends)} iter {step}/{length} {losses} lr {lr:.3g} "
            f"{values['images_per_second']:.1f} images/s data {values['data_share']:.0%} "
            f"{values['peak_memory_gib']:.1f} GiB "
            f"eta {eta(self.started, iteration - self.start, self.iterations - iteration)}",
            shown=bool(self.bar.disable),
        )
        for message in self.pace.add(self.done, iteration, seconds, self.waited):
            self.line(message)
        self.window, self.waited = [], 0.0
        self.done, self.since = iteration, time.monotonic()
        return means

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What the block does is no training: neither the speed nor the expected end counts its time."""
        begun = time.monotonic()
        yield
        spent = time.monotonic() - begun
        self.started, self.since = self.started + spent, self.since + spent

    def place(self, iteration: int) -> tuple[int, int, int]:
        """(epoch from 1, iteration within it from 1, the epoch's iterations) of the iteration that was the n-th."""
        epoch = bisect_left(self.ends, iteration)
        first = self.ends[epoch - 1] if epoch else 0
        return epoch + 1, iteration - first, self.ends[epoch] - first

    def scalars(self, iteration: int, values: Mapping[str, Shown]) -> None:
        """The numbers as a line of metrics.jsonl, null where they are not finite, and all as `show`."""
        if not self.writing:
            return
        epoch, step, length = self.place(iteration)
        record: dict[str, Any] = {"iteration": iteration, "epoch": epoch - 1 + step / length}
        record |= {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self._warn("metrics.jsonl", self.metrics.write(json_text(record) + "\n"))
        self.show(iteration, values)

    def show(self, iteration: int, values: Mapping[str, Shown]) -> None:
        """Numbers, tensors, pictures and texts on the pages of TensorBoard. Rank 0 only."""
        if self.writing:
            for board in self.boards:
                self._warn(board.name, board.show(iteration, values))

    def snapshot(self, iteration: int, values: dict[str, list[float]]) -> None:
        """One line of equilibrium.jsonl: lists with a number for each class; null where it is not finite."""
        if self.writing:
            line = json_text({"iteration": iteration, **values}, separators=(",", ":"))
            self._warn("equilibrium.jsonl", self.classes.write(line + "\n"))

    def _warn(self, what: str, problem: str) -> None:
        """Tell what the disk did not take, once until it takes something again."""
        if problem and what not in self.troubled:
            say(f"WARNING: {problem}. Training goes on; what is to be written is kept until there is room for it")
        self.troubled = self.troubled | {what} if problem else self.troubled - {what}

    def sync(self) -> None:
        """Wait until all lines would survive a crash of the machine, before a checkpoint takes them for granted."""
        if self.writing:
            for file in self.files:
                self._warn(Path(file.path).name, file.sync())

    def line(self, text: str, shown: bool = True) -> None:
        """A line of log.txt, also printed unless `shown` is False. Rank 0 only."""
        if not self.writing:
            return
        self._warn("log.txt", self.text.write(text + "\n"))
        if shown:
            say(text)

    def close(self) -> None:
        """Close bar and files; may be called twice."""
        self.bar.close()
        if self.writing:
            self.line(f"{self.done}/{self.iterations} iterations done, {clock(time.monotonic() - self.started)}")
            for file in self.files:
                self._warn(Path(file.path).name, file.close())
            for board in self.boards:
                board.close()
            self.writing = False


def open_boards(folder: Path, first: int | None, wandb_config: str = "") -> list[Board | WandbLog]:
    """The pages of a run folder, see `Board`; with a text of options on Weights & Biases, too. Close them."""
    boards: list[Board | WandbLog] = [Board(folder / "tensorboard", first)]
    if wandb_config:
        boards.append(WandbLog(folder, load_yaml(wandb_config, "config")))
    return boards


def mean_losses(window: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each loss over the passes in `window` and over ranks, and their sum as `loss`."""
    names = sorted(window[0])
    totals = torch.stack([torch.stack([losses[name].float() for losses in window]).mean() for name in names]).double()
    means = (distributed.all_reduce_sum(totals) / distributed.world_size()).tolist()  # sync: log line
    return {"loss": sum(means), **dict(zip(names, means, strict=True))}


def check_run_folder(folder: Path | str, config_text: str, defaults_text: str) -> None:
    """UserError where `folder` holds another run than `config_text` describes, or files that are no run of ours.

    An option that is newer than the run there had its default (`defaults_text`) when that run began.
    """
    folder = Path(folder)
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        taken = [name for name in ("env.txt", "metrics.jsonl", "log.txt", "checkpoints") if (folder / name).exists()]
        if taken or (folder.exists() and not folder.is_dir()):
            raise UserError(
                f"output = {folder}: is no folder of a run (no config.yaml), but holds {', '.join(taken) or 'a file'}; "
                "choose another with output=..."
            )
        return
    there = dotted(load_yaml(defaults_text, "defaults"))
    there |= dotted(load_yaml(config_file.read_text(encoding="utf-8"), str(config_file)))
    here = dotted(load_yaml(config_text, "config"))
    if keys := [key for key in differing(here, there) if key not in MAY_CHANGE]:
        lines = [f"  {key}: {show(there.get(key))} there, {show(here.get(key))} now" for key in keys]
        raise UserError(
            f"output = {folder}: holds another run, which is not overwritten. What differs:\n" + "\n".join(lines) + "\n"
            f"Go on with that run by giving its values, choose another folder with output=..., or delete {folder}."
        )


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
