"""Checkpoints of other projects: read without running code, renamed by a table, checked against our model."""

import argparse
import codecs
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from loce.checkpoint.load import FORMAT, METHOD_STATE, code_in, require_finite, stats_to_dict, why_unreadable
from loce.config import Config, ModelConfig, UserError, from_dict, raise_problems, to_dict
from loce.models.build import build_model
from loce.utils.classes import ClassStats, frequency_groups
from loce.utils.errors import first_few

Weights = dict[str, Tensor]
MaskPredictor = Literal["auto", "normalised", "linear"]
CLASSIFIER = "roi_heads.classifier.fc_cls"
NO_MASKS = "no mask head in it: a detector of boxes (model.masks=false)"
MEMBERS = ("state_dict", "model", "model_state_dict")  # MMDetection's and Lightning's, torchvision's, the tutorials'
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # in keys, added by torch
COUNTER = "num_batches_tracked"  # the one whole number of a batch norm
AVERAGED = "n_averaged"  # beside the weights in torch.optim.swa_utils.AveragedModel
PLAIN = (  # objects beside weights that hold values and run nothing: the arguments of torchvision's own training
    argparse.Namespace,
    (PosixPath, "pathlib.PosixPath"),
    (PosixPath, "pathlib._local.PosixPath"),  # as Python 3.13 writes it
)
# Everything plain in a file: numbers, text, tensors, containers; models and optimizers as state dicts, others as text.
PLAIN_COPY = (
    "python -c \"import sys, torch; plain = lambda x: plain(x.state_dict()) if hasattr(x, 'state_dict') else x if x is "
    "None or torch.is_tensor(x) or type(x) in (str, int, float, bool) else {str(k): plain(v) for k, v in x.items()} if "
    "isinstance(x, dict) else [plain(v) for v in x] if isinstance(x, (list, tuple)) else str(x); "
    "torch.save(plain(torch.load(sys.argv[1], map_location='cpu', weights_only=False)), sys.argv[2])\""
)


@dataclass(frozen=True)
class Format:
    """How others write a detector. mark: how a key begins that only they have; table: their module -> ours."""

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


def _plain_numpy() -> list[Any]:
    """Arrays and numbers of NumPy: the best score beside weights, or the weights themselves."""
    calls = [np._core.multiarray._reconstruct, np._core.multiarray.scalar]  # type: ignore[attr-defined]
    old = [(call, f"numpy.core.multiarray.{call.__name__}") for call in calls]  # as NumPy 1 writes them
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"]}
    return [*calls, *old, np.ndarray, np.dtype, *kinds, codecs.encode]


