"""Checkpoints of MMDetection (2.x and 3.x) into ours and back, bit for bit; torchvision's, too."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loce.checkpoint.convert import mmdetection, torchvision
from loce.checkpoint.convert.mmdetection import to_mmdetection
from loce.checkpoint.convert.source import MaskPredictor, find_weights, open_weights, read_foreign
from loce.config import UserError, from_dict
from loce.data.annotations.lvis import LVISAnnotations
from loce.utils.classes import ClassStats
from loce.utils.errors import first_few

__all__ = ["convert", "to_mmdetection"]
READERS = (mmdetection, torchvision)


def convert(
    source: Path,
    annotations: str = "",
    source_classes: str = "",
    mask_predictor: MaskPredictor = "auto",
    overrides: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """(checkpoint of ours for `loce.load_model` and train.init, lines of a report) from somebody else's file.

    annotations: file of the data set that the model is for, or will be trained on; "" for the names that the source
    gives, or placeholders. source_classes: annotation file of what a torchvision model was trained on, where that is
    not COCO. overrides: "model.*" and "data.*" options that no weight shows, such as sizes. UserError, with everything
    that is wrong: unreadable, another architecture, classes that do not fit.
    """
    content = read_foreign(source)
    weights, left_out = find_weights(content, [reader.FORMAT.mark for reader in READERS], source)
    for reader in READERS:
        if any(key.startswith(reader.FORMAT.mark) for key in weights):
            found = open_weights(source, reader.FORMAT, weights, content.get("meta"))
            stats = _stats(annotations, overrides) if annotations else None
            checkpoint, report = reader.convert(found, stats, source_classes, mask_predictor, overrides)
            return checkpoint, report + ([f"dropped on purpose: {first_few(left_out)}"] if left_out else [])
    parts = ", ".join(f"{part} ({n})" for part, n in Counter(key.split(".")[0] for key in weights).most_common(8))
    raise UserError(
        f"{source}: no Mask or Faster R-CNN of MMDetection (it would have {mmdetection.FORMAT.mark}*) or of "
        f"torchvision ({torchvision.FORMAT.mark}*); tensors in it: {parts or 'none'}"
    )


def _stats(annotations: str, overrides: Sequence[str]) -> ClassStats:
    """The classes that a training on this file has."""
    file = LVISAnnotations.open(annotations)
    data = from_dict({}, "options", [word for word in overrides if word.startswith("data.")]).data
    return file.without_empty().stats if data.drop_empty else file.stats
