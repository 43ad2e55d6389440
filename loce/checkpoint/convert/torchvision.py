"""torchvision's Mask and Faster R-CNN (COCO's, or a user's own): ours but for what docs/differences.md lists.

Its labels put the background first, its pooling is not aligned; how anchors are rounded and masks are pasted is ours.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loce.checkpoint.convert.source import (
    CLASSIFIER,
    NO_MASKS,
    Format,
    MaskPredictor,
    Source,
    architecture,
    bare_stats,
    check,
    new_model,
)
from loce.config import Config, UserError, diff, from_dict
from loce.data.annotations.lvis import LVISAnnotations
from loce.models.torchvision_classes import coco_rows
from loce.utils.classes import ClassStats
from loce.utils.yaml_text import show

PYRAMID = tuple((part, level) for part in ("inner_blocks", "layer_blocks") for level in range(4))
FORMAT = Format(
    name="torchvision",
    mark="roi_heads.box_predictor.",
    table={  # where a part has two names, the second is that of files written before torchvision 0.13
        "backbone.body": "backbone.body",
        **{f"backbone.fpn.{part}.{level}.0": f"backbone.fpn.{part}.{level}.0" for part, level in PYRAMID},
        **{f"backbone.fpn.{part}.{level}": f"backbone.fpn.{part}.{level}.0" for part, level in PYRAMID},
        "rpn.head.conv.0.0": "rpn.head.conv.0.0",
        "rpn.head.conv": "rpn.head.conv.0.0",
        "rpn.head.cls_logits": "rpn.head.cls_logits",
        "rpn.head.bbox_pred": "rpn.head.bbox_pred",
        "roi_heads.box_head.fc6": "roi_heads.box_head.fc1",
        "roi_heads.box_head.fc7": "roi_heads.box_head.fc2",
        "roi_heads.box_predictor.cls_score": "roi_heads.classifier.fc_cls",
        "roi_heads.box_predictor.bbox_pred": "roi_heads.fc_reg",
        **{f"roi_heads.mask_head.{n}.0": f"roi_heads.mask_head.convs.{n}" for n in range(4)},
        **{f"roi_heads.mask_head.mask_fcn{n + 1}": f"roi_heads.mask_head.convs.{n}" for n in range(4)},
        "roi_heads.mask_predictor.conv5_mask": "roi_heads.mask_head.upsample",
        "roi_heads.mask_predictor.mask_fcn_logits": "roi_heads.mask_head.predictor",
    },
)
CLASS_PARTS = {CLASSIFIER: 1, "roi_heads.fc_reg": 4, "roi_heads.mask_head.predictor": 1}  # rows of a class
COUNTER = ".num_batches_tracked"  # torchvision's frozen batch norm has none


def convert(
    found: Source,
    stats: ClassStats | None,
    source_classes: str,
    mask_predictor: MaskPredictor,
    overrides: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """See `loce.checkpoint.convert.convert`."""
    outputs = found.outputs
    names = _output_names(found, source_classes)
    if stats is None:
        named = [row for row, name in enumerate(names) if name is not None]
        stats = bare_stats([str(names[row]) for row in named], named)
    row_of = {_normal(name): row for row, name in enumerate(names) if name is not None}
    rows = [row_of.get(_normal(name)) for name in stats.names]
    options = architecture(found, "linear" if mask_predictor == "auto" else mask_predictor)
    options = replace(options, roi=replace(options.roi, aligned=False))
    head, model = new_model(options, stats, overrides)
    data, model_options = head["config"]["data"], head["config"]["model"]
    changes = diff(Config(), from_dict(head["config"]))
    options_to_train = [f"{key}={show(value)}" for key, value in changes.items() if key.startswith(("model.", "data."))]
    # The shapes that the source has: one more row for the background everywhere, and its own number of classes.
    keys = [(f"{part}.{kind}", height) for part, height in CLASS_PARTS.items() for kind in ("weight", "bias")]
    of_classes = {key: height for key, height in keys if key in model}
    shapes = {key: (height * outputs, *model[key].shape[1:]) for key, height in of_classes.items()}
    expected = {**model, **{key: torch.empty(shape, device="meta") for key, shape in shapes.items()}}
    check(found, expected, optional=COUNTER)
    weights = dict(found.weights)
    for key, height in of_classes.items():
        weights[key] = _move_rows(found.weights[key], model[key], rows, height)
    taken = [name for name, row in zip(stats.names, rows, strict=True) if row is not None]
    fresh = [name for name, row in zip(stats.names, rows, strict=True) if row is None]
    new = [key for key in model if key not in weights and key.endswith(COUNTER)]
    hint = "" if taken or source_classes else " (source_classes=B.json would name the outputs)"
    return {**head, "model": model | weights}, [
        f"{found.path}: torchvision, {outputs} outputs, {len(found.weights)} tensors, all of them used",
        "background: moved from the first output to the last",
        f"{len(taken)} classes taken over by name: {', '.join(taken) or 'none'}{hint}",
        f"{len(fresh)} classes start anew: {', '.join(fresh) or 'none'}",
        f"new, zero: {len(new)} num_batches_tracked, which nothing reads",
        f"mask predictor: {options.mask_predictor}" if options.masks else NO_MASKS,
        "pooling: torchvision's (model.roi.aligned=false)",
        "not seen from weights, so as given here or by default: "
        f"data.test_short_edge={data['test_short_edge']} data.long_edge={data['long_edge']} (torchvision: min_size, "
        f"max_size), model.rpn.anchor_scale={model_options['rpn']['anchor_scale']:g} (side of the finest anchors / 4)",
        f"to train from it: {' '.join(options_to_train)}",
    ]


def _move_rows(
    source: Tensor,
    fresh: Tensor,
    rows: list[int | None],
    height: int,
) -> Tensor:
    """Rows of the target's classes: from the source, or fresh; the classifier's background from first to last."""
    blocks = source.unflatten(0, (-1, height))
    moved = fresh.clone().unflatten(0, (-1, height))
    for label, row in enumerate(rows):
        if row is not None:
            moved[label] = blocks[row]
    if len(moved) == len(rows) + 1:  # the classifier: the one part that has a row for the background here
        moved[-1] = blocks[0]
    return moved.flatten(0, 1)


def _output_names(found: Source, source_classes: str) -> list[str | None]:
    """The name of each output, None for those that stand for no class."""
    outputs = found.outputs
    if not source_classes:
        known = coco_rows()
        return known if len(known) == outputs else [None] + [f"class {row}" for row in range(1, outputs)]
    stats = LVISAnnotations.open(source_classes, masks=False, named=False, annotated=False).stats
    by_id = dict(zip(stats.category_ids.tolist(), stats.names, strict=True))
    if max(by_id) < outputs and min(by_id) > 0:  # torchvision's own recipe: the output is the category id
        return [by_id.get(row) for row in range(outputs)]
    if len(stats) == outputs - 1:  # numbered in the order of the file, after the background
        return [None, *stats.names]
    raise UserError(
        f"{found.path} has {outputs} outputs; {source_classes} has {len(stats)} categories with ids up to "
        f"{max(by_id)}: neither the ids nor the order of the categories can number the outputs"
    )


def _normal(name: str | None) -> str:
    return str(name).lower().replace("_", " ").strip()
