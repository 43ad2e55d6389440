"""RoI heads: sampled RoIs and rows from the feature memory, through one classifier, box regressor and mask head.

Shapes: B images, R sampled RoIs over the batch, K rows from the memory, N = R + K rows in this order, D features, C
classes, L logits of the classifier, P positives, G ground-truth instances over the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torchvision.ops import roi_align

from loce.config import RoIConfig
from loce.data.masks import CroppedMasks
from loce.heads.base import Head, RoIs
from loce.mean_score import MeanScoreTracker, instance_scores
from loce.models.boxes import (
    HEAD,
    INSTANCES,
    REGIONS,
    ROI_STDS,
    constants,
    encode,
    finite,
    generator_for,
    leave_out,
    match_boxes,
    sample,
)
from loce.models.mask_head import MaskHead, mask_loss, mask_targets
from loce.models.memory_sampling import ImageSeed, MemoryRows, MemorySampling
from loce.utils.classes import IGNORED, META
from loce.utils.distributed import all_reduce_sum, divisor

BOX_SIDE, MASK_SIDE = 7, 14
POOL_STRIDES = (4, 8, 16, 32)  # P2..P5; P6 serves the RPN only
TORCHVISION_SAMPLES = 2  # a bin and axis
COUNTS = 3  # in Rows.sums
T = TypeVar("T")


@dataclass
class Targets:
    """Ground truth of one image, on the model's device, and where its random numbers come from."""

    boxes: Tensor  # (G, 4)
    labels: Tensor  # (G,)
    masks: CroppedMasks | None  # None: the model has no mask head
    store_rows: Tensor | None = None  # (n,) instances whose features the memory stores; None: it chooses
    sampled_class: int = -1  # as RoIs.sampled_class_N
    seed: int | None = None  # of the image's random numbers
    batch_index: int = 0  # position in the batch over all ranks
    ignored: Tensor | None = None  # (M, 4) boxes of regions that are neither objects nor background
    host_labels: Tensor | None = None  # (G,) `labels` on the host, where the memory chooses


@dataclass
class SampledRoIs:
    """RoIs of one image: boxes (R, 4), labels (R,) with IGNORED in unused slots, instance (R,) or -1.

    Those with an instance come first.
    """

    boxes: Tensor
    labels: Tensor
    instances: Tensor


class FirstStage(NamedTuple):
    """What the RoI heads work on: maps P2..P6 (B, D, h, w); of each image proposals (n, 4), ground truth, and the
    (height, width) of its content."""

    features: list[Tensor]
    proposals: list[Tensor]
    targets: list[Targets]
    sizes: list[tuple[int, int]]


class Rows(NamedTuple):
    """The N rows of a batch, before their losses: what the classifier read, box targets, logits, and what a loss gets.

    sums: (4 (C+1) + 3,) what has to be added up over ranks: the entries of the mean score (2, 2, C+1), see
    `MeanScoreTracker.sums`; how many rows take part, are positive, and take part and are from the memory.
    """

    batch: FirstStage
    sampled: list[SampledRoIs]
    x_ND: Tensor  # noqa: N815
    box_targets_N4: Tensor  # noqa: N815
    logits_NL: Tensor  # noqa: N815
    rois: RoIs
    sums: Tensor

    @property
    def regions(self) -> int:
        """R."""
        return sum(len(r.labels) for r in self.sampled)


class Once:
    """Results of one batch, by what makes them: models that share a module (together.py) share its work."""

    def __init__(self) -> None:
        self.results: dict[Any, Any] = {}

    def __call__(self, key: Any, compute: Callable[[], T]) -> T:
        """`compute()`, or what it gave before under this key."""
        if key not in self.results:
            self.results[key] = compute()
        result: T = self.results[key]
        return result


