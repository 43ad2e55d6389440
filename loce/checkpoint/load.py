"""Reading checkpoints: the file meant by a path, its classes, its weights as a start, its model ready to predict.

What is in a checkpoint and how training goes on from one: resume.py. How its files lie on disk: checkpoint_files.py.
All files load with `weights_only=True`: no code in them is ever run.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loce.checkpoint import files
from loce.config import Config, UserError, from_dict
from loce.models.build import build_model
from loce.models.mask_rcnn import MaskRCNN
from loce.utils.classes import ClassStats

FORMAT = 2
READABLE = (1, FORMAT)  # for their weights; what format 1 kept of a run is too little to go on from
MEMORY_PREFIX = "roi_heads.memory."
HEAD_PREFIX = "roi_heads.classifier."
OLD_HEAD_PREFIX = "roi_heads.head."  # of files before the classifier had its name; hashes of weights keep it
METHOD_STATE = (MEMORY_PREFIX, "roi_heads.tracker.")  # belongs to the stage that made it


def memory_state(model: MaskRCNN) -> dict[str, Tensor]:
    """The buffers of the feature memory, which a checkpoint holds packed and apart from the weights."""
    return {k: v for k, v in model.state_dict().items() if k.startswith(MEMORY_PREFIX)}


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
    if problem := files.damage_of(path):
        raise UserError(f"checkpoint {path}: damaged: {problem}; use another checkpoint")
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
    if content["format"] not in READABLE:
        raise UserError(f"checkpoint {path}: format {content['format']}, this loce reads up to format {FORMAT}")
    content["model"] = {name.replace(OLD_HEAD_PREFIX, HEAD_PREFIX): w for name, w in content["model"].items()}
    return content


def stats_of(path: Path) -> ClassStats:
    """The classes of a checkpoint file."""
    return stats_from_dict(read(path)["classes"])


def main_file(path: Path) -> Path:
    """The `main.pt` meant by a run folder, a checkpoint folder or a file. UserError where there is none."""
    if path.is_file():
        return path
    for candidate in (path / "main.pt", *(folder / "main.pt" for folder in files.finished(path))):
        if candidate.is_file():
            return candidate
    raise UserError(f"{path}: no finished checkpoint there (looked for main.pt and checkpoints/*/main.pt)")


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
    source = model.roi_heads.classifier.adopt(source)
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


def load_model(path: str | Path, device: str | torch.device = "cpu", config: Config | None = None) -> MaskRCNN:
    """The model of a checkpoint (file, checkpoint folder or run folder) in evaluation mode, ready to predict.

    `model(list of (3, h, w) uint8 RGB images)` gives a list of {boxes, labels, scores, masks}; `model.class_names`
    names the labels. config: takes the place of the checkpoint's options; UserError where the weights do not fit it.
    """
    file = main_file(Path(path))
    main = read(file)
    model = build_model(config or from_dict(main["config"]), stats_from_dict(main["classes"]), pretrained=False)
    weights = {**memory_state(model), **main["model"]}
    wanted = model.state_dict()
    wrong = [f"{k} is missing" for k in wanted if k not in weights]
    wrong += [f"{k} is left over" for k in weights if k not in wanted]
    wrong += [f"{k} is {tuple(v.shape)}" for k, v in weights.items() if k in wanted and v.shape != wanted[k].shape]
    if wrong:
        raise UserError(
            f"checkpoint {file}: {len(wrong)} weights do not fit the options: {', '.join(wrong[:5])}; "
            "a head can be exchanged at evaluation only for one with the same weights"
        )
    model.load_state_dict(weights)
    return model.to(device).eval()
