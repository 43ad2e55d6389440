"""The run folder: what was run (config.yaml, env.txt) and what happened (log.txt, metrics.jsonl, TensorBoard)."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loce import distributed
from loce.environment import environment
from loce.errors import UserError
from loce.files import write_text
from loce.progress import Progress, clock, eta, peak_memory, progress, say
from loce.yaml_text import load_yaml, show

__all__ = ["RunLog", "check_run_folder", "environment", "progress", "say"]
# What may differ when a run goes on: it changes how fast a run goes and what it writes, not what it learns.
MAY_CHANGE = {"data.workers", "eval.batch_size", "train.evaluate"} | {
    f"train.{name}" for name in ("log_every", "checkpoint_every", "keep_checkpoints")
}


class RunLog:
    """Collects the losses of each step and writes them every few iterations. Rank 0 writes; all ranks must call.

    iterations: of the whole training; start: how many are done (0: from the beginning; else the log is cut there, so
    that no line is lost or doubled); epoch_length: iterations; batch_size: images of an iteration over all ranks;
    extra: called when a line is written, by every rank; gives more numbers for it ("mean_score/r": 0.02).
    """

    def __init__(
        self,
        folder: Path | str,
        config_text: str,
        *,
        iterations: int,
        epoch_length: int,
        batch_size: int,
        start: int = 0,
        device: torch.device | str = "cpu",
        extra: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.iterations, self.epoch_length, self.batch_size = iterations, epoch_length, batch_size
        self.start, self.done, self.extra = start, start, extra
        check_run_folder(self.folder, config_text)
        self.writing = distributed.is_main()
        if self.writing:
            self._open(config_text, device)
        images = (iterations * batch_size, start * batch_size)
        self.display = Progress("training", *images, unit="images", lines=False)
        self.started = time.monotonic()
        self._clear()

    def _open(self, config_text: str, device: torch.device | str) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import, one rank needs it

        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.yaml", config_text)
        with (self.folder / "env.txt").open("a", encoding="utf-8") as file:
            file.write(environment(device) + "\n\n")
        cut_metrics(self.folder / "metrics.jsonl", self.start)
        self.metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.text = (self.folder / "log.txt").open("a", encoding="utf-8")
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.start + 1)

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.adds, self.data_seconds, self.since = 0, 0.0, time.monotonic()

    def data_time(self, seconds: float) -> None:
        """Seconds that the step waited for its images."""
        self.data_seconds += seconds

    def add(self, losses: dict[str, Tensor], images: int) -> None:
        """Losses of one forward pass, scalars on the device, and its images on this rank. Does not wait for the device.

        The names must be the same on all ranks.
        """
        for name, value in losses.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.adds += 1
        self.display.advance(images * distributed.world_size())

    def means(self) -> dict[str, float]:
        """Mean of each loss over the steps since the last line and over ranks, and their sum as `loss`."""
        names = sorted(self.sums)
        totals = torch.stack([self.sums[name] for name in names]).double() / max(self.adds, 1)
        means = (distributed.all_reduce_sum(totals) / distributed.world_size()).tolist()  # sync: log line
        return {"loss": sum(means), **dict(zip(names, means, strict=True))}

    def flush(self, iteration: int, lr: float) -> dict[str, float]:
        """Write the line of `iteration` (steps done over the whole training); the mean losses, equal on all ranks."""
        means = self.means()
        values = {**means, "lr": lr, **(self.extra() if self.extra else {})}
        seconds = max(time.monotonic() - self.since, 1e-9)
        values["images_per_second"] = (iteration - self.done) * self.batch_size / seconds
        values["data_share"] = min(self.data_seconds / seconds, 1.0)
        values["peak_memory_gib"] = peak_memory()
        self.scalars(iteration, values)
        epoch = (iteration - 1) // self.epoch_length + 1
        epochs = math.ceil(self.iterations / self.epoch_length)
        losses = " ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.display.note(f"epoch {epoch}/{epochs} loss {means['loss']:.4g} lr {lr:.3g}")
        self.line(
            f"epoch {epoch}/{epochs} iter {iteration - (epoch - 1) * self.epoch_length}/{self.epoch_length} {losses} "
            f"lr {lr:.3g} {values['images_per_second']:.1f} images/s data {values['data_share']:.0%} "
            f"{values['peak_memory_gib']:.1f} GiB "
            f"eta {eta(self.started, iteration - self.start, self.iterations - iteration)}",
            shown=self.display.bar is None,
        )
        self.done = iteration
        self._clear()
        return means

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and TensorBoard points. JSON has no infinity and no NaN: they become null."""
        if not self.writing:
            return
        record: dict[str, Any] = {"iteration": iteration, "epoch": iteration / self.epoch_length}
        record |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.metrics.write(json.dumps(record, allow_nan=False) + "\n")
        self.metrics.flush()
        for name, value in values.items():
            tag = name if "/" in name else f"train/{name}"
            self.board.add_scalar(tag, value, iteration)

    def line(self, text: str, shown: bool = True) -> None:
        """A line of log.txt, also printed unless `shown` is False. Rank 0 only."""
        if not self.writing:
            return
        self.text.write(text + "\n")
        self.text.flush()
        if shown:
            say(text)

    def close(self) -> None:
        """Close bar and files; may be called twice."""
        self.display.close()
        if self.writing:
            self.line(f"{self.done}/{self.iterations} iterations done, {clock(time.monotonic() - self.started)}")
            for file in (self.metrics, self.text, self.board):
                file.close()
            self.writing = False


def check_run_folder(folder: Path | str, config_text: str) -> None:
    """UserError where `folder` holds another run than `config_text` describes, or files that are no run of ours."""
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
    there = _flat(load_yaml(config_file.read_text(encoding="utf-8"), str(config_file)))
    here = _flat(load_yaml(config_text, "config"))
    keys = [key for key in {**here, **there} if key not in MAY_CHANGE and here.get(key) != there.get(key)]
    if keys:
        lines = [f"  {key}: {show(there.get(key))} there, {show(here.get(key))} now" for key in keys]
        raise UserError(
            f"output = {folder}: holds another run, which is not overwritten. What differs:\n" + "\n".join(lines) + "\n"
            f"Go on with that run by giving its values, choose another folder with output=..., or delete {folder}."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def cut_metrics(path: Path, iteration: int) -> None:
    """Drop the lines after `iteration`, and a last line that was never finished."""
    if not path.exists():
        return
    keep = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["iteration"] > iteration:
                break
            keep += len(line)
    os.truncate(path, keep)
