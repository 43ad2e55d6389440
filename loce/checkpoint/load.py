"""Checkpoints read from disk: options, classes and weights of a trained detector, and the detector built from them.

What else a checkpoint holds of a run, and how training goes on from it: save.py. How its files lie on disk: files.py.
All files load with `weights_only=True`: no code in them is ever run.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loce.checkpoint.files import FROZEN, MAIN, damage_of, finished
from loce.config import Config, UserError, from_dict
from loce.models.build import build_model
from loce.models.mask_rcnn import MaskRCNN
from loce.utils.classes import ClassStats
from loce.utils.errors import first_few
from loce.utils.files import kind_of

FORMAT = 3
GOES_ON = (2, FORMAT)  # format 2 has the feature memory in main.pt or rank<r>.pt, and no frozen.pt
READABLE = (1, *GOES_ON)  # for their weights; what format 1 kept of a run is too little to go on from
MEMORY_PREFIX = "roi_heads.memory.bank."  # what it holds
RATES_PREFIX = "roi_heads.memory.rates."  # how it draws, where that is learned
HEAD_PREFIX = "roi_heads.classifier."
OLD_HEAD_PREFIX = "roi_heads.head."  # of files before the classifier had its name; hashes of weights keep it
METHOD_STATE = {
    MEMORY_PREFIX: "feature memory",
    RATES_PREFIX: "sampling rates",
    "roi_heads.tracker.": "mean score",
}  # belongs to the stage that made it
CONVERTED = "  A checkpoint of MMDetection or torchvision is converted by scripts/convert.py SOURCE.pth OUT.pt."


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of ours in memory. Its file is read and checked once, by `open`, whatever is taken from it then.

    path: the file; options: of its run, nested; classes: of its training data; model: the weights on the host (a state
    dict without the feature memory); state: all the rest of the file, what resuming needs (see save.py), the moving
    averages of the weights included, which are what is evaluated, converted and started from (`train.ema`).
    """

    path: Path
    options: dict[str, Any]
    classes: ClassStats
    model: dict[str, Tensor]
    state: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path, checked: bool = False) -> "Checkpoint":
        """The checkpoint meant by a run folder (its newest), a checkpoint folder or a file.

        checked: its checksum was compared just now. UserError where there is none, where it is damaged, not of ours or
        of a version of loce that this one does not know, and where weights are not finite.
        """
        file = main_file(Path(path))
        content = load_file(file, checked)
        missing = [key for key in ("format", "config", "classes", "model") if key not in content]
        if missing:
            raise UserError(f"checkpoint {file}: not written by loce (it has no {', '.join(missing)}).\n{CONVERTED}")
        if content["format"] not in READABLE:
            raise UserError(f"checkpoint {file}: format {content['format']}, this loce reads up to format {FORMAT}")
        weights = content.pop("model")
        if content.get("frozen"):
            frozen = file.with_name(FROZEN)
            if not frozen.is_file():
                raise UserError(
                    f"checkpoint {file}: its weights that did not train are in {FROZEN}, which does not lie beside it "
                    "any more: copy this, too, or take the last checkpoint of the run, whose main.pt is whole"
                )
            weights |= load_file(frozen, checked)["model"]
        weights = {name.replace(OLD_HEAD_PREFIX, HEAD_PREFIX): w for name, w in weights.items()}
        require_finite({**weights, **content.get("ema", {})}, f"checkpoint {file}")
        classes = stats_from_dict(content.pop("classes"))
        return cls(file, content.pop("config"), classes, weights, content)

    @cached_property
    def config(self) -> Config:
        """The options of its run."""
        return self.config_with()

    def config_with(self, overrides: Sequence[str] = ()) -> Config:
        """The options of its run with others in their place, each "section.key=value"."""
        return from_dict(self.options, str(self.path), overrides)

    @property
    def averages(self) -> dict[str, Tensor]:
        """The moving averages of the weights; {} of a run without."""
        found: dict[str, Tensor] = self.state.get("ema", {})
        return found

    @property
    def weights(self) -> dict[str, Tensor]:
        """`model`, with the averages where there are some."""
        return {**self.model, **self.averages}

    @property
    def iterations(self) -> str:
        """How many iterations of its run were done: "500", or "500 of 1000" in files that say so."""
        done, share = self.state.get("iteration", 0), self.state.get("progress")
        return f"{done} of {round(done / share)}" if share else f"{done}"

    @property
    def unfinished(self) -> bool:
        """Whether its run had more iterations to come; older files do not say, and count as finished."""
        return bool(self.state.get("progress", 1.0) < 1)

    def detector(self, config: Config | None = None) -> MaskRCNN:
        """The model on the host, by the options of its run or by `config`; UserError where the weights do not fit."""
        config = config or self.config
        if config.train.ema not in (0, self.config.train.ema):
            raise UserError(
                f"checkpoint {self.path}: train.ema = {config.train.ema:g}: its weights were averaged with "
                f"{self.config.train.ema:g} in training; 0 takes those of the last step"
            )
        model = build_model(config, self.classes, pretrained=False)
        weights = self.weights if config.train.ema else self.model
        weights = {k: v for k, v in weights.items() if not k.startswith(RATES_PREFIX)}  # a detector draws nothing
        weights = {**memory_state(model), **weights}
        expected = model.state_dict()
        wrong = [f"{k} is missing" for k in expected if k not in weights]
        wrong += [f"{k} is left over" for k in weights if k not in expected]
        wrong += [
            f"{k} is {tuple(v.shape)}" for k, v in weights.items() if k in expected and v.shape != expected[k].shape
        ]
        if wrong:
            raise UserError(
                f"checkpoint {self.path}: {len(wrong)} weights do not fit the options: {first_few(wrong)}; "
                "a head can be exchanged at evaluation only for one with the same weights"
            )
        model.load_state_dict(weights)
        return model


