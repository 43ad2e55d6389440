"""Checks of a data set, which change nothing in it: contents, faults, long tail.

A problem must be mended before a training or an evaluation means anything. The rest is only reported, since training
copes with it (loce/data/annotations/training_rows.py says how, docs/data.md what to do about it).
"""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from loce.config import Config, DataConfig, MemoryConfig, SamplerConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.annotations.plausible import beyond_border
from loce.data.annotations.requirements import compared_types, evaluation_problems, training_problems
from loce.data.build import images_in_both
from loce.data.download import ANNOTATIONS, IMAGES
from loce.data.samplers import image_labels, repeat_factors
from loce.data.transforms import ImageError, read_levels, resized
from loce.utils.classes import GROUP_NAMES, GROUPS
from loce.utils.errors import UserError, first_few
from loce.utils.progress import progress

EDGES = (0, 1, 2, 6, 11, 31, 101, 301, 1001)  # images that show a class: where the histogram's bars begin
BAR = 40  # characters of the longest
WORST = 5  # images named
FEW = 5  # instances; a class with fewer is named
BREAK = "\n    "
DEFAULTS = Config()


@dataclass
class Report:
    """Lines to print, and problems (how many, where, the fix)."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, label: str, text: str) -> None:
        """A line with a label."""
        self.lines.append(f"  {label:<12} {text}")


def check_set(
    path: str,
    images: str,
    report: Report,
    sample: int,
    workers: int = 4,
    config: Config = DEFAULTS,
    use: Literal["", "training", "evaluation"] = "",
) -> LVISAnnotations | None:
    """Check an annotation file and its images; gives the annotations, None where they cannot be read.

    images: folder, "" to leave images out. sample: how many images are decoded, evenly over the file. config: options
    of the run that the file is for. use: what that run does with it; "": not known, so that what only an evaluation
    refuses is reported without being a problem.
    """
    report.lines.append(path)
    data = config.data
    try:
        options = (data.rare_max, data.common_max, data.keep_empty and use != "evaluation", data.without_mask == "box")
        annotations = LVISAnnotations.open(path, *options, masks=config.model.masks)
    except UserError as error:
        version = next((v for v, archives in ANNOTATIONS.items() for a in archives if a.content == Path(path).name), "")
        fix = f". `make data VERSION={version} ARGS=only=annotations` fetches it into data/" if version else ""
        report.problems.append(f"{error}{fix}")
        report.add("unreadable", "see below")
        return None
    _check_counts(annotations, report, use, data.drop_empty)
    beyond = beyond_border(annotations.xywh, annotations.image_sizes[annotations.image_of])
    report.add("boxes", f"{beyond.sum()} reach more than 1 pixel over their image's border (they are cut there)")
    _check_left_out(annotations, report)
    _check_refused(annotations, config, use, report)
    if images:
        present = _check_missing(annotations, images, data.allow_missing, report)
        # At most `sample` of them, evenly over the file, the first and the last included.
        chosen = np.unique(np.linspace(0, max(len(present) - 1, 0), min(len(present), sample)).round().astype(np.int64))
        _check_files(annotations, images, present[chosen], workers, (data.exif, data.scale_16bit), report)
    else:
        report.add("not done", "no image was looked at; images=FOLDER shows whether all are there and can be read")
    return annotations


def _check_refused(annotations: LVISAnnotations, config: Config, use: str, report: Report) -> None:
    """What a training or an evaluation with these options would refuse."""
    data = config.data
    if annotations.suspicion:
        report.problems.append(f"{annotations.path}: {annotations.suspicion}")
    masks = "segm" in compared_types(annotations, data.without_mask)
    evaluation = evaluation_problems(annotations, masks, config.eval.protocols, data.allow_misplaced)
    training = training_problems(annotations, data.allow_misplaced)
    report.problems += evaluation if use == "evaluation" else training
    if not use:
        for problem in evaluation:
            if problem not in training:
                report.add("evaluation", f"would refuse this file: {problem.removeprefix(f'{annotations.path}: ')}")


def check_pair(
    train: LVISAnnotations,
    val: LVISAnnotations,
    train_images: str,
    val_images: str,
    report: Report,
) -> None:
    """What must hold between a training and a validation set: the same classes, no image in both."""
    report.lines.append("training and validation")
    try:
        val.require_same_classes(train.stats, train.path)
    except UserError as error:
        report.problems.append(f"{error}. Labels are positions in that list: give both files the same one")
    else:
        unseen = (train.stats.instance_counts == 0) & (val.stats.instance_counts > 0)
        untested = val.stats.instance_counts == 0
        report.add("classes", f"the same; {untested.sum()} have no validation instance, {unseen.sum()} only those")
        for label, mask in (("no AP", untested), ("never seen", unseen)):
            if mask.any():
                names = [name for name, holds in zip(train.stats.names, mask, strict=True) if holds]
                report.add(label, first_few(names))
    if Path(train.path).resolve() == Path(val.path).resolve():
        report.add("images", "the same file for both")
        return
    both = images_in_both(train, val, train_images, val_images)
    report.add("images", f"{len(both)} in both")
    if both:
        report.problems.append(
            f"{len(both)} images are in {train.path} and in {val.path} (the first: {both[0]}): the result would not be "
            "one of unseen images; remove them from one of the files"
        )


def _check_counts(annotations: LVISAnnotations, report: Report, use: str, drop_empty: bool) -> None:
    stats = annotations.stats
    counts = stats.instance_counts
    total, used = len(annotations), len(annotations.train_images)
    report.add("images", f"{total}, of which training uses {used}")
    report.add("annotations", f"{len(annotations.labels)}, of which training uses {len(annotations.train_rows)}")
    groups = [(group, stats.group_mask(group)) for group in GROUPS]
    report.add(
        f"{len(stats)} classes",
        "; ".join(f"{g}: {mask.sum()} with {counts[mask].sum()} instances" for g, mask in groups),
    )
    bounds = suggested_bounds(stats.image_counts)
    if use != "evaluation" and not annotations.own_groups and not all(mask.any() for _, mask in groups) and bounds:
        rare, common = bounds
        report.add(
            "no classes",
            f"{' and '.join(GROUP_NAMES[g] for g, mask in groups if not mask.any())}: no AP of theirs; thirds of the "
            f"classes, if this is the training file: data.rare_max={rare} data.common_max={common}, in both stages",
        )
    few = [f"{stats.names[i]} ({counts[i]})" for i in np.argsort(counts, kind="stable") if counts[i] < FEW]
    named = f": {first_few(few)}" if few else ""
    report.add(f"under {FEW}", f"{len(few)} classes, {(counts == 0).sum()} with none{named}")
    if (counts == 0).any() and use != "evaluation":
        fate = "dropped (data.drop_empty)" if drop_empty else "data.drop_empty=true trains without them, in both stages"
        report.add("no instance", f"{first_few([stats.names[i] for i in np.flatnonzero(counts == 0)])}: {fate}")
    names = Counter(annotations.name(index) for index in range(total))
    twice = [name for name, number in names.items() if number > 1]
    if twice:
        report.problems.append(
            f"{annotations.path}: {len(twice)} image files are listed more than once ({first_few(twice)}): merge their "
            "entries, else one lacks the other's annotations"
        )
    if not (used and len(annotations.train_rows)) and use != "evaluation":
        report.problems.append(f"{annotations.path}: training could use none of its images; see the reasons above")


def suggested_bounds(image_counts: np.ndarray) -> tuple[int, int] | None:
    """`data.rare_max` and `data.common_max` that cut the classes with images into thirds, about; None where none do.

    LVIS's bounds, 10 and 100 images, make every class of a small set with few classes frequent.
    """
    counts = np.sort(image_counts[image_counts > 0])
    values = np.unique(counts)
    if len(values) < len(GROUPS):
        return None
    # Where many classes have as many images, a bound is the next lower number that leaves the group above a class.
    rare, common = (int(counts[-(-share * len(counts) // 3) - 1]) for share in (1, 2))
    common = max(min(common, int(values[-2])), int(values[1]))
    return min(rare, int(values[values < common][-1])), common


def _check_left_out(annotations: LVISAnnotations, report: Report) -> None:
    """Annotations that are left out or read otherwise than they are written, repeated ones, and absent fields."""
    for reason, number in annotations.dropped.items():
        report.add("left out", f"{number} {reason} (first: {', '.join(map(str, annotations.first_ids(reason)))})")
    for note in annotations.notes:
        report.add("note", note)
    cells = np.column_stack([annotations.image_of, annotations.labels, annotations.xywh.round(2)])
    _, first, counts = np.unique(cells, axis=0, return_index=True, return_counts=True)
    if (counts > 1).any():
        ids = first_few(annotations.annotation_ids[np.sort(first[counts > 1])])
        report.add("twice", f"{(counts - 1).sum()} annotations repeat another's image, class and box (of {ids})")
    fields = {"neg_category_ids": annotations.negatives, "not_exhaustive_category_ids": annotations.not_exhaustive}
    lacking = [name for name, lists in fields.items() if lists is None]
    if lacking:
        report.add("no field", f"{' and '.join(lacking)}: evaluation follows COCO's rules (protocol auto)")
    if not annotations.own_groups:
        report.add("no field", "frequency: rare, common and frequent are counted here (data.rare_max, data.common_max)")


def _check_missing(annotations: LVISAnnotations, images: str, allowed: bool, report: Report) -> np.ndarray:
    """Counts per folder; gives the indices of the images that are there."""
    missing = annotations.missing_images(images)
    total = Counter(os.path.dirname(annotations.name(index)) for index in range(len(annotations)))
    lacking = Counter(os.path.dirname(annotations.name(index)) for index in missing)
    for split, number in sorted(total.items()):
        report.add("folder", f"{_folder(images, split)}: {number} images, {lacking[split]} missing")
    for split, number in sorted(lacking.items()) if not allowed else ():
        lost = [i for i in missing if os.path.dirname(annotations.name(i)) == split]
        advice = annotations.there_instead(lost, images) or _where_from(_folder(images, split))
        report.problems.append(
            f"{annotations.path}: {number} of {total[split]} images are missing in {_folder(images, split)} "
            f"(the first: {Path(annotations.name(lost[0])).name}). {advice}"
        )
    if allowed and missing and not len(np.setdiff1d(annotations.train_images, missing)):
        report.problems.append(f"{annotations.path}: none of the images that could be used is in {images}")
    return np.setdiff1d(np.arange(len(annotations)), missing)


def _folder(images: str, split: str) -> Path:
    """Where the images of a split are looked for: data/coco and data/coco/val2017 both mean data/coco/val2017."""
    folder = Path(images, split)
    return Path(images) if Path(images).name == split and not folder.is_dir() else folder


def _where_from(folder: Path) -> str:
    """How to get the images of a folder."""
    for archive in IMAGES:
        if archive.content == folder.name:
            return (
                f"They are COCO's: `make data ARGS=only=images` fetches them into data/coco, "
                f"or unpack {archive.urls[0]} in {folder.parent}, "
                f"or link a folder that has them: ln -s /path/to/{folder.name} {folder}"
            )
    return f"Put or link them there, or name the folder that has them{'' if folder.is_dir() else ' (there is none)'}"


def _check_files(
    annotations: LVISAnnotations,
    images: str,
    indices: Sequence[int] | np.ndarray,
    workers: int,
    how: tuple[str, str],
    report: Report,
) -> None:
    """Decode images: damaged ones, those of another size than the file says, and those nearly black in 8 bits.

    how: `data.exif`, `data.scale_16bit`.
    """

    def complaint(index: int) -> tuple[str, str]:
        size = tuple(annotations.image_sizes[index].tolist())
        try:
            _, few_levels = read_levels(annotations.image_path(index, images), size, *how)
        except ImageError as error:
            return f"image {annotations.image_ids[index]}: {error}", ""
        return "", few_levels

    with ThreadPoolExecutor(max(1, workers)) as pool:
        looked = pool.map(complaint, [int(index) for index in indices])
        found = list(progress(looked, len(indices), "decoding", "images")) if len(indices) else []
    wrong, few = ([text for text in texts if text] for texts in zip(*found, strict=True)) if found else ([], [])
    report.add("decoded", f"{len(indices)} of {len(annotations)} images, {len(wrong)} cannot be used")
    if few:
        report.add("16 bits", f"{len(few)} of them use few of 256 levels; the first: {few[0]}")
    if wrong:
        report.problems.append(
            f"{annotations.path}: {len(wrong)} of the {len(indices)} images decoded cannot be used. Fetch damaged ones "
            "again; where sizes differ, correct the file's `height` and `width` or take the images it was made for:"
            f"\n    {first_few(wrong, between=BREAK)}"
        )


@dataclass(frozen=True)
class Seen:
    """How often an epoch shows instances of each class, (C,) float64, on average."""

    uniform: np.ndarray
    repeat_factor: np.ndarray
    memory_equal: np.ndarray
    memory_counts: np.ndarray


def expected_views(annotations: LVISAnnotations, sampler: SamplerConfig, memory: MemoryConfig) -> Seen:
    """Instances shown (uniform, repeat-factor) and features drawn from the memory on top of them, in an epoch.

    The memory gives k m features per 2 images of a uniform epoch, classes drawn with p ~ 1 / s (Eq. 7). The mean score
    s is not known before training: memory_equal assumes the same s for all classes, as when it starts; memory_counts
    takes the instance counts for it, as `indicator.kind: prior` does. The truth moves from the first towards the second
    as long as rare classes score low. Classes without an instance have nothing stored.
    """
    labels = image_labels(annotations)
    place = np.searchsorted(annotations.train_images, annotations.image_of[annotations.train_rows])
    place = np.minimum(place, max(len(annotations.train_images) - 1, 0))
    used = annotations.train_images[place] == annotations.image_of[annotations.train_rows]
    shown, classes = place[used], annotations.labels[annotations.train_rows][used]
    counts = labels.instances.astype(np.float64)
    repeated = repeat_factors(labels, sampler.repeat_threshold, sampler.repeat_by, sampler.repeat_alpha)[shown]
    draws = len(labels.images) / 2 * memory.classes_per_draw * memory.features_per_class
    stored = counts > 0
    scarce = np.where(stored, 1 / np.maximum(counts, 1), 0)
    return Seen(
        uniform=counts,
        repeat_factor=np.bincount(classes, weights=repeated, minlength=len(counts)),
        memory_equal=draws * stored / max(stored.sum(), 1),
        memory_counts=draws * scarce / max(scarce.sum(), 1e-12),
    )


def long_tail_lines(
    annotations: LVISAnnotations,
    data: DataConfig,
    sampler: SamplerConfig,
    memory: MemoryConfig,
) -> list[str]:
    """The long-tail view as text: histogram, expected views by group, the images that need most memory."""
    lines = [*_histogram(annotations)]
    if len(annotations.train_rows) and len(annotations.train_images):
        lines += [*_views(annotations, sampler, memory), *_worst(annotations, data)]
    return lines


def _histogram(annotations: LVISAnnotations) -> list[str]:
    images, groups = annotations.stats.image_counts, annotations.stats.groups
    ends = (*EDGES[1:], None)
    bars = []
    for low, end in zip(EDGES, ends, strict=True):
        inside = (images >= low) & (images < end if end is not None else True)
        name = f"{low}" if end == low + 1 else f"{low}-{end - 1}" if end else f"{low}+"
        own = "".join(f" {group} {(inside & (groups == group)).sum()}" for group in GROUPS)
        bars.append((name, int(inside.sum()), own))
    longest = max(number for _, number, _ in bars)
    return ["  classes by the number of images that show them"] + [
        f"    {name:>9} {number:>5}{own if number else '':<18} {'#' * -(-BAR * number // max(longest, 1))}"
        for name, number, own in bars
    ]


def _views(annotations: LVISAnnotations, sampler: SamplerConfig, memory: MemoryConfig) -> list[str]:
    seen, stats = expected_views(annotations, sampler, memory), annotations.stats
    sides = {
        "uniform sampler": seen.uniform,
        f"repeat_factor (t = {sampler.repeat_threshold:g})": seen.repeat_factor,
    }
    if memory.draw == "score":
        sides |= {
            "feature memory, all scores equal": seen.memory_equal,
            "feature memory, scores ~ counts": seen.memory_counts,
        }
    head = "".join(f"{group:>12}" for group in GROUPS)
    lines = [f"  {'instances of a class in an epoch, mean':<42}{head}     fewest"]
    for name, values in sides.items():
        means = "".join(
            f"{values[mask].mean():12.1f}" if (mask := stats.group_mask(group)).any() else f"{'-':>12}"
            for group in GROUPS
        )
        lines.append(f"    {name:<40}{means}{values.min():11.1f}")
    k, m = memory.classes_per_draw, memory.features_per_class
    drawn = f"{k} x {m} for every 2 images, p ~ 1 / mean score"
    return (
        [*lines, f"    (memory: features drawn on top of a uniform epoch, {drawn})"]
        if memory.draw == "score"
        else lines
    )


def _worst(annotations: LVISAnnotations, data: DataConfig) -> list[str]:
    """Images that need most memory: with so many instances, at the largest size that training gives them."""
    counts = np.diff(annotations.first_row)[annotations.train_images]
    over = int((counts > data.max_instances).sum())
    used = np.minimum(counts, data.max_instances)
    sizes = annotations.image_sizes[annotations.train_images]
    new = np.array([resized((int(h), int(w)), max(data.short_edges), data.long_edge) for h, w in sizes])
    new = np.full_like(new, data.canvas) if data.resize == "lsj" else new
    order = np.lexsort((annotations.train_images, -new.prod(axis=1) * used))[:WORST]
    lines = [
        f"  images that need most memory ({over} have more than data.max_instances = {data.max_instances} instances)"
    ]
    for i in order:
        index = annotations.train_images[i]
        lines.append(
            f"    image {annotations.image_ids[index]}: {counts[i]} instances, {sizes[i][1]} x {sizes[i][0]} pixels, "
            f"{new[i][1]} x {new[i][0]} in training"
        )
    return lines
