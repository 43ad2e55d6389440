"""Is B better than A? Paired differences of two evaluations with intervals, and the categories that moved most.

Both are resampled with the same images (Efron & Tibshirani 1993), so that what is hard for both cancels out; the
resampled differences are shifted to the difference itself, as in `bootstrap`.
"""

import csv
from pathlib import Path

import numpy as np

from loce.evaluation.bootstrap import METRICS, Tallies, draw_weights, interval, load_tallies, means_under
from loce.utils.errors import UserError


def compare(first: Tallies, second: Tallies, resamples: int = 1000, seed: int = 0) -> dict[str, dict[str, float]]:
    """For AP, APr, APc, APf: first, second, difference (second - first), its 95% interval low, high, and better, the
    share of resamples in which the second is better; nan where undefined.

    UserError when the two are not of the same images, objects, IoU type and protocol.
    """
    for name in ("image_ids", "category_ids", "object_image", "object_category", "protocol", "iou_type"):
        if not np.array_equal(getattr(first, name), getattr(second, name)):
            raise UserError(
                f"the two evaluations differ in {name.replace('_', ' ')}; only evaluations of the same annotation "
                "file, type and protocol can be compared"
            )
    ones = np.ones((len(first.image_ids), 1), dtype=np.int32)
    weights = draw_weights(len(first.image_ids), resamples, seed)
    whole = [means_under(tallies, ones) for tallies in (first, second)]
    drawn = [means_under(tallies, weights) for tallies in (first, second)]
    rows = {}
    for name in METRICS:
        values = float(whole[0][name][0]), float(whole[1][name][0])
        differences = drawn[1][name] - drawn[0][name]
        low, high = interval(differences, values[1] - values[0])
        finite = differences[np.isfinite(differences)]
        shifted = finite - finite.mean() + values[1] - values[0] if len(finite) else finite
        better = float((shifted > 0).mean()) if len(finite) else float("nan")
        rows[name] = {
            "first": values[0],
            "second": values[1],
            "difference": values[1] - values[0],
            "low": low,
            "high": high,
            "better": better,
        }
    return rows


def compare_folders(first: str | Path, second: str | Path, resamples: int = 1000, top: int = 10) -> str:
    """Text that compares two output folders of scripts/evaluate.py for every IoU type that both have."""
    folders = Path(first), Path(second)
    for folder in folders:
        if not list(folder.glob("tallies_*.npz")):
            raise UserError(f"{folder}: holds no tallies_<type>.npz; give two output folders of scripts/evaluate.py")
    kinds = [k for k in ("bbox", "segm") if all((folder / f"tallies_{k}.npz").is_file() for folder in folders)]
    if not kinds:
        raise UserError(f"{folders[0]} and {folders[1]} have no IoU type in common")
    lines = [f"A: {folders[0]}", f"B: {folders[1]}"]
    for kind in kinds:
        first_tallies, second_tallies = (load_tallies(folder / f"tallies_{kind}.npz") for folder in folders)
        lines += ["", f"{kind}, protocol {first_tallies.protocol}, {len(first_tallies.image_ids):,} images"]
        lines += [f"{'':6}{'A':>8}{'B':>8}{'B - A':>9}  {'95% interval':18}B is better in"]
        for name, row in compare(first_tallies, second_tallies, resamples).items():
            lines.append(_line(name, row))
    return "\n".join(lines + moved(folders, top)) + "\n"


def _line(name: str, row: dict[str, float]) -> str:
    if not np.isfinite(row["difference"]):
        return f"{name:6}{'no category with objects':>34}"
    between = f"{row['low']:+.3f} to {row['high']:+.3f}"
    numbers = f"{row['first']:8.3f}{row['second']:8.3f}{row['difference']:+9.3f}"
    return f"{name:6}{numbers}  {between:18}{row['better']:.1%} of resamples"


def moved(folders: tuple[Path, Path], top: int) -> list[str]:
    """The `top` categories that gained and that lost most AP, from per_category.csv."""
    tables = []
    for folder in folders:
        path = folder / "per_category.csv"
        if not path.is_file():
            raise UserError(f"{path}: no such file; give two output folders of scripts/evaluate.py")
        with path.open(newline="", encoding="utf-8") as file:
            tables.append(list(csv.DictReader(file)))
    if {row["iou_type"] for row in tables[0]} != {row["iou_type"] for row in tables[1]}:
        return []  # masks in one, boxes in the other
    pairs = [(a, b, float(b["AP"]) - float(a["AP"])) for a, b in zip(*tables, strict=True) if float(a["AP"]) >= 0]
    pairs.sort(key=lambda pair: pair[2])
    lines = []
    for what, chosen in (("gained", pairs[::-1][:top]), ("lost", pairs[:top])):
        chosen = [pair for pair in chosen if (pair[2] > 0) == (what == "gained") and pair[2] != 0]
        lines += ["", f"categories that {what} most AP ({tables[0][0]['iou_type']}; group, objects here)"]
        for a, b, difference in chosen:
            name = f"{a['name'][:28]} ({a['frequency']}, {a['instances']})"
            lines.append(f"  {name:40}{float(a['AP']):7.3f}{float(b['AP']):7.3f}{difference:+8.3f}")
        lines += [] if chosen else ["  none"]
    return lines
