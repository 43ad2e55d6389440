"""Lost objects one by one: misses.csv, a row each, rare categories first and in a group the largest objects first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loce.evaluation.lost_objects import CAUSES, Outcomes
from loce.evaluation.lvis_ap import Evaluation
from loce.evaluation.true_boxes import TrueBoxes
from loce.utils.classes import GROUPS
from loce.utils.files import csv_text, write_text

FILE = "misses.csv"
FOUND = ("found", "outscored")
COLUMNS = (
    *("image_id", "annotation_id", "id", "name", "frequency", "area_share", "cause", "taken_for"),
    *("own_score", "best", "best_score"),
)


def write_misses(output: Path, evaluation: Evaluation, outcomes: Outcomes, boxes: TrueBoxes | None) -> None:
    """Of every lost object: its area as a share of its image, the cause, what it was taken for and, where the true
    boxes were classified, the scores of its own category and of the best one there."""
    truth = evaluation.truth
    lost = np.flatnonzero((outcomes.cause >= 0) & ~np.isin(outcomes.cause, [list(CAUSES).index(c) for c in FOUND]))
    share = truth.areas[lost] / truth.sizes[truth.image[lost]].prod(axis=1)
    group = np.array([GROUPS.index(str(g)) for g in truth.frequency])[truth.category[lost]]
    order = np.lexsort((-share, group))
    place = {} if boxes is None else {number: row for row, number in enumerate(boxes.annotation_ids.tolist())}
    name_of = dict(zip(truth.category_ids.tolist(), truth.names, strict=True))
    rows: list[Sequence[Any]] = [COLUMNS]
    for row, area in zip(lost[order].tolist(), share[order].tolist(), strict=True):
        k, other, number = truth.category[row], int(outcomes.other[row]), int(truth.ids[row])
        seen = ["", "", ""]
        if boxes is not None and number in place:
            at = place[number]
            seen = [f"{boxes.scores[at]:.4g}", name_of[int(boxes.best_ids[at])], f"{boxes.best_scores[at]:.4g}"]
        facts = [truth.image_ids[truth.image[row]], number, truth.category_ids[k], truth.names[k], truth.frequency[k]]
        cause = list(CAUSES)[outcomes.cause[row]]
        rows.append([*facts, f"{area:.4g}", cause, truth.names[other] if other >= 0 else "", *seen])
    write_text(output / FILE, csv_text(rows))
