"""Somebody else's checkpoint: read without running code, renamed by a table, checked against our model."""

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from loce.checkpoint.load import FORMAT, METHOD_STATE, stats_to_dict
from loce.config import Config, ModelConfig, UserError, from_dict, raise_problems, to_dict
from loce.models.build import build_model
from loce.utils.classes import ClassStats, frequency_groups

Weights = dict[str, Tensor]
MaskPredictor = Literal["auto", "normalised", "linear"]
CLASSIFIER = "roi_heads.classifier.fc_cls"
_SHOWN = 5  # keys named of a long list


@dataclass(frozen=True)
class Format:
    """How others write a Mask R-CNN. mark: how a key begins that only they have; table: their module -> ours."""

    name: str
    mark: str
    table: dict[str, str]


@dataclass(frozen=True)
class Source:
    """A file that was read: weights under our names, what each key was called there, and what else the file says."""

    path: Path
    format: Format
    weights: Weights
    names: dict[str, str]
    meta: Mapping[str, Any]

    @property
    def outputs(self) -> int:
        """Outputs of the classifier, background included."""
        if f"{CLASSIFIER}.weight" not in self.weights:
            raise UserError(f"{self.path}: no classifier in it; {original(self.format, CLASSIFIER)}.weight is missing")
        return len(self.weights[f"{CLASSIFIER}.weight"])


def read_foreign(path: Path) -> dict[str, Any]:
    """A file's dictionary, without running code from it; UserError with a way out where that is not possible."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needs = re.search(r"(?:GLOBAL|function|class) (\S+\.\S+)", str(error))
        if not needs:
            raise UserError(f"{path}: damaged, or not written by torch.save") from None
        raise UserError(
            f"{path}: cannot be read without running code from it ({needs[1]}), so it is refused.\n"
            "  If you trust where it comes from, write its weights alone into a new file, and convert that:\n"
            f"  python -c \"import torch; c = torch.load('{path}', map_location='cpu', weights_only=False); "
            "torch.save({'state_dict': c.get('state_dict', c)}, 'weights_only.pth')\""
        ) from None
    except Exception as error:  # torch raises a dozen kinds for damaged files
        raise UserError(f"{path}: damaged, or not written by torch.save ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dictionary of weights")
    return content


def state_dict(content: Mapping[str, Any], path: Path) -> tuple[Weights, list[str]]:
    """The weights in a file's dictionary, bare or under `state_dict` or `model`, and what stands beside them."""
    key = next((k for k in ("state_dict", "model") if isinstance(content.get(k), Mapping)), None)
    wrapped = content if key is None else content[key]
    strange = [
        str(name) for name, value in wrapped.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strange:
        raise UserError(
            f"{path}: no dictionary of weights; {some(strange)} {'is' if len(strange) == 1 else 'are'} none"
        )
    weights = {name.removeprefix("module."): value for name, value in wrapped.items()}
    return weights, [] if key is None else [name for name in content if name != key]


def open_weights(path: Path, form: Format, weights: Weights, meta: Any) -> Source:
    """Give weights our names; UserError where the table does not know a key."""
    renamed, names, unknown = rename(weights, form.table)
    if unknown:
        raise UserError(f"{path}: not of the architecture that loce has: {some(unknown)}")
    return Source(path, form, renamed, names, meta if isinstance(meta, Mapping) else {})


def rename(weights: Weights, table: Mapping[str, str]) -> tuple[Weights, dict[str, str], list[str]]:
    """(weights under new names, new name -> old name, old names that the table does not know)."""
    renamed, names, unknown = {}, {}, []
    for key, value in weights.items():
        dots = [i for i, letter in enumerate(key) if letter == "."]
        module = next((key[:i] for i in reversed(dots) if key[:i] in table), None)
        if module is None:
            unknown.append(key)
        else:
            new = table[module] + key[len(module) :]
            renamed[new], names[new] = value, key
    return renamed, names, unknown


def original(form: Format, key: str) -> str:
    """What they call a key of ours (the newest of their names)."""
    back = {ours: theirs for theirs, ours in reversed(form.table.items())}
    names = rename({f"{key}.": torch.empty(0)}, back)[0]
    return next(iter(names), key).removesuffix(".")


def architecture(found: Source, mask_predictor: str) -> ModelConfig:
    """The options of the model that the weights come from; UserError where it is no ResNet-18, -50 or -101."""
    blocks = {key.split(".")[3] for key in found.weights if key.startswith("backbone.body.layer3.")}
    convs = 3 if "backbone.body.layer3.0.conv3.weight" in found.weights else 2
    backbone = {(2, 2): "resnet18", (6, 3): "resnet50", (23, 3): "resnet101"}.get((len(blocks), convs))
    if backbone is None:
        raise UserError(
            f"{found.path}: its backbone has {len(blocks)} blocks of {convs} convolutions in layer3; loce has "
            "ResNet-18 (2 of 2), ResNet-50 (6 of 3) and ResNet-101 (23 of 3)"
        )
    modules = {
        "fpn_channels": "backbone.fpn.inner_blocks.0.0.bias",
        "fc_features": "roi_heads.box_head.fc1.bias",
        "mask_channels": "roi_heads.mask_head.convs.0.bias",
    }
    widths = {option: len(found.weights[key]) for option, key in modules.items() if key in found.weights}
    mask_convs = {key.split(".")[3] for key in found.weights if key.startswith("roi_heads.mask_head.convs.")}
    widths["mask_convs"] = len(mask_convs)
    return ModelConfig(backbone=backbone, mask_predictor=mask_predictor, **widths)  # type: ignore[arg-type]


def new_model(config: ModelConfig, stats: ClassStats, words: Sequence[str] = ()) -> tuple[dict[str, Any], Weights]:
    """(a checkpoint without weights, the weights of an untrained model, always the same).

    words: options of a run, "section.key=value", that no weight shows: sizes of images and anchors, for one.
    """
    whole = from_dict(to_dict(Config(model=config)), "what the weights say", words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = build_model(whole, stats, pretrained=False).state_dict()
    head = {
        "format": FORMAT,
        "config": to_dict(whole),
        "classes": stats_to_dict(stats),
        "world_size": 1,
        "iteration": 0,
    }
    return head, weights


def check(found: Source, expected: Weights, optional: str = " ") -> None:
    """UserError where keys are missing or too many, or shapes differ from those of `expected`.

    optional: how keys end that may be missing.
    """
    needed = [k for k in expected if not k.endswith(optional) and not k.startswith(tuple(METHOD_STATE))]
    shapes = [
        f"{found.names[key]} {tuple(value.shape)}, expected {tuple(expected[key].shape)}"
        for key, value in found.weights.items()
        if key in expected and value.shape != expected[key].shape
    ]
    findings = {
        "missing": [original(found.format, key) for key in needed if key not in found.weights],
        "not of the architecture that loce has": [found.names[key] for key in found.weights if key not in expected],
        "wrong shape": shapes,
    }
    raise_problems([f"{found.path}: {what}: {some(keys)}" for what, keys in findings.items() if keys])


def bare_stats(names: Sequence[str], category_ids: Sequence[int]) -> ClassStats:
    """Facts of classes of which nothing is counted."""
    zeros = np.zeros(len(names), np.int64)
    return ClassStats(
        names=tuple(names),
        category_ids=np.array(category_ids, np.int64),
        image_counts=zeros,
        instance_counts=zeros,
        groups=frequency_groups(zeros),
        image_total=0,
    )


def some(keys: Sequence[str]) -> str:
    """The first few of a list, and how many it has."""
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
