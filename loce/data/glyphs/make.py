"""Glyph-LVIS: a long-tailed instance segmentation set in LVIS v1's format, drawn on this machine.

The files: glyph_classes (which characters), glyph_plan (which class in which image: the long tail), glyph_drawing (one
image), glyph_records (masks and JSON), glyph_samples (a page to look at), and here the folder as a whole:

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
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from loce.data.glyphs import plan as glyph_plan
from loce.data.glyphs.characters import CHARACTERS, category_name
from loce.data.glyphs.page import draw_samples
from loce.data.glyphs.plan import Plan
from loce.data.glyphs.records import INFO, LICENSE, Record, Settings, Task, category_records, draw_task, image_record
from loce.utils.classes import GROUPS
from loce.utils.errors import UserError
from loce.utils.files import write_text
from loce.utils.options import Conflict, Count, Fraction, Natural, Range, Share, to_dict
from loce.utils.progress import progress, say

VERSION = 1  # of what is drawn: another number means other images
STAMP = "glyphs.json"
PARTIAL = ".glyphs.partial"
PLANNING, DRAWING, VERIFYING = 0, 1, 2  # purposes of random numbers, part of their seeds
FREE = ("out", "workers")  # options that do not change what is drawn


@dataclass(frozen=True, kw_only=True)
class GlyphOptions:
    """Options of a Glyph-LVIS set."""

    out: str  # folder to write
    classes: Annotated[int, Range(1, len(CHARACTERS))] = 50
    train_images: Count = 2000
    val_images: Count = 400
    size: Annotated[int, Range(32, 4096)] = 128  # pixels a side
    seed: Natural = 0
    classes_per_image: Annotated[float, Range(1, 100)] = 2.5  # mean
    most_objects: Count = 12  # in an image
    smallest: Share = 0.14  # mean of an object's width and height, as a share of the image's side
    largest: Share = 0.36
    negatives: Fraction = 0.25  # share of the absent classes that is listed as verified absent
    workers: Count = 2  # processes


CONFLICTS: tuple[Conflict, ...] = (
    (("smallest", "largest"), lambda o: o.smallest > o.largest, "smallest must not be above largest"),
    (("smallest", "size"), lambda o: o.smallest * o.size < 16, "objects under 16 pixels cannot be told apart"),
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
    if _is_finished(folder, options):
        say(f"{folder}: finished before, used as it is")
        return
    partial_folder = folder / PARTIAL
    shutil.rmtree(partial_folder, ignore_errors=True)
    _draw_set(options, partial_folder)
    for path in sorted(partial_folder.iterdir()):
        path.rename(folder / path.name)
    partial_folder.rmdir()
    write_text(folder / STAMP, json.dumps(_identity(options), indent=1) + "\n")


def _identity(options: GlyphOptions) -> dict[str, Any]:
    """What the set is a function of."""
    drawn = {key: value for key, value in to_dict(options).items() if key not in FREE}
    return {"version": VERSION, **drawn}


def _is_finished(folder: Path, options: GlyphOptions) -> bool:
    """Whether the set is there; UserError where another set, or anything else, is."""
    stamp = folder / STAMP
    if stamp.exists():
        found = json.loads(stamp.read_text(encoding="utf-8"))
        wanted = _identity(options)
        differing = [
            f"{key} = {found.get(key)} there, {wanted.get(key)} wanted"
            for key in sorted(found | wanted)
            if found.get(key) != wanted.get(key)
        ]
        if differing:
            raise UserError(
                f"{folder} holds glyphs of other options: {'; '.join(differing)}; choose another out=, or delete it"
            )
        return True
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out = {folder} is a file; choose another out=")
    others = [path.name for path in folder.iterdir() if path.name != PARTIAL] if folder.exists() else []
    if others:
        raise UserError(f"{folder} holds {min(others)}, but no finished set of glyphs; choose a new or an empty folder")
    return False


def _draw_set(options: GlyphOptions, folder: Path) -> None:
    """Everything but the stamp."""
    started = time.monotonic()
    rng = np.random.default_rng([options.seed, PLANNING])
    characters = glyph_plan.ranked_characters(options.classes, rng)
    ids = _category_ids(characters, rng)
    settings = Settings(
        folder=folder,
        size=options.size,
        sides=(options.smallest, options.largest),
        characters=characters,
        category_ids=ids,
    )
    plans = _plans(options, rng)
    annotations, images = {}, {}
    for split, plan in plans.items():
        (folder / f"{split}2017").mkdir(parents=True)
        first_id = 1 if split == "train" else options.train_images + 1
        tasks = _tasks(plan, split, first_id, options)
        annotations[split] = _number(_draw(settings, tasks, options.workers, split))
        images[split] = _image_records(plan, tasks, ids, options)
    categories = category_records(characters, ids, annotations["train"])
    for split in plans:
        _write_split(folder / "annotations" / f"{split}.json", images[split], annotations[split], categories)
    draw_samples(folder, images["train"], annotations["train"], categories)
    _report(options, annotations, categories, time.monotonic() - started)


def _category_ids(characters: str, rng: np.random.Generator) -> tuple[int, ...]:
    """Ids in the order of the names, as in LVIS, but with gaps, as in COCO; by label."""
    ids = 2 + np.cumsum(rng.integers(1, 4, len(characters)))
    order = sorted(range(len(characters)), key=lambda label: category_name(characters[label]))
    by_label = dict(zip(order, ids.tolist(), strict=True))
    return tuple(by_label[label] for label in range(len(characters)))


def _plans(options: GlyphOptions, rng: np.random.Generator) -> dict[str, Plan]:
    train = glyph_plan.long_tail(options.classes, options.train_images, options.classes_per_image)
    val = glyph_plan.validation_counts(train, options.val_images, options.classes_per_image)
    herds = glyph_plan.mean_instances(train)
    fewest = glyph_plan.VALIDATION_INSTANCES
    return {
        "train": glyph_plan.plan_split(train, options.train_images, herds, options.most_objects, 0, rng),
        "val": glyph_plan.plan_split(val, options.val_images, herds, options.most_objects, fewest, rng),
    }


def _rows_by_image(plan: Plan, images: int) -> list[slice]:
    """The rows of the plan of each image."""
    return [slice(a, b) for a, b in pairwise(np.searchsorted(plan.images, np.arange(images + 1)).tolist())]


def _tasks(plan: Plan, split: str, first_id: int, options: GlyphOptions) -> list[Task]:
    """What to draw in each image of a split; which object lies in front is random."""
    tasks = []
    images = options.train_images if split == "train" else options.val_images
    for image_id, rows in enumerate(_rows_by_image(plan, images), first_id):
        labels = np.repeat(plan.labels[rows], plan.instances[rows] + plan.left_out[rows])
        annotated = [
            place < n for n, m in zip(plan.instances[rows], plan.left_out[rows], strict=True) for place in range(n + m)
        ]
        order = np.random.default_rng([options.seed, PLANNING, image_id]).permutation(len(labels))
        tasks.append(
            Task(
                image_id=image_id,
                path=f"{split}2017/{image_id:012}.jpg",
                seed=(options.seed, DRAWING, image_id),
                labels=tuple(labels[order].tolist()),
                annotated=tuple(annotated[i] for i in order),
            )
        )
    return tasks


def _draw(settings: Settings, tasks: list[Task], workers: int, label: str) -> Iterator[list[Record]]:
    """The annotations of each image, in order, drawn by as many processes."""
    draw = partial(draw_task, settings)
    if workers == 1:
        yield from progress(map(draw, tasks), len(tasks), label, "images")
        return
    with get_context("spawn").Pool(workers) as pool:
        yield from progress(pool.imap(draw, tasks, chunksize=16), len(tasks), label, "images")


def _number(annotations_of_images: Iterator[list[Record]]) -> list[Record]:
    """All annotations in one list, with `id` 1, 2, ..."""
    flat = (annotation for annotations in annotations_of_images for annotation in annotations)
    return [{"id": number, **annotation} for number, annotation in enumerate(flat, 1)]


def _image_records(plan: Plan, tasks: list[Task], ids: tuple[int, ...], options: GlyphOptions) -> list[Record]:
    records = []
    every = np.arange(options.classes)
    id_of = np.array(ids)
    for task, rows in zip(tasks, _rows_by_image(plan, len(tasks)), strict=True):
        absent = np.setdiff1d(every, plan.labels[rows])
        rng = np.random.default_rng([options.seed, VERIFYING, task.image_id])
        verified = rng.choice(absent, round(options.negatives * len(absent)), replace=False)
        open_labels = plan.labels[rows][plan.left_out[rows] > 0]
        negatives, not_exhaustive = (sorted(id_of[labels].tolist()) for labels in (verified, open_labels))
        records.append(image_record(task, options.size, negatives, not_exhaustive))
    return records


def _write_split(path: Path, images: list[Record], annotations: list[Record], categories: list[Record]) -> None:
    content = {
        "info": INFO,
        "licenses": [LICENSE],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    write_text(path, json.dumps(content, separators=(",", ":")))


def _report(
    options: GlyphOptions, annotations: dict[str, list[Record]], categories: list[Record], seconds: float
) -> None:
    groups = [sum(category["frequency"] == group for category in categories) for group in GROUPS]
    objects = {split: len(records) for split, records in annotations.items()}
    images = options.train_images + options.val_images
    say(
        f"{options.out}: {options.classes} classes ({groups[0]} rare, {groups[1]} common, {groups[2]} frequent); "
        f"train {options.train_images} images, {objects['train']} objects; "
        f"val {options.val_images} images, {objects['val']} objects; "
        f"{images / seconds:.0f} images/s"
    )
