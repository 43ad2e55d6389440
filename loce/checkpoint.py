"""Checkpoints: everything that training depends on, written so that a kill at any moment loses nothing.

A checkpoint is a folder `checkpoints/000001500/` with `main.pt` (model, optimiser, position, config, classes) and one
`rank<r>.pt` per process (random state and, unless shared, the feature memory). `main.pt` is written last: a folder
without it is unfinished and is ignored. All files load with `weights_only=True`.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loce import distributed
from loce.build import build_model
from loce.classes import ClassStats
from loce.config import Config, EvalConfig, UserError, from_dict, to_dict
from loce.files import atomic_write
from loce.models.mask_rcnn import MaskRCNN

FORMAT = 1
MEMORY_PREFIX = "roi_heads.memory."
HEAD_PREFIX = "roi_heads.head."
METHOD_STATE = (MEMORY_PREFIX, "roi_heads.tracker.")  # belongs to the stage that made it


def stats_to_dict(stats: ClassStats) -> dict[str, Any]:
    """Plain lists and numbers, for a checkpoint."""
    return {
        "names": list(stats.names),
        "category_ids": stats.category_ids.tolist(),
        "image_counts": stats.image_counts.tolist(),
        "instance_counts": stats.instance_counts.tolist(),
        "groups": stats.groups.tolist(),
        "image_total": stats.image_total,
    }


def stats_from_dict(values: dict[str, Any]) -> ClassStats:
    """Inverse of `stats_to_dict`."""
    return ClassStats(
        names=tuple(values["names"]),
        category_ids=np.array(values["category_ids"], np.int64),
        image_counts=np.array(values["image_counts"], np.int64),
        instance_counts=np.array(values["instance_counts"], np.int64),
        groups=np.array(values["groups"], "<U1"),
        image_total=values["image_total"],
    )


def load_file(path: Path) -> dict[str, Any]:
    """The dictionary in a file. UserError where the file is missing, damaged, or needs code to be run."""
    if not path.is_file():
        raise UserError(f"checkpoint {path}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds here
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"checkpoint {path}: cannot be read, damaged or not a checkpoint ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def read(path: Path) -> dict[str, Any]:
    """A `main.pt`. UserError where it is none of ours, or of a version of loce that this one does not know."""
    content = load_file(path)
    missing = [key for key in ("format", "config", "classes", "model") if key not in content]
    if missing:
        raise UserError(
            f"checkpoint {path}: not written by loce (it has no {', '.join(missing)}).\n"
            "  A checkpoint of MMDetection or torchvision is converted by scripts/convert.py SOURCE.pth OUT.pt."
        )
    if content["format"] != FORMAT:
        raise UserError(f"checkpoint {path}: format {content['format']}, this loce reads format {FORMAT}")
    return content


def stats_of(path: Path) -> ClassStats:
    """The classes of a checkpoint file."""
    return stats_from_dict(read(path)["classes"])


def main_file(path: Path) -> Path:
    """The `main.pt` meant by a run folder, a checkpoint folder or a file. UserError where there is none."""
    if path.is_file():
        return path
    for candidate in (path / "main.pt", *(folder / "main.pt" for folder in finished(path))):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"{path}: no finished checkpoint there (looked for main.pt and checkpoints/*/main.pt).\n"
        "  Stage 2 starts from stage 1: scripts/train.py stage1.yaml makes runs/stage1."
    )


def finished(run: Path) -> list[Path]:
    """Finished checkpoint folders of a run, newest first."""
    folders = [f for f in (run / "checkpoints").glob("[0-9]*") if (f / "main.pt").is_file()]
    return sorted(folders, key=lambda f: int(f.name), reverse=True)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The random state of this process, on the host and on its device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Inverse of `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def save(
    run: Path, config: Config, stats: ClassStats, model: nn.Module, state: dict[str, Any], device: torch.device
) -> Path:
    """Write a checkpoint at `state["iteration"]`; every rank must call. Then delete what is older than the last few.

    state: what else training depends on (optimiser, scaler, position), plain containers and tensors.
    """
    folder = run / "checkpoints" / f"{state['iteration']:09d}"
    weights = model.state_dict()
    own = {} if config.memory.shared else {k: v for k, v in weights.items() if k.startswith(MEMORY_PREFIX)}
    _write(folder / f"rank{distributed.rank()}.pt", {"rng": rng_state(device), "memory": own})
    distributed.barrier()
    if distributed.is_main():
        main = {
            "format": FORMAT,
            "config": to_dict(config),
            "classes": stats_to_dict(stats),
            "world_size": distributed.world_size(),
            "model": {k: v for k, v in weights.items() if k not in own},
            **state,
        }
        _write(folder / "main.pt", main)
        _tidy(run, folder, config.train.keep_checkpoints)
    distributed.barrier()
    return folder


def _tidy(run: Path, newest: Path, keep: int) -> None:
    """Delete all but the newest `keep` finished checkpoints, and older ones that were never finished."""
    kept = finished(run)[:keep]
    for folder in (run / "checkpoints").glob("[0-9]*"):
        if folder not in kept and int(folder.name) < int(newest.name):
            (folder / "main.pt").unlink(missing_ok=True)  # first: a half-deleted folder is an unfinished one
            shutil.rmtree(folder)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def restore(folder: Path, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Load model, memory and random state of this rank; returns what `save` was given as `state`, and the rest.

    UserError where the number of ranks differs: per-rank memories and random states could not be dealt out.
    """
    main = read(folder / "main.pt")
    if main["world_size"] != distributed.world_size():
        raise UserError(
            f"{folder} was written by {main['world_size']} processes, this run has {distributed.world_size()}.\n"
            f"  Resume with --nproc_per_node={main['world_size']}, or start anew with another output=..."
        )
    own = load_file(folder / f"rank{distributed.rank()}.pt")
    model.load_state_dict({**main["model"], **own["memory"]})
    set_rng_state(own["rng"], device)
    return main