class BoxHead(nn.Module):
    """The two shared FCs: pooled features (N, D, 7, 7) -> (N, F), or a part of this."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels * BOX_SIDE**2, features)
        self.fc2 = nn.Linear(features, features)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, first: int = 0, last: int = 2) -> Tensor:
        """The layers from `first` to before `last`, of what comes out of those before `first`."""
        x = x.flatten(1)
        for layer in (self.fc1, self.fc2)[first:last]:
            x = F.relu(layer(x))
        return x


class RoIHeads(nn.Module):
    """Box head, classification head, class-specific box regressor, mask head (or none), and what LOCE adds to them."""

    prior: Tensor

    def __init__(
        self,
        config: RoIConfig,
        box_head: BoxHead,
        classifier: Head,
        mask_head: MaskHead | None,
        tracker: MeanScoreTracker,
        prior: Tensor | None = None,
        memory: MemorySampling | None = None,
    ) -> None:
        """prior: (C+1,) instance counts that take the mean score's place (supplement, Sec. 1); None: mean score."""
        super().__init__()
        self.config, self.progress = config, 0.0
        self.only_classifier = False  # the rest of the detector is frozen and has no losses
        self.calibration: Callable[[Tensor], Tensor] | None = None  # logits -> scores in place of the classifier's own
        self.num_classes = tracker.scores.numel() - 1
        self.box_head, self.classifier, self.mask_head = box_head, classifier, mask_head
        self.fc_reg = nn.Linear(box_head.fc2.out_features, 4 * self.num_classes)
        nn.init.normal_(self.fc_reg.weight, std=0.001)
        nn.init.zeros_(self.fc_reg.bias)
        self.tracker, self.memory = tracker, memory
        self.use_prior = prior is not None
        self.register_buffer("prior", prior if prior is not None else torch.empty(0), persistent=False)

    @property
    def most_positives(self) -> int:
        """How many positive RoIs an image can have."""
        return int(self.config.batch_per_image * self.config.positive_fraction)

    @property
    def indicator(self) -> Tensor:
        """(C+1,) what tells weak classes from strong ones: the mean score s (Eq. 2) or the instance counts."""
        return self.prior if self.use_prior else self.tracker.scores

    def losses(self, rows: Rows, sums: Tensor, once: Once | None = None) -> dict[str, Tensor]:
        """Losses of one batch. sums: `rows.sums` of all ranks together; once: what other models computed of the batch.

        The loss of a mask head or a box regressor that they share is the same tensor in all.
        """
        once, rois = once or Once(), rows.rois
        # The mean score (Sec. 3.1) is updated by this step's probabilities before the loss takes its margins from it.
        self._update_mean_score(sums)
        rois.indicator = self.indicator

        # With memory.loss_weight the memory's rows are a batch of their own; a Gaussian's have no boxes to learn.
        counts = sums[-COUNTS:]
        rois.count, positives, drawn_count = divisor(counts)
        apart = self.memory is not None and self.memory.config.loss_weight > 0
        boxed = self.memory is None or self.memory.has_boxes
        own = rois if boxed and not apart else rois.part(slice(rows.regions), divisor(counts[0] - counts[2]))
        with record_function("classification loss"):
            if apart:
                losses = self._losses_apart(rows.logits_NL, own, rois.part(slice(rows.regions, None), drawn_count))
            else:
                losses = self.classifier.losses(rows.logits_NL, rois)
        if self.only_classifier:
            return losses
        boxes = rois if boxed else own
        losses["loss_box"] = once(self.fc_reg, lambda: self._box_loss(rows, boxes))
        if self.mask_head is not None:
            losses["loss_mask"] = once(self.mask_head, lambda: self._mask_loss(rows, positives))
        return losses

    def _losses_apart(self, logits_NL: Tensor, own: RoIs, drawn: RoIs) -> dict[str, Tensor]:
        """The head's losses with memory.loss_weight: a head with state sees two batches."""
        assert self.memory is not None
        losses = self.classifier.losses(logits_NL[: len(own.labels_N)], own)
        apart = self.classifier.losses(logits_NL[len(own.labels_N) :], drawn)
        return {name: loss + self.memory.config.loss_weight * apart[name] for name, loss in losses.items()}

    def fill_memory(self, batch: FirstStage, once: Once | None = None) -> None:
        """`forward_rows` and `losses` without losses: what they store, and what they do to the mean score."""
        self._update_mean_score(all_reduce_sum(self.forward_rows(batch, once).sums))

    def forward_rows(self, batch: FirstStage, once: Once | None = None) -> Rows:
        """Select, pool, store, draw, classify: all that comes before the losses. once: as in `losses`."""
        once, targets = once or Once(), batch.targets
        sampled = once("RoIs", lambda: [self.select(p, t) for p, t in zip(batch.proposals, targets, strict=True)])
        pooled = once("pooled", lambda: self.pool(batch.features, [r.boxes for r in sampled], BOX_SIDE))
        labels_N, box_targets_N4, instances_N, sampled_class_N = once("rows", lambda: _rows(sampled, targets))

        # MFS (Sec. 3.3): features around this batch's objects are stored, then rows of weak classes are drawn.
        memory, drawn = None, 0
        if self.memory is not None:
            if self.memory.config.source == "boxes":
                once(self.memory.bank, lambda: self.store(batch))
            else:
                read = pooled if self.memory.config.level == "roi" else self._read(pooled, once)
                once(self.memory.bank, lambda: self.store_regions(read, box_targets_N4, sampled, targets))
            memory = self._draw([ImageSeed(t.seed, t.batch_index) for t in targets if t.sampled_class != META])
            drawn = len(memory.labels)
            labels_N = torch.cat([labels_N, memory.labels])
            box_targets_N4 = torch.cat([box_targets_N4, memory.box_targets])
            instances_N, sampled_class_N = (F.pad(x, (0, drawn), value=-1) for x in (instances_N, sampled_class_N))
        x_ND = self._classifier_input(pooled, memory, once)
        with record_function("classifier"):
            logits_NL = self.classifier(x_ND)

        rois = RoIs(
            labels_N=labels_N,
            instances_N=instances_N,
            from_memory_N=torch.arange(len(labels_N), device=labels_N.device) >= len(labels_N) - drawn,
            progress=self.progress,
            features_ND=x_ND.detach(),
            sampled_class_N=sampled_class_N,
            generator=generator_for(targets[0].seed, HEAD, x_ND.device),
        )
        most = len(sampled) * self.most_positives + drawn
        sums = self._sums(logits_NL, rois, sum(len(t.labels) for t in targets), most)
        return Rows(batch, sampled, x_ND, box_targets_N4, logits_NL, rois, sums)

    @torch.no_grad()
    def store(self, batch: FirstStage) -> None:
        """Store features of jittered boxes around some instances: pooled ones, or what the classifier reads."""
        assert self.memory is not None
        targets = batch.targets
        chosen = [self._choose(t) if t.store_rows is None else t.store_rows for t in targets]
        boxes, labels, seeds = [t.boxes for t in targets], [t.labels for t in targets], [t.seed for t in targets]
        jittered, labels_B, box_targets_B4 = self.memory.boxes(boxes, labels, chosen, batch.sizes, seeds)
        pooled = self.pool(batch.features, jittered, BOX_SIDE)
        stored = self.features_of(pooled) if self.memory.config.level == "fc" else pooled
        self.memory.store(stored, labels_B, box_targets_B4)

    @torch.no_grad()
    def store_regions(
        self,
        features_R: Tensor,
        box_targets_R4: Tensor,
        sampled: list[SampledRoIs],
        targets: list[Targets],
    ) -> None:
        """Store features of positive regions; where `store_rows` of an image says so, those of these instances only."""
        assert self.memory is not None
        most, rows, labels, first = self.most_positives, [], [], 0  # of an image the positives come first
        for r, t in zip(sampled, targets, strict=True):
            wanted = r.instances[:most] >= 0
            if t.store_rows is not None:
                wanted = wanted & (r.instances[:most, None] == t.store_rows).any(dim=1)
            rows.append(torch.arange(first, first + len(wanted), device=features_R.device))
            labels.append(torch.where(wanted, r.labels[:most], IGNORED))
            first += len(r.labels)
        index = torch.cat(rows)
        self.memory.store(features_R.detach()[index], torch.cat(labels), box_targets_R4[index])

    @torch.no_grad()
    def held_out_losses(self, batch: FirstStage) -> Tensor:
        """(C+1,): the sum of -log p(c) over regions of each class c, p the scores, and how many regions there are.

        Of images with `store_rows`; others count for nothing. For the rates of memory.draw=adaptive.
        """
        sampled = [self.select(p, t) for p, t in zip(batch.proposals, batch.targets, strict=True)]
        shown = [t.store_rows is not None and len(t.store_rows) > 0 for t in batch.targets]
        labels = [r.labels if s else torch.full_like(r.labels, IGNORED) for r, s in zip(sampled, shown, strict=True)]
        labels_R = torch.cat(labels)
        x_RD = self.features_of(self.pool(batch.features, [r.boxes for r in sampled], BOX_SIDE))
        scores_RC = self.classifier.scores(self.classifier(x_RD))
        own_R = (labels_R >= 0) & (labels_R < self.num_classes)
        label_R = torch.where(own_R, labels_R, 0)
        score_R = scores_RC.gather(1, label_R[:, None])[:, 0].clamp(min=torch.finfo(scores_RC.dtype).tiny)
        sums_C = score_R.new_zeros(self.num_classes).index_add_(0, label_R, torch.where(own_R, -score_R.log(), 0))
        return torch.cat([sums_C, (labels_R != IGNORED).sum()[None]])

    def _draw(self, images: list[ImageSeed]) -> MemoryRows:
        """Rows from the memory; none before memory.start."""
        assert self.memory is not None
        if self.progress < self.memory.config.start:
            return self.memory.no_rows()
        share = self.classifier.own_share() if self.memory.config.draw == "confusion" else None
        return self.memory.draw(self.indicator, images, share)

    def _choose(self, target: Targets) -> Tensor:
        """(n,) the instances of an image to store, chosen on the host."""
        assert self.memory is not None and target.host_labels is not None
        generator = generator_for(target.seed, INSTANCES, torch.device("cpu"))
        rows = self.memory.choose_rows(target.host_labels, generator)
        rows = rows.pin_memory() if target.labels.is_cuda else rows  # as the data loader leaves the others
        return rows.to(target.labels.device, non_blocking=True)

    def _classifier_input(self, pooled: Tensor, memory: MemoryRows | None, once: Once) -> Tensor:
        """(N, D) what the classifier reads of pooled features (R, D, 7, 7) and, after them, of rows from the memory."""
        drawn = None if memory is None else memory.features.to(pooled.dtype)
        if drawn is not None and drawn.dim() == pooled.dim():  # memory.level=roi
            return self.features_of(torch.cat([pooled, drawn]))
        x_RD = self._read(pooled, once)
        return x_RD if drawn is None else torch.cat([x_RD, drawn])

    def _read(self, pooled: Tensor, once: Once) -> Tensor:
        """(R, D) what the classifier reads of pooled features (R, D, 7, 7)."""
        return once((self.box_head, self.classifier.depth), lambda: self.features_of(pooled))

    def pool(self, features: list[Tensor], boxes: list[Tensor], side: int) -> Tensor:
        """(N, D, S, S) features of boxes, as `config` says; see the function `pool`."""
        return pool(features, boxes, side, self.config.finest_scale, self.config.aligned)

    @record_function("shared FCs")
    def features_of(self, pooled: Tensor) -> Tensor:
        """(N, F) what the classification head reads of pooled features."""
        return self.box_head(pooled, last=self.classifier.depth)

    def scores(self, logits_NL: Tensor) -> Tensor:
        """(N, C) scores of logits in evaluation: the classifier's own, or those of a post-hoc calibration."""
        return self.classifier.scores(logits_NL) if self.calibration is None else self.calibration(logits_NL)

    @record_function("box regressor")
    def deltas(self, x_ND: Tensor) -> Tensor:
        """(N, 4C) box deltas from what the classification head reads."""
        return self.fc_reg(self.box_head(x_ND, first=self.classifier.depth))

    @record_function("sampling of regions")
    def select(self, proposals_N4: Tensor, target: Targets) -> SampledRoIs:
        """Match and sample the proposals of an image; its ground-truth boxes stand in front, each its own positive."""
        own_G = torch.arange(len(target.boxes), device=proposals_N4.device)
        low = self.config.positive_iou
        matched_N = match_boxes(proposals_N4, target.boxes, low, low, low)
        matched_N = leave_out(matched_N, proposals_N4, target.ignored)
        boxes, matched = torch.cat([target.boxes, proposals_N4]), torch.cat([own_G, matched_N])

        # Positives up to their share, then negatives; each kind in slots of fixed number, some of them unused.
        generator = generator_for(target.seed, REGIONS, proposals_N4.device)
        positives, positive_valid, negatives, negative_valid = sample(
            matched, self.config.batch_per_image, self.config.positive_fraction, generator
        )
        instances = torch.where(positive_valid, matched[positives], -1)
        labels = torch.where(positive_valid, target.labels[instances] if len(own_G) else 0, IGNORED)
        negative_labels = torch.where(negative_valid, self.num_classes, IGNORED)
        picked = torch.cat([positives, negatives])
        labels = torch.cat([labels, negative_labels])
        instances = torch.cat([instances, torch.full_like(negatives, -1)])

        # Used slots to the front, in order; never more than `batch_per_image` of them are used.
        slots = _set_first(labels != IGNORED, self.config.batch_per_image)
        return SampledRoIs(boxes[picked[slots]], labels[slots], instances[slots])

    @record_function("mean score")
    @torch.no_grad()
    def _sums(self, logits_NL: Tensor, rois: RoIs, instances: int, most: int) -> Tensor:
        """What this rank adds to `Rows.sums`; the mean score is of the classifier's scores, which carry no margin.

        instances: G; most: positives and memory rows there can be: only so many rows are scored, a quarter as a rule.
        """
        positive_N, counted_N = rois.instances_N >= 0, rois.labels_N != IGNORED
        rows = _set_first(positive_N | rois.from_memory_N, most)
        labels_M, own_M = rois.labels_N[rows], rois.instances_N[rows]
        own_M1 = labels_M.clamp(0, self.num_classes - 1)[:, None]
        probabilities_M = self.classifier.scores(logits_NL.detach()[rows]).gather(1, own_M1)[:, 0]
        memory = (torch.where(rois.from_memory_N[rows], labels_M, IGNORED), probabilities_M)
        entries = self.tracker.sums(*instance_scores(probabilities_M, labels_M, own_M, instances), memory)
        counts = torch.stack([counted_N.sum(), positive_N.sum(), (counted_N & rois.from_memory_N).sum()])
        return torch.cat([entries.flatten(), counts])

    @record_function("mean score")
    def _update_mean_score(self, sums: Tensor) -> None:
        """Eq. 2, by `Rows.sums` of all ranks."""
        self.tracker.apply_sums(sums[:-COUNTS].view(2, 2, -1))

    @record_function("box loss")
    def _box_loss(self, rows: Rows, rois: RoIs) -> Tensor:
        """L1 of the own class's deltas over positives, divided by the number of rows that count.

        rois: all rows, or the first ones. The regressor is evaluated for as many as can be positive, and of each for
        one class.
        """
        most = len(rows.sampled) * self.most_positives + len(rois.labels_N) - rows.regions
        positive_N = (rois.labels_N >= 0) & (rois.labels_N < self.num_classes)
        chosen = _set_first(positive_N, most)
        positive_M = positive_N[chosen]
        own_M = torch.where(positive_M, rois.labels_N[chosen], 0)
        hidden_MF = self.box_head(rows.x_ND[chosen], first=self.classifier.depth)
        weight_M4F = self.fc_reg.weight.unflatten(0, (-1, 4)).index_select(0, own_M)
        bias_M4 = self.fc_reg.bias.unflatten(0, (-1, 4)).index_select(0, own_M)
        deltas_M4 = (weight_M4F @ hidden_MF[:, :, None])[:, :, 0] + bias_M4
        errors_M4 = torch.where(positive_M[:, None], deltas_M4.float() - rows.box_targets_N4[chosen], 0)
        return errors_M4.abs().sum() / rois.count

    @record_function("mask targets and loss")
    def _mask_loss(self, rows: Rows, positives: Tensor) -> Tensor:
        """Binary cross-entropy of the own class's mask over positives."""
        assert self.mask_head is not None
        counts = torch.stack([(r.instances >= 0).sum() for r in rows.sampled])
        shown = list(zip(rows.sampled, counts.tolist(), strict=True))  # sync: masks are of positives, which come first
        boxes, labels_P = [r.boxes[:p] for r, p in shown], torch.cat([r.labels[:p] for r, p in shown])
        masks = [t.masks for t in rows.batch.targets if t.masks is not None]
        wanted = [mask_targets(m, r.instances[:p], r.boxes[:p]) for m, (r, p) in zip(masks, shown, strict=True)]
        logits = self.mask_head(self.pool(rows.batch.features, boxes, MASK_SIDE), labels_P)
        return mask_loss(logits, torch.cat(wanted), positives)


