"""Report of an evaluation on screen and in a folder: tables, metrics.json, per_category.csv, tallies to compare."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loce.data.annotations.image_lists import attributes_of_images, listed_images
from loce.data.annotations.lvis import LVISAnnotations
from loce.evaluation import calibration
from loce.evaluation.annotations import GroundTruth, load_annotations, only_images, with_training_groups
from loce.evaluation.bootstrap import intervals, tally
from loce.evaluation.detections import Detections, has_names_for_ids, read_results, suspicions
from loce.evaluation.lost_objects import explain
from loce.evaluation.lost_objects_report import write_errors
from loce.evaluation.lvis_ap import IOU_TYPES, Evaluation, choose_protocol, evaluate_loaded, load_results
from loce.evaluation.matching import Protocol
from loce.evaluation.misses import FILE as MISSES
from loce.evaluation.misses import write_misses
from loce.evaluation.near_misses import read_near_misses
from loce.evaluation.slices import slice_lines, slice_numbers, slice_table
from loce.evaluation.thresholds import COLUMN as THRESHOLD
from loce.evaluation.thresholds import best_thresholds
from loce.evaluation.true_boxes import FILE as BOXES_FILE
from loce.evaluation.true_boxes import KEY as TRUE_BOXES
from loce.evaluation.true_boxes import read_true_boxes
from loce.evaluation.true_boxes_report import accuracies, accuracy_intervals, write_true_boxes
from loce.utils.classes import GROUP_NAMES, GROUPS, ClassStats
from loce.utils.errors import UserError
from loce.utils.files import csv_text, json_text, write_text
from loce.utils.progress import phase

COLUMNS = ("id", "name", "frequency", "images", "instances", "AP", "AP50", "AR", "detections", "detection_score")
RESULTS = "results.json"
EXTRA = ("found_score", "iou_type", THRESHOLD, "F1")  # and box_AP, box_AP50, box_AR beside those of masks
READING = (  # beside numbers wherever they are read
    "AP is the mean over all categories, APr, APc and APf over those of a group: groups differ in size, so AP is not "
    "the mean of the three. A category without objects is in no mean (in protocol pool its detections are false "
    "positives where it was verified to be absent)."
)
_SIZES = {"s": "small (< 32^2 px)", "m": "medium", "l": "large (> 96^2 px)"}


@phase("evaluation")
def evaluate_and_report(
    annotations: str | Path | Mapping[str, Any] | LVISAnnotations | GroundTruth,
    results: str | Path | list[dict[str, Any]] | Detections,
    output: str | Path,
    iou_types: Sequence[str] = (),
    protocol: str | Sequence[str] = "auto",
    max_detections: int | None = None,
    resamples: int = 1000,
    origin: str = "",
    errors: bool = True,
    save_json: bool = False,
    allow_misplaced: bool = False,
    posthoc: str = "",
    training: ClassStats | None = None,
    images: str = "",
    slices: str = "",
    boundary: bool = False,
) -> dict[str, Evaluation]:
    """Evaluate, print the tables and write the folder `output`; the result per IoU type, "bbox" first, and where there
    are several protocols also per type and further protocol ("segm_fixed").

    annotations, results, max_detections: as for `evaluate_lvis`; iou_types: empty means what the results have;
    protocol: one or several, from the same matching; "auto": "lvis" for federated ground truth, else "coco";
    max_detections is of the first; resamples: of the bootstrap, 0 for none; origin:
    what made the results (method, checkpoint), written beside the numbers; errors: explain lost objects (of masks
    where they are evaluated), with the near misses of inference where `results` is its folder and has them; save_json:
    also write results.json, the official results format; allow_misplaced: as for `evaluate_lvis`; posthoc: the method
    that calibrated the scores and its options, written beside the numbers; training: classes of the training set, whose
    groups r/c/f take the place of the file's; images: a file of ids or names of images, which alone are evaluated;
    slices: a CSV file of attributes of images, for numbers of each value in slices.csv; boundary: boundary AP beside
    that of masks ("boundary").
    Writes metrics.json ({"bbox": 13 numbers, "segm": ..., "bbox_fixed": ...}), evaluation.json (what they are of),
    per_category.csv, calibration.csv and calibration.png (of the first protocol), tallies_<key>.npz (for
    scripts/compare.py), errors.csv and errors.png, misses.csv; of inference that classified the true boxes, too,
    "true_boxes" in metrics.json, confusions.csv and .png. UserError for bad input, before anything is written.
    """
    # A JSON file, a folder that inference wrote (its near misses explain more) or results in memory.
    near_misses, boxes, source = None, None, "results"
    if isinstance(results, (str, Path)):
        source = str(results)
        origin = origin or source
        near_misses = read_near_misses(results) if errors and Path(results).is_dir() else None
        boxes = read_true_boxes(Path(results).parent) if Path(results).is_dir() else None
        if not Path(results).is_dir():
            names = None
            if Path(results).is_file() and has_names_for_ids(results) and isinstance(annotations, (str, Path)):
                file = LVISAnnotations.open(annotations, masks=False)
                names = {file.name(index): int(number) for index, number in enumerate(file.image_ids)}
            results = read_results(results, names)
    wanted = tuple(iou_types) or (results.iou_types if isinstance(results, Detections) else ("bbox", "segm"))
    truth = load_annotations(annotations, "segm" in wanted, allow_misplaced)
    truth = truth if training is None else with_training_groups(truth, training)
    detections = load_results(results, truth, source)
    if images:
        chosen = truth.image_ids[listed_images(images, truth.image_ids, truth.image_names)]
        truth = only_images(truth, chosen, f"those of {images}")
        detections = detections.some(np.flatnonzero(np.isin(detections.image_ids, chosen)))
        near_misses = None if near_misses is None else near_misses.of_images(chosen)
    parts = attributes_of_images(slices, truth.image_ids, truth.image_names) if slices else {}
    rules = choose_protocols(protocol, truth, max_detections)
    wanted = tuple(iou_types) or detections.iou_types
    if boundary and "segm" not in wanted:
        raise UserError("eval.boundary: boundary AP is of masks, which are not evaluated here")
    # The numbers come first, and are on disk before what may take another minute: intervals, causes of lost objects.
    kinds = sorted({*wanted, *(["boundary"] if boundary else [])}, key=IOU_TYPES.index)
    by_kind = {kind: evaluate_loaded(truth, detections, kind, rules) for kind in kinds}
    first = {kind: found[0] for kind, found in by_kind.items()}  # of the first protocol
    further = {f"{kind}_{one.protocol.name}": one for kind, found in by_kind.items() for one in found[1:]}
    evaluations = {**first, **further}
    facts = _facts(truth, detections, rules, evaluations, origin)
    facts |= {"posthoc": posthoc} if posthoc else {}
    facts["notes"] += suspicions(detections, truth, source)
    boxes = None if boxes is None else boxes.of(truth)
    numbers = {} if boxes is None else accuracies(boxes, truth)
    print("\n".join(header(facts)))
    write_folder(Path(output), evaluations, facts, numbers)
    of_slices = {}
    for key, evaluation in evaluations.items():
        tallies = tally(evaluation, parts)
        of_slices[key] = slice_numbers(tallies, resamples)
        spread = intervals(tallies, resamples) if resamples else {}
        facts["intervals"][key] = spread
        tallies.save(Path(output) / f"tallies_{key}.npz")
        print("\n" + table(evaluation, spread))
        if parts:
            print("\n" + "\n".join(slice_lines(of_slices[key], title(evaluation))))
    if parts:
        write_text(Path(output) / "slices.csv", slice_table(of_slices))
    main = first["segm" if "segm" in first else "bbox"]
    print("\n".join(["", f"note: {READING}", *write_calibration(Path(output), main)]))
    if boxes is not None:
        if Path(str(results)).parent.resolve() != Path(output).resolve():
            boxes.save(Path(output) / BOXES_FILE)  # for scripts/compare.py
        spread = accuracy_intervals(boxes, truth, resamples) if resamples else {}
        facts["intervals"][TRUE_BOXES] = spread
        print("\n" + "\n".join(write_true_boxes(Path(output), boxes, truth, numbers, spread)))
    if errors and len(truth):
        outcomes = explain(main, detections, near_misses)
        print("\n" + "\n".join(write_errors(output, main, outcomes, detections, origin)))
        write_misses(Path(output), main, outcomes, boxes)
    print("\n" + "\n".join(markdown(evaluations)))
    write_facts(Path(output), facts)
    if save_json:
        detections.save_json(Path(output) / RESULTS)
    return evaluations


def _facts(
    truth: GroundTruth,
    detections: Detections,
    rules: Sequence[Protocol],
    evaluations: dict[str, Evaluation],
    origin: str,
) -> dict[str, Any]:
    """Origin of the numbers: files, protocol, counts, notes; evaluation.json."""
    first = next(iter(evaluations.values()))
    empty = first.matches.objects[0] == 0
    return {
        "annotations": truth.source,
        "results": origin,
        "protocol": ", ".join(one.name for one in rules),
        "rules": "; ".join(map(str, rules)),
        "images": len(truth.image_ids),
        "subset": truth.part,
        "images_with_detections": len(np.unique(detections.image_ids)),
        "categories": len(truth.category_ids),
        "categories_without_objects": {g: int((empty & (truth.frequency == g)).sum()) for g in GROUPS},
        "objects": int(first.matches.objects[0].sum()),
        "detections": len(detections),
        "detections_that_count": {key: len(e.matches.row) for key, e in evaluations.items()},
        "intervals": {},
        "notes": list(truth.notes),
    }


def choose_protocols(
    protocol: str | Sequence[str],
    truth: GroundTruth,
    max_detections: int | None = None,
) -> list[Protocol]:
    """The rules of one name or several; "auto" by what the ground truth has; max_detections: of the first."""
    names = [protocol] if isinstance(protocol, str) else protocol
    names = [("lvis" if truth.federated else "coco") if name == "auto" else name for name in names]
    return [choose_protocol(name, None if n else max_detections) for n, name in enumerate(dict.fromkeys(names))]


def header(facts: Mapping[str, Any]) -> list[str]:
    """What every number below is of."""
    skipped = facts["categories_without_objects"]
    by_group = ", ".join(f"{number} {GROUP_NAMES[group]}" for group, number in skipped.items())
    counted = ", ".join(f"{number:,} ({kind})" for kind, number in facts["detections_that_count"].items())
    lines = [
        f"annotations: {facts['annotations']}",
        f"results: {facts['results'] or 'given in memory'}",
        f"protocol: {facts['rules']}",
        *([f"scores: calibrated post hoc by {facts['posthoc']}"] if "posthoc" in facts else []),
        f"{facts['images']:,} images, {facts['categories']:,} categories, {facts['objects']:,} objects; "
        f"{facts['detections']:,} detections in {facts['images_with_detections']:,} images, {counted} count",
        f"{sum(skipped.values()):,} categories have no objects here and are in no mean ({by_group})",
        *(f"note: {note}" for note in facts["notes"]),
    ]
    if not facts["objects"]:
        lines.append("warning: there are no objects to find, so there are no numbers")
    elif not facts["detections"]:
        lines.append("warning: there are no detections at all, so every number is 0")
    elif facts["images_with_detections"] < 0.5 * facts["images"]:
        lines.append("warning: most images have no detections; are these the results of a part of the data set only?")
    return lines


def describe(name: str) -> str:
    """A metric's name in words: "average precision, IoU .50:.95, all sizes, rare categories"."""
    if name in calibration.NAMES:
        what = "expected" if name.startswith("ECE") else "largest"
        return f"{what} calibration error at IoU .50, {GROUP_NAMES.get(name[3:], 'all')} categories"
    kind, cap = name.partition("@")[::2]
    size = _SIZES.get(kind[2:], "all sizes")
    group = GROUP_NAMES.get(kind[2:], "all")
    iou = f".{kind[2:]}" if kind[2:].isdigit() else ".50:.95"
    what = "average recall" if kind.startswith("AR") else "average precision"
    return f"{what}, IoU {iou}, {size}, {group} categories" + (f", cap {cap}" if cap else "")


