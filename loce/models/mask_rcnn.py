"""Mask R-CNN with FPN (arXiv 1703.06870) or, without a mask head, Faster R-CNN (arXiv 1506.01497), by MMDetection's
numerics, and LOCE's second stage.

Samples are the data sets' dicts with host tensors; the model moves them to its own device. Shapes: B images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from loce.config import EvalConfig, HeadConfig, IndicatorConfig, MemoryConfig, ModelConfig, UserError
from loce.data.transforms import Geometry, resized
from loce.heads import HEADS
from loce.mean_score import MeanScoreTracker
from loce.models.backbone import Backbone, build_backbone, fold_norms
from loce.models.boxes import ROI_STDS, constants, decode
from loce.models.detection import detect, detect_of_classes
from loce.models.lost_objects import find_near_misses
from loce.models.mask_head import MASK_SIZE, MaskHead
from loce.models.memory_sampling import MemorySampling
from loce.models.paste import paste_and_encode, paste_full
from loce.models.roi_heads import BOX_SIDE, MASK_SIDE, BoxHead, FirstStage, Once, RoIHeads, Targets, pyramid_level
from loce.models.rpn import RPN, LossSums
from loce.utils.classes import IGNORED, ClassStats
from loce.utils.distributed import all_reduce_sums
from loce.utils.errors import first_few

PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, ImageNet
PIXEL_STD = (58.395, 57.12, 57.375)
DIVISOR = 32
MASK_BYTES = 1 << 25  # of the mask head's largest map: it is made for so many regions at a time
Size = tuple[int, int]


def build_roi_heads(
    model: ModelConfig,
    head: HeadConfig,
    indicator: IndicatorConfig,
    memory: MemoryConfig,
    stats: ClassStats,
) -> RoIHeads:
    """The RoI heads for the classes of `stats`: boxes, masks (or none), classifier, LOCE's mean score and memory."""
    classes, width = len(stats), model.fpn_channels
    box_head = BoxHead(width, model.fc_features)
    mask_head = None
    if model.masks:
        normalised = model.mask_predictor == "normalised"
        mask_head = MaskHead(width, model.mask_channels, model.mask_convs, classes, normalised, model.mask_temperature)

    # The indicator (Sec. 3.1): the mean score or, in its place, training instance counts.
    tracker = MeanScoreTracker(classes, indicator.momentum, indicator.initial_score, indicator.background_score)
    prior = None
    if indicator.kind == "prior":
        if HEADS[head.name].needs_indicator and (stats.instance_counts == 0).any():
            absent = [n for n, count in zip(stats.names, stats.instance_counts, strict=True) if count == 0]
            raise UserError(
                f"indicator.kind: prior: {len(absent)} classes have no training instance (first: "
                f"{first_few(absent)}), so the margin log(n'/n) is undefined.\n"
                "  Use indicator.kind=score, or leave these classes out: data.drop_empty=true."
            )
        prior = torch.tensor([*stats.instance_counts, indicator.background_count], dtype=torch.float32)

    # What the memory stores, and what the classifier reads: vectors after shared FCs, or pooled features.
    feature_shape = (model.fc_features,) if memory.level == "fc" else (width, BOX_SIDE, BOX_SIDE)
    sampling = MemorySampling(classes, feature_shape, memory, stats.instance_counts) if memory.enabled else None
    method = HEADS[head.name]
    if method.depth:
        class_head = method(model.fc_features, stats, head)
    else:
        class_head = method(width * BOX_SIDE**2, stats, head, model.fc_features)
    return RoIHeads(model.roi, box_head, class_head, mask_head, tracker, prior, sampling)


class Folded:
    """A frozen backbone whose norms are folded (backbone.py), and what it was made of. It is no part of the model."""

    def __init__(self, backbone: Backbone, weights: list[Tensor]) -> None:
        self.backbone, self.weights = backbone, weights
        self.state = self.now()

    def now(self) -> list[tuple[Any, ...]]:
        """Of each weight, what it is and how often it was written to."""
        return [(x.device, x.dtype, 0 if x.is_inference() else x._version) for x in self.weights]


