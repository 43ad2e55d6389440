"""Record of a finished run: its numbers, those of resampled images, its classes, and where they come from.

A JSON file of some 20 kB, so that runs of other machines and other days can stand in one table (results.py).
"""

import json
import shlex
import statistics
from pathlib import Path
from typing import Any

from loce.report.tables.rows import COLUMNS, MEASURES, UNKNOWN, RowRun
from loce.report.tables.steps import average_precisions
from loce.utils.files import read_csv, write_text

RESAMPLES, DIGITS = 400, 5
RESAMPLE_SEED = 0  # of the images drawn: the same for all runs, so that differences can be paired


def write_record(run: RowRun) -> None:
    """Write the record of a run that is trained and evaluated."""
    evaluation = json.loads((run.evaluation / "evaluation.json").read_text(encoding="utf-8"))
    lines = (run.folder / "env.txt").read_text(encoding="utf-8").splitlines()
    last = dict(line.split(": ", 1) for line in lines if ": " in line)  # of the last start, where it was resumed
    script, *words = shlex.split(last["command"])
    record = {
        "command": shlex.join([Path(script).name, *words]),
        "seed": run.config.seed,
        "options": run.options,
        "start": start(run),
        "code": last["code"],
        "device": last["device"],
        "started": last["started"],
        **speed(run),
        "minutes": round(float((run.folder / "minutes.txt").read_text()), 1),
        "data": "{annotations}, {images:,} images, {categories:,} categories".format_map(evaluation)
        + (f", SUBSET, {evaluation['subset']}" if evaluation.get("subset") else ""),
        "protocol": evaluation["rules"],
        "values": dict(zip(COLUMNS, average_precisions(run.evaluation), strict=True)) | measured(run.evaluation),
        "resamples": resamples(run.evaluation),
        "classes": classes(run.evaluation),
    }
    write_text(run.record, json.dumps(record, separators=(",", ":")).replace(',"', ',\n"') + "\n")


def start(run: RowRun) -> str:
    """The hash of the weights that the run started from; empty of a run that started from none."""
    if not run.config.train.init:
        return ""
    origin = Path(run.config.train.init, "eval/origin.txt").read_text(encoding="utf-8")
    return origin.removeprefix("weights ").partition(",")[0]


def speed(run: RowRun) -> dict[str, float]:
    """Images a second in training, the median of its log's lines, and the most memory of the first process, in GiB."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "images_per_second": round(statistics.median(line["images_per_second"] for line in lines), 1),
        "peak_memory_gib": round(max(line["peak_memory_gib"] for line in lines), 2),
    }


def measured(evaluation: Path) -> dict[str, float]:
    """Of MEASURES, in percent, those that the evaluation has."""
    metrics = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
    found = {column: metrics.get(key, {}).get(name, UNKNOWN) for column, (key, name) in MEASURES.items()}
    return {column: 100 * value for column, value in found.items() if value >= 0}


def resamples(evaluation: Path) -> dict[str, list[float]]:
    """COLUMNS, and what there is of MEASURES, in percent of RESAMPLES resampled validation sets; none of a group
    without objects."""
    from loce.evaluation.bootstrap import draw_weights, load_tallies, means_under  # imports NumPy and more
    from loce.evaluation.true_boxes import KEY, group_accuracies, read_true_boxes, resampled_accuracy

    means = {}  # by key of metrics.json
    for key in dict.fromkeys(["bbox", "segm", *(key for key, _ in MEASURES.values())]):
        if (file := evaluation / f"tallies_{key}.npz").is_file():
            tallies = load_tallies(file)
            means[key] = means_under(tallies, draw_weights(len(tallies.image_ids), RESAMPLES, RESAMPLE_SEED))
    if (boxes := read_true_boxes(evaluation)) is not None:
        box = load_tallies(evaluation / "tallies_bbox.npz")
        weights = draw_weights(len(box.image_ids), RESAMPLES, RESAMPLE_SEED)
        accuracy = resampled_accuracy(boxes, box.image_ids, box.category_ids, weights)
        means[KEY] = group_accuracies(accuracy, box.frequency)
    first = means.get("segm", means["bbox"])
    drawn = {"box AP": means["bbox"]["AP"], **{name: first[name] for name in COLUMNS if name in first}}
    if "segm" not in means:  # the groups of a detector of boxes are of boxes, and it has no mask AP
        del drawn["AP"]
    drawn |= {column: means[key][name] for column, (key, name) in MEASURES.items() if name in means.get(key, {})}
    return {
        name: [round(100 * v, DIGITS - 2) for v in drawn[name].tolist()]
        for name in (*COLUMNS, *MEASURES)
        if name in drawn and (drawn[name] == drawn[name]).all()
    }


def classes(evaluation: Path) -> dict[str, list[Any]]:
    """Of every class: id, group, training instances, mean score and mask AP (None where validation has no objects)."""
    ap_of = {row["id"]: float(row["AP"] or -1) for row in read_csv(evaluation / "per_category.csv")}
    rows = read_csv(evaluation / "mean_scores.csv")
    seen = [int(row["boxes"]) and ap_of[row["id"]] >= 0 for row in rows]
    return {
        "id": [int(row["id"]) for row in rows],
        "group": [row["group"] for row in rows],
        "instances": [int(row["training_instances"]) for row in rows],
        "mean score": [
            round(float(row["mean_score"]), DIGITS) if s else None for row, s in zip(rows, seen, strict=True)
        ],
        "AP": [round(ap_of[row["id"]], DIGITS) if s else None for row, s in zip(rows, seen, strict=True)],
    }
