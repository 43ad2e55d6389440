"""Is Glyph-LVIS shaped like LVIS? Statistics of annotation files side by side, in one figure.

    python benchmarks/lvis_statistics.py [glyph50=runs/glyphs50] [glyph100=runs/glyphs100] [lvis=FILE counts=FILE]

LVIS's side is stored in results/lvis_statistics.json: published image counts of v1's training data (all classes, images
without objects), all else of 100 validation images of v0.5 in its groups, of which 1 label is rare. lvis= and counts=
reduce such files anew: annotations, and a text file of image counts. Of the drawn sets the training data count, and
validation where a panel says so.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from loce.config import raise_problems, read_options, run_script
from loce.report.figures import GROUP_COLOURS, save_figure
from loce.utils.classes import GROUP_NAMES
from loce.utils.files import write_text

Statistics = dict[str, Any]
V1_EMPTY = 1 - 99_388 / 100_170  # share of v1's training images without objects
TICKS = (1, 2, 5, 10, 20, 50, 100)
STYLES: dict[str, dict[str, Any]] = {
    "LVIS": {"color": "black", "linewidth": 2.2},
    "Glyph-100": {"color": "#d1495b", "linewidth": 1.8},
    "Glyph-50": {"color": "#00798c", "linewidth": 1.4, "linestyle": "--"},
}
GROUPS = "rcf"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw statistics of LVIS and of drawn sets."""

    glyph50: str = "runs/glyphs50"  # folders of drawn sets
    glyph100: str = "runs/glyphs100"
    lvis: str = ""  # annotation file that LVIS's statistics are made of anew; empty: the stored ones
    counts: str = ""  # text file of image counts of LVIS's classes, for lvis=
    stored: str = "benchmarks/results/lvis_statistics.json"
    output: str = "docs/images/glyph_lvis.png"


