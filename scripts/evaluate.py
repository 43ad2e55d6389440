"""Evaluate a checkpoint, or the results of any model: tables on the screen and in a folder.

python scripts/evaluate.py annotations=A.json results=R.json [output=DIR]
python (or torchrun --nproc_per_node=N) scripts/evaluate.py [checkpoint=RUN_OR_FILE] [annotations=A.json images=DIR]
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loce.config import Natural, UserError, read_options, run_script
from loce.evaluation.report import evaluate_and_report

WRITTEN = "metrics.json, evaluation.json, per_category.csv and more are in"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Evaluate a checkpoint, or results, on LVIS- or COCO-style ground truth."""

    checkpoint: str = ""  # run folder or checkpoint; with no results either: the newest run below runs/
    results: str = ""  # results JSON, or the folder of detections that inference wrote
    annotations: str = ""  # ground truth, JSON; empty: the checkpoint's validation data
    images: str = ""  # folder of the images, for a checkpoint; empty: the checkpoint's
    output: str = ""  # folder for the numbers; empty: in the run folder, or beside the results
    device: Literal["auto", "cpu", "cuda"] = "auto"  # for a checkpoint
    detections: Natural = 0  # kept of an image, for a checkpoint; 0: the checkpoint's (300)
    iou_types: Literal["auto", "bbox", "segm", "bbox,segm"] = "auto"  # auto: what the results have
    protocol: Literal["auto", "lvis", "fixed", "coco"] = "auto"  # auto: lvis where the file has LVIS's fields
    max_detections: Natural = 0  # per image (lvis), per image and category (coco); 0: the protocol's own
    resamples: Natural = 1000  # of the bootstrap for the intervals; 0: none
    errors: bool = True  # what became of lost objects: errors.csv, errors.png
    save_json: bool = False  # also write the detections as results.json, in the official format


def evaluate_results(options: Options) -> None:
    """Results from a file or folder."""
    missing = [name for name in ("annotations", "results") if not getattr(options, name)]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} must be given: python scripts/evaluate.py annotations=A.json results=R.json"
        )
    results = Path(options.results)
    output = options.output or str(results.with_name(results.stem + "_evaluation"))
    evaluate_and_report(
        options.annotations,
        results,
        output,
        protocol=options.protocol,
        **report_options(options),
    )
    print(f"{WRITTEN} {output}")


def report_options(options: Options) -> dict[str, Any]:
    """What is evaluated and written, whoever made the detections."""
    return {
        "iou_types": () if options.iou_types == "auto" else options.iou_types.split(","),
        "max_detections": options.max_detections or None,
        "resamples": options.resamples,
        "errors": options.errors,
        "save_json": options.save_json,
    }


def evaluate_a_checkpoint(options: Options) -> None:
    """Inference, then the same evaluation."""
    from loce.inference import evaluate_checkpoint  # torch is not needed to evaluate results

    path = Path(options.checkpoint) if options.checkpoint else newest_run(Path("runs"))
    data = {"val_annotations": options.annotations, "val_images": options.images}
    evaluation: dict[str, Any] = {} if options.protocol == "auto" else {"protocol": options.protocol}
    if options.detections:
        evaluation["detections"] = options.detections
    output = Path(options.output) if options.output else None
    given = {k: v for k, v in data.items() if v}
    output = evaluate_checkpoint(path, output, given, evaluation, options.device, **report_options(options))
    print(f"{WRITTEN} {output}")


def newest_run(runs: Path) -> Path:
    """The run folder with the checkpoint written last."""
    files = sorted(runs.glob("**/checkpoints/*/main.pt"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UserError(
            f"no checkpoint below {runs}/; give checkpoint=RUN_OR_FILE, or results=R.json annotations=A.json"
        )
    return files[-1].parents[2]


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    if options.checkpoint and options.results:
        raise UserError("checkpoint and results: give one of them")
    if options.results and (options.images or options.detections or options.device != "auto"):
        raise UserError("images, detections and device are for checkpoints; results need no inference")
    evaluate_results(options) if options.results else evaluate_a_checkpoint(options)


if __name__ == "__main__":
    run_script(main)
