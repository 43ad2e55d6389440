"""Contents of the report's sections, as page.html shows them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from loce.evaluation.lost_objects import CAUSES
from loce.evaluation.true_boxes import KEY, NAMES, confusions, largest, matrix
from loce.report.reading import Run, Values, number
from loce.report.states import GROUPS, KINDS, States
from loce.utils.yaml_text import differing, dotted, show

ERRORS = ("ECE", "MCE")
SHAPES = {"segm": "mask", "bbox": "box", "boundary": "boundary"}
OF_GROUPS = ("APr", "APc", "APf")
METRICS = ("AP", "APr", "APc", "APf", "AP50", "AP75")
POINTS = 300  # of a curve; longer ones are averaged over neighbours
# Of metrics.jsonl: title of a figure, and the names of its values with what the legend calls them.
CURVES: dict[str, tuple[str, Callable[[Run], dict[str, str]]]] = {
    "losses": (
        "Losses (logarithmic)",
        lambda run: {k: k for line in run.metrics for k in line if k.startswith("loss")},
    ),
    "scores": ("Mean score of the groups", lambda _: {f"mean_score/{g}": name for g, name in GROUPS.items()}),
    "memory": ("Memory fill of the groups", lambda _: {f"memory_fill/{g}": name for g, name in GROUPS.items()}),
    "aps": (
        "AP of the groups, after epochs (train.evaluate_every) and at the end: of masks, of boxes where there are none",
        lambda run: {f"eval/{kind(run)}_AP{g}": name for g, name in {"": "all", **GROUPS}.items()},
    ),
}


def kind(run: Run) -> str:
    """The IoU type that a run's AP is of: masks, or boxes where masks were not evaluated."""
    masks = "segm" in run.aps or any("eval/segm_AP" in line for line in run.metrics)
    return "segm" if masks else "bbox"


def percent(value: float | None) -> str:
    """12.3; "-" of no classes."""
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"


def short(value: float | None) -> float | None:
    """Four digits of a number."""
    return None if value is None else float(f"{value:.4g}")


def subset(run: Run) -> str:
    """Which images the last evaluation is of, where not of all."""
    return f" (SUBSET, {run.facts['subset']})" if run.facts.get("subset") else ""


def regrouped(runs: Sequence[Run]) -> str:
    """What is said where runs put classes into different groups, so that numbers of groups do not compare; or ""."""
    groups = [dict(zip(run.classes.ids, run.classes.groups, strict=True)) for run in runs]
    other = [
        f"{run.title} ({count} classes)"
        for run, own in zip(runs, groups, strict=True)
        if (count := sum(own[i] != group for i, group in groups[0].items() if i in own))
    ]
    told = f"{', '.join(other)} put classes into other groups than {runs[0].title}: numbers of groups are of different "
    return (
        told + "classes, so APr, APc and APf are not shown, and other numbers of groups do not compare."
        if other
        else ""
    )


def results(run: Run, groups: bool = True) -> list[dict[str, Any]]:
    """METRICS of masks and boxes, each with the ends of its interval (None: not known), of the last evaluation and of
    those of scripts/evaluate.py, which are named by folder and annotation file; groups: with those of OF_GROUPS."""
    evaluations = {run.title + subset(run): (run.aps, run.facts)}
    for folder, (aps, facts) in run.others.items():
        part = f", SUBSET, {facts['subset']}" if facts.get("subset") else ""
        what = f"{facts.get('annotations', '-')}, {facts.get('protocol', '-')}{part}"
        evaluations[f"{run.title}, {folder}: {what}"] = aps, facts
    return [
        {
            "run": title,
            "of": name,
            "cells": [
                (None, None, None)
                if m in OF_GROUPS and not groups
                else (aps[kind].get(m), *(((facts.get("intervals") or {}).get(kind) or {}).get(m) or (None, None)))
                for m in METRICS
            ],
        }
        for title, (aps, facts) in evaluations.items()
        for shape, what in SHAPES.items()
        for kind, name in ((key, key.replace(shape, what, 1).replace("_", ", ")) for key in aps)
        if kind.partition("_")[0] == shape
    ]