def reduced(file: Path) -> Statistics:
    """Statistics of an annotation file in LVIS's format. A label is a class in an image."""
    content = json.loads(file.read_text(encoding="utf-8"))
    group = {category["id"]: category["frequency"] for category in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    labels: Counter[tuple[int, int]] = Counter()
    sides = []
    for annotation in content["annotations"]:
        image, (_, _, width, height) = images[annotation["image_id"]], annotation["bbox"]
        labels[annotation["image_id"], annotation["category_id"]] += 1
        sides.append((width / image["width"] + height / image["height"]) / 2)
    shown: dict[int, list[int]] = defaultdict(list)  # classes of an image
    for image_id, category in labels:
        shown[image_id].append(category)
    # Beside a label of each group, the mean number of other classes of each group.
    beside = {g: np.zeros(len(GROUPS)) for g in GROUPS}
    for image_id, category in labels:
        others = [group[other] for other in shown[image_id] if other != category]
        beside[group[category]] += [others.count(g) for g in GROUPS]
    positive = Counter(group[category] for _, category in labels)
    negative = Counter(group[category] for image in images.values() for category in image["neg_category_ids"])
    open_ended = sum(len(image["not_exhaustive_category_ids"]) for image in images.values())
    return {
        "images": len(images),
        "images_a_class": sorted(Counter(category for _, category in labels).values(), reverse=True),
        "classes_an_image": histogram(len(shown[image_id]) for image_id in images),
        "objects_a_label": histogram(labels.values()),
        "objects_an_image": histogram(sum(labels[i, c] for c in shown[i]) for i in images),
        "sides": np.quantile(sides, np.linspace(0, 1, 101)).round(5).tolist(),
        "labels": {g: positive[g] for g in GROUPS},
        "beside": {g: (beside[g] / max(1, positive[g])).round(3).tolist() for g in GROUPS},
        "absent": {g: round(negative[g] / max(1, positive[g]), 3) for g in GROUPS},
        "not_exhaustive": round(open_ended / len(labels), 4),
        "empty": round(sum(not shown[i] for i in images) / len(images), 4),
    }


def histogram(numbers: Iterable[int]) -> list[int]:
    """How often there is 0, 1, 2, ..."""
    return np.bincount(list(numbers)).tolist()


def reduced_lvis(options: Options) -> Statistics:
    """LVIS's statistics, stored or made anew."""
    stored = Path(options.stored)
    if options.lvis:
        counts = sorted(map(int, Path(options.counts).read_text(encoding="utf-8").split()), reverse=True)
        found = {**reduced(Path(options.lvis)), "images_a_class": counts, "empty": round(V1_EMPTY, 4)}
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
        write_text(stored, f"{{\n{lines}\n}}\n")
    content: Statistics = json.loads(stored.read_text(encoding="utf-8"))
    return content


def or_more(axis: Axes, sets: dict[str, Statistics], name: str, title: str) -> None:
    """The share of images or labels with n or more, against n."""
    for label, statistics in sets.items():
        counts = np.array(statistics[name])
        numbers = np.arange(1, len(counts))
        shares = 100 * counts[::-1].cumsum()[::-1][1:] / counts.sum()
        axis.plot(numbers, shares, label=label, **STYLES[label])
    axis.set(xscale="log", yscale="log", title=title, ylabel="share with n or more, %", xlabel="n", ylim=(0.7, 130))
    most = max(len(statistics[name]) for statistics in sets.values())
    axis.set_xticks([tick for tick in TICKS if tick < most], minor=False)
    axis.set_yticks((1, 10, 100))
    axis.xaxis.set_minor_locator(NullLocator())
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")


def bars(axis: Axes, names: Sequence[str], values: dict[str, Sequence[float]]) -> None:
    """A bar for each name and set; values: by set, of `names`."""
    width = 0.8 / len(values)
    for place, (label, own) in enumerate(values.items()):
        at = np.arange(len(names)) + (place - (len(values) - 1) / 2) * width
        drawn = axis.bar(at, own, width, color=STYLES[label]["color"])
        axis.bar_label(
            drawn, [f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in own], fontsize=8, padding=1
        )
    axis.set_xticks(range(len(names)), names)
    axis.margins(y=0.12)


def draw(training: dict[str, Statistics], validation: dict[str, Statistics], output: Path) -> None:
    """The figure; both with LVIS."""
    figure = Figure((13.5, 6.6))
    axes = figure.subplots(2, 4).ravel()
    for label, statistics in training.items():
        counts = np.array(statistics["images_a_class"])
        axes[0].plot((np.arange(len(counts)) + 0.5) / len(counts), counts, label=label, **STYLES[label])
    for bound in (10.5, 100.5):
        axes[0].axhline(bound, color="grey", linewidth=0.7, linestyle=":")
    for group, place, side in zip(
        GROUPS, ((0.02, 3), (0.98, 40), (0.98, 400)), ("left", "right", "right"), strict=True
    ):
        axes[0].text(*place, GROUP_NAMES[group], color=GROUP_COLOURS[group], ha=side)
    axes[0].set(yscale="log", title="images a class", xlabel="rank / number of classes", ylabel="training images")
    axes[0].yaxis.set_major_formatter("{x:g}")
    or_more(axes[1], training, "classes_an_image", "classes an image")
    or_more(axes[2], training, "objects_a_label", "objects of a class in an image")
    or_more(axes[3], training, "objects_an_image", "objects an image")
    for label, statistics in training.items():
        axes[4].plot(statistics["sides"], np.linspace(0, 100, 101), **STYLES[label])
    axes[4].set(xscale="log", title="size of objects", ylabel="objects up to this size, %")
    axes[4].set_xlabel("mean of width and height / image's side")
    axes[4].xaxis.set_major_formatter("{x:g}")
    groups = [f"{GROUP_NAMES[g]}\n(LVIS: {validation['LVIS']['labels'][g]})" for g in GROUPS]
    bars(axes[5], groups, {label: [sum(s["beside"][g]) for g in GROUPS] for label, s in validation.items()})
    axes[5].set(title="other classes beside one (validation)", ylabel="classes", xlabel="group (labels it is of)")
    bars(axes[6], groups, {label: [s["absent"][g] for g in GROUPS] for label, s in validation.items()})
    axes[6].set(title="verified absent (validation)", ylabel="images, per image with it", yscale="log")
    axes[6].set(xlabel="group (labels it is of)")
    axes[6].yaxis.set_major_formatter("{x:g}")
    shares = ("not_exhaustive", "empty")
    names = ("labels not\nexhaustive", "images without\nobjects")
    bars(axes[7], names, {label: [100 * s[share] for share in shares] for label, s in training.items()})
    axes[7].set(title="labels and images", ylabel="%")
    for letter, axis in zip("abcdefgh", axes, strict=True):
        axis.set_title(f"({letter}) {axis.get_title()}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    labels[0] += ": v1 in (a) and images without objects, else 100 validation images of v0.5"
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    save_figure(figure, output)


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    folders = {"Glyph-100": Path(options.glyph100), "Glyph-50": Path(options.glyph50)}
    files = {
        (name, part): folder / f"annotations/{part}.json"
        for name, folder in folders.items()
        for part in ("train", "val")
    }
    missing = [str(file) for file in files.values() if not file.is_file()]
    raise_problems([f"{file}: not there; draw the set first: make table1 DATA=glyph100" for file in missing])
    lvis = reduced_lvis(options)
    parts = [{"LVIS": lvis, **{name: reduced(files[name, part]) for name in folders}} for part in ("train", "val")]
    draw(*parts, Path(options.output))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    run_script(main)
