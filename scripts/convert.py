"""Convert a checkpoint: python scripts/convert.py SOURCE OUT [key=value ...]

SOURCE -> ours: a Mask or Faster R-CNN of MMDetection 2.x or 3.x (LOCE's release, for one) or of torchvision, as its
training, an own one, Lightning or torch.compile saved it; model.* and data.* are a run's options that no weight shows
(data.test_short_edge=800, model.rpn.anchor_scale=8). With --to mmdet (to=mmdet): a checkpoint or run folder of ours ->
MMDetection's.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loce.config import UserError, read_options, run_script
from loce.utils.files import require_writable


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of scripts/convert.py, after SOURCE and OUT."""

    to: Literal["loce", "mmdet"] = "loce"
    annotations: str = ""  # file of the data set that the model is for: its class names and counts
    source_classes: str = ""  # annotation file of what a torchvision model was trained on, where that is not COCO
    mask_predictor: Literal["auto", "normalised", "linear"] = "auto"  # auto: what the source says, or its usual one


CONFLICTS = (
    (("to", "annotations"), lambda o: o.to == "mmdet" and bool(o.annotations), "the classes stay as they are"),
    (("to", "source_classes"), lambda o: o.to == "mmdet" and bool(o.source_classes), "the classes stay as they are"),
    (("to", "mask_predictor"), lambda o: o.to == "mmdet" and o.mask_predictor != "auto", "it stays as it is"),
)


RUN_OPTIONS = ("model.", "data.")


def read_words(words: list[str]) -> tuple[Path, Path, ConvertOptions, list[str]]:
    """SOURCE, OUT, the options of a command line, and those of a run; `--to X` and `--to=X` mean to=X."""
    if "--to" in words[:-1]:
        at = words.index("--to")
        words = [*words[:at], f"to={words[at + 1]}", *words[at + 2 :]]
    words = [f"to={word[5:]}" if word.startswith("--to=") else word for word in words]
    if "-h" in words or "--help" in words:
        read_options(ConvertOptions, ["-h"])
    paths = [word for word in words if "=" not in word and not word.startswith("-")]
    if len(paths) != 2:
        raise UserError("usage: python scripts/convert.py SOURCE OUT [key=value ...]; --help lists the keys")
    own = [word for word in words if word not in paths and not word.startswith(RUN_OPTIONS)]
    options = read_options(ConvertOptions, own, CONFLICTS)
    rest = [word for word in words if word.startswith(RUN_OPTIONS)]
    if rest and options.to == "mmdet":
        raise UserError(f"{', '.join(rest)}: the options stay as they are with to=mmdet")
    return Path(paths[0]), Path(paths[1]), options, rest


def main() -> None:
    source, out, options, words = read_words(sys.argv[1:])
    if out.exists():
        raise UserError(f"{out} exists; files are never overwritten: remove it, or give another name")
    require_writable(out.parent, "")
    from loce.checkpoint.convert import convert, to_mmdetection  # torch, after the command line is known to be right
    from loce.checkpoint.files import write

    if options.to == "mmdet":
        content, report = to_mmdetection(source)
    else:
        content, report = convert(source, options.annotations, options.source_classes, options.mask_predictor, words)
    if problem := write(out, content).get("problem"):
        raise UserError(f"{problem}")
    print("\n".join([*report, f"wrote {out}"]))


if __name__ == "__main__":
    run_script(main)
