"""Report of lost objects: their causes as a table (errors.csv), a figure (errors.png) and a few lines on the screen."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loce.evaluation.annotations import positions
from loce.evaluation.detections import Detections
from loce.evaluation.lost_objects import CAUSES, Outcomes, confusions, given_back
from loce.evaluation.lvis_ap import Evaluation
from loce.utils.classes import GROUP_NAMES, GROUP_RGB
from loce.utils.files import atomic_write, csv_text, write_text

_SHAPES = {"bbox": "boxes", "segm": "masks"}
GREY = (150, 150, 150)  # of all
GROUPS = {"all": "all"} | GROUP_NAMES


def write_errors(
    output: str | Path,
    evaluation: Evaluation,
    outcomes: Outcomes,
    detections: Detections,
    origin: str = "",
) -> list[str]:
    """errors.csv and errors.png (`origin` is written below it) in the folder `output`; returns lines for the screen."""
    back = given_back(evaluation, outcomes)
    groups = {name: _group(evaluation, outcomes, back, name) for name in GROUPS}
    write_text(Path(output) / "errors.csv", _table(evaluation, outcomes, back, groups))
    with atomic_write(Path(output) / "errors.png") as temporary:
        part = f", SUBSET, {evaluation.truth.part}" if evaluation.truth.part else ""
        draw(groups, f"{_SHAPES[evaluation.iou_type]}, protocol {evaluation.protocol.name}{part}", origin, temporary)
    return lines(evaluation, outcomes, groups, detections)


def _group(evaluation: Evaluation, outcomes: Outcomes, back: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    """Objects by cause, AP and what each cause would give back, for the categories of a group with objects."""
    matches, truth = evaluation.matches, evaluation.truth
    chosen = (matches.objects[0] > 0) & ((truth.frequency == name) | (name == "all"))
    causes = outcomes.cause[chosen[truth.category]]
    row: dict[str, Any] = {"objects": int(matches.objects[0][chosen].sum())}
    row |= {cause: int((causes == number).sum()) for number, cause in enumerate(CAUSES)}
    for name in ("AP", "AP50"):
        values = np.array([entry[name] for entry in evaluation.per_category])[chosen]
        row[name] = float(values.mean()) if len(values) else float("nan")
    row |= {f"back_{cause}": float(v[chosen].mean()) if chosen.any() else float("nan") for cause, v in back.items()}
    return row


def _table(
    evaluation: Evaluation,
    outcomes: Outcomes,
    back: Mapping[str, np.ndarray],
    groups: Mapping[str, dict[str, Any]],
) -> str:
    """CSV: a row a group, then a row a category with objects; empty where nothing is known."""
    columns = list(groups["all"])
    blank = {column for name in outcomes.unseen for column in (name, f"back_{name}")}
    rows: list[list[Any]] = [["level", "id", "name", "frequency", *columns, "classified_as_what"]]
    for name, row in groups.items():
        cells = ["" if column in blank else value for column, value in row.items()]
        rows.append(["group", "", GROUPS[name], "" if name == "all" else name, *cells, ""])
    truth, size = evaluation.truth, len(CAUSES)
    known = outcomes.cause >= 0
    counts = np.bincount(truth.category[known] * size + outcomes.cause[known], minlength=size * len(truth.category_ids))
    counts = counts.reshape(-1, size)
    for k in np.flatnonzero(evaluation.matches.objects[0]):
        entry = evaluation.per_category[k]
        numbers = [int(evaluation.matches.objects[0, k]), *counts[k].tolist(), entry["AP"], entry["AP50"]]
        numbers += [float(values[k]) for values in back.values()]
        cells = ["" if column in blank else value for column, value in zip(columns, numbers, strict=True)]
        row_head = ["category", entry["id"], entry["name"], entry["frequency"]]
        rows.append([*row_head, *cells, confusions(evaluation, outcomes, k)])
    return csv_text(rows)


def lines(
    evaluation: Evaluation,
    outcomes: Outcomes,
    groups: Mapping[str, dict[str, Any]],
    detections: Detections,
) -> list[str]:
    """Objects by cause and the AP each cause would give back, rare beside all."""
    shown = {name: row for name, row in groups.items() if row["objects"]}
    head = "".join(f"{GROUPS[name]:>20}" for name in shown)
    text = [f"{evaluation.iou_type}: what became of the objects at IoU .5, and the AP (percent) that would give back"]
    text.append(f"{'':48}{head}")
    text.append(f"{'objects, AP':48}" + "".join(f"{r['objects']:>12,}{100 * r['AP']:8.1f}" for r in shown.values()))
    for cause, meaning in CAUSES.items():
        if not any(row[cause] for row in shown.values()):
            continue
        gain = [f"{100 * row[f'back_{cause}']:+8.1f}" if cause != "found" else f"{'':8}" for row in shown.values()]
        text.append(f"{meaning:48}" + "".join(f"{r[cause]:12,}{g}" for r, g in zip(shown.values(), gain, strict=True)))
    exact = "".join(f"{'':12}{100 * (r['AP50'] - r['AP']):+8.1f}" for r in shown.values())
    text.append(f"{'exact ' + _SHAPES[evaluation.iou_type] + ' of those found (AP50 - AP)':48}{exact}")
    return text + _caveats(evaluation, outcomes, groups, detections)


def _caveats(
    evaluation: Evaluation,
    outcomes: Outcomes,
    groups: Mapping[str, dict[str, Any]],
    detections: Detections,
) -> list[str]:
    """Notes on causes that detections alone do not show."""
    if "removed_by_nms" not in outcomes.unseen:
        return []
    notes = []
    row, truth = groups["all"], evaluation.truth
    image, _ = positions(truth.image_ids, detections.image_ids)
    category, _ = positions(truth.category_ids, detections.category_ids)
    if truth.federated and truth.counted()[image, category].all():
        notes.append(
            "note: the results hold verified categories only: confusion with any other category looks like no detection"
        )
    if row["no_detection"]:
        notes.append(
            "note: from detections alone, which do not tell what NMS removed and what was proposed; our own inference "
            "stores that (eval.errors)"
        )
    return notes


def draw(groups: Mapping[str, dict[str, Any]], title: str, origin: str, path: Path) -> None:
    """Bars: AP that each cause would give back, by group; `origin`: what the detections are of, in small letters."""
    from matplotlib.figure import Figure  # slow to import

    names = [cause for cause in CAUSES if cause != "found" and any(row[cause] for row in groups.values())]
    groups = {name: row for name, row in groups.items() if row["objects"]}
    figure = Figure(figsize=(9, 2 + 0.6 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / max(len(groups), 1)
    for g, (group, row) in enumerate(groups.items()):
        values = [np.nan_to_num(100 * row[f"back_{name}"]) for name in names]
        colour = [part / 255 for part in GROUP_RGB.get(group, GREY)]
        label = f"{GROUPS[group]} (AP {100 * row['AP']:.1f})"
        axes.barh(np.arange(len(names)) + g * height, values, height, label=label, color=colour)
    axes.set_yticks(np.arange(len(names)) + 0.4 - height / 2, [CAUSES[name] for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("AP that the cause would give back, percent")
    axes.set_title(f"What keeps AP low: {title}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.supxlabel(textwrap.fill(origin, 150, break_on_hyphens=False), fontsize=6, color="grey")
    figure.savefig(path, dpi=120)
