"""Folder of a Glyph-LVIS set:

    out/annotations/train.json, val.json    out/train2017/*.jpg, out/val2017/*.jpg    out/samples.png    out/glyphs.json

glyphs.json names the options and is written last: a folder without it is not finished. The set is a function of the
options without `out` and `workers`; the same versions of the libraries give the same bytes.

Federated labels as in LVIS: evaluation counts a detection only if its class is present in the image or listed as
verified absent (`neg_category_ids`). LVIS could verify a handful of 1203 classes an image; here all are known, and a
quarter of the absent ones is listed. So a class that shows in 5% of the images is tested against some five times as
many images without it: enough that false positives on rare classes cost, and still a sample, as in LVIS.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from loce.data.glyphs.characters import CHARACTERS, category_name
from loce.data.glyphs.exports import write_export
from loce.data.glyphs.page import draw_samples
from loce.data.glyphs.plan import (
    VALIDATION_INSTANCES,
    VERSION_1,
    Plan,
    long_tail,
    plan_split,
    ranked_characters,
    validation_counts,
)
from loce.data.glyphs.records import INFO, LICENSE, Record, Settings, Task, category_records, draw_task, image_record
from loce.data.glyphs.scenes import VERSION_2, absent_shares, label_sides
from loce.utils.classes import GROUPS
from loce.utils.errors import UserError
from loce.utils.files import write_text
from loce.utils.options import Conflict, Count, Fraction, Natural, Range, Share, to_dict
from loce.utils.progress import print_line, progress
from loce.utils.yaml_text import differing

VERSIONS = {1: VERSION_1, 2: VERSION_2}  # of what is drawn: another number means other images
STAMP = "glyphs.json"
PARTIAL = ".glyphs.partial"
PLANNING, DRAWING, VERIFYING, SIZING = 0, 1, 2, 3  # purposes of random numbers, part of their seeds
FREE = ("out", "workers", "export")  # options that do not change what is drawn


@dataclass(frozen=True, kw_only=True)
class GlyphOptions:
    """Options of a Glyph-LVIS set."""

    out: str  # folder to write
    version: Annotated[int, Range(1, 2)] = 1  # 2: shaped like LVIS, with scenes (docs/benchmark.md)
    classes: Annotated[int, Range(1, len(CHARACTERS))] = 50
    skip: Natural = 0  # leave out so many characters, the first: those that sets of up to so many classes show
    train_images: Count = 2000
    val_images: Count = 400
    size: Annotated[int, Range(32, 4096)] = 128  # pixels a side
    seed: Natural = 0
    classes_per_image: Annotated[float, Range(1, 100)] = 2.5  # mean
    most_objects: Count = 12  # in an image
    smallest: Share = 0.14  # mean of an object's width and height, as a share of the image's side
    largest: Share = 0.36
    negatives: Fraction = 0.25  # share of the absent classes that is listed as verified absent; version 2: by class
    workers: Count = 2  # processes
    export: Literal["none", "voc", "yolo", "labelme"] = "none"  # OUT/voc, ...: the set in a tool's format


CONFLICTS: tuple[Conflict, ...] = (
    (
        ("classes", "skip"),
        lambda o: o.classes + o.skip > len(CHARACTERS),
        f"there are {len(CHARACTERS)} characters; together at most so many",
    ),
    (("smallest", "largest"), lambda o: o.smallest > o.largest, "smallest must not be above largest"),
    (("smallest", "size"), lambda o: o.smallest * o.size < 16, "objects under 16 pixels cannot be told apart"),
    (
        ("negatives", "version"),
        lambda o: o.version == 2 and o.negatives != GlyphOptions.negatives,
        "is of version 1; version 2 lists each class as often as LVIS does",
    ),
    (
        ("classes", "train_images", "classes_per_image"),
        lambda o: o.train_images * o.classes_per_image < o.classes,
        "some class would have no training image; raise train_images or classes_per_image",
    ),
    (
        ("classes", "val_images", "classes_per_image"),
        lambda o: o.val_images * o.classes_per_image < o.classes,
        "some class would have no validation image; raise val_images or classes_per_image",
    ),
)


def make_glyphs(options: GlyphOptions) -> None:
    """Draw the set into `options.out`, unless it is there. UserError when the folder holds something else.

    Starts `options.workers` processes: the calling script needs `if __name__ == "__main__"`.
    """
    folder = Path(options.out)
    # A set of an earlier release has no `skip` in its stamp, and is the same set.
    identity = {key: value for key, value in to_dict(options).items() if key not in FREE}
    if not options.skip:
        del identity["skip"]
    if _is_finished(folder, identity):
        print_line(f"{folder}: finished before, used as it is")
    else:
        _write_set(options, folder, identity)
    if options.export != "none":
        write_export(folder, options.export)


def _write_set(options: GlyphOptions, folder: Path, identity: Record) -> None:
    """Draw the set into a folder of its own, which becomes `folder` when all is there; the stamp comes last."""
    partial_folder = folder / PARTIAL
    shutil.rmtree(partial_folder, ignore_errors=True)
    _draw_set(options, partial_folder)
    for path in sorted(partial_folder.iterdir()):
        path.rename(folder / path.name)
    partial_folder.rmdir()
    write_text(folder / STAMP, json.dumps(identity, indent=1) + "\n")


def _is_finished(folder: Path, identity: Record) -> bool:
    """Whether the set is there; UserError where another set, or anything else, is."""
    stamp = folder / STAMP
    if stamp.exists():
        found = json.loads(stamp.read_text(encoding="utf-8"))
        keys = sorted(differing(found, identity))
        if keys:
            values = "; ".join(f"{key} = {found.get(key)} there, {identity.get(key)} wanted" for key in keys)
            raise UserError(f"{folder} holds glyphs of other options: {values}; choose another out=, or delete it")
        return True
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out = {folder} is a file; choose another out=")
    others = [path.name for path in folder.iterdir() if path.name != PARTIAL] if folder.exists() else []
    if others:
        raise UserError(f"{folder} holds {min(others)}, but no finished set of glyphs; choose a new or an empty folder")
    return False


def _draw_set(options: GlyphOptions, folder: Path) -> None:
    """Images, annotation files and samples: everything but the stamp."""
    started = time.monotonic()
    rng = np.random.default_rng([options.seed, PLANNING])
    # The classes; their ids are in the order of the names, as in LVIS, but with gaps, as in COCO.
    characters = ranked_characters(options.classes, rng, options.skip)
    ids = 2 + np.cumsum(rng.integers(1, 4, options.classes))
    rank = np.argsort(np.argsort([category_name(character) for character in characters]))
    settings = Settings(
        folder=folder,
        size=options.size,
        characters=characters,
        category_ids=tuple(ids[rank].tolist()),
    )
    # Which class stands in which image, and how often.
    statistics, most, per_image = VERSIONS[options.version], options.most_objects, options.classes_per_image
    numbers = {"train": options.train_images, "val": options.val_images}
    train = long_tail(options.classes, options.train_images, per_image, statistics)
    counts = {"train": train, "val": validation_counts(train, options.val_images, per_image, statistics)}
    scenes, fewest = statistics.scenes(train, rng), {"train": 0, "val": VALIDATION_INSTANCES}
    plans = {
        split: plan_split(counts[split], train, images, most, fewest[split], rng, statistics, scenes)
        for split, images in numbers.items()
    }
    # Draw the images; annotations are numbered in their order.
    annotations: dict[str, list[Record]] = {}
    images: dict[str, list[Record]] = {}
    for split, first_id in (("train", 1), ("val", options.train_images + 1)):
        (folder / f"{split}2017").mkdir(parents=True)
        negatives: float | np.ndarray = options.negatives
        if options.version == 2:
            negatives = absent_shares(counts[split], train, numbers[split])
        tasks = _tasks(plans[split], split, first_id, options)
        drawn = chain.from_iterable(_draw(settings, tasks, options.workers, split))
        annotations[split] = [{"id": number, **annotation} for number, annotation in enumerate(drawn, 1)]
        images[split] = [
            image_record(task, settings, negatives, np.random.default_rng([options.seed, VERIFYING, task.image_id]))
            for task in tasks
        ]
    # The files of both splits have the same categories, counted in training.
    categories = category_records(characters, settings.category_ids, annotations["train"])
    for split in plans:
        content = {
            "info": INFO,
            "licenses": [LICENSE],
            "images": images[split],
            "annotations": annotations[split],
            "categories": categories,
        }
        write_text(folder / "annotations" / f"{split}.json", json.dumps(content, separators=(",", ":")))
    draw_samples(folder, images["train"], annotations["train"], categories)
    groups = [sum(category["frequency"] == group for category in categories) for group in GROUPS]
    print_line(
        f"{options.out}: {options.classes} classes ({groups[0]} rare, {groups[1]} common, {groups[2]} frequent); "
        f"train {options.train_images} images, {len(annotations['train'])} objects; "
        f"val {options.val_images} images, {len(annotations['val'])} objects; "
        f"{(options.train_images + options.val_images) / (time.monotonic() - started):.0f} images/s"
    )


def _tasks(
    plan: Plan,
    split: str,
    first_id: int,
    options: GlyphOptions,
) -> list[Task]:
    """What to draw in each image of a split; which object lies in front is random."""
    tasks = []
    images = options.train_images if split == "train" else options.val_images
    bounds = (options.smallest, options.largest)
    sides = np.tile(bounds, (len(plan.labels), 1))
    if options.version == 2:
        sides = label_sides(plan, bounds, np.random.default_rng([options.seed, SIZING, first_id]))
    borders = np.searchsorted(plan.images, np.arange(images + 1)).tolist()
    for image_id, (first, end) in enumerate(pairwise(borders), first_id):
        instances, left_out = plan.instances[first:end], plan.left_out[first:end]
        labels = np.repeat(plan.labels[first:end], instances + left_out)
        label_bounds = np.repeat(sides[first:end], instances + left_out, axis=0)
        annotated = [place < n for n, m in zip(instances, left_out, strict=True) for place in range(n + m)]
        order = np.random.default_rng([options.seed, PLANNING, image_id]).permutation(len(labels))
        tasks.append(
            Task(
                image_id=image_id,
                path=f"{split}2017/{image_id:012}.jpg",
                seed=(options.seed, DRAWING, image_id),
                labels=tuple(labels[order].tolist()),
                sides=tuple(map(tuple, label_bounds[order].tolist())),
                annotated=tuple(annotated[i] for i in order),
            )
        )
    return tasks


def _draw(
    settings: Settings,
    tasks: list[Task],
    workers: int,
    label: str,
) -> Iterator[list[Record]]:
    """The annotations of each image, in order, drawn by as many processes."""
    draw = partial(draw_task, settings)
    if workers == 1:
        yield from progress(map(draw, tasks), len(tasks), label, "images")
        return
    with get_context("spawn").Pool(workers) as pool:
        yield from progress(pool.imap(draw, tasks, chunksize=16), len(tasks), label, "images")
