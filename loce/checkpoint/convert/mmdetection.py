"""MMDetection's Mask and Faster R-CNN (2.x, 3.x, LOCE's), both ways. Its conventions are ours: only names change."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loce.checkpoint.convert.source import (
    NO_MASKS,
    Format,
    MaskPredictor,
    Source,
    architecture,
    bare_stats,
    check,
    new_model,
    rename,
)
from loce.checkpoint.load import METHOD_STATE, Checkpoint
from loce.config import UserError
from loce.utils.classes import ClassStats
from loce.utils.errors import first_few

FORMAT = Format(
    name="MMDetection",
    mark="roi_head.",
    table={  # what follows (weight, bias, layer1.0.conv1.weight, ...) keeps its name; nothing is dropped
        "backbone": "backbone.body",
        **{f"neck.lateral_convs.{level}.conv": f"backbone.fpn.inner_blocks.{level}.0" for level in range(4)},
        **{f"neck.fpn_convs.{level}.conv": f"backbone.fpn.layer_blocks.{level}.0" for level in range(4)},
        "rpn_head.rpn_conv": "rpn.head.conv.0.0",
        "rpn_head.rpn_cls": "rpn.head.cls_logits",
        "rpn_head.rpn_reg": "rpn.head.bbox_pred",
        "roi_head.bbox_head.shared_fcs.0": "roi_heads.box_head.fc1",
        "roi_head.bbox_head.shared_fcs.1": "roi_heads.box_head.fc2",
        "roi_head.bbox_head.fc_cls": "roi_heads.classifier.fc_cls",
        "roi_head.bbox_head.fc_reg": "roi_heads.fc_reg",
        **{f"roi_head.mask_head.convs.{n}.conv": f"roi_heads.mask_head.convs.{n}" for n in range(4)},
        "roi_head.mask_head.upsample": "roi_heads.mask_head.upsample",
        "roi_head.mask_head.conv_logits": "roi_heads.mask_head.predictor",
    },
)


def convert(
    found: Source,
    stats: ClassStats | None,
    source_classes: str,
    mask_predictor: MaskPredictor,
    overrides: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """See `loce.checkpoint.convert.convert`."""
    if source_classes:
        raise UserError("source_classes is for torchvision's files: MMDetection's classes stay as they are")
    count = found.outputs - 1
    report = [f"{found.path}: MMDetection, {count} classes, {len(found.weights)} tensors, all of them used"]
    names = _class_names(found.meta)
    if names and len(names) != count:
        report.append(f"class names: the file names {len(names)} of its {count} classes, so none are used")
        names = []
    if stats is None:
        report.append(f"class names: {'as in the file' if names else 'placeholders'}, category ids 1 to {count}")
        report.append(
            "  evaluation and training want the data set's own names and ids: convert with annotations=A.json"
        )
        stats = bare_stats(names or [f"class {label}" for label in range(count)], range(1, count + 1))
    elif len(stats) != count:
        raise UserError(
            f"{found.path} has {count} classes ({count + 1} outputs of fc_cls), the annotations {len(stats)}"
        )
    elif names:
        report += _compare_names(found.path, names, stats.names)
    reason = ""
    if mask_predictor == "auto":
        mask_predictor, reason = _guess_predictor(found.meta)
    options = architecture(found, mask_predictor)
    if reason or not options.masks:
        report.append(f"mask predictor: {mask_predictor}, {reason}" if options.masks else NO_MASKS)
    head, model = new_model(options, stats, overrides)
    check(found, model)
    return {**head, "model": model | found.weights}, report


def _class_names(meta: Mapping[str, Any]) -> list[str]:
    """The names that a file gives: in 2.x meta.CLASSES, in 3.x meta.dataset_meta.classes (or CLASSES); [] for none."""
    places = [place for place in (meta, meta.get("dataset_meta")) if isinstance(place, Mapping)]
    found = next((place[key] for place in places for key in ("CLASSES", "classes") if place.get(key)), ())
    return [found] if isinstance(found, str) else [str(name) for name in found]


def _compare_names(path: Path, names: Sequence[str], target: Sequence[str]) -> list[str]:
    """A note where names differ; UserError where a name is found at another place."""
    differ = [label for label, (a, b) in enumerate(zip(names, target, strict=True)) if a != b]
    moved = next((label for label in differ if names[label] in target), None)
    if moved is not None:
        raise UserError(
            f"{path}: the annotations have its classes in another order: {names[moved]!r} is class {moved} in the "
            f"checkpoint and class {target.index(names[moved])} in the annotations"
        )
    pairs = [f"{names[label]} -> {target[label]}" for label in differ]
    return [f"{len(pairs)} class names are written differently in the annotations: {first_few(pairs)}"] if pairs else []


def _guess_predictor(meta: Mapping[str, Any]) -> tuple[MaskPredictor, str]:
    """The mask predictor is not seen from the weights: normalised and linear ones have the same names and shapes."""
    config = str(meta.get("config") or meta.get("cfg") or "")  # 2.x, 3.x
    if re.search(r"norm(ed|alized)?_?(mask|conv|predictor)", config, re.IGNORECASE):
        return "normalised", "as the configuration in the file says"
    if config:
        return "linear", "as the configuration in the file says"
    return "normalised", "as in LOCE; the file does not say (mask_predictor=linear for a plain Mask R-CNN)"


def to_mmdetection(source: Path) -> tuple[dict[str, Any], list[str]]:
    """(what MMDetection's `load_checkpoint` reads, lines of a report) from a checkpoint of ours: file or run folder."""
    checkpoint = Checkpoint.open(source)
    path, options = checkpoint.path, checkpoint.options["model"]
    if not options["backbone"].startswith("resnet") or options["norm"] == "group":
        raise UserError(
            f"{path}: model.backbone={options['backbone']} with model.norm={options['norm']} has no counterpart in "
            "MMDetection; only ResNet-50 and -101 with batch norm have"
        )
    weights, _, unknown = rename(checkpoint.weights, {ours: theirs for theirs, ours in FORMAT.table.items()})
    left = [key for key in unknown if not key.startswith(tuple(METHOD_STATE))]
    if left:
        raise UserError(f"{path}: MMDetection's Mask R-CNN has no place for {first_few(left)}")
    report = [f"{path}: {len(weights)} tensors written"]
    for prefix, what in METHOD_STATE.items():
        count = sum(key.startswith(prefix) for key in unknown)
        report += [f"dropped on purpose: {prefix[:-1]} ({what}, {count} tensors)"] if count else []
    if checkpoint.config.model.masks:
        report.append(f"its mask predictor is {options['mask_predictor']}: MMDetection's config must say so too")
    return {"meta": {"CLASSES": checkpoint.classes.names}, "state_dict": weights}, report
