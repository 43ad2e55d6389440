"""Export of a detector as one file (`torch.export`) that runs with torch and torchvision alone.

A batch of one, an image of fixed size, fixed numbers of proposals, candidates and detections; what is not used of them
is padding. The numbers are those of `MaskRCNN.detect` on a batch that is padded to that size, up to rounding, with one
exception: see `FixedSizeDetector`.

Shapes: A anchors and K best anchors of a level, N proposals, C classes, T candidates (proposal, class), M detections.
"""

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from loce.checkpoint.load import Checkpoint, weights_hash
from loce.config import Config, UserError
from loce.data.annotations.cache import open_annotations
from loce.data.transforms import resized
from loce.engine.class_facts import calibrate, posthoc_text
from loce.engine.inference import stored_thresholds
from loce.engine.pictures import SURE
from loce.models.boxes import ROI_STDS, RPN_STDS, decode, finite
from loce.models.mask_head import MASK_SIZE
from loce.models.mask_rcnn import DIVISOR, MASK_BYTES, MaskRCNN
from loce.models.roi_heads import BOX_SIDE, MASK_SIDE, POOL_STRIDES, TORCHVISION_SAMPLES, pyramid_level
from loce.utils.files import atomic_write

ABOUT = "about.json"  # in the file: labels, sizes, thresholds
CANDIDATES = 10  # times the number of detections


