"""Comparison of two evaluations: paired bootstrap over their images, of the whole set and of slices of it.

Both are resampled with the same images, so that what is hard for both cancels out. Legend: I images.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from loce.evaluation.bootstrap import Tallies, as_they_are, draw_weights, interval, load_tallies, means_under
from loce.evaluation.calibration import NAMES as CALIBRATION
from loce.evaluation.slices import SHOWN
from loce.utils.errors import UserError
from loce.utils.files import read_csv

HEAD = f"{'A':>8}{'B':>8}{'B - A':>9}  {'95% interval':18}B is better in"


def compare(
    first: Tallies,
    second: Tallies,
    resamples: int = 1000,
    inside: np.ndarray | None = None,
) -> dict[str, dict[str, float]]:
    """For AP, APr, APc, APf and calibration errors: first, second, difference (second - first), its 95% interval low,
    high, and better, the share of resamples in which the second is better (a lower error); nan where undefined.
    inside: (I,) bool, the images of a slice that alone count.

    Without the numbers of groups where the two put categories into different ones: these are of different categories.
    UserError when the two are not of the same images, objects, IoU type and protocol.
    """
    for name in ("image_ids", "category_ids", "object_image", "object_category", "protocol", "iou_type"):
        a, b = getattr(first, name), getattr(second, name)
        if first.pooled and name.startswith("object_"):  # the pool of all; groups may differ, see `regrouped`
            a, b = a[first.object_category == 0], b[second.object_category == 0]
        if not np.array_equal(a, b):
            raise UserError(
                f"the two evaluations differ in {name.replace('_', ' ')}; only evaluations of the same annotation "
                "file, type and protocol can be compared"
            )
    # AP of the data set as it is, then of resampled images.
    weights = draw_weights(len(first.image_ids), resamples, 0, inside)
    whole = [means_under(tallies, as_they_are(len(weights), inside)) for tallies in (first, second)]
    drawn = [means_under(tallies, weights) for tallies in (first, second)]
    rows = {}
    names = [name for name in whole[0] if name in whole[1]]
    if regrouped(first, second):
        names = [name for name in names if name in ("AP", "ECE", "MCE")]
    for name in names:
        values = float(whole[0][name][0]), float(whole[1][name][0])
        differences = drawn[1][name] - drawn[0][name]
        low, high = interval(differences, values[1] - values[0])
        finite = differences[np.isfinite(differences)]
        # Centred on the difference that was measured, as the interval is.
        shifted = finite - finite.mean() + values[1] - values[0] if len(finite) else finite
        wins = shifted < 0 if name in CALIBRATION else shifted > 0
        better = float(wins.mean()) if len(finite) else float("nan")
        rows[name] = {
            "first": values[0],
            "second": values[1],
            "difference": values[1] - values[0],
            "low": low,
            "high": high,
            "better": better,
        }
    return rows


def regrouped(first: Tallies, second: Tallies) -> str:
    """What is said where the two put categories into different groups; "" where they do not."""
    ours, theirs = (one.frequency if one.groups is None else one.groups for one in (first, second))
    if np.array_equal(ours, theirs):
        return ""
    return (
        f"{(ours != theirs).sum()} of {len(ours)} categories are rare, common or frequent otherwise in B "
        "(its training set or annotation file says so): numbers of groups would be of different categories, and are "
        "left out"
    )


def compare_folders(first: str | Path, second: str | Path, resamples: int = 1000, top: int = 10) -> str:
    """Text that compares two output folders of scripts/evaluate.py for every IoU type that both have."""
    folders = Path(first), Path(second)
    found = []
    for folder in folders:
        files = sorted(folder.glob("tallies_*.npz"))
        if not files:
            raise UserError(f"{folder}: holds no tallies_<type>.npz; give two output folders of scripts/evaluate.py")
        loaded = [load_tallies(file) for file in files]
        found.append({(str(one.iou_type), str(one.protocol)): one for one in loaded})
    if not {kind for kind, _ in found[0]} & {kind for kind, _ in found[1]}:
        raise UserError(f"{folders[0]} and {folders[1]} have no IoU type in common")
    both = [key for key in found[0] if key in found[1]]
    if not both:
        named = [", ".join(sorted({protocol for _, protocol in one})) for one in found]
        raise UserError(
            f"the two evaluations differ in protocol: {folders[0]} is {named[0]}, {folders[1]} is {named[1]}"
        )
    lines = [f"A: {folders[0]}", f"B: {folders[1]}"]
    for kind, protocol in both:
        one, other = found[0][kind, protocol], found[1][kind, protocol]
        part = "" if one.part is None else str(one.part)
        lines += ["", f"{kind}, protocol {protocol}, {f'SUBSET, {part}' if part else f'{len(one.image_ids):,} images'}"]
        lines += [f"{'':6}{HEAD}", *difference_lines(compare(one, other, resamples))]
        lines += [note] if (note := regrouped(one, other)) else []
        lines += slice_differences(one, other, resamples)
    return "\n".join(lines + moved(folders, top)) + "\n"


def difference_lines(rows: Mapping[str, Mapping[str, float]], indent: str = "") -> list[str]:
    """A line for each row of `compare`."""
    lines = []
    for name, row in rows.items():
        between = f"{row['low']:+.3f} to {row['high']:+.3f}"
        numbers = f"{row['first']:8.3f}{row['second']:8.3f}{row['difference']:+9.3f}"
        known = f"{numbers}  {between:18}{row['better']:.1%} of resamples"
        nothing = "no detections" if name in CALIBRATION else "no category with objects"
        lines.append(f"{indent}{name:6}{known if np.isfinite(row['difference']) else f'{nothing:>34}'}")
    return lines


def slice_differences(first: Tallies, second: Tallies, resamples: int) -> list[str]:
    """Lines that compare the slices that both have, of the same images, each paired over its own images."""
    ours, theirs = _slices(first), _slices(second)
    same = [key for key, inside in ours.items() if key in theirs and np.array_equal(inside, theirs[key])]
    lines = []
    for key in same:
        rows = compare(first, second, resamples, ours[key])
        shown = {name: rows[name] for name in SHOWN if name in rows and np.isfinite(rows[name]["difference"])}
        lines += [f"  {key}, {ours[key].sum():,} images", *difference_lines(shown, "  ")]
    left_out = [key for key in dict.fromkeys([*ours, *theirs]) if key not in same]
    lines += [f"  slices of one alone, or of other images, are left out: {', '.join(left_out)}"] if left_out else []
    return lines


def _slices(tallies: Tallies) -> dict[str, np.ndarray]:
    """ "attribute=value" -> (I,) bool."""
    if tallies.slices is None or tallies.in_slice is None:
        return {}
    return {"=".join(key): inside for key, inside in zip(tallies.slices.tolist(), tallies.in_slice, strict=True)}


def moved(folders: tuple[Path, Path], top: int) -> list[str]:
    """The `top` categories that gained and that lost most AP, from per_category.csv."""
    paths = [folder / "per_category.csv" for folder in folders]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; give two output folders of scripts/evaluate.py")
    tables = [read_csv(path) for path in paths]
    if {row["iou_type"] for row in tables[0]} != {row["iou_type"] for row in tables[1]}:
        return []  # masks in one, boxes in the other
    pairs = [(a, b, float(b["AP"]) - float(a["AP"])) for a, b in zip(*tables, strict=True) if float(a["AP"]) >= 0]
    pairs.sort(key=lambda pair: pair[2])
    lines = []
    for what, chosen in (("gained", pairs[::-1][:top]), ("lost", pairs[:top])):
        chosen = [pair for pair in chosen if (pair[2] > 0) == (what == "gained") and pair[2] != 0]
        lines += ["", f"categories that {what} most AP ({tables[0][0]['iou_type']}; group, objects here)"]
        for a, b, difference in chosen:
            group = "/".join(dict.fromkeys((a["frequency"], b["frequency"])))
            name = f"{a['name'][:28]} ({group}, {a['instances']})"
            lines.append(f"  {name:40}{float(a['AP']):7.3f}{float(b['AP']):7.3f}{difference:+8.3f}")
        lines += [] if chosen else ["  none"]
    return lines