def load_weights(path: Path, model: MaskRCNN, stats: ClassStats, reset_head: bool = False) -> dict[str, list[str]]:
    """Start from another run's weights: the names of parameters that were loaded, are new, and were dropped.

    reset_head: take over nothing of the classification head. The feature memory and the mean score are never taken
    over: they belong to the stage that made them. UserError where classes or shapes differ.
    """
    file = main_file(path)
    main = read(file)
    names = main["classes"]["names"]
    if len(names) != len(stats):
        raise UserError(
            f"checkpoint {file} has {len(names)} classes, the training data has {len(stats)}.\n"
            "  Give train.init=... a checkpoint that was trained on these classes, or train stage 1 on this data first."
        )
    if tuple(names) != stats.names:
        pairs = zip(names, stats.names, strict=True)
        first = next((i, a, b) for i, (a, b) in enumerate(pairs) if a != b)
        raise UserError(
            f"checkpoint {file}: its classes are not those of the training data; the first that differs is class "
            f"{first[0]}: {first[1]!r} in the checkpoint, {first[2]!r} in the data"
        )
    left_out = (*METHOD_STATE, HEAD_PREFIX) if reset_head else METHOD_STATE
    source = {k: v for k, v in main["model"].items() if not k.startswith(left_out)}
    source = model.roi_heads.head.adopt(source)
    target = model.state_dict()
    wrong = [k for k, v in source.items() if k in target and target[k].shape != v.shape]
    if wrong:
        shapes = ", ".join(f"{k} {tuple(source[k].shape)} against {tuple(target[k].shape)}" for k in wrong[:5])
        hint = (
            "\n  head.reset=true starts the classifier anew." if all(k.startswith(HEAD_PREFIX) for k in wrong) else ""
        )
        raise UserError(f"checkpoint {file}: another architecture; {len(wrong)} shapes differ: {shapes}{hint}")
    model.load_state_dict(source, strict=False)
    return {
        "loaded": [k for k in source if k in target],
        "new": [k for k in target if k not in source and not k.startswith(METHOD_STATE)],
        "dropped": [k for k in source if k not in target],
    }


def load_model(path: str | Path, device: str | torch.device = "cpu", evaluation: EvalConfig | None = None) -> MaskRCNN:
    """The model of a checkpoint (file, checkpoint folder or run folder) in evaluation mode, ready to predict.

    `model(list of (3, h, w) uint8 RGB images)` gives a list of {boxes, labels, scores, masks}; `model.class_names`
    names the labels. evaluation: takes the place of the checkpoint's thresholds.
    """
    main = read(main_file(Path(path)))
    stats = stats_from_dict(main["classes"])
    config = from_dict(main["config"])
    config = dataclasses.replace(config, eval=evaluation or config.eval)
    model = build_model(config, stats, pretrained=False)
    memory = {k: v for k, v in model.state_dict().items() if k.startswith(MEMORY_PREFIX)}
    model.load_state_dict({**memory, **main["model"]})
    return model.to(device).eval()
