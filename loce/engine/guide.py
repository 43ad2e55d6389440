"""Recipe for a data set: image size, length, batch, anchors and groups from what the set shows, each with its reason.

It stands on stage1.yaml where there is a GPU, else on the small detector of glyphs/stage1.yaml. Rules of thumb of ours;
benchmarks/guide.py compares what they choose with that recipe as it is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loce.config import TrainConfig, load_config, run_folder
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.check import suggested_bounds
from loce.models.rpn import RATIOS, STRIDES
from loce.utils.classes import GROUPS
from loce.utils.environment import available_cores
from loce.utils.errors import UserError, first_few
from loce.utils.files import write_text
from loce.utils.yaml_text import show

GPU_BASE, CPU_BASE = "stage1.yaml", "glyphs/stage1.yaml"
SMALL = 10  # % of the objects are smaller than what is called a small object here
EDGES = {GPU_BASE: (480, 1200), CPU_BASE: (96, 512)}  # px; the short edge of images lies between
SCALES = (2, 3, 4, 6, 8, 12)  # anchor scales to choose from
MARGIN = 0.05  # of IoU, by which another scale must be better than the base's
SEEN = {GPU_BASE: 48_000, CPU_BASE: 10_000}  # images that stage 1 shows; fewer where epochs are LONGEST
LONGEST = 200  # epochs
CORE_PIXELS = 0.4e6 * 1200  # that a core trains on in 20 minutes, at the speed of the demo
IMAGE_BYTES, OTHER_BYTES = 2.5e9, 2e9  # of ResNet-50 with masks: an image of 800 x 1333 px; weights and the rest
DETECTIONS = 100  # of an image, where no more classes than that are there


@dataclass(frozen=True)
class Choice:
    """An option of a recipe, and why it has this value."""

    key: str
    value: Any
    reason: str = ""


def write_recipes(
    recipe: Path,
    train: tuple[str, str],
    val: tuple[str, str],
    given: Mapping[str, Any],
) -> tuple[list[str], list[str]]:
    """Write `recipe` and, beside it, that of LOCE on top; lines that say why, and the commands that come next.

    train, val: annotation file and image folder. given: options that are decided. UserError where a file cannot be
    read, holds nothing to train on, or would be overwritten.
    """
    loce = recipe.with_name(f"{recipe.stem}_loce.yaml")
    if recipe.suffix != ".yaml":
        raise UserError(f"recipe = {recipe}: must end in .yaml")
    for file in (recipe, loce):
        if file.exists():
            raise UserError(f"recipe = {recipe}: {file} is there, and is not overwritten; choose another, or delete it")
    annotations = LVISAnnotations.open(train[0], box_masks=True)
    if not len(annotations.train_rows):
        raise UserError(f"{train[0]}: training could use none of its objects: check it without recipe={recipe}")
    # Stage 1.
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    base = GPU_BASE if gpu_bytes else CPU_BASE
    pairs = {"train": train, "val": val}
    parts = ("annotations", "images")
    where = [Choice(f"data.{split}_{part}", pair[n]) for split, pair in pairs.items() for n, part in enumerate(parts)]
    chosen = choose(annotations, base, gpu_bytes, available_cores())
    choices = [choice for choice in chosen if choice.key not in given]
    choices += [
        Choice(key, list(value) if isinstance(value, tuple) else value, "as given") for key, value in given.items()
    ]
    detector = "there is a GPU" if gpu_bytes else "there is no GPU, so the demo's small detector"
    write_text(recipe, yaml_text(f"Stage 1; {detector}.", base, [*where, *choices]))
    # LOCE: what stage 1 has, but for the length, a quarter as in the paper.
    stage1, paper = load_config([str(recipe)]), load_config(["loce.yaml"]).train
    epochs = max(2, -(-stage1.train.epochs // 4))
    init = Choice("train.init", stage1.output, "stage 1")
    short = length(paper, epochs, len(annotations.train_images), stage1.train.batch_size)
    write_text(loce, yaml_text("Stage 2, LOCE.", ["loce.yaml", f"./{recipe.name}"], [init, *short]))
    control = f"{loce} head.name=softmax memory.enabled=false output={stage1.output}_softmax"
    lines = [f"  {choice.key} = {show(choice.value)}: {choice.reason}" for choice in choices]
    commands = [
        f"python scripts/train.py {recipe}",
        f'python scripts/finetune.py {loce} "{control}"',
        f"python scripts/report.py {stage1.output}_softmax {run_folder(loce)} output={recipe.with_suffix('.html')}",
    ]
    return [f"wrote {recipe} (change there what you know better) and {loce}:", *lines], ["next:", *commands]


def choose(train: LVISAnnotations, base: str, gpu_bytes: float, cores: int) -> list[Choice]:
    """The options of stage 1 that this training set wants otherwise than the recipe `base`.

    train: read with box_masks=True, so that objects without masks are in it, too.
    """
    config, images, rows = load_config([base]), len(train.train_images), train.train_rows
    old, batch = config.model.rpn.anchor_scale, config.train.batch_size
    sizes = train.image_sizes[train.train_images]
    short = int(np.median(sizes.min(axis=1)))
    aspect = float(np.median(sizes.max(axis=1) / sizes.min(axis=1)))
    sides = train.xywh[rows, 2:] / train.image_sizes[train.image_of[rows]].min(axis=1)[:, None]  # of the short edge
    small = float(np.percentile(np.sqrt(sides.prod(axis=1)), SMALL))
    # Image size: the base's, or as large as images are and a CPU has time for; more where small objects need it to fill
    # the base's smallest anchor, on a CPU at the price of up to 3 of 4 images seen.
    pixels = math.inf if gpu_bytes else CORE_PIXELS * cores / aspect
    lowest, highest = EDGES[base]
    usual = config.data.test_short_edge if gpu_bytes else min(short, math.sqrt(pixels / SEEN[base]))
    most = min(highest, math.sqrt(4 * pixels / SEEN[base]), 2 * short)
    edge = 16 * max(1, round(min(max(usual, old * STRIDES[0] / small, lowest), most) / 16))
    largest = max(config.data.short_edges)
    edges = [16 * max(1, round(length * edge / largest / 16)) for length in config.data.short_edges]
    becomes = f"{SMALL}% of the objects are under {small * short:.0f} of {short} px; that becomes {small * edge:.0f}"
    choices = [
        Choice("data.short_edges", edges, becomes),
        Choice("data.test_short_edge", edge, "the largest of them"),
        Choice("data.long_edge", edge * 5 // 3, "5 / 3 of it: panoramas are made smaller"),
    ]
    # Weights: the small trunk's own, which the recipe of drawn sets does without.
    if base == CPU_BASE:
        choices.append(Choice("model.weights", "glyphs", "the small trunk has seen characters, no photos"))
    # Masks.
    masks = int(train.has_mask[rows].sum())
    if not masks:
        choices.append(Choice("model.masks", False, "no object has a mask: a Faster R-CNN"))
    elif masks < len(rows):
        choices.append(Choice("data.without_mask", "box", f"{len(rows) - masks} of {len(rows)} objects have no mask"))
    # Anchors: the scale at which objects and their best anchors are most alike.
    fits = {scale: anchor_fit(sides * edge, scale) for scale in (old, *SCALES)}
    best = max(fits, key=lambda scale: fits[scale])
    if fits[best] - fits[old] > MARGIN:
        alike = f"IoU of objects and their best anchors' shapes {fits[best]:.2f} on average, {fits[old]:.2f} by {old:g}"
        choices.append(Choice("model.rpn.anchor_scale", best, alike))
    # Batch: by the GPU's memory.
    if gpu_bytes:
        each = IMAGE_BYTES * edge**2 * aspect / (800 * 1333)
        batch = next((n for n in (16, 8, 4) if OTHER_BYTES + n * each <= gpu_bytes), 2)
        room = f"about {each / 1e9:.1f} GB an image, of {gpu_bytes / 1e9:.0f} GB"
        choices.append(Choice("train.batch_size", batch, room))
    # Length: so many images seen, as far as there is time.
    seen = min(float(SEEN[base]), pixels / edge**2)
    epochs = min(max(round(seen / images), config.train.epochs if gpu_bytes else 2), LONGEST)
    choices += length(config.train, epochs, images, batch)
    # Groups, where LVIS's bounds leave one empty; detections.
    bounds, groups = suggested_bounds(train.stats.image_counts), map(train.stats.group_mask, GROUPS)
    if bounds and not train.own_groups and not all(group.any() for group in groups):
        thirds = "thirds of the classes; with LVIS's 10 and 100 images a group would be empty"
        choices += [Choice("data.rare_max", bounds[0], thirds), Choice("data.common_max", bounds[1], "as rare_max")]
    # Placeholders, such as Roboflow's category 0.
    empty = train.stats.instance_counts == 0
    if empty.any():
        names = first_few([train.stats.names[label] for label in np.flatnonzero(empty)])
        choices.append(Choice("data.drop_empty", True, f"no object is of {names}"))
    if (classes := int((~empty).sum())) <= DETECTIONS:
        choices.append(Choice("eval.detections", DETECTIONS, f"LVIS's 300 are for 1203 classes, not for {classes}"))
    return choices


def length(like: TrainConfig, epochs: int, images: int, batch: int) -> list[Choice]:
    """Epochs, drops in the proportions of `like`, and a warm-up that is a quarter of the training at most."""
    steps = epochs * max(1, images // batch)
    drops = sorted({round(drop * epochs / like.epochs) for drop in like.drops} - {0, epochs})
    choices = [
        Choice("train.epochs", epochs, f"{epochs * images} images seen, {steps} steps of {batch}"),
        Choice("train.drops", drops, f"after the same shares as {list(like.drops)} of {like.epochs}"),
    ]
    if steps < 4 * like.warmup_iterations:
        choices.append(Choice("train.warmup_iterations", max(steps // 4, 1), "a quarter of the steps"))
    return choices


def anchor_fit(sides: np.ndarray, scale: float) -> float:
    """Mean over objects of the IoU with the most alike anchor, both centred on one point. sides: (N, 2) px."""
    areas = (scale * np.array(STRIDES)) ** 2.0
    ratios = np.sqrt(RATIOS)
    widths, heights = np.sqrt(areas)[:, None] / ratios, np.sqrt(areas)[:, None] * ratios
    common = np.minimum(sides[:, :1], widths.ravel()) * np.minimum(sides[:, 1:], heights.ravel())
    return float((common / (sides.prod(axis=1)[:, None] + (widths * heights).ravel() - common)).max(axis=1).mean())


def yaml_text(title: str, base: str | list[str], choices: list[Choice]) -> str:
    """A recipe with the reason of each choice above it."""
    lines = [
        f"# {title}",
        "# Written by scripts/check_data.py for this data set: change what you know better.",
        f"base: {show(base)}",
    ]
    tree: dict[str, Any] = {}
    for choice in choices:
        *sections, last = choice.key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = choice
    return "\n".join([*lines, *_nested(tree, "")]) + "\n"


def _nested(tree: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in tree.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_nested(value, indent + "  ")]
        else:
            lines += [f"{indent}# {value.reason}"] if value.reason else []
            lines.append(f"{indent}{key}: {show(value.value)}")
    return lines
