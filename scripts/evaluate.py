"""Evaluate the results of any model: a table on the screen, metrics.json and per_category.csv in a folder.

python scripts/evaluate.py annotations=A.json results=R.json output=DIR
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loce.config import Natural, UserError, read_options, run_script
from loce.evaluation.report import evaluate_and_report


@dataclass(frozen=True, kw_only=True)
class Options:
    """Evaluate results on LVIS- or COCO-style ground truth."""

    annotations: str = ""  # ground truth, JSON
    results: str = ""  # results JSON, or the folder of detections that inference wrote
    output: str = ""  # folder for the numbers; empty: beside the results
    iou_types: Literal["auto", "bbox", "segm", "bbox,segm"] = "auto"  # auto: what the results have
    protocol: Literal["auto", "lvis", "fixed", "coco"] = "auto"  # auto: lvis where the file has LVIS's fields
    max_detections: Natural = 0  # per image (lvis), per image and category (coco); 0: the protocol's own
    resamples: Natural = 1000  # of the bootstrap for the intervals; 0: none
    errors: bool = True  # what became of lost objects: errors.csv, errors.png


def evaluate_results(options: Options) -> None:
    """Results from a file or folder."""
    missing = [name for name in ("annotations", "results") if not getattr(options, name)]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given: {__doc__.splitlines()[2]}")
    results = Path(options.results)
    output = options.output or str(results.with_name(results.stem + "_evaluation"))
    evaluate_and_report(
        options.annotations,
        results,
        output,
        iou_types=() if options.iou_types == "auto" else options.iou_types.split(","),
        protocol=options.protocol,
        max_detections=options.max_detections or None,
        resamples=options.resamples,
        errors=options.errors,
    )
    print(f"written to {output}: metrics.json, evaluation.json, per_category.csv, ...")


def main() -> None:
    evaluate_results(read_options(Options, sys.argv[1:]))


if __name__ == "__main__":
    run_script(main)