def title(evaluation: Evaluation) -> str:
    """What numbers are of."""
    part = f", SUBSET, {evaluation.truth.part}" if evaluation.truth.part else ""
    return f"{evaluation.iou_type}, protocol {evaluation.protocol.name}{part}"


def table(evaluation: Evaluation, spread: Mapping[str, tuple[float, float]]) -> str:
    """The 13 numbers in the official order, then the calibration errors, with intervals where there are any."""
    lines = [title(evaluation), f"{'':8} {'value':>6}  {'95% interval':14}"]
    for name, value in (evaluation.metrics | evaluation.calibration).items():
        low, high = spread.get(name, (math.nan, math.nan))
        between = f"{low:.3f} - {high:.3f}" if math.isfinite(low) else ""
        shown = f"{value:6.3f}" if value >= 0 else f"{'-':>6}"  # undefined: no such objects
        lines.append(f"{name:8} {shown}  {between:14} {describe(name)}")
    return "\n".join(lines)


def markdown(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Rows to copy, in percent; the protocol stands in each."""
    lines, head = [], ""
    for evaluation in evaluations.values():
        names = f"| type, protocol | {' | '.join(evaluation.metrics)} |"
        if names != head:
            head = names
            lines += [head, "|---" * (len(evaluation.metrics) + 1) + "|"]
        values = [f"{100 * v:.2f}" if v >= 0 else "-" for v in evaluation.metrics.values()]
        lines.append(f"| {title(evaluation).replace(' protocol', '')} | " + " | ".join(values) + " |")
    return lines


def write_folder(
    output: Path,
    evaluations: Mapping[str, Evaluation],
    facts: Mapping[str, Any],
    accuracy: Mapping[str, float],
) -> None:
    """metrics.json, evaluation.json and per_category.csv; what an earlier evaluation left there is removed."""
    for name in ("slices.csv", MISSES, *([] if accuracy else [BOXES_FILE])):
        (output / name).unlink(missing_ok=True)
    plain = [output / f"{name}.{kind}" for name in ("errors", "calibration", "confusions") for kind in ("csv", "png")]
    for path in (*output.glob("tallies_*.npz"), *plain):
        path.unlink(missing_ok=True)
    metrics = {key: {**evaluation.metrics, **evaluation.calibration} for key, evaluation in evaluations.items()}
    told: dict[str, Any] = {TRUE_BOXES: accuracy} if accuracy else {}
    told |= {"posthoc": facts["posthoc"]} if "posthoc" in facts else {}
    told |= {"subset": facts["subset"]} if facts["subset"] else {}
    write_text(output / "metrics.json", json.dumps({**metrics, **told}, indent=2) + "\n")
    write_facts(output, facts)
    write_text(output / "per_category.csv", category_table(evaluations))


def write_calibration(output: Path, evaluation: Evaluation) -> list[str]:
    """calibration.csv and calibration.png; a line that says why there are none."""
    if evaluation.reliability is None:
        return ["calibration errors: none, since scores below 0 or above 1 are no probabilities"]
    sums = evaluation.reliability.sum(axis=0, dtype=np.float64)
    what = title(evaluation)
    write_text(output / "calibration.csv", calibration.table(sums, what))
    calibration.draw(sums, evaluation.calibration, what, output / "calibration.png")
    return []


def write_facts(output: Path, facts: Mapping[str, Any]) -> None:
    """evaluation.json."""
    write_text(output / "evaluation.json", json_text(facts, indent=2) + "\n")


def category_table(evaluations: Mapping[str, Evaluation]) -> str:
    """CSV, a row a category, of masks where they were evaluated; the numbers of boxes then stand at the end."""
    main = "segm" if "segm" in evaluations else "bbox"
    beside = ["bbox"] if main == "segm" and "bbox" in evaluations else []
    part = evaluations[main].truth.part
    names = [*COLUMNS, *EXTRA, *(f"box_{key}" for _ in beside for key in ("AP", "AP50", "AR"))]
    rows: list[list[Any]] = [[*names, *(["subset"] if part else [])]]
    best = zip(*(values.tolist() for values in best_thresholds(evaluations[main].matches)), strict=True)
    for k, (row, (threshold, f1)) in enumerate(zip(evaluations[main].per_category, best, strict=True)):
        own = {**row, "iou_type": main, THRESHOLD: threshold, "F1": f1}
        other = [evaluations[kind].per_category[k][key] for kind in beside for key in ("AP", "AP50", "AR")]
        rows.append([*(own[key] for key in (*COLUMNS, *EXTRA)), *other, *([part] if part else [])])
    return csv_text(rows)
