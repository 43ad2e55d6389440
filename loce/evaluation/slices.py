"""Numbers of slices: of the images with an attribute, such as weather=rain, from the matches of the whole set.

A slice is a weighting of the images (bootstrap.py), 1 inside and 0 outside; its resamples draw among its own images.
Equal to evaluating its images alone, but for the caps of protocols fixed and pool, which are over the whole set.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from loce.evaluation.bootstrap import Tallies, as_they_are, draw_weights, fraction_intervals, means_under
from loce.utils.files import csv_text

SHOWN = ("AP", "APr", "APc", "APf", "ECE")
Rows = list[dict[str, Any]]


def slice_numbers(tallies: Tallies, resamples: int) -> Rows:
    """A row a slice: attribute, value, images, objects, and what `means_under` gives, -1 where undefined, each with the
    ends of its 95% interval as NAME_low and NAME_high (nan: none)."""
    if tallies.slices is None or tallies.in_slice is None:
        return []
    rows = []
    for (attribute, value), inside in zip(tallies.slices.tolist(), tallies.in_slice, strict=True):
        objects = inside[tallies.object_image]
        if tallies.pooled:
            objects &= tallies.object_category == 0
        row: dict[str, Any] = {"attribute": attribute, "value": value, "images": inside.sum(), "objects": objects.sum()}
        whole = means_under(tallies, as_they_are(len(inside), inside))
        drawn = means_under(tallies, draw_weights(len(inside), resamples, 0, inside))
        for name, (low, high) in fraction_intervals(whole, drawn).items():
            known = float(whole[name][0]) if np.isfinite(whole[name][0]) else -1.0
            row |= {name: known, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def slice_table(numbers: Mapping[str, Rows]) -> str:
    """CSV of `slice_numbers`; in front, which evaluation a row is of ("segm", "segm_pool")."""
    every = [{"of": key, **row} for key, rows in numbers.items() for row in rows]
    names = list(dict.fromkeys(name for row in every for name in row))
    return csv_text([names, *([row.get(name, "") for name in names] for row in every)])


def slice_lines(rows: Rows, what: str) -> list[str]:
    """What is shown of slices on the screen."""
    lines = [f"slices, {what} (each a part of the images)", f"{'':28}{'images':>8}{'objects':>9}"]
    lines[1] += "".join(f"{name:>8}" for name in SHOWN) + "  95% interval of AP"
    for row in rows:
        cells = [f"{row[name]:8.3f}" if row.get(name, -1) >= 0 else f"{'-':>8}" for name in SHOWN]
        between = f"  {row['AP_low']:.3f} - {row['AP_high']:.3f}" if row["AP_low"] == row["AP_low"] else ""
        name = f"{row['attribute']}={row['value']}"[:27]
        lines.append(f"{name:28}{row['images']:8,}{row['objects']:9,}{''.join(cells)}{between}")
    return lines