def _set_first(flags_N: Tensor, number: int) -> Tensor:
    """The first `number` rows when those whose flag is set go first, each kind in its order; no wait for the device."""
    return flags_N.to(torch.uint8).sort(descending=True, stable=True).indices[:number]


def _rows(sampled: list[SampledRoIs], targets: list[Targets]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of all RoIs: label, box target (R, 4), instance in the batch or -1, class that the image was drawn for."""
    labels, box_targets, instances, sampled_classes, offset = [], [], [], [], 0
    for r, t in zip(sampled, targets, strict=True):
        labels.append(r.labels)
        box_targets.append(_box_targets(r, t))
        instances.append(torch.where(r.instances >= 0, r.instances + offset, -1))
        sampled_classes.append(torch.full_like(r.labels, t.sampled_class))
        offset += len(t.labels)
    return torch.cat(labels), torch.cat(box_targets), torch.cat(instances), torch.cat(sampled_classes)


def _box_targets(sampled: SampledRoIs, target: Targets) -> Tensor:
    """(R, 4) deltas from each positive RoI to its ground truth, 0 elsewhere."""
    if len(target.boxes) == 0:
        return torch.zeros_like(sampled.boxes)
    deltas = encode(sampled.boxes, target.boxes[sampled.instances.clamp(min=0)], ROI_STDS)
    return torch.where((sampled.instances >= 0)[:, None], deltas, 0)


def pyramid_level(boxes_N4: Tensor, finest_scale: float) -> Tensor:
    """(N,) long in 0..3: floor(log2(sqrt(w h) / finest_scale + 1e-6)), cut to the levels there are; 0 for nan."""
    scale_N = (boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(dim=1).clamp(min=0).sqrt()
    return (scale_N / finest_scale + 1e-6).log2().floor().nan_to_num(0).clamp(0, len(POOL_STRIDES) - 1).long()


@record_function("RoIAlign")
def pool(
    features: list[Tensor],
    boxes: list[Tensor],
    side: int,
    finest_scale: float,
    aligned: bool = True,
) -> Tensor:
    """(N, D, S, S) features of the boxes (n_i, 4) of each image, in their order. A box without area gives zeros.

    So does one with nan, as a diverged model makes them: there is a row for every box, and the loss shows the nan.
    aligned: as many samples a bin as it has pixels, pixels' centres half a pixel in; False: torchvision's MultiScale-
    RoIAlign, 2 x 2 samples, pixels' centres at whole numbers, sides of at least a pixel of the map.
    """
    samples = 0 if aligned else TORCHVISION_SAMPLES
    image_N = torch.cat([b.new_full((len(b),), i) for i, b in enumerate(boxes)])
    boxes_N4 = finite(torch.cat(boxes))
    level_N = pyramid_level(boxes_N4, finest_scale)
    regions_N5 = torch.cat([image_N[:, None], boxes_N4], dim=1)
    # Level by level, in their order within a level.
    levels = constants(tuple(range(len(POOL_STRIDES))), level_N.device, torch.long)
    counts = (level_N[:, None] == levels).sum(dim=0).tolist()  # sync: how many boxes each level gets
    order_N = level_N.argsort(stable=True)
    parts = [
        roi_align(maps.float(), part_n5, side, 1 / stride, samples, aligned)
        for maps, part_n5, stride in zip(features, regions_N5[order_N].split(counts), POOL_STRIDES, strict=False)
    ]
    if max(counts) == len(boxes_N4) and not torch.is_grad_enabled():  # of one level: they are in order
        return parts[counts.index(len(boxes_N4))].to(features[0].dtype)
    return torch.cat(parts).to(features[0].dtype).index_select(0, order_N.argsort())