def accuracy(run: Run, groups: bool = True) -> list[tuple[float | None, float | None, float | None]]:
    """Class-balanced accuracy on the true boxes of all classes and of rare, common and frequent ones, each with the
    ends of its interval (None: not known); groups: with those of the groups; empty where there is none."""
    spans = (run.facts.get("intervals") or {}).get(KEY) or {}
    found = run.aps.get(KEY) or {}
    shown = [name for name in NAMES.values() if name in found]
    return [
        (found[name], *(spans.get(name) or (None, None))) if groups or name == shown[0] else (None, None, None)
        for name in shown
    ]


def confusion_matrix(run: Run) -> dict[str, Any]:
    """Of the classes of the largest confusions: heads, and rows of name, group, boxes and (boxes, share) in each
    column, the last of which is all other classes; empty where nothing is confused, or not known."""
    if run.boxes is None:
        return {}
    ids = np.sort(run.classes.ids)
    chosen = largest(confusions(run.boxes, ids))
    facts = dict(zip(run.classes.ids, zip(run.classes.names, run.classes.groups, strict=True), strict=True))
    named = [facts[int(ids[k])] for k in chosen]
    rows = []
    for (name, group), counts in zip(named, matrix(run.boxes, ids, chosen).tolist(), strict=True):
        cells = [(count, count / max(sum(counts), 1)) for count in counts]
        rows.append({"name": name, "group": group, "boxes": sum(counts), "cells": cells})
    return {"heads": [*(name for name, _ in named), "any other"], "rows": rows} if rows else {}


def calibration(run: Run) -> list[dict[str, Any]]:
    """Of each group with detections: ECE and MCE with their intervals, the mean of Eq. 2's score over its classes on
    the true boxes of the validation data and in training, and its reliability diagram as points (score, precision,
    detections)."""
    kind = "segm" if "segm" in run.aps else "bbox"
    spans = (run.facts.get("intervals") or {}).get(kind) or {}
    trained = run.snapshots[-1].scores if run.snapshots else []
    found = []
    for group, name in GROUPS.items():
        bins = [row for row in run.reliability if row["group"] == group and row["precision"]]
        errors = [
            (run.aps.get(kind, {}).get(f"{n}{group}"), *(spans.get(f"{n}{group}") or (None, None))) for n in ERRORS
        ]
        means = []
        for scores in (run.tested, trained):
            own = [s for s, g in zip(scores, run.classes.groups, strict=False) if g == group and s is not None]
            means.append(sum(own) / len(own) if own else None)
        points = [(float(r["mean_score"]), float(r["precision"]), int(r["detections"])) for r in bins]
        found += [{"group": group, "name": name, "errors": errors, "means": means, "points": points}] if bins else []
    return found


def shown_curves(runs: Sequence[Run]) -> dict[str, str]:
    """Name -> title of the curves that one of the runs has more than a point of."""
    return {name: title for name, (title, _) in CURVES.items() if any(len(curve(run, name)["at"]) > 1 for run in runs)}


