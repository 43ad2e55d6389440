"""TensorBoard and Weights & Biases logs: curves in groups, spread of the classes, pictures, and what was run.

A value's type decides how it is shown: a number is a point of a curve, a tensor (N,) a histogram, an array (H, W, 3) a
picture, a text Markdown. Rank 0 only.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from torch import Tensor

from loce.config import Config, to_dict
from loce.utils.classes import GROUP_NAMES
from loce.utils.errors import UserError
from loce.utils.files import write_text
from loce.utils.progress import print_line

Shown = float | Tensor | np.ndarray | str
TAGS = {
    "loss": "loss/all",
    "lr": "speed/learning_rate",
    "images_per_second": "speed/images_per_second",
    "data_share": "speed/share_of_waiting_for_images",
    "peak_memory_gib": "memory/peak_GiB",
}
GROUPED = ("mean_score", "memory_fill")  # a curve each for rare, common, frequent, and a chart with the three
LIMITS = {"init_timeout": 30, "login_timeout": 30, "finish_timeout": 60}  # seconds that Weights & Biases may take


def open_boards(folder: Path, first: int | None, config: Config) -> list["TensorBoardLog | WandbLog"]:
    """The logs of a run folder, see `TensorBoardLog`; with `train.wandb` on Weights & Biases, too. Close them."""
    boards: list[TensorBoardLog | WandbLog] = [TensorBoardLog(folder / "tensorboard", first)]
    return [*boards, WandbLog(folder, to_dict(config))] if config.train.wandb else boards


def tag(name: str) -> str:
    """The page and the title of a value: loss_mask -> loss/mask, mean_score/r -> mean_score/rare."""
    page, _, rest = name.partition("/")
    if rest:
        return f"{page}/{GROUP_NAMES.get(rest, rest)}"
    return TAGS.get(name, f"loss/{name.removeprefix('loss_')}")


class TensorBoardLog:
    """Writes into `folder`; points of an earlier run from iteration `first` on are dropped (None: none are).

    TensorBoard's writer does not survive a full disk: a new one writes again what was lost.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, first: int | None) -> None:
        self.folder = folder
        self.waiting: list[tuple[int, Mapping[str, Shown]]] = []
        self.writer: Any = self._open(first)

    def _open(self, first: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import, one rank needs it

        writer = SummaryWriter(str(self.folder), purge_step=first)
        charts = {name: ["Multiline", [f"{name}/{group}" for group in GROUP_NAMES.values()]] for name in GROUPED}
        writer.add_custom_scalars({"rare, common, frequent": charts})
        return writer

    def show(self, iteration: int, values: Mapping[str, Shown]) -> str:
        """Show values by name at `iteration`; what the disk said where it did not take them, else "".

        What was not taken is kept for the next call.
        """
        self.waiting.append((iteration, values))
        try:
            if self.writer is None:
                self.writer = self._open(self.waiting[0][0])
            for at, some in self.waiting:
                for name, value in some.items():
                    self._add(tag(name), value, at)
            self.writer.flush()
            self.waiting = []
        except OSError as error:
            self.writer = None
            return f"{self.folder}: {error.strerror}"
        return ""

    def _add(self, title: str, value: Shown, at: int) -> None:
        if isinstance(value, str):
            self.writer.add_text(title, value, at)
        elif isinstance(value, Tensor):
            self.writer.add_histogram(title, value, at)
        elif isinstance(value, np.ndarray):
            self.writer.add_image(title, value, at, dataformats="HWC")
        elif value >= 0 or not title.startswith("eval/"):  # -1: there is nothing to evaluate
            self.writer.add_scalar(title, value, at)

    def close(self) -> None:
        """Everything was flushed before."""
        if self.writer is not None:
            with suppress(OSError):
                self.writer.close()


class WandbLog:
    """Shows on Weights & Biases what `TensorBoardLog` shows. A run that goes on has the same page: its id is on disk.

    No network never blocks a run for long, nor ends it: what could not be sent stays in RUN/wandb.
    """

    name = "wandb"

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.wandb, file = require_wandb(), folder / "wandb_id.txt"
        if not file.is_file():
            write_text(file, uuid4().hex[:12] + "\n")
        options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "loce"),
            "id": file.read_text(encoding="utf-8").strip(),
            "name": str(folder),
            "dir": str(folder),
            "config": dict(config),
            "resume": "allow",
            "settings": self.wandb.Settings(console="off", **LIMITS),
        }
        try:
            self.run = self.wandb.init(**options)
        except Exception as error:  # no network, no key: whatever it is, training does not depend on it
            print_line(
                f"WARNING: Weights & Biases: {error}. What is logged stays in {folder}/wandb: wandb sync sends it later"
            )
            self.run = self.wandb.init(**options, mode="offline")
        self.run.define_metric("*", step_metric="iteration")

    def show(self, iteration: int, values: Mapping[str, Shown]) -> str:
        """As `TensorBoardLog.show`; texts are left out, since the page has the configuration."""
        kinds = {Tensor: lambda x: self.wandb.Histogram(x.numpy()), np.ndarray: self.wandb.Image}
        shown = {tag(name): kinds.get(type(x), float)(x) for name, x in values.items() if not isinstance(x, str)}
        try:
            self.run.log({"iteration": iteration, **shown})
        except Exception as error:
            return f"Weights & Biases: {error}"
        return ""

    def close(self) -> None:
        """Send what is left, for a minute at most."""
        try:
            self.run.finish()
        except Exception as error:
            print_line(f"WARNING: Weights & Biases: {error}")


def require_wandb() -> Any:
    """The package; UserError where it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"train.wandb = true: the package wandb cannot be imported ({error}); install it with "
            "pip install 'loce[wandb]', or set train.wandb=false"
        ) from None
    return wandb
