"""Options that are each allowed but cannot stand together."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from loce.method_options import HeadConfig
from loce.utils.options import Conflict


def _other_heads_options() -> Iterator[Conflict]:
    """An option of another method than the chosen one would do nothing."""
    for section in dataclasses.fields(HeadConfig):
        if isinstance(section.default_factory, type):
            for option in dataclasses.fields(section.default_factory):

                def is_wrong(
                    c: Any, s: str = section.name, o: str = option.name, default: Any = option.default
                ) -> bool:
                    return c.head.name != s and getattr(getattr(c.head, s), o) != default

                reason = f"an option of head.name={section.name}, which is not chosen"
                yield (f"head.{section.name}.{option.name}", "head.name"), is_wrong, reason


def _stale(c: Any) -> bool:
    """Whether vectors are stored that come from layers which train."""
    return bool(c.memory.enabled and c.memory.level == "fc" and c.train.freeze == "backbone")


# What cannot stand together: the keys, when it is wrong, and why (or what is right).
CONFLICTS: tuple[Conflict, ...] = (
    (("data.train_annotations",), lambda c: not c.data.train_annotations, "must name a file"),
    (("data.val_annotations",), lambda c: not c.data.val_annotations, "must name a file"),
    (("data.train_images",), lambda c: not c.data.train_images, "must name a folder"),
    (("data.val_images",), lambda c: not c.data.val_images, "must name a folder"),
    (
        ("data.common_max", "data.rare_max"),
        lambda c: c.data.common_max < c.data.rare_max,
        "common_max must not be below rare_max",
    ),
    (("data.short_edges",), lambda c: not c.data.short_edges, "must hold at least one length"),
    (
        ("data.long_edge", "data.short_edges"),
        lambda c: c.data.long_edge < max(c.data.short_edges, default=0),
        "long_edge must not be below a short edge",
    ),
    (
        ("data.long_edge", "data.test_short_edge"),
        lambda c: c.data.long_edge < c.data.test_short_edge,
        "long_edge must not be below test_short_edge",
    ),
    (
        ("model.rpn.negative_iou", "model.rpn.positive_iou"),
        lambda c: c.model.rpn.negative_iou > c.model.rpn.positive_iou,
        "negative_iou must not be above positive_iou",
    ),
    (
        ("model.rpn.batch_per_image", "model.rpn.positive_fraction"),
        lambda c: c.model.rpn.batch_per_image * c.model.rpn.positive_fraction < 1,
        "their product, the positive anchors of an image, must be at least 1",
    ),
    (
        ("model.roi.batch_per_image", "model.roi.positive_fraction"),
        lambda c: c.model.roi.batch_per_image * c.model.roi.positive_fraction < 1,
        "their product, the positive RoIs of an image, must be at least 1",
    ),
    (
        ("model.backbone", "model.weights"),
        lambda c: c.model.backbone == "tiny" and c.model.weights != "none",
        "the tiny backbone has no ImageNet weights; set model.weights=none",
    ),
    (
        ("model.backbone", "model.norm"),
        lambda c: c.model.backbone == "tiny" and c.model.norm != "group",
        "the tiny backbone has group norm only; set model.norm=group",
    ),
    (
        ("model.norm", "model.weights", "train.init"),
        lambda c: (
            c.model.norm == "frozen" and c.model.weights == "none" and not c.train.init and c.model.backbone != "tiny"
        ),
        "without weights there are no statistics to freeze; set model.norm=batch or group, or train.init",
    ),
    (
        ("model.frozen_stages", "model.weights", "train.init"),
        lambda c: c.model.frozen_stages > 0 and c.model.weights == "none" and not c.train.init,
        "stages of random weights would never train; set model.frozen_stages=0, or train.init",
    ),
    (
        ("memory.enabled", "train.freeze"),
        lambda c: c.memory.enabled and c.train.freeze == "none",
        "the stored features would be stale; set train.freeze=trunk (or backbone, with memory.level=roi)",
    ),
    (
        ("memory.enabled", "memory.level", "train.freeze"),
        lambda c: _stale(c) and not c.memory.allow_stale,
        "the shared FCs train, so vectors stored after them would be stale; set train.freeze=trunk, memory.level=roi, "
        "or memory.allow_stale=true to try it",
    ),
    (
        ("memory.allow_stale", "memory.enabled", "memory.level", "train.freeze"),
        lambda c: c.memory.allow_stale and not _stale(c),
        "nothing stored would be stale; leave allow_stale out",
    ),
    (
        ("memory.transform", "indicator.kind"),
        lambda c: c.memory.transform == "log_inverse" and c.indicator.kind == "prior",
        "-log of instance counts is no probability; set memory.transform=inverse or inverse_root",
    ),
    (
        ("indicator.warm_start", "memory.enabled"),
        lambda c: not c.indicator.warm_start and not c.memory.enabled,
        "without a memory nothing is filled, and the mean score starts at initial_score anyway; leave warm_start out",
    ),
    (
        ("train.freeze", "train.init"),
        lambda c: c.train.freeze != "none" and not c.train.init,
        "what is frozen must come from somewhere; set train.init to a checkpoint or a run folder",
    ),
    (
        ("model.norm", "train.freeze"),
        lambda c: c.model.norm == "batch" and c.train.freeze != "none",
        "batch norms would go on changing their statistics in what is frozen; set model.norm=frozen, same weights",
    ),
    (
        ("train.batch_size", "train.accumulate"),
        lambda c: c.train.batch_size % c.train.accumulate != 0,
        "batch_size must be divisible by accumulate",
    ),
    (
        ("train.evaluate_every", "train.evaluate"),
        lambda c: c.train.evaluate_every > 0 and not c.train.evaluate,
        "there is nothing to do every few epochs where nothing is evaluated",
    ),
    (
        ("train.evaluate_every", "train.epochs"),
        lambda c: c.train.evaluate_every >= c.train.epochs,
        "evaluate_every must be below epochs; the last epoch is evaluated without it",
    ),
    (
        ("train.overfit", "train.dry_run"),
        lambda c: c.train.overfit > 0 and c.train.dry_run,
        "these are two different trials; give one of them",
    ),
    (
        ("train.overfit", "head.name"),
        lambda c: c.train.overfit > 0 and c.head.name == "simcal",
        "this head draws images by class and cannot learn fixed ones; try the recipe of the stage before",
    ),
    (
        ("train.drops", "train.epochs"),
        lambda c: list(c.train.drops) != sorted(set(c.train.drops)) or any(d >= c.train.epochs for d in c.train.drops),
        "drops must increase and stay below epochs",
    ),
    (
        ("head.reset", "train.init"),
        lambda c: c.head.reset and not c.train.init,
        "there is nothing to start anew; set train.init, or leave head.reset out",
    ),
    (
        ("head.reset", "head.name"),
        lambda c: c.head.reset and c.head.name == "simcal",
        "the detector's own classifier is one of the two; set head.simcal.layers=3fc_rand to start the other anew",
    ),
    (
        ("memory.level", "head.name"),
        lambda c: c.memory.enabled and c.memory.level == "fc" and c.head.name == "simcal",
        "this head reads pooled features, not vectors; set memory.level=roi",
    ),
    (
        ("train.freeze", "head.name"),
        lambda c: c.head.name in ("simcal", "balms") and c.train.freeze != "detector",
        "this head is a second stage of its own; set train.freeze=detector and train.init",
    ),
    (
        ("head.name", "sampler.name"),
        lambda c: c.head.name == "simcal" and c.sampler.name != "bilevel",
        "this head learns from the class that an image was drawn for; set sampler.name=bilevel",
    ),
    (
        ("sampler.repeat_threshold", "sampler.name"),
        lambda c: c.sampler.name != "repeat_factor" and c.sampler.repeat_threshold != 1e-3,
        "an option of sampler.name=repeat_factor, which is not chosen",
    ),
    (
        ("sampler.repeat_rounding", "sampler.name"),
        lambda c: c.sampler.name != "repeat_factor" and c.sampler.repeat_rounding != "stochastic",
        "an option of sampler.name=repeat_factor, which is not chosen",
    ),
    (
        ("sampler.bilevel_tau", "sampler.name"),
        lambda c: c.sampler.name != "bilevel" and c.sampler.bilevel_tau != 0,
        "an option of sampler.name=bilevel, which is not chosen",
    ),
    (
        ("head.forest.trees", "head.name"),
        lambda c: c.head.name == "forest" and not c.head.forest.trees,
        "must name a file of parent trees; scripts/build_forest.py writes one",
    ),
    (
        ("head.forest.visual", "head.forest.geometrical", "head.forest.lexical", "head.name"),
        lambda c: (
            c.head.name == "forest" and not (c.head.forest.visual + c.head.forest.geometrical + c.head.forest.lexical)
        ),
        "at least one tree must have parents",
    ),
    (
        ("head.bags.bounds",),
        lambda c: list(c.head.bags.bounds) != sorted(set(c.head.bags.bounds)),
        "must increase",
    ),
    (
        ("head.reweighted.beta", "head.reweighted.by"),
        lambda c: c.head.reweighted.by == "inverse_frequency" and c.head.reweighted.beta != 0.9999,
        "an option of head.reweighted.by=effective_number, which is not chosen",
    ),
    (
        ("head.ldam.reweight_from", "head.ldam.beta"),
        lambda c: c.head.ldam.reweight_from == 1 and c.head.ldam.beta != 0.9999,
        "rows are never weighted by class, so beta does nothing; leave it out, or lower reweight_from",
    ),
    *_other_heads_options(),
)
