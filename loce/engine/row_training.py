"""Training of a classification head on exported rows of any detector: feature, box and label of each region.

What is trained is the head alone, as in a second stage with train.freeze=detector: proposals, features and boxes are
those of the files (region_store.py). The loss, the mean score, the memory and the sampling of regions are those of a
training in place. Rows of one file at a time are in memory, so a batch's images come from one or two files.

Differences from a training in place: no image is flipped or scaled anew; the memory stores the batch's positive rows
(memory.source=regions), since the boxes of Eq. 5 would need the detector, and is empty at first; one process, without
checkpoints: what is stopped begins anew.

Shapes: R regions of an image, N rows of a batch, D features, C classes, L logits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loce.config import (
    HeadConfig,
    IndicatorConfig,
    MemoryConfig,
    Protocols,
    TrainConfig,
)
from loce.data.annotations.lvis import LVISAnnotations
from loce.engine.loop import learning_rate
from loce.engine.region_store import Regions, read_regions
from loce.heads import Head, RoIs
from loce.mean_score import MeanScoreTracker, instance_scores
from loce.models.boxes import BETWEEN, NEGATIVE, REGIONS, generator_for, leave_out, match_boxes, sample
from loce.models.memory_sampling import ImageSeed, MemorySampling
from loce.utils.classes import IGNORED
from loce.utils.errors import DivergedError
from loce.utils.options import Count, Fraction, Natural, NotNegative, Positive, Share
from loce.utils.progress import progress

SCHEDULE = ("batch_size", "epochs", "drops", "lr", "warmup_iterations")  # options of TrainConfig


@dataclass(frozen=True, kw_only=True)
class RowMemory:
    """Feature memory of the rows (LOCE, Sec. 3.3)."""

    enabled: bool = False  # features of weak classes are stored and drawn again
    capacity: Count = 80  # M, features per class
    classes_per_draw: Count = 8  # k, per 2 images
    features_per_class: Count = 4  # m


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Train a classification head on exported rows, and evaluate it on others."""

    train: str = ""  # folder of regions_*.npz with features, of training images; classifier.npz: what it starts from
    val: str = ""  # the same of validation images
    annotations: str = ""  # of the training images, JSON
    val_annotations: str = ""  # of the validation images
    output: str = "runs/rows"  # folder for the head and the numbers
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    seed: Natural = 0  # of new weights, order of images and draws
    epochs: Count = 2  # over the training images
    drops: tuple[Count, ...] = (1,)  # epochs after which the learning rate falls to a tenth
    batch_size: Count = 16  # images a step
    lr: Positive = 0.02  # for 16 images; scaled linearly with batch_size
    warmup_iterations: Natural = 50  # with a linearly rising learning rate
    weight_decay: NotNegative = 1e-4  # of SGD with momentum 0.9
    rows: Count = 512  # of an image in the loss
    positive_fraction: Share = 0.25  # of them, at most
    positive_iou: Share = 0.5  # boxes from here on are of the object's class, where the rows have no labels
    score_threshold: Fraction = 1e-4  # detections below are left out
    nms: Share = 0.5  # IoU; boxes of a class above it are one
    detections: Count = 300  # per image
    protocol: Protocols = "auto"  # one, or [lvis, fixed, pool]
    resamples: Natural = 1000  # of the bootstrap for the intervals
    head: HeadConfig = field(default_factory=HeadConfig)
    indicator: IndicatorConfig = field(default_factory=IndicatorConfig)
    memory: RowMemory = field(default_factory=RowMemory)


class Image(NamedTuple):
    """Rows of a training image: features (R, D), labels (R,) with C for background and IGNORED for neither, instances
    (R,), -1 for none."""

    features: Tensor
    labels: Tensor
    instances: Tensor