class FixedSizeDetector(nn.Module):
    """Detections of an image on a canvas, with no shape that depends on what is in it.

    The canvas has fixed sides, multiples of 32. Of all pairs of proposal and class only the `CANDIDATES` x M best go
    through NMS, and where this leaves fewer than M, `MaskRCNN.detect` would go on to the next ones: those are missing.
    """

    def __init__(self, model: MaskRCNN, canvas: tuple[int, int]) -> None:
        """model: becomes part of this module and loses what only training needs; canvas: (height, width)."""
        super().__init__()
        self.model, self.canvas = model.only_predict().requires_grad_(False), canvas
        model.backbone.folded = None  # its own weights go into the file
        model.roi_heads.memory = None
        del model.roi_heads.tracker, model.roi_heads.prior
        features = self.model.features(model.pixel_mean.new_zeros(1, 3, *canvas))
        for level, anchors_A4 in enumerate(model.rpn.anchors(features)):
            self.register_buffer(f"anchors{level}", anchors_A4.clone())

    def forward(self, image: Tensor, size: Tensor) -> dict[str, Tensor]:
        """Boxes (M, 4) xyxy in pixels of the canvas, scores (M,), labels (M,) and, unless the model has no mask head,
        masks (M, 28, 28) of probabilities over the boxes; best first. Where the score is 0 there is no detection.

        image: (3, *canvas) uint8 RGB, whose content begins in the upper left corner; size: (2,) long, its height and
        width. What lies beyond is not looked at.
        """
        height, width = (torch.arange(side, device=image.device) for side in self.canvas)
        inside = (height[:, None] < size[0]) & (width < size[1])
        pixels = (image - self.model.pixel_mean) / self.model.pixel_std
        features = self.model.features(torch.where(inside, pixels, 0)[None])
        limits_4 = size.flip(0).repeat(2).float()
        proposals_N4, real_N = self._proposals(features, limits_4)
        boxes_M4, scores_M, labels_M = self._detections(features, proposals_N4, real_N, limits_4)
        found = {"boxes": boxes_M4, "scores": scores_M, "labels": labels_M}
        head = self.model.roi_heads.mask_head
        if head is not None:
            most = max(1, MASK_BYTES // (4 * MASK_SIZE**2 * head.upsample.out_channels))
            some = zip(boxes_M4.split(most), labels_M.split(most), strict=True)
            logits = [head(self._pool(features, boxes, MASK_SIDE), labels) for boxes, labels in some]
            found["masks"] = torch.cat(logits).float().sigmoid()
        return found

    def _proposals(self, features: list[Tensor], limits_4: Tensor) -> tuple[Tensor, Tensor]:
        """`RPN.proposals` of one image, and after them boxes that NMS left out: (N, 4); (N,) bool, which are real."""
        rpn, boxes, scores = self.model.rpn, [], []
        for level, (logits_BA, deltas_BA4) in enumerate(zip(*rpn(features), strict=True)):
            scores_K, top_K = logits_BA[0].float().sigmoid().topk(min(rpn.config.pre_nms_test, logits_BA.shape[1]))
            anchors_K4 = self.get_buffer(f"anchors{level}")[top_K]
            boxes.append(_clipped(decode(anchors_K4, deltas_BA4[0, top_K], RPN_STDS, None), limits_4))
            scores.append(_after_nms(boxes[-1], scores_K, rpn.config.nms))
        scores_S, order_S = torch.cat(scores).sort(descending=True, stable=True)
        best_N = order_S[: rpn.config.post_nms]
        return torch.cat(boxes)[best_N], scores_S[: len(best_N)] >= 0

    def _detections(
        self,
        features: list[Tensor],
        proposals_N4: Tensor,
        real_N: Tensor,
        limits_4: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`detect` of these proposals, padded: boxes (M, 4), scores (M,), labels (M,)."""
        roi, options = self.model.roi_heads, self.model.evaluation
        x_ND = roi.features_of(self._pool(features, proposals_N4, BOX_SIDE))
        deltas_NC4 = roi.deltas(x_ND).float().reshape(len(x_ND), -1, 4)
        boxes_NC4 = _clipped(decode(proposals_N4[:, None], deltas_NC4, ROI_STDS, None), limits_4)
        scores_NC = roi.scores(roi.classifier(x_ND))
        scores_NC = torch.where(real_N[:, None] & (scores_NC > options.score_threshold), scores_NC, 0)

        # The best candidates, then those of them that NMS leaves; what has no score comes last and suppresses nothing.
        most = min(CANDIDATES * options.detections, scores_NC.numel())
        scores_T, place_T = (x[:most] for x in scores_NC.flatten().sort(descending=True, stable=True))
        labels_T, boxes_T4 = place_T % scores_NC.shape[1], boxes_NC4.flatten(0, 1)[place_T]
        apart_T4 = boxes_T4.double() + labels_T[:, None] * (boxes_T4.max().double() + 1)
        scores_T = _after_nms(apart_T4, scores_T, options.nms).clamp(min=0)
        scores_M, best_M = (x[: options.detections] for x in scores_T.sort(descending=True, stable=True))
        found_M = scores_M > 0
        return boxes_T4[best_M] * found_M[:, None], scores_M, labels_T[best_M] * found_M

    def _pool(self, features: list[Tensor], boxes_N4: Tensor, side: int) -> Tensor:
        """`RoIHeads.pool` of one image: each level pools all boxes, but those of other levels have no area there."""
        options = self.model.roi_heads.config
        samples = 0 if options.aligned else TORCHVISION_SAMPLES
        boxes_N4 = finite(boxes_N4)
        level_N = pyramid_level(boxes_N4, options.finest_scale)
        pooled = features[0].new_zeros(())
        for level, (maps, stride) in enumerate(zip(features, POOL_STRIDES, strict=False)):
            here_N1 = (level_N == level)[:, None]
            regions_N5 = F.pad(torch.where(here_N1, boxes_N4, 0), (1, 0))
            own = roi_align(maps.float().contiguous(), regions_N5, side, 1 / stride, samples, options.aligned)
            pooled = torch.where(here_N1[:, :, None, None], own.to(maps.dtype), pooled)
        return pooled


def _after_nms(boxes_K4: Tensor, scores_K: Tensor, threshold: float) -> Tensor:
    """(K,) the scores, -1 where NMS leaves a box out. Boxes have no negative corners.

    torchvision tells `torch.export` that at least two boxes stay: two that overlap nothing are added.
    """
    apart_24 = torch.tensor([[-2.0, -2, -1, -1], [-4, -4, -3, -3]], dtype=boxes_K4.dtype, device=boxes_K4.device)
    added_S = torch.cat([scores_K, scores_K.new_full((2,), -1)])
    kept = nms(torch.cat([boxes_K4, apart_24]), added_S.to(boxes_K4.dtype), threshold)
    return torch.full_like(added_S, -1).index_copy(0, kept, added_S[kept])[: len(scores_K)]


def _clipped(boxes: Tensor, limits_4: Tensor) -> Tensor:
    return boxes.clamp(min=0).minimum(limits_4)


def export(model: MaskRCNN, canvas: tuple[int, int], about: dict[str, Any], path: Path) -> None:
    """Write the detector for this canvas to `path`, with `about` as JSON inside; the model is changed by it."""
    with torch.no_grad(), warnings.catch_warnings():
        # How torchvision tells the shape of what NMS gives; that channels-last weights are saved as they are.
        warnings.simplefilter("ignore")
        detector = FixedSizeDetector(model, canvas).eval()
        example = (torch.zeros(3, *canvas, dtype=torch.uint8), torch.tensor(canvas))
        detector(*example)  # constants that are kept between calls are real tensors from now on
        program = torch.export.export(detector, example)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        with atomic_write(path) as temporary:
            torch.export.save(program, temporary, extra_files={ABOUT: json.dumps(about)})


def export_run(run: Path, out: Path, size: Sequence[int], overrides: Sequence[str]) -> list[str]:
    """`export` of a run folder, checkpoint folder or file to `out`; lines that say what was chosen.

    size: (height, width) of the images, or () for the usual one; overrides: options in place of the checkpoint's.
    UserError where there is no such checkpoint, or the usual size is not known.
    """
    checkpoint = Checkpoint.open(run)
    config = checkpoint.config_with(overrides)
    height, width = size or usual_size(config)
    canvas = -(-height // DIVISOR) * DIVISOR, -(-width // DIVISOR) * DIVISOR
    model = checkpoint.detector(config)
    calibrate(model, config, run if run.is_dir() else run.with_suffix(""))
    thresholds, told = stored_thresholds(checkpoint, model, config, SURE)
    about = {
        "names": model.stats.names,
        "category_ids": model.stats.category_ids.tolist(),
        "canvas": canvas,
        "short_edge": config.data.test_short_edge,
        "long_edge": config.data.long_edge,
        "thresholds": [SURE] * len(model.stats) if thresholds is None else thresholds.tolist(),
        "posthoc": posthoc_text(config),
        "source": f"{checkpoint.path}, weights {weights_hash(model)}",
    }
    export(model, canvas, about, out)
    return [f"images on a canvas of {canvas[0]} x {canvas[1]} px (height x width)", told]


def usual_size(config: Config) -> tuple[int, int]:
    """(height, width) that most validation images have after resizing. UserError where there is no such file."""
    data = config.data
    if not Path(data.val_annotations).is_file():
        raise UserError(
            f"size: must be given, as size=[800,1333]: there is no {data.val_annotations} (data.val_annotations), "
            "whose images would tell the usual one"
        )
    annotations = open_annotations(data.val_annotations, data.rare_max, data.common_max, masks=False, annotated=False)
    edges = data.test_short_edge, data.long_edge
    return Counter(resized((h, w), *edges) for h, w in annotations.image_sizes.tolist()).most_common(1)[0][0]
