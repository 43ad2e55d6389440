"""Differences of categories between two evaluations: AP and accuracy on the true boxes, with paired intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loce.evaluation.bootstrap import Tallies, difference
from loce.evaluation.true_boxes import KEY
from loce.utils.errors import UserError
from loce.utils.files import csv_text, read_csv

FEWEST = 5  # images with objects of a category, from which on resamples of them say something
CHANCE = (
    f"an interval is of one category by itself (none where under {FEWEST} images have it): of many categories that are "
    "alike in A and B, one in twenty leaves out 0 by chance"
)
WHAT = ("AP", "accuracy")
PARTS = {"first": "A", "second": "B", "difference": "difference", "low": "low", "high": "high", "better": "better"}
Differences = dict[int, dict[str, float]]  # category id -> `difference`
Rows = list[dict[str, Any]]


def category_differences(tallies: Tallies, whole: Sequence[np.ndarray], drawn: Sequence[np.ndarray]) -> Differences:
    """`difference` of each category by its id, without an interval where few images have objects of it.

    whole, drawn: of both evaluations, (K, 1) and (K, B).
    """
    size = len(tallies.image_ids)
    cells = np.unique(tallies.object_category.astype(np.int64) * size + tallies.object_image)
    images = np.bincount(cells // size, minlength=len(tallies.category_ids))
    found = {}
    for k, number in enumerate(tallies.category_ids.tolist()):
        found[number] = difference([values[k, 0] for values in whole], [values[k] for values in drawn])
        if images[k] < FEWEST:
            found[number] |= dict.fromkeys(("low", "high", "better"), float("nan"))
    return found


def category_rows(folders: Sequence[Path], found: Mapping[str, Differences]) -> tuple[str, Rows]:
    """IoU type of per_category.csv in both folders and, of each category, what is known of it: id, name, groups in A
    and B, objects, "AP" and "accuracy" with `difference` (None: not known, or there is no such thing)."""
    paths = [folder / "per_category.csv" for folder in folders]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; give two output folders of scripts/evaluate.py")
    tables = [read_csv(path) for path in paths]
    kinds = [{row["iou_type"] for row in table} for table in tables]
    if kinds[0] != kinds[1]:
        return "", []  # masks in one, boxes in the other
    kind, rows = next(iter(kinds[0]), ""), []
    for a, b in zip(*tables, strict=True):
        ap = found.get(kind, {}).get(int(a["id"]))
        if ap is None and float(a["AP"]) >= 0:  # of protocol pool alone, which has no categories
            ap = difference([float(a["AP"]), float(b["AP"])], [np.empty(0), np.empty(0)])
        groups = "/".join(dict.fromkeys((a["frequency"], b["frequency"])))
        facts = {"id": int(a["id"]), "name": a["name"], "frequency": groups, "instances": a["instances"]}
        rows.append({**facts, "AP": ap, "accuracy": found.get(KEY, {}).get(int(a["id"]))})
    return kind, rows


def category_table(rows: Rows) -> str:
    """CSV, a row a category; nothing where a number is not known."""
    facts = ("id", "name", "frequency", "instances")
    head = [*facts, *(f"{what}_{part}" for what in WHAT for part in PARTS.values())]
    numbers = ([(row[what] or {}).get(part, np.nan) for what in WHAT for part in PARTS] for row in rows)
    return csv_text([head, *([*(row[fact] for fact in facts), *own] for row, own in zip(rows, numbers, strict=True))])


def moved(kind: str, rows: Rows, top: int) -> list[str]:
    """Lines on the `top` categories that gained and that lost most, AP of `kind`, then accuracy."""
    lines: list[str] = []
    for what, of in zip(WHAT, (kind, "true boxes"), strict=True):
        known = [row for row in rows if row[what] and np.isfinite(row[what]["difference"])]
        known.sort(key=lambda row: row[what]["difference"])
        for word, sign, chosen in (("gained", 1, known[::-1][:top]), ("lost", -1, known[:top])) if known else ():
            lines += ["", f"categories that {word} most {what} ({of}; group, objects here; 95% interval of B - A)"]
            chosen = [row for row in chosen if sign * row[what]["difference"] > 0]
            for row in chosen:
                name, own = f"{row['name'][:28]} ({row['frequency']}, {row['instances']})", row[what]
                between = f"  {own['low']:+.3f} to {own['high']:+.3f}" if np.isfinite(own["low"]) else ""
                numbers = f"{own['first']:7.3f}{own['second']:7.3f}{own['difference']:+8.3f}"
                lines.append(f"  {name:40}{numbers}{between}")
            lines += [] if chosen else ["  none"]
    return [*lines, "", f"note: {CHANCE}"] if lines else []
