"""Evaluate a checkpoint, or the results of any model: tables on the screen and in a folder.

python scripts/evaluate.py annotations=A.json results=R.json [training=TRAIN.json] [output=DIR]
python (or torchrun --nproc_per_node=N) scripts/evaluate.py [checkpoint=RUN_OR_FILE | checkpoint=[A,B]]
    [annotations=A.json images=DIR] [eval.posthoc=fracal eval.fracal.exponent=2] [head.name=norcal] [eval.nms=0.4]
Options head.* and eval.* take the place of the checkpoint's, for what works on trained weights as they are;
train.ema=0 evaluates the weights of the last step in place of their average.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loce.config import EvalConfig, Natural, Protocols, UserError, read_options, run_script
from loce.data.annotations.lvis import LVISAnnotations
from loce.evaluation.report import evaluate_and_report
from loce.report.tables.steps import newest_run
from loce.utils.files import require_writable
from loce.utils.yaml_text import parse_value, show

FOR_RESULTS = ("eval.images=", "eval.slices=", "eval.boundary=")  # options of a run that need no inference
CONFIG_WORDS = ("head.", "eval.", "train.ema=")  # options of a run
WRITTEN = "metrics.json, evaluation.json, per_category.csv and more are in"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Evaluate a checkpoint, or results, on LVIS- or COCO-style ground truth."""

    checkpoint: str = ""  # run folder or checkpoint, or [A, B]; with no results either: the newest run below runs/
    results: str = ""  # results JSON, or the folder of detections that inference wrote
    annotations: str = ""  # ground truth, JSON; empty: the checkpoint's validation data
    training: str = ""  # training annotations, for results: what is rare, common and frequent is counted there
    rare_max: Natural = 10  # images, with `training`; as data.rare_max of a run
    common_max: Natural = 100  # images, with `training`
    images: str = ""  # folder of the images, for a checkpoint; empty: the checkpoint's
    output: str = ""  # folder for the numbers; empty: in the run folder, or beside the results
    device: Literal["auto", "cpu", "cuda"] = "auto"  # for a checkpoint
    detections: Natural = 0  # kept of an image, for a checkpoint; 0: the checkpoint's (300)
    iou_types: Literal["auto", "bbox", "segm", "bbox,segm"] = "auto"  # auto: what the results have
    protocol: Protocols = "auto"  # one, or [lvis,fixed,pool]; auto: lvis where the file has LVIS's fields
    max_detections: Natural = 0  # per image (lvis), per image and category (coco); 0: the (first) protocol's own
    resamples: Natural = 1000  # of the bootstrap for the intervals; 0: none
    errors: bool = True  # what became of lost objects: errors.csv, errors.png
    allow_misplaced: bool = False  # results on annotations of which many masks lie elsewhere than their boxes
    save_json: bool = False  # also write the detections as results.json, in the official format


def evaluate_results(options: Options, words: Sequence[str]) -> None:
    """Results from a file or folder; words: of FOR_RESULTS."""
    missing = [name for name in ("annotations", "results") if not getattr(options, name)]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} must be given: python scripts/evaluate.py annotations=A.json results=R.json"
        )
    section = read_options(EvalConfig, [word.removeprefix("eval.") for word in words])
    results = Path(options.results)
    output = options.output or str(results.with_name(results.stem + "_evaluation"))
    require_writable(output)
    training = None
    if options.training:
        bounds = (options.rare_max, options.common_max)
        training = LVISAnnotations.open(options.training, *bounds, masks=False, named=False).stats
    evaluate_and_report(
        options.annotations,
        results,
        output,
        protocol=options.protocol,
        errors=options.errors,
        allow_misplaced=options.allow_misplaced,
        training=training,
        images=section.images,
        slices=section.slices,
        boundary=section.boundary,
        **report_options(options),
    )
    print(f"{WRITTEN} {output}")


def report_options(options: Options) -> dict[str, Any]:
    """What is evaluated and written, whoever made the detections."""
    return {
        "iou_types": () if options.iou_types == "auto" else options.iou_types.split(","),
        "max_detections": options.max_detections or None,
        "resamples": options.resamples,
        "save_json": options.save_json,
    }


def evaluate_a_checkpoint(options: Options, words: Sequence[str]) -> None:
    """Inference, then the same evaluation."""
    from loce.engine.inference import evaluate_checkpoints  # torch is not needed to evaluate results

    listed = parse_value(options.checkpoint) if options.checkpoint.startswith("[") else [options.checkpoint]
    newest = None if options.checkpoint else newest_run(Path("runs"))
    paths = [Path(str(path)) for path in listed] if options.checkpoint else [newest] if newest else []
    if len(paths) > 1 and options.output:
        raise UserError("output: is for one checkpoint; of several, each is evaluated into its own run folder")
    if not paths:
        raise UserError("no checkpoint below runs/; give checkpoint=RUN_OR_FILE, or results=R.json annotations=A.json")
    names = {"data.val_annotations": options.annotations, "data.val_images": options.images}
    protocol = options.protocol if isinstance(options.protocol, str) else show(list(options.protocol))
    names |= {"eval.protocol": protocol if protocol != "auto" else ""}
    names |= {"eval.detections": str(options.detections or ""), "eval.errors": "" if options.errors else "false"}
    names |= {"data.allow_misplaced": "true" if options.allow_misplaced else ""}
    words = [f"{key}={value}" for key, value in names.items() if value] + list(words)
    output = Path(options.output) if options.output else None
    for folder in evaluate_checkpoints(paths, output, words, options.device, **report_options(options)):
        print(f"{WRITTEN if (folder / 'metrics.json').is_file() else 'results.json, without numbers, is in'} {folder}")


def main() -> None:
    words = [word for word in sys.argv[1:] if word.startswith(CONFIG_WORDS)]
    options = read_options(Options, [word for word in sys.argv[1:] if word not in words])
    if options.checkpoint and options.results:
        raise UserError("checkpoint and results: give one of them")
    if options.training and not options.results:
        raise UserError("training: is for results; a checkpoint knows its training data")
    inference = [word for word in words if not word.startswith(FOR_RESULTS)]
    if options.results and (options.images or options.detections or options.device != "auto" or inference):
        raise UserError(
            "images, detections, device, train.ema, head.* and eval.* are for checkpoints; results need no inference "
            "(eval.images, eval.slices and eval.boundary are for both)"
        )
    evaluate_results(options, words) if options.results else evaluate_a_checkpoint(options, words)


if __name__ == "__main__":
    run_script(main)
