"""Figures of runs by matplotlib: the paper's Figures 1 and 4 (score, accuracy, AP of every class), score against AP."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from loce.utils.classes import GROUP_NAMES, GROUP_RGB
from loce.utils.errors import UserError, first_few
from loce.utils.files import atomic_write, read_csv

GROUP_COLOURS = {group: tuple(part / 255 for part in rgb) for group, rgb in GROUP_RGB.items()}
VALUES = {"score": "mean score of own class", "accuracy": "classification accuracy", "ap": "AP"}  # rows of a figure
NAMED, LETTERS = 40, 24  # classes up to which they are named below the bars; letters of a name there
COLUMNS = {"score": "mean_score", "accuracy": "accuracy"}  # of mean_scores.csv


def equilibrium_figure(runs: Mapping[str, Path], output: Path, rows: Sequence[str] = ("score", "ap")) -> None:
    """A row for each kind of value of every class, most frequent in training first, one column per run (Figures 1, 4).

    runs: title -> evaluation folder with per_category.csv and, but for rows=("ap",), mean_scores.csv. rows: of VALUES.
    Classes without objects in the validation data are gaps, and in no mean. The suffix of `output` says PNG or PDF.
    """
    require_same_groups(runs)
    size = (4.6 * len(runs), 0.6 + 2.3 * len(rows))
    figure = Figure(size)
    axes = figure.subplots(len(rows), len(runs), sharex="col", sharey="row", squeeze=False)
    named = False
    # Rows share their axis, so each panel only raises the common limit.
    for column, (title, folder) in zip(axes.T, runs.items(), strict=True):
        values, groups, counts, names = class_values(folder)
        for axis, name in zip(column, rows, strict=True):
            _bars(axis, values[name], groups)
        part = next(iter(read_csv(folder / "per_category.csv")), {}).get("subset")
        column[0].set_title(f"{title}\nSUBSET, {part}" if part else title)
        _class_axis(column[-1], counts, names)
        named |= len(names) <= NAMED
    for axis, name in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(VALUES[name])
    handles = [Rectangle((0, 0), 1, 1, color=GROUP_COLOURS[g]) for g in GROUP_COLOURS]
    figure.legend(handles, GROUP_NAMES.values(), loc="lower center", ncols=3, frameon=False)
    figure.set_figheight(size[1] + named)  # an inch for names
    figure.tight_layout(rect=(0, 0.25 / size[1], 1, 1))
    save_figure(figure, output)


def require_same_groups(runs: Mapping[str, Path]) -> None:
    """UserError where evaluations put a class into different groups, whose means then are of different classes."""
    first, *others = runs.items()
    groups = {row["id"]: row["frequency"] for row in read_csv(first[1] / "per_category.csv")}
    for title, folder in others:
        rows = read_csv(folder / "per_category.csv")
        moved = [row["id"] for row in rows if groups.get(row["id"], row["frequency"]) != row["frequency"]]
        if moved:
            raise UserError(
                f"{title}: puts categories into other groups than {first[0]} (ids {first_few(moved)}), so the means of "
                "rare, common and frequent are of different classes; draw the two in figures of their own"
            )


def class_values(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None, list[str]]:
    """Values of an evaluation's classes, groups ("r", "c", "f"), training instances and names, most instances first.

    Values: name in VALUES -> (C,), nan where the validation data have no boxes (score, accuracy) or no objects that
    count (AP: empty or -1). The results of another program have AP only: no instances then (None), and the order is
    groups, in them most objects in the validation data first.
    """
    tested = folder / "mean_scores.csv"
    by_id = {row["id"]: row for row in read_csv(folder / "per_category.csv")}
    if not tested.is_file():
        rows = sorted(by_id.values(), key=lambda row: ("fcr".index(row["frequency"]), -int(row["instances"])))
        groups = np.array([row["frequency"] for row in rows])
        return {"ap": _numbers(rows, "AP")}, groups, None, [row.get("name", row["id"]) for row in rows]
    rows = sorted(read_csv(tested), key=lambda row: -int(row["training_instances"]))
    boxes = np.array([int(row["boxes"]) for row in rows])
    values = {n: np.where(boxes > 0, _numbers(rows, c), np.nan) for n, c in COLUMNS.items() if c in rows[0]}
    values["ap"] = _numbers([by_id[row["id"]] for row in rows], "AP")
    counts = np.array([int(row["training_instances"]) for row in rows])
    return values, np.array([row["group"] for row in rows]), counts, [row.get("name", row["id"]) for row in rows]


def _numbers(rows: Sequence[Mapping[str, str]], column: str) -> np.ndarray:
    values = np.array([float(row[column] or "nan") for row in rows])
    return np.where(values < 0, np.nan, values)


def _class_axis(axis: Any, counts: np.ndarray | None, names: Sequence[str]) -> None:
    """The names of few classes; else the paper's x axis: places in the order, and the class's training instances."""
    if len(names) <= NAMED:
        own = [""] * len(names) if counts is None else [f" ({count})" for count in counts]
        labels = [f"{name[:LETTERS]}{count}" for name, count in zip(names, own, strict=True)]
        axis.set_xticks(range(len(names)), labels, rotation=90, fontsize=7, parse_math=False)
    elif counts is None:
        axis.set_xlabel("classes: frequent, common, rare")
    else:
        places = np.linspace(0, len(counts) - 1, min(5, len(counts))).round().astype(int)
        axis.set_xticks(places, [f"{place + 1}\n({counts[place]})" for place in places])
        axis.set_xlabel("class (its training instances)")


def group_means(values: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """The mean of each group over its classes (C,) that have a value; a group without any is left out."""
    known = ~np.isnan(values)
    return {g: float(values[known & (groups == g)].mean()) for g in GROUP_COLOURS if (known & (groups == g)).any()}


def _bars(axis: Any, values: np.ndarray, groups: np.ndarray) -> None:
    axis.bar(range(len(values)), values, width=1.0, color=[GROUP_COLOURS[g] for g in groups])
    for group, mean in group_means(values, groups).items():
        places = np.flatnonzero(groups == group)
        axis.hlines(mean, min(places) - 0.5, max(places) + 0.5, colors="black", linewidth=1.2)
        text = axis.text(max(places) + 0.5, mean, f" {mean:.2f}", va="bottom", ha="right", fontsize=9, weight="bold")
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    axis.margins(x=0.01)
    highest = np.nanmax(values, initial=0.0) or 1 / 1.1  # nothing to show: the whole range
    axis.set_ylim(0, max(axis.get_ylim()[1] if axis.get_ylim()[1] < 1 else 0, min(1.0, highest * 1.1)))
    axis.spines[["top", "right"]].set_visible(False)


def score_figure(runs: Mapping[str, Mapping[str, Sequence[Any]]], output: Path) -> None:
    """Mean score against mask AP of every class, one panel per run, coloured by group (what Figure 1 claims).

    runs: title -> "mean score", "AP" and "group" of every class; None where validation has no objects.
    """
    figure = Figure((4.2 * len(runs), 4.2))
    axes = figure.subplots(1, len(runs), sharex=True, sharey=True, squeeze=False)
    for axis, (title, classes) in zip(axes[0], runs.items(), strict=True):
        for group, colour in GROUP_COLOURS.items():
            points = zip(classes["mean score"], classes["AP"], classes["group"], strict=True)
            mine = [(score, ap) for score, ap, g in points if g == group and score is not None and ap is not None]
            axis.scatter(*np.array(mine or np.empty((0, 2))).T, s=22, color=colour, alpha=0.8, label=GROUP_NAMES[group])
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("mean score of own class")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("mask AP")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    save_figure(figure, output)


def save_figure(figure: Figure, output: Path) -> None:
    """A figure as a file, in the format of its suffix."""
    with atomic_write(output) as temporary:
        figure.savefig(temporary, dpi=110)
