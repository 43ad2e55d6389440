"""The long tail of a training set before training: who is rare, and how often an epoch shows each class.

Repeat-factor sampling: LVIS (arXiv 1908.03195); feature memory: Sec. 3.3, Eq. 7-8. Shapes: C classes, T training
images.
"""

from dataclasses import dataclass

import numpy as np

from loce.config import DataConfig, MemoryConfig, SamplerConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.samplers import image_labels, repeat_factors
from loce.data.transforms import resized
from loce.utils.classes import GROUPS

EDGES = (0, 1, 2, 6, 11, 31, 101, 301, 1001)  # images that show a class: where the histogram's bars begin
BAR = 40  # characters of the longest
WORST = 5  # images named


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
    repeated = repeat_factors(labels, sampler.repeat_threshold)[shown]
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
    annotations: LVISAnnotations, data: DataConfig, sampler: SamplerConfig, memory: MemoryConfig
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
    lines.append(
        f"    (memory: features drawn on top of a uniform epoch, {k} x {m} for every 2 images, p ~ 1 / mean score)"
    )
    return lines


def _worst(annotations: LVISAnnotations, data: DataConfig) -> list[str]:
    """Images that need most memory: with so many instances, at the largest size that training gives them."""
    counts = np.diff(annotations.first_row)[annotations.train_images]
    over = int((counts > data.max_instances).sum())
    used = np.minimum(counts, data.max_instances)
    sizes = annotations.image_sizes[annotations.train_images]
    new = np.array([resized((int(h), int(w)), max(data.short_edges), data.long_edge) for h, w in sizes])
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
