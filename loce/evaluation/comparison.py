"""Comparison of two evaluations: paired bootstrap over their images, of the whole set, slices of it and categories.

Both are resampled with the same images, so that what is hard for both cancels out. Legend: I images.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loce.evaluation.bootstrap import (
    METRICS,
    Tallies,
    as_they_are,
    difference,
    draw_weights,
    load_tallies,
    means_under,
    resampled_ap,
)
from loce.evaluation.calibration import NAMES as CALIBRATION
from loce.evaluation.category_differences import (
    Differences,
    category_differences,
    category_rows,
    category_table,
    moved,
)
from loce.evaluation.slices import SHOWN
from loce.evaluation.true_boxes import KEY, NAMES, TrueBoxes, group_accuracies, read_true_boxes, resampled_accuracy
from loce.utils.errors import UserError
from loce.utils.files import write_text

HEAD = f"{'A':>8}{'B':>8}{'B - A':>9}  {'95% interval':18}B is better in"


class Resampled(NamedTuple):
    """Weights (I, 1) of the data set as it is and (I, B) of its resamples, and AP of each category under both, (K, 1)
    and (K, B), of the first evaluation and of the second."""

    once: np.ndarray
    weights: np.ndarray
    whole: list[np.ndarray]
    drawn: list[np.ndarray]


def resample_both(
    first: Tallies,
    second: Tallies,
    resamples: int,
    inside: np.ndarray | None = None,
) -> Resampled:
    """Both with the same images; inside: (I,) bool, the images of a slice that alone count.

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
    images = len(first.image_ids)
    once, weights = as_they_are(images, inside), draw_weights(images, resamples, 0, inside)
    return Resampled(once, weights, *([resampled_ap(t, w) for t in (first, second)] for w in (once, weights)))


def compare(
    first: Tallies,
    second: Tallies,
    resamples: int = 1000,
    inside: np.ndarray | None = None,
    aps: Resampled | None = None,
) -> dict[str, dict[str, float]]:
    """`difference` of AP, APr, APc, APf and calibration errors; aps: of `resample_both`, where it was called already.

    Without the numbers of groups where the two put categories into different ones: these are of different categories.
    """
    aps = resample_both(first, second, resamples, inside) if aps is None else aps
    whole = [means_under(one, aps.once, ap) for one, ap in zip((first, second), aps.whole, strict=True)]
    drawn = [means_under(one, aps.weights, ap) for one, ap in zip((first, second), aps.drawn, strict=True)]
    names = [name for name in whole[0] if name in whole[1]]
    if regrouped(first, second):
        names = [name for name in names if name in ("AP", "ECE", "MCE")]
    return {n: difference([w[n][0] for w in whole], [d[n] for d in drawn], n in CALIBRATION) for n in names}


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


class Compared(NamedTuple):
    """`difference` by name of numbers of one IoU type and protocol, or of accuracy on the true boxes (KEY), and what is
    to be said of them; tallies: of both evaluations."""

    kind: str
    title: str
    rows: dict[str, dict[str, float]]
    note: str
    tallies: tuple[Tallies, Tallies]


def compare_evaluations(
    first: Path,
    second: Path,
    resamples: int = 1000,
) -> tuple[list[Compared], dict[str, Differences]]:
    """Two output folders of scripts/evaluate.py: every IoU type and protocol of both, then the true boxes; and the
    categories by IoU type or KEY. UserError where they cannot be compared."""
    found = []
    for folder in (first, second):
        files = sorted(folder.glob("tallies_*.npz"))
        if not files:
            raise UserError(f"{folder}: holds no tallies_<type>.npz; give two output folders of scripts/evaluate.py")
        loaded = [load_tallies(file) for file in files]
        found.append({(str(one.iou_type), str(one.protocol)): one for one in loaded})
    if not {kind for kind, _ in found[0]} & {kind for kind, _ in found[1]}:
        raise UserError(f"{first} and {second} have no IoU type in common")
    both = [key for key in found[0] if key in found[1]]
    if not both:
        named = [", ".join(sorted({protocol for _, protocol in one})) for one in found]
        raise UserError(f"the two evaluations differ in protocol: {first} is {named[0]}, {second} is {named[1]}")
    parts: list[Compared] = []
    of_categories: dict[str, Differences] = {}
    plain = None
    for kind, protocol in both:
        pair = one, other = found[0][kind, protocol], found[1][kind, protocol]
        part = "" if one.part is None else str(one.part)
        of = f"SUBSET, {part}" if part else f"{len(one.image_ids):,} images"
        aps = resample_both(one, other, resamples)
        whole = compare(one, other, resamples, aps=aps)
        rows = {name: whole[name] for name in METRICS if name in whole}
        rows |= {"AP50": compare(one.at_half, other.at_half, resamples)["AP"]} | whole
        parts.append(Compared(kind, f"{kind}, protocol {protocol}, {of}", rows, regrouped(one, other), pair))
        if not one.pooled:
            plain = pair
            of_categories.setdefault(kind, category_differences(one, aps.whole, aps.drawn))
    # Accuracy on the true boxes, over the same images.
    boxes = [read_true_boxes(folder) for folder in (first, second)]
    if boxes[0] is not None and boxes[1] is not None and plain is not None:
        rows, of_categories[KEY] = _compare_boxes((boxes[0], boxes[1]), plain, resamples)
        note = "" if rows else "not compared: they are of other annotations"
        parts.append(Compared(KEY, f"classification of the {len(boxes[0]):,} true boxes, {of}", rows, note, plain))
    return parts, of_categories


