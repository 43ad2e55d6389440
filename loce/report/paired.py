"""Paired differences between runs, as the page shows them: what scripts/compare.py says of each run and the first."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from loce.evaluation.bootstrap import METRICS
from loce.evaluation.comparison import compare_evaluations
from loce.evaluation.true_boxes import KEY, NAMES
from loce.report.panels import SHAPES, subset
from loce.report.reading import Run
from loce.utils.errors import UserError

COLUMNS = (*METRICS, "AP50")


class Paired(NamedTuple):
    """Rows of AP, a cell for each of COLUMNS, and of class-balanced accuracy, a cell for each of NAMES: {"run", "of",
    "cells"}; notes: what is not compared, and why. A cell: percentage points, whether 0 is outside of the interval."""

    aps: list[dict[str, Any]]
    accuracies: list[dict[str, Any]]
    notes: list[str]


def paired(runs: Sequence[Run], resamples: int = 1000) -> Paired:
    """Last evaluations of all runs but the first against that of the first."""
    found = Paired([], [], [])
    for run in runs[1:]:
        try:
            parts, _ = compare_evaluations(runs[0].folder / "eval", run.folder / "eval", resamples)
        except UserError as error:
            found.notes.append(f"{run.title}: not compared: {error}")
            continue
        for part in parts:
            rows, names = (found.accuracies, tuple(NAMES.values())) if part.kind == KEY else (found.aps, COLUMNS)
            protocol = str(part.tallies[0].protocol).partition(" ")[0]
            cells = [cell(part.rows.get(name, {})) for name in names]
            if part.rows:
                what = {"run": run.title + subset(run), "of": f"{SHAPES.get(part.kind)}, {protocol}"}
                rows.append({**what, "cells": cells})
        notes = dict.fromkeys(part.note for part in parts if part.note)
        found.notes.extend(f"{run.title}: {note}" for note in notes)
    return found


def cell(row: dict[str, float]) -> tuple[str, bool]:
    """A `difference`: "+1.2 [-0.3, +2.6]"; "-" where there is none, or no category."""
    if not np.isfinite(row.get("difference", np.nan)):
        return "-", False
    low, high = (100 * row[end] for end in ("low", "high"))
    between = f" [{low:+.1f}, {high:+.1f}]" if np.isfinite(low) else ""
    return f"{100 * row['difference']:+.1f}{between}", low > 0 or high < 0
