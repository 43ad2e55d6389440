"""TensorBoard pages of a run: curves in groups, spread of the classes, pictures, and what was run.

A value's type decides how it is shown: a number is a point of a curve, a tensor (N,) a histogram, an array (H, W, 3) a
picture, a text Markdown.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from loce.utils.classes import GROUP_NAMES

Shown = float | Tensor | np.ndarray | str
PLACES = {
    "loss": "loss/all",
    "lr": "speed/learning_rate",
    "images_per_second": "speed/images_per_second",
    "data_share": "speed/share_of_waiting_for_images",
    "peak_memory_gib": "memory/peak_GiB",
}
GROUPED = ("mean_score", "memory_fill")  # a curve each for rare, common, frequent, and a chart with the three


def tag(name: str) -> str:
    """The page and the title of a value: loss_mask -> loss/mask, mean_score/r -> mean_score/rare."""
    page, _, rest = name.partition("/")
    if rest:
        return f"{page}/{GROUP_NAMES.get(rest, rest)}"
    return PLACES.get(name, f"loss/{name.removeprefix('loss_')}")


class Board:
    """Writes into `folder`; points that are there already lose their place from iteration `first` on (None: none do).

    TensorBoard's writer does not survive a full disk: a new one shows again what has got lost.
    """

    def __init__(self, folder: Path, first: int | None) -> None:
        self.folder, self.name = folder, "tensorboard"
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
                    _add(self.writer, tag(name), value, at)
            self.writer.flush()
            self.waiting = []
        except OSError as error:
            self.writer = None
            return f"{self.folder}: {error.strerror}"
        return ""

    def close(self) -> None:
        """Everything was flushed before."""
        if self.writer is not None:
            with suppress(OSError):
                self.writer.close()


def _add(writer: Any, title: str, value: Shown, at: int) -> None:
    if isinstance(value, str):
        writer.add_text(title, value, at)
    elif isinstance(value, Tensor):
        writer.add_histogram(title, value, at)
    elif isinstance(value, np.ndarray):
        writer.add_image(title, value, at, dataformats="HWC")
    elif value >= 0 or not title.startswith("eval/"):  # -1: there is nothing to evaluate
        writer.add_scalar(title, value, at)
