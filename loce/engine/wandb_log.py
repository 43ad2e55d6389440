"""The curves and pictures of a run on Weights & Biases, for `train.wandb`: `pip install loce[wandb]`.

Rank 0 only. No network never blocks a run for long, nor ends it: what could not be sent stays in RUN/wandb.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from torch import Tensor

from loce.engine.boards import Shown, tag
from loce.utils.errors import UserError
from loce.utils.files import write_text
from loce.utils.progress import say

LIMITS = {"init_timeout": 30, "login_timeout": 30, "finish_timeout": 60}  # seconds


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


class WandbLog:
    """Shows what `Board` shows. A run that goes on has the same page: its id lies in the run folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.wandb, self.name = require_wandb(), "wandb"
        file = folder / "wandb_id.txt"
        if not file.is_file():
            write_text(file, uuid4().hex[:12] + "\n")
        place: dict[str, Any] = {"name": str(folder), "dir": str(folder), "config": dict(config), "resume": "allow"}
        place |= {"project": os.environ.get("WANDB_PROJECT", "loce"), "id": file.read_text(encoding="utf-8").strip()}
        place["settings"] = self.wandb.Settings(console="off", **LIMITS)
        try:
            self.run = self.wandb.init(**place)
        except Exception as error:  # no network, no key: whatever it is, training does not depend on it
            say(
                f"WARNING: Weights & Biases: {error}. What is logged stays in {folder}/wandb: wandb sync sends it later"
            )
            self.run = self.wandb.init(**place, mode="offline")
        self.run.define_metric("*", step_metric="iteration")

    def show(self, iteration: int, values: Mapping[str, Shown]) -> str:
        """As `Board.show`; texts are left out, since the page has the configuration."""
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
            say(f"WARNING: Weights & Biases: {error}")