def train_head(head: Head, files: Sequence[Path], annotations: LVISAnnotations, options: RowOptions) -> None:
    """Train a head on the rows of files: store and draw features, classify, update the mean score, loss, SGD."""
    stats, device, kind = annotations.stats, next(head.parameters()).device, options.indicator
    classes = len(stats)
    tracker = MeanScoreTracker(classes, kind.momentum, kind.initial_score, kind.background_score).to(device)
    prior_L = torch.tensor([*stats.instance_counts, kind.background_count], dtype=torch.float32, device=device)
    memory = None
    if options.memory.enabled:
        chosen = {name: value for name, value in vars(options.memory).items() if name != "enabled"}
        settings = MemoryConfig(enabled=True, source="regions", **chosen)
        memory = MemorySampling(classes, (head.in_features,), settings).to(device)
    shared = {name: getattr(options, name) for name in SCHEDULE}
    schedule, optimizer = TrainConfig(**shared), torch.optim.SGD(head.parameters(), momentum=0.9)
    optimizer.param_groups[0]["weight_decay"] = options.weight_decay
    steps = len(image_ids(files)) // options.batch_size  # of an epoch
    total = options.epochs * steps

    head.train()
    for step in progress(range(total), total, "training", "steps"):
        epoch = step // steps
        if step % steps == 0:
            rng = np.random.default_rng([options.seed, epoch])
            images = shuffled(files, annotations, options, rng)
        seeds = [ImageSeed(int(rng.integers(2**62)), place) for place in range(options.batch_size)]
        x_ND, labels_N, instances_N = (rows.to(device) for rows in batch_of(images, seeds, options))

        # Features of the batch's objects are stored, then rows of weak classes are drawn (Eq. 6-8).
        indicator_L, drawn = prior_L if kind.kind == "prior" else tracker.scores, 0
        if memory is not None:
            memory.store(x_ND, torch.where(instances_N >= 0, labels_N, IGNORED), x_ND.new_zeros(len(x_ND), 4))
            rows = memory.draw(indicator_L, seeds)
            drawn = len(rows.labels)
            x_ND, labels_N = torch.cat([x_ND, rows.features]), torch.cat([labels_N, rows.labels])
            instances_N = F.pad(instances_N, (0, drawn), value=-1)
        logits_NL, from_memory_N = head(x_ND), torch.arange(len(x_ND), device=device) >= len(x_ND) - drawn

        # The mean score (Eq. 2), before the loss takes its margins from it.
        own_N1 = labels_N.clamp(0, classes - 1)[:, None]
        p_N = head.scores(logits_NL.detach()).gather(1, own_N1)[:, 0]
        entries = instance_scores(p_N, labels_N, instances_N, int(instances_N.max()) + 1)  # sync: rows of few images
        tracker.update(*entries, (torch.where(from_memory_N, labels_N, IGNORED), p_N))
        indicator_L = prior_L if kind.kind == "prior" else tracker.scores

        rois = RoIs(labels_N, instances_N, from_memory_N, indicator_L.clone(), step / total, x_ND.detach())
        loss = torch.stack(list(head.losses(logits_NL, rois).values())).sum()
        if not loss.isfinite():
            raise DivergedError(f"training diverged at step {step + 1}: the loss is {loss.item()}; try a lower lr")
        optimizer.param_groups[0]["lr"] = learning_rate(schedule, step, epoch, total)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()


def shuffled(
    files: Sequence[Path],
    annotations: LVISAnnotations,
    options: RowOptions,
    rng: np.random.Generator,
) -> Iterator[Image]:
    """The images of an epoch: files in random order, the images of each in random order."""
    row_of = {int(number): index for index, number in enumerate(annotations.image_ids)}
    for file in rng.permutation(np.array(files, dtype=object)):
        regions = read_regions(file, len(annotations.stats), "features")
        for place in rng.permutation(len(regions.image_ids)).tolist():
            index = row_of[int(regions.image_ids[place])]
            yield image_of(regions, slice(*regions.bounds[place : place + 2]), annotations, index, options.positive_iou)


def image_of(regions: Regions, rows: slice, annotations: LVISAnnotations, index: int, positive_iou: float) -> Image:
    """The rows of an image; where they have no labels, a box is of the object that it overlaps by `positive_iou`.

    Labels of the file name no instances: each positive row then is one of its own for the mean score.
    """
    assert regions.features is not None
    classes = len(annotations.stats)
    if regions.labels is not None:
        labels_R = regions.labels[rows]
        own_R = (labels_R >= 0) & (labels_R < classes)
        return Image(regions.features[rows], labels_R, torch.where(own_R, torch.arange(len(own_R)), -1))
    own = annotations.rows(index)
    truth_G4, crowds_M4 = (torch.from_numpy(annotations.corners(some)) for some in (own, annotations.ignored(index)))
    matched_R = match_boxes(regions.boxes[rows], truth_G4, *(positive_iou,) * 3)
    matched_R = leave_out(matched_R, regions.boxes[rows], crowds_M4)
    label_G = torch.from_numpy(annotations.labels[own].astype(np.int64))
    label_R = label_G[matched_R.clamp(min=0)] if len(own) else matched_R
    labels_R = torch.where(matched_R >= 0, label_R, torch.where(matched_R == NEGATIVE, classes, IGNORED))
    return Image(regions.features[rows], labels_R, matched_R.clamp(min=-1))


def batch_of(images: Iterator[Image], seeds: Sequence[ImageSeed], options: RowOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D), labels (N,) and instances (N,) of a batch: of each image `rows` at random, as in detection."""
    features, labels, instances, first = [], [], [], 0
    for seed, (x_RD, labels_R, instances_R) in zip(seeds, images, strict=False):  # seeds first: no image is lost
        background_R = (labels_R >= 0) & (instances_R < 0)
        matched_R = torch.where(background_R, NEGATIVE, torch.where(instances_R >= 0, instances_R, BETWEEN))
        generator = generator_for(seed.seed, REGIONS, torch.device("cpu"))
        rows, valid, others, others_valid = sample(matched_R, options.rows, options.positive_fraction, generator)
        chosen = torch.cat([rows[valid], others[others_valid]])
        features.append(x_RD[chosen])
        labels.append(labels_R[chosen])
        instances.append(torch.where(instances_R[chosen] >= 0, instances_R[chosen] + first, -1))
        first += len(x_RD)
    return torch.cat(features), torch.cat(labels), torch.cat(instances)


def image_ids(files: Sequence[Path]) -> np.ndarray:
    """(I,) the images of files, in their order."""
    found = []
    for file in files:
        with np.load(file, allow_pickle=False) as content:
            found.append(content["image_ids"])
    return np.concatenate(found)
