"""The record of a finished run: its numbers, the same of resampled images, its classes, and what they are of.

A JSON file of some 20 kB, so that runs of other machines and other days can stand in one table (results.py).
"""

import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loce.report.tables.rows import COLUMNS, RowRun
from loce.report.tables.steps import average_precisions
from loce.utils.files import write_text

RESAMPLES, DIGITS = 400, 5
RESAMPLE_SEED = 0  # of the images drawn: the same for all runs, so that differences can be paired


def write_record(job: RowRun, seed: int) -> None:
    """Write the record of a run that is trained and evaluated."""
    evaluation = json.loads((job.evaluation / "evaluation.json").read_text(encoding="utf-8"))
    lines = (job.folder / "env.txt").read_text(encoding="utf-8").splitlines()
    last = dict(line.split(": ", 1) for line in lines if ": " in line)  # of the last start, where it was resumed
    script, *words = shlex.split(last["command"])
    record = {
        "command": shlex.join([Path(script).name, *words]),
        "seed": seed,
        "options": job.options,
        "start": start(job),
        "code": last["code"],
        "device": last["device"],
        "started": last["started"],
        **speed(job),
        "minutes": round(float((job.folder / "minutes.txt").read_text()), 1),
        "data": "{annotations}, {images:,} images, {categories:,} categories".format_map(evaluation),
        "protocol": evaluation["rules"],
        "values": dict(zip(COLUMNS, average_precisions(job.evaluation), strict=True)),
        "resamples": resamples(job.evaluation),
        "classes": classes(job.evaluation),
    }
    write_text(job.record, json.dumps(record, separators=(",", ":")).replace(',"', ',\n"') + "\n")


def start(job: RowRun) -> str:
    """The hash of the weights that the run started from; empty of a run that started from none."""
    if not job.config.train.init:
        return ""
    origin = Path(job.config.train.init, "eval/origin.txt").read_text(encoding="utf-8")
    return origin.removeprefix("weights ").partition(",")[0]


def speed(job: RowRun) -> dict[str, float]:
    """Images a second in training, the median of its log's lines, and the most memory of the first process, in GiB."""
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "images_per_second": round(statistics.median(line["images_per_second"] for line in lines), 1),
        "peak_memory_gib": round(max(line["peak_memory_gib"] for line in lines), 2),
    }


def speed_in_words(records: Sequence[dict[str, Any]]) -> str:
    """The same of the runs of a row: mean speed and most memory; "-" where no record has them."""
    known = [record for record in records if "images_per_second" in record]
    if not known:
        return "-"
    mean = statistics.mean(record["images_per_second"] for record in known)
    return f"{mean:.0f} images/s, {max(record['peak_memory_gib'] for record in known):.1f} GiB"


def resamples(evaluation: Path) -> dict[str, list[float]]:
    """COLUMNS in percent of RESAMPLES resampled validation sets; none of a group without objects."""
    from loce.evaluation.bootstrap import draw_weights, load_tallies, means_under  # imports NumPy and more

    box, mask = (load_tallies(evaluation / f"tallies_{kind}.npz") for kind in ("bbox", "segm"))
    weights = draw_weights(len(box.image_ids), RESAMPLES, RESAMPLE_SEED)
    drawn = {"box AP": means_under(box, weights)["AP"], **means_under(mask, weights)}
    return {
        name: [round(100 * v, DIGITS - 2) for v in drawn[name].tolist()]
        for name in COLUMNS
        if (drawn[name] == drawn[name]).all()
    }


def classes(evaluation: Path) -> dict[str, list[Any]]:
    """Of every class: id, group, training instances, mean score and mask AP (None where validation has no objects)."""
    from loce.report.figures import read_table  # imports matplotlib

    ap_of = {row["id"]: float(row["AP"] or -1) for row in read_table(evaluation / "per_category.csv")}
    rows = read_table(evaluation / "mean_scores.csv")
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