def curve(run: Run, name: str) -> dict[str, Any]:
    """{"at": iterations, "series": {legend: values}} of the lines that have such values."""
    chosen = CURVES[name][1](run)
    last = {f"eval/{kind(run)}_{key}": number(str(value)) for key, value in run.aps.get(kind(run), {}).items()}
    lines = [line for line in [*run.metrics, {"iteration": run.last, **last}] if any(key in line for key in chosen)]
    size = -(-len(lines) // POINTS) or 1
    parts = [lines[i : i + size] for i in range(0, len(lines), size)]
    series = {shown: [_mean([_value(line, key) for line in part]) for part in parts] for key, shown in chosen.items()}
    known = {shown: values for shown, values in series.items() if any(v is not None for v in values)}
    return {"at": [part[-1]["iteration"] for part in parts], "series": known}


def _value(line: Mapping[str, Any], key: str) -> float | None:
    """None also for the -1 of an AP that is undefined."""
    value: float | None = line.get(key)
    return None if value is None or (key.startswith("eval/") and value < 0) else value


def _mean(values: Values) -> float | None:
    known = [value for value in values if value is not None]
    return short(sum(known) / len(known)) if known else None


def causes(run: Run) -> dict[str, Any]:
    """Causes of lost objects in each group that has objects, and the AP that every cause would give back."""
    by_name = {row["name"]: row for row in run.errors if row["level"] == "group" and int(row["objects"])}
    groups: list[dict[str, Any]] = [
        {
            "name": name,
            "objects": int(by_name[name]["objects"]),
            "counts": {cause: int(by_name[name][cause] or 0) for cause in CAUSES},
            "back": {cause: by_name[name].get(f"back_{cause}") for cause in CAUSES},
        }
        for name in ("rare", "common", "frequent", "all")
        if name in by_name
    ]
    rows = [
        {"cause": cause, "name": name, "colour": f"s{place}"}  # a class of style.css
        for place, (cause, name) in enumerate(CAUSES.items())
        if any(group["counts"][cause] for group in groups)
    ]
    return {"groups": groups, "rows": rows}


def class_table(runs: Sequence[Run], states: Sequence[States]) -> dict[str, Any]:
    """A row for each class of the first run; of the others the class of the same id beside it.

    heads: of each run its columns; rows: name, group, training instances and cells of all runs.
    """
    columns, heads = [], []
    for run, kinds in zip(runs, states, strict=True):
        known = [kind for kind in KINDS if kind in kinds]
        texts = [[_cell(value, kind) for value in kinds[kind][-1][1]] for kind in known]
        lost = {int(row["id"]): most_lost(row) for row in run.errors if row["level"] == "category"}
        by_id = dict(zip(run.classes.ids, zip(*texts, strict=True), strict=True)) if texts else {}
        heads.append([*(KINDS[kind].short for kind in known), *(["lost mostly"] if lost else [])])
        columns.append({i: [*cells, *([lost.get(i, "-")] if lost else [])] for i, cells in by_id.items()})
    facts = runs[0].classes
    rows = [
        {
            "name": facts.names[label],
            "group": facts.groups[label],
            "count": facts.counts[label],
            "cells": [
                cell
                for column, head in zip(columns, heads, strict=True)
                for cell in column.get(facts.ids[label], ["-"] * len(head))
            ],
        }
        for label in facts.order
    ]
    return {"heads": heads, "rows": rows}


def _cell(value: float | None, kind: str) -> str:
    """Three digits; percents from 10 on with one decimal, too; counts whole."""
    if value is None:
        return "-"
    value = 100 * value if KINDS[kind].percent else value
    if KINDS[kind].percent and value >= 10:
        return f"{value:.1f}"
    return f"{value:.0f}" if value % 1 == 0 else f"{value:.3g}"


def most_lost(row: Mapping[str, str]) -> str:
    """The cause that most objects of a class are lost to."""
    counts = {cause: int(row[cause] or 0) for cause in CAUSES if cause != "found"}
    cause = max(counts, key=lambda name: counts[name])
    what = f": {row['classified_as_what']}" if cause == "classified_as" and row["classified_as_what"] else ""
    return f"{counts[cause]} of {row['objects']} {CAUSES[cause]}{what}" if counts[cause] else "-"


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Options in which the runs differ, with the value of each run."""
    options = [dotted(run.config) for run in runs]
    keys = [key for key in differing(*options) if key != "output"]
    return {key: [show(found[key]) if key in found else "-" for found in options] for key in keys}


def origin(run: Run) -> dict[str, str]:
    """The run's summary from its log, and the machine that it ran on the last time."""
    started = [block for block in run.texts["env.txt"].split("\n\n") if block.strip()]
    kept = ("method", "data", "model", "batch", "schedule")
    lines = [line for line in run.texts["log.txt"].splitlines() if line.split(":")[0] in kept]
    return {
        "start": "\n".join(dict.fromkeys(lines)),
        "machine": started[-1] if started else "env.txt is not there",
    }