def compare_folders(
    first: str | Path,
    second: str | Path,
    resamples: int = 1000,
    top: int = 10,
    table: str | Path = "",
) -> str:
    """Text that compares two output folders of scripts/evaluate.py, or runs with one, for every IoU type of both.

    top: categories shown that gained most and that lost most; table: a CSV file of all categories, written too.
    """
    folders = _evaluation(Path(first)), _evaluation(Path(second))
    parts, of_categories = compare_evaluations(*folders, resamples)
    lines = [f"A: {folders[0]}", f"B: {folders[1]}"]
    for part in parts:
        width = 12 if part.kind == KEY else 6
        head = [f"{'':{width}}{HEAD}"] if part.rows else []
        lines += ["", part.title, *head, *difference_lines(part.rows, width=width), *([part.note] if part.note else [])]
        lines += slice_differences(*part.tallies, resamples) if part.kind != KEY else []
    kind, rows = category_rows(folders, of_categories)
    if table:
        write_text(table, category_table(rows))
    return "\n".join(lines + moved(kind, rows, top)) + "\n"


def _evaluation(folder: Path) -> Path:
    """The folder, or its eval/ where it is that of a run."""
    return folder / "eval" if (folder / "config.yaml").is_file() and (folder / "eval").is_dir() else folder


def difference_lines(rows: Mapping[str, Mapping[str, float]], indent: str = "", width: int = 6) -> list[str]:
    """A line for each row of `compare`."""
    lines = []
    for name, row in rows.items():
        between = f"{row['low']:+.3f} to {row['high']:+.3f}"
        numbers = f"{row['first']:8.3f}{row['second']:8.3f}{row['difference']:+9.3f}"
        known = f"{numbers}  {between:18}{row['better']:.1%} of resamples"
        nothing = "no detections" if name in CALIBRATION else "no category with objects"
        lines.append(f"{indent}{name:{width}}{known if np.isfinite(row['difference']) else f'{nothing:>34}'}")
    return lines


def _compare_boxes(
    boxes: tuple[TrueBoxes, TrueBoxes], tallies: tuple[Tallies, Tallies], resamples: int
) -> tuple[dict[str, dict[str, float]], Differences]:
    """`difference` of class-balanced accuracy by name, and of each category by its id; nothing where the two are of
    other annotations. tallies: of both evaluations."""
    first = tallies[0]
    if not np.array_equal(boxes[0].annotation_ids, boxes[1].annotation_ids):
        return {}, {}
    once, weights = as_they_are(len(first.image_ids)), draw_weights(len(first.image_ids), resamples, 0)
    places = (first.image_ids, first.category_ids)
    whole, drawn = ([resampled_accuracy(own, *places, w) for own in boxes] for w in (once, weights))
    means = [[group_accuracies(values, first.frequency) for values in both] for both in (whole, drawn)]
    names = list(NAMES.values())[: 1 if regrouped(*tallies) else None]  # others would be of different categories
    rows = {n: difference([one[n][0] for one in means[0]], [one[n] for one in means[1]]) for n in names}
    return rows, category_differences(first, whole, drawn)


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