def read_foreign(path: Path) -> dict[str, Any]:
    """A file's dictionary, without running code from it; UserError with a way out where that is not possible."""
    if not path.is_file():
        folder = (
            "is a folder; give a file (or to=mmdet for a run of ours)" if path.is_dir() else "there is no such file"
        )
        raise UserError(f"{path}: {folder}")
    try:
        if path.suffix == ".safetensors":  # not every torch reads them
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            with torch.serialization.safe_globals([*PLAIN, *_plain_numpy()]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise UserError(f"{path}: cannot be read here ({error}): pip install safetensors") from None
    except Exception as error:  # torch raises a dozen kinds for damaged files
        code = code_in(error)
        if not code:
            raise UserError(f"{path}: damaged, or not written by torch.save ({why_unreadable(path, error)})") from None
        if code.startswith("__main__."):
            raise UserError(
                f"{path}: holds an object of {code[9:]}, a class of the script that saved it, and is refused: no other "
                "script can read it.\n  Let that script save the weights instead: torch.save(model.state_dict(), FILE)"
            ) from None
        raise UserError(
            f"{path}: cannot be read without running code from it ({code}), so it is refused.\n"
            "  If you trust where it comes from, write what is plain in it, weights and names, into a new file, and "
            f"convert that. Where {code.split('.')[0]} is installed:\n"
            f"  {PLAIN_COPY} {shlex.quote(str(path))} weights_only.pth"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dictionary of weights")
    return content


def find_weights(content: Mapping[str, Any], marks: Sequence[str], path: Path) -> tuple[Weights, list[str]]:
    """The weights of a Mask R-CNN in a file's dictionary, and the names of what is left out.

    They may be all of it or one member, and the model may have been wrapped: see `WRAPPERS`, and any prefix that all
    its keys have. marks: how the keys begin that only a Mask R-CNN has. UserError where there are several models.
    """
    members = dict(_mappings(content))
    models = [name for name, value in members.items() if any(_prefixes(value, mark) for mark in marks)]
    key = next((name for name in MEMBERS if name in (models or members)), models[0] if models else None)
    if len(models) > 1 and key not in MEMBERS:
        raise UserError(f"{path}: there are {len(models)} models in it, {first_few(models)}: save one of them alone")
    wrapped = content if key is None else members[key]
    left_out = [] if key is None else [name for name in content if name != key.partition(".")[0]]

    wrapped = {k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in wrapped.items()}
    strange = [str(k) for k, value in wrapped.items() if not (isinstance(k, str) and isinstance(value, Tensor))]
    if strange:
        verb = "is" if len(strange) == 1 else "are"
        raise UserError(f"{path}: no dictionary of weights; {first_few(strange)} {verb} none")

    weights: Weights = {}
    for name, value in wrapped.items():
        weights[".".join(part for part in name.split(".") if part not in WRAPPERS)] = value
    prefixes = sorted({prefix for mark in marks for prefix in _prefixes(weights, mark)})
    if len(prefixes) > 1 or len(weights) < len(wrapped):
        begin = first_few([prefix or "nothing" for prefix in prefixes])
        raise UserError(
            f"{path}: there are several models in it, whose keys begin with {begin}: save the weights of one alone"
        )
    prefix = prefixes[0] if prefixes else ""
    copies = {f"ema_{name.replace('.', '_')}" for name in weights}  # of MMDetection's averaging, as they were trained
    outside = [name for name in weights if not name.startswith(prefix) or name == AVERAGED or name in copies]
    kept = {name.removeprefix(prefix): value for name, value in weights.items() if name not in outside}
    return kept, left_out + outside


def _mappings(content: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Dictionaries in a dictionary and in those, under the path of their names."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield f"{above}{name}", value
            yield from _mappings(value, f"{above}{name}.")


def _prefixes(weights: Mapping[Any, Any], mark: str) -> set[str]:
    """What stands before `mark` in the keys that have it: {""} in a bare state dict, {"model."} in one of Lightning."""
    places = ((key, f".{key}".find(f".{mark}")) for key in map(str, weights))
    return {key[:place] for key, place in places if place >= 0}


def open_weights(
    path: Path,
    form: Format,
    weights: Weights,
    meta: Any,
) -> Source:
    """Give weights our names; UserError where the table does not know a key."""
    renamed, names, unknown = rename(weights, form.table)
    if unknown:
        raise UserError(f"{path}: not of the architecture that loce has: {first_few(unknown)}")
    whole = [
        f"{key} ({value.dtype})" for key, value in weights.items() if not (value.is_floating_point() or COUNTER in key)
    ]
    odd = [key for key, value in weights.items() if value.is_meta or value.layout != torch.strided]
    if whole or odd:
        raise UserError(
            f"{path}: {len(whole) + len(odd)} tensors hold no floating-point numbers, or are sparse or without "
            f"content: {first_few(whole + odd)}; save the weights as they are for training: dense, in float32"
        )
    require_finite(weights, str(path))
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
    grouped = found.weights.get("backbone.body.layer1.0.conv2.weight", torch.empty(0, 64)).shape[1] == 4
    if backbone == "resnet101" and grouped:
        backbone = "resnext101_64x4d"
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
    mask_head = [key for key in found.weights if key.startswith("roi_heads.mask_head.")]
    if not mask_head:
        return ModelConfig(backbone=backbone, masks=False, **widths)  # type: ignore[arg-type]
    widths["mask_convs"] = len({key.split(".")[3] for key in mask_head if ".convs." in key})
    return ModelConfig(backbone=backbone, mask_predictor=mask_predictor, **widths)  # type: ignore[arg-type]


def new_model(config: ModelConfig, stats: ClassStats, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Weights]:
    """(a checkpoint without weights, the weights of an untrained model, always the same).

    overrides: options of a run, "section.key=value", that no weight shows: sizes of images and anchors, for one.
    """
    whole = from_dict(to_dict(Config(model=config)), "what the weights say", overrides)
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
    raise_problems([f"{found.path}: {what}: {first_few(keys)}" for what, keys in findings.items() if keys])


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