def load_model(path: str | Path, device: str | torch.device = "cpu", config: Config | None = None) -> MaskRCNN:
    """The model of a checkpoint (file, checkpoint folder or run folder) in evaluation mode, ready to predict.

    `model(list of (3, h, w) uint8 RGB images)` gives a list of {boxes, labels, scores, masks}; `model.class_names`
    names the labels. config: takes the place of the checkpoint's options; UserError where the weights do not fit it.
    """
    return Checkpoint.open(path).detector(config).to(device).only_predict()


def main_file(path: Path) -> Path:
    """The `main.pt` meant by a run folder, a checkpoint folder or a file. UserError where there is none."""
    if path.is_file():
        return path
    for candidate in (path / MAIN, *(folder / MAIN for folder in finished(path))):
        if candidate.is_file():
            return candidate
    raise UserError(f"{path}: no finished checkpoint there (looked for main.pt and checkpoints/*/main.pt)")


def load_file(path: Path, checked: bool = False) -> dict[str, Any]:
    """The dictionary in a file. UserError where the file is missing, damaged, or needs code to be run.

    checked: its checksum was compared just now.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path}: there is no such file")
    if not checked and (problem := damage_of(path)):
        raise UserError(f"checkpoint {path}: damaged: {problem}; use another checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds here
        code = code_in(error)
        reason = f"it needs {code}, which may run code" if code else why_unreadable(path, error)
        raise UserError(
            f"checkpoint {path}: cannot be read, damaged or not a checkpoint ({reason})"
            + (f".\n{CONVERTED}" if code else "")
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def why_unreadable(path: Path, error: Exception) -> str:
    """Why torch.load does not take a file, without its advice to let the file run code."""
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    return kind_of(path) or reason or type(error).__name__


def code_in(error: Exception) -> str:
    """What torch.load(weights_only=True) refused to call, such as "argparse.Namespace"; "" for other errors."""
    if "TorchScript" in str(error):
        return "torch.jit"
    found = (
        re.search(r"(?:GLOBAL|function|class) (\w[\w.]*\.\w+)", str(error))
        if isinstance(error, UnpicklingError)
        else None
    )
    return found[1] if found else ""


def require_finite(weights: Mapping[str, Tensor], owner: str) -> None:
    """UserError that begins with `owner` where a weight is nan or infinite."""
    bad = [name for name, weight in weights.items() if weight.is_floating_point() and not weight.isfinite().all()]
    if bad:
        raise UserError(
            f"{owner}: {len(bad)} of {len(weights)} tensors have values that are not finite (nan, inf): "
            f"{first_few(bad)}; its training diverged, so use a checkpoint from before that"
        )


def load_weights(
    start: Checkpoint,
    model: MaskRCNN,
    stats: ClassStats,
    reset_head: bool = False,
) -> dict[str, list[str]]:
    """Start from another run's weights: the names of parameters that were loaded, are new, and were dropped.

    reset_head: take over nothing of the classification head. The feature memory and the mean score are never taken
    over: they belong to the stage that made them. UserError where classes or shapes differ.
    """
    names = start.classes.names
    if len(names) != len(stats):
        raise UserError(
            f"checkpoint {start.path} has {len(names)} classes, the training data has {len(stats)}.\n"
            "  Give train.init=... a checkpoint that was trained on these classes, or train stage 1 on this data first "
            f"(its data.drop_empty was {str(start.config.data.drop_empty).lower()})."
        )
    if names != stats.names:
        pairs = zip(names, stats.names, strict=True)
        first = next((i, a, b) for i, (a, b) in enumerate(pairs) if a != b)
        raise UserError(
            f"checkpoint {start.path}: its classes are not those of the training data; the first that differs is class "
            f"{first[0]}: {first[1]!r} in the checkpoint, {first[2]!r} in the data"
        )
    left_out = (*METHOD_STATE, HEAD_PREFIX) if reset_head else tuple(METHOD_STATE)
    source = {k: v for k, v in start.weights.items() if not k.startswith(left_out)}
    source = model.roi_heads.classifier.adopt(source)
    target = model.state_dict()
    wrong = [k for k, v in source.items() if k in target and target[k].shape != v.shape]
    if wrong:
        shapes = first_few(f"{k} {tuple(source[k].shape)} against {tuple(target[k].shape)}" for k in wrong)
        hint = (
            "\n  head.reset=true starts the classifier anew." if all(k.startswith(HEAD_PREFIX) for k in wrong) else ""
        )
        raise UserError(f"checkpoint {start.path}: another architecture; {len(wrong)} shapes differ: {shapes}{hint}")
    model.load_state_dict(source, strict=False)
    return {
        "loaded": [k for k in source if k in target],
        "new": [k for k in target if k not in source and not k.startswith(tuple(METHOD_STATE))],
        "dropped": [k for k in source if k not in target],
    }


def weights_hash(model: MaskRCNN) -> str:
    """First 12 digits of the SHA-256 of the weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not name.startswith(tuple(METHOD_STATE)):
            name = name.replace(HEAD_PREFIX, OLD_HEAD_PREFIX)
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def memory_of(main: Checkpoint, rank: int, checked: bool = False) -> dict[str, Tensor]:
    """The packed feature memory (memory.py) of a rank in a checkpoint folder, of rank 0 where it is shared; {}: none.

    checked: as in `load_file`.
    """
    if main.state["format"] == FORMAT:
        file = main.path.with_name(f"memory{rank}.pt")
        return load_file(file, checked) if file.is_file() else {}
    own = load_file(main.path.with_name(f"rank{rank}.pt"), checked)
    return own.get("memory") or main.state.get("memory", {})


def memory_state(model: MaskRCNN) -> dict[str, Tensor]:
    """The buffers of the feature memory; what it holds is packed in a checkpoint, and apart from the weights."""
    return {k: v for k, v in model.state_dict().items() if k.startswith((MEMORY_PREFIX, RATES_PREFIX))}


def stats_to_dict(stats: ClassStats) -> dict[str, Any]:
    """Plain lists and numbers, for a checkpoint."""
    plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(stats).items()}
    return {**plain, "names": list(stats.names)}


def stats_from_dict(values: dict[str, Any]) -> ClassStats:
    """Inverse of `stats_to_dict`."""
    return ClassStats(
        names=tuple(values["names"]),
        category_ids=np.array(values["category_ids"], np.int64),
        image_counts=np.array(values["image_counts"], np.int64),
        instance_counts=np.array(values["instance_counts"], np.int64),
        groups=np.array(values["groups"], "<U1"),
        image_total=values["image_total"],
        file_images=values.get("file_images", 0),  # unknown to files of before
    )