class MaskRCNN(nn.Module):
    """Training: list of samples -> dict of losses. Evaluation: `detect`, or call with images."""

    pixel_mean: Tensor
    pixel_std: Tensor
    stats: ClassStats  # of the training set; set by whoever builds the model

    def __init__(
        self,
        config: ModelConfig,
        roi_heads: RoIHeads,
        evaluation: EvalConfig,
        test_edges: tuple[int, int],
    ) -> None:
        """test_edges: (short, long) in pixels, what images are resized to in `predict`."""
        super().__init__()
        self.config, self.evaluation, self.test_edges = config, evaluation, test_edges
        self.backbone = build_backbone(config)
        self.rpn = RPN(config.fpn_channels, config.rpn)
        self.roi_heads = roi_heads
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label."""
        return self.stats.names

    def train(self, mode: bool = True) -> "MaskRCNN":
        """As usual, but batch norms with frozen statistics stay in evaluation mode; their affine weights train."""
        super().train(mode)
        if self.config.norm == "frozen":
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
            self.backbone.folded = None
            self._fold()
        return self

    def _fold(self) -> Backbone:
        """The backbone, if it is frozen as a whole with its norms folded; made again where a weight changed."""
        backbone, folded = self.backbone, self.backbone.folded
        if any(p.requires_grad for p in backbone.body.parameters()):
            backbone.folded = None
            return backbone
        if folded is None or folded.weights[0] is not next(backbone.parameters()) or folded.state != folded.now():
            weights = [*backbone.body.parameters(), *backbone.body.buffers()]
            folded = backbone.folded = Folded(fold_norms(backbone), weights)
        return folded.backbone

    def only_predict(self) -> "MaskRCNN":
        """Evaluation mode of a model that is never trained: on a CPU its convolutions run channels last; frozen batch
        norms are folded into the convolutions before them.

        The weights stay the same numbers; results differ by rounding.
        """
        self.requires_grad_(False)
        if self.pixel_mean.device.type == "cpu":
            self.to(memory_format=torch.channels_last)
        return self.eval()

    def freeze(self, what: str) -> None:
        """Stop training of "backbone" (with its pyramid), of the "trunk" (backbone, pyramid and shared FCs), or of the
        "detector": everything but the classification head, whose losses are then the only ones.
        """
        if what == "detector":
            self.requires_grad_(False)
            self.roi_heads.classifier.requires_grad_(True)
            self.roi_heads.only_classifier = True
        trunk = [self.backbone, self.roi_heads.box_head]
        for part in {"backbone": trunk[:1], "trunk": trunk}.get(what, []):
            part.requires_grad_(False)

    @record_function("images to the device, normalised")
    def batch_images(self, images: list[Tensor]) -> tuple[Tensor, list[Size], list[Size]]:
        """Normalise uint8 images (3, h, w) on the device and pad them with zeros below and at the right.

        Returns the batch (B, 3, H, W), the content sizes, and each image's own size padded to a multiple of 32.
        """
        sizes = [(x.shape[1], x.shape[2]) for x in images]
        padded = [(-(-h // DIVISOR) * DIVISOR, -(-w // DIVISOR) * DIVISOR) for h, w in sizes]
        batch = self.pixel_mean.new_zeros((len(images), 3, max(h for h, _ in padded), max(w for _, w in padded)))
        for row, image, (height, width) in zip(batch, images, sizes, strict=True):
            pixels = image.to(batch.device, non_blocking=True)
            row[:, :height, :width] = (pixels - self.pixel_mean) / self.pixel_std
        return batch, sizes, padded

    @record_function("backbone and pyramid")
    def features(self, batch: Tensor, seeds: Sequence[int | None] = ()) -> list[Tensor]:
        """P2..P6 of normalised images (B, 3, H, W); in training, seeds of their random numbers."""
        if self.backbone.stochastic_depth:
            self.backbone.draw_branches(seeds, batch.device)
        if batch.is_cuda and torch.is_autocast_enabled("cuda"):
            batch = batch.contiguous(memory_format=torch.channels_last)  # as tensor cores read it
        return list((self.backbone if self.backbone.folded is None else self._fold())(batch).values())

    def targets_of(self, sample: dict[str, Any], batch_index: int = 0) -> Targets:
        """Ground truth on the model's device."""
        device, rows, ignored = self.pixel_mean.device, sample.get("store_rows"), sample.get("ignored")
        ignored = torch.empty((0, 4)) if ignored is None else ignored
        boxes, labels, ignored = (x.to(device, non_blocking=True) for x in (sample["boxes"], sample["labels"], ignored))
        return Targets(
            boxes=boxes,
            labels=labels,
            masks=sample["masks"].to(device, non_blocking=True) if self.config.masks else None,
            store_rows=None if rows is None else rows.to(device, non_blocking=True),
            sampled_class=sample.get("sampled_class", -1),
            seed=sample.get("seed"),
            batch_index=sample.get("batch_index", batch_index),
            ignored=ignored,
            host_labels=sample.get("host_labels", sample["labels"]),
        )

    def forward(self, samples: list[Any]) -> Any:
        """Training: samples -> their losses, scalars by name. Evaluation: images (3, h, w) -> list of {boxes, labels,
        scores, masks}; no masks where the model has none."""
        if not self.training:
            return self.predict(samples)
        rpn, batch = self.first_stage(samples)
        rows = self.roi_heads.forward_rows(batch)
        # One collective for all that the losses need to know of other ranks.
        anchors, sums = all_reduce_sums([rpn.number, rows.sums])
        return rpn.divided(anchors) | self.roi_heads.losses(rows, sums)

    def first_stage(self, samples: list[Any], learns: bool = True) -> tuple[LossSums, FirstStage]:
        """Trunk and RPN: its losses, none where it does not learn, and what the RoI heads work on."""
        batch, sizes, padded = self.batch_images([s["image"] for s in samples])
        targets = [self.targets_of(s, i) for i, s in enumerate(samples)]
        features = self.features(batch, [t.seed for t in targets])
        with torch.no_grad():  # proposals have no gradient, and the RPN's losses need few anchors
            logits, deltas = self.rpn(features)
        features = [x.contiguous() for x in features]  # as RoIAlign reads them
        anchors = self.rpn.anchors(features)
        losses = LossSums({}, constants((1,), batch.device))
        if learns and not self.roi_heads.only_classifier:
            boxes, seeds, ignored = [t.boxes for t in targets], [t.seed for t in targets], [t.ignored for t in targets]
            losses = self.rpn.losses(features, anchors, padded, boxes, seeds, ignored)
        proposals = self.rpn.proposals(logits, deltas, anchors, sizes, [(t.boxes, t.labels) for t in targets])
        return losses, FirstStage(features, proposals, targets, sizes)

    @torch.no_grad()
    def fill_memory(self, samples: list[dict[str, Any]]) -> None:
        """Store the features of the samples' `store_rows` and update the mean score; nothing is learned."""
        _, batch = self.first_stage(samples, learns=False)
        self.roi_heads.fill_memory(batch)

    @torch.no_grad()
    def held_out_losses(self, samples: list[dict[str, Any]]) -> Tensor:
        """(C+1,) what `RoIHeads.held_out_losses` says of samples with `store_rows`; nothing is learned or stored."""
        _, batch = self.first_stage(samples, learns=False)
        return self.roi_heads.held_out_losses(batch)

    @torch.no_grad()
    def detect(
        self,
        images: list[Tensor],
        scales: list[tuple[float, float]],
        originals: list[Size],
        allowed: Sequence[Tensor | None] | None = None,
        objects: Sequence[tuple[Tensor, Tensor]] | None = None,
        once: Once | None = None,
        full_masks: bool = False,
        true_boxes: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> list[dict[str, Any]]:
        """Detections per image in original pixels: boxes (M, 4), scores (M,), labels (M,), rles (M compressed codes;
        not in a model without masks).

        scales: (x, y) resized / original; originals: (height, width); allowed: per image a bool mask (C,) of the
        classes that evaluation can use there: others count towards the cap of detections, but are then left out
        before masks are made, and all detections of these classes stay where a protocol is uncapped; the result then
        has "ranks" (M,), how many better ones of any class there were; objects: per image the boxes (G, 4) and labels
        (G,) that are to be found; the result then has "near_misses" of them, see `find_near_misses`; once: what other
        models computed of these images; full_masks: masks (M, height, width) bool in place of rles; true_boxes: per
        image boxes (G, 4) in pixels of the resized image and labels (G,), which the classifier gets in place of
        proposals; the result then has "class_scores": (G,) each, own scores, best labels and their scores.
        """
        once = once or Once()
        batch, sizes, _ = once("images", lambda: self.batch_images(images))
        features = once(self.backbone, lambda: self.features(batch))
        proposals = once((self.backbone, self.rpn), lambda: self._propose(features, sizes))
        features = once((self.backbone, "maps"), lambda: [x.contiguous() for x in features])  # as RoIAlign reads them
        results = []
        for i, boxes_N4 in enumerate(proposals):
            level_features = [x[i : i + 1] for x in features]
            keep = None if allowed is None else allowed[i]
            wanted = None if objects is None else objects[i]
            options = (sizes[i], scales[i], originals[i], keep, wanted, once, i, full_masks)
            results.append(self._detect_one(level_features, boxes_N4, *options))
            if true_boxes is not None:
                scores = self._class_scores(level_features, *true_boxes[i], once, i)
                results[i]["class_scores"] = tuple(x.cpu() for x in scores)
        return results

    def _propose(self, features: list[Tensor], sizes: list[Size]) -> list[Tensor]:
        """Proposals of the RPN in evaluation."""
        logits, deltas = self.rpn(features)
        return self.rpn.proposals(logits, deltas, self.rpn.anchors(features), sizes)

    def _classify(
        self,
        features: list[Tensor],
        proposals_N4: Tensor,
        size: Size,
        scale: tuple[float, float],
        once: Once,
        place: int,
    ) -> tuple[Tensor, Tensor]:
        """Boxes (N, C, 4) of every class, in pixels of the original image, and logits (N, L) of proposals."""
        roi = self.roi_heads
        pooled = once((self.backbone, self.rpn, place), lambda: roi.pool(features, [proposals_N4], BOX_SIDE))
        reads = (self.backbone, self.rpn, roi.box_head, roi.classifier.depth, place)
        x_ND = once(reads, lambda: roi.features_of(pooled))
        deltas_NC4 = once((*reads, roi.fc_reg), lambda: roi.deltas(x_ND).float().reshape(len(x_ND), -1, 4))
        boxes_NC4 = decode(proposals_N4[:, None], deltas_NC4, ROI_STDS, size)
        return boxes_NC4 / proposals_N4.new_tensor([*scale, *scale]), roi.classifier(x_ND)

    @torch.no_grad()
    def regions(self, images: list[Tensor], scales: list[tuple[float, float]]) -> list[tuple[Tensor, Tensor]]:
        """Per image what `detect` begins with: boxes (N, C, 4) in pixels of the original image, and logits (N, L)."""
        batch, sizes, _ = self.batch_images(images)
        features, once = self.features(batch), Once()
        proposals, maps = self._propose(features, sizes), [x.contiguous() for x in features]
        return [
            self._classify([x[i : i + 1] for x in maps], boxes_N4, sizes[i], scales[i], once, i)
            for i, boxes_N4 in enumerate(proposals)
        ]

    def _detect_one(
        self,
        features: list[Tensor],
        proposals_N4: Tensor,
        size: Size,
        scale: tuple[float, float],
        original: Size,
        allowed_C: Tensor | None,
        objects: tuple[Tensor, Tensor] | None,
        once: Once,
        place: int,
        full_masks: bool = False,
    ) -> dict[str, Any]:
        """Detections of the image at a `place` of the batch."""
        # Scores and boxes (in pixels of the original image) of every proposal and class; the best are detections.
        roi = self.roi_heads
        boxes_NC4, logits_NL = self._classify(features, proposals_N4, size, scale, once, place)
        scores_NC, scale_4 = roi.scores(logits_NL), proposals_N4.new_tensor([*scale, *scale])
        found = boxes_M4, scores_M, labels_M = detect(boxes_NC4, scores_NC, self.evaluation)

        # Near misses are looked for among all detections; then those of classes that do not count here are left out.
        allowed_C = None if allowed_C is None else allowed_C.to(labels_M.device)
        misses: dict[str, Any] = {}
        if objects is not None:
            wanted = objects[0].to(scale_4), objects[1].to(labels_M)
            every = (boxes_NC4, scores_NC, found, allowed_C, self.evaluation)
            parts = find_near_misses(wanted, proposals_N4 / scale_4, *every)
            misses = {"near_misses": {kind: tuple(x.cpu() for x in part) for kind, part in parts.items()}}
        ranks = {}
        if allowed_C is not None:
            these = (boxes_NC4, scores_NC, found, allowed_C, self.evaluation)
            (boxes_M4, scores_M, labels_M), ranks_M = detect_of_classes(*these, self.evaluation.uncapped)
            ranks = {"ranks": ranks_M.cpu()}

        arrays = {"boxes": boxes_M4.cpu(), "scores": scores_M.cpu(), "labels": labels_M.cpu(), **ranks, **misses}
        mask_head = roi.mask_head
        if mask_head is None:
            return arrays
        # Masks of what is left, some regions at a time, which bounds the memory, and by level of the pyramid, so that
        # most of these times read one map.
        most = max(1, MASK_BYTES // (4 * MASK_SIZE**2 * mask_head.upsample.out_channels))
        regions_M4 = boxes_M4 * scale_4
        order_M = pyramid_level(regions_M4, roi.config.finest_scale).argsort(stable=True)
        some = zip(regions_M4[order_M].split(most), labels_M[order_M].split(most), strict=True)
        masks = [mask_head(roi.pool(features, [b], MASK_SIDE), labels).float().sigmoid() for b, labels in some]
        masks_MSS = torch.cat(masks)[order_M.argsort()]
        if full_masks:
            return {**arrays, "masks": paste_full(masks_MSS, boxes_M4, original)}
        return {**arrays, "rles": paste_and_encode(masks_MSS, boxes_M4, original)}

    def _class_scores(
        self,
        features: list[Tensor],
        boxes_G4: Tensor,
        labels_G: Tensor,
        once: Once,
        place: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of given boxes of the image at a `place` of the batch: see `detect`. Background is never the best label."""
        roi = self.roi_heads
        boxes_G4, labels_G = boxes_G4.to(features[0].device), labels_G.to(features[0].device)
        pooled = once((self.backbone, "true boxes", place), lambda: roi.pool(features, [boxes_G4], BOX_SIDE))
        reads = (self.backbone, "true boxes", roi.box_head, roi.classifier.depth, place)
        scores_GC = roi.scores(roi.classifier(once(reads, lambda: roi.features_of(pooled))))
        best_scores_G, best_G = scores_GC.max(dim=1)
        return scores_GC.gather(1, labels_G[:, None])[:, 0], best_G, best_scores_G

    @torch.no_grad()
    def training_logits(self, samples: list[dict[str, Any]]) -> Tensor:
        """(R, L) logits of the regions that a training step would sample; nothing is learned or stored."""
        _, (features, proposals, targets, _) = self.first_stage(samples, learns=False)
        roi = self.roi_heads
        sampled = [roi.select(p, t) for p, t in zip(proposals, targets, strict=True)]
        used_N = torch.cat([r.labels for r in sampled]) != IGNORED
        return roi.classifier(roi.features_of(roi.pool(features, [r.boxes for r in sampled], BOX_SIDE)))[used_N]

    @torch.no_grad()
    def detect_images(self, images: list[Tensor], full_masks: bool = False) -> list[dict[str, Any]]:
        """`detect` on uint8 RGB images (3, h, w) of any size, resized as the options say; results in their pixels."""
        pixels, scales, originals = [], [], []
        for image in images:
            old = (image.shape[1], image.shape[2])
            geometry = Geometry(old, resized(old, *self.test_edges))
            rows = geometry.image(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))
            pixels.append(torch.from_numpy(rows).permute(2, 0, 1))
            scales.append(geometry.scale)
            originals.append(old)
        return self.detect(pixels, scales, originals, full_masks=full_masks)

    def predict(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detections of uint8 RGB images (3, h, w) of any size: boxes, labels, scores and, of a model with masks,
        full-size bool masks."""
        return self.detect_images(images, full_masks=True)
