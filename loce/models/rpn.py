"""Region proposal network with MMDetection's numerics: float anchors, its matcher, L1 loss, 1000 proposals in all.

Shapes: L pyramid levels, A anchors of one image over all levels (order: level, y, x, ratio), B images.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import nms

from loce.config import RPNConfig
from loce.models.boxes import (
    ANCHORS,
    BETWEEN,
    RPN_STDS,
    clip,
    constants,
    decode,
    encode,
    generator_for,
    leave_out,
    match_boxes,
    sample,
)
from loce.models.nms_resampling import NMSResampling
from loce.utils.distributed import divisor

RATIOS = (0.5, 1.0, 2.0)  # height / width
STRIDES = (4, 8, 16, 32, 64)


def level_anchors(
    height: int,
    width: int,
    stride: int,
    scale: float,
    device: torch.device,
) -> Tensor:
    """(height * width * 3, 4) float anchors of one level, centred on (x * stride, y * stride), side scale * stride."""
    side = 1 << (max(height, width) - 1).bit_length()  # few sizes, so that few are kept
    return _square_of_anchors(side, stride, scale, device)[:height, :width].reshape(-1, 4)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _square_of_anchors(side: int, stride: int, scale: float, device: torch.device) -> Tensor:
    """(side, side, 3, 4) anchors, by y, x and ratio; kept between steps, 12 MB for the finest level of 1333 pixels."""
    ratio_R = constants(RATIOS, device)
    half_h_R = scale * stride * ratio_R.sqrt() / 2
    half_w_R = scale * stride / ratio_R.sqrt() / 2
    cell_R4 = torch.stack([-half_w_R, -half_h_R, half_w_R, half_h_R], dim=1)
    place = torch.arange(side, device=device) * stride
    y, x = torch.meshgrid(place, place, indexing="ij")
    centres = torch.stack([x, y, x, y], dim=-1)[:, :, None]
    return centres + cell_R4


def level_validity(
    height: int,
    width: int,
    stride: int,
    padded_size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """(height * width * 3,) bool: anchors whose cell lies in the image's own padded area, not the batch's."""
    valid = torch.zeros((height, width, len(RATIOS)), dtype=torch.bool, device=device)
    valid[: -(-padded_size[0] // stride), : -(-padded_size[1] // stride)].fill_(True)
    return valid.reshape(-1)


def _validity(shapes: list[tuple[int, int]], padded_size: tuple[int, int], device: torch.device) -> Tensor:
    levels = zip(shapes, STRIDES, strict=True)
    return torch.cat([level_validity(h, w, stride, padded_size, device) for (h, w), stride in levels])


class LossSums(NamedTuple):
    """Losses of a batch that are not divided yet, scalars by name, and the number () that they are divided by."""

    losses: dict[str, Tensor]
    number: Tensor

    def divided(self, total: Tensor) -> dict[str, Tensor]:
        """The losses. total: the sum over ranks of `number`."""
        mean = divisor(total)
        return {name: loss / mean for name, loss in self.losses.items()}


class RPN(nn.Module):
    """Proposals and their losses from the feature pyramid."""

    def __init__(self, channels: int, config: RPNConfig) -> None:
        super().__init__()
        self.config = config
        self.head = RPNHead(channels, len(RATIOS), conv_depth=1)
        self.resampling: NMSResampling | None = None  # set by whoever builds the model

    @record_function("RPN head, everywhere, no gradient")
    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness logits (B, A_l) and deltas (B, A_l, 4) per level, flattened in anchor order."""
        logits, deltas = self.head(features)
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        deltas = [x.permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in deltas]
        return logits, deltas

    def anchors(self, features: list[Tensor]) -> list[Tensor]:
        """Anchors (A_l, 4) per level for feature maps (B, D, h, w)."""
        scale = self.config.anchor_scale
        return [
            level_anchors(x.shape[2], x.shape[3], stride, scale, x.device)
            for x, stride in zip(features, STRIDES, strict=True)
        ]

    @record_function("proposals and their NMS")
    @torch.no_grad()
    def proposals(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        anchors: list[Tensor],
        image_sizes: list[tuple[int, int]],
        truths: list[tuple[Tensor, Tensor]] | None = None,
    ) -> list[Tensor]:
        """Per image at most `post_nms` boxes (n, 4), best first; NMS runs within each level; small boxes stay.

        truths: in training, ground-truth boxes (G, 4) and labels (G,) of each image, for NMS resampling.
        """
        # The best anchors of each level, S of all levels together, become boxes by one call for all images.
        pre_nms = self.config.pre_nms_train if self.training else self.config.pre_nms_test
        scores, deltas_of_best, best_anchors = [], [], []
        for logits_BA, deltas_BA4, anchors_A4 in zip(logits, deltas, anchors, strict=True):
            scores_BK, top_BK = logits_BA.float().sigmoid().topk(min(pre_nms, logits_BA.shape[1]), dim=1)
            scores.append(scores_BK)
            deltas_of_best.append(deltas_BA4.gather(1, top_BK[..., None].expand(-1, -1, 4)))
            best_anchors.append(anchors_A4[top_BK])
        boxes_BS4 = decode(torch.cat(best_anchors, dim=1), torch.cat(deltas_of_best, dim=1), RPN_STDS, None)
        scores_BS, lengths = torch.cat(scores, dim=1), [x.shape[1] for x in scores]

        known: Sequence[tuple[Tensor, Tensor] | None] = truths or [None] * len(image_sizes)
        return [
            self._suppressed(clip(boxes_S4, size), scores_S, lengths, truth)
            for boxes_S4, scores_S, size, truth in zip(boxes_BS4, scores_BS, image_sizes, known, strict=True)
        ]

    def _suppressed(
        self,
        boxes_S4: Tensor,
        scores_S: Tensor,
        lengths: list[int],
        truth: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """What NMS leaves of an image's boxes, which lie level after level, best first; at most `post_nms`."""
        boxes, scores = [], []
        for boxes_K4, scores_K in zip(boxes_S4.split(lengths), scores_S.split(lengths), strict=True):
            if self.resampling is None or truth is None:
                kept = nms(boxes_K4, scores_K, self.config.nms)  # sync: NMS decides how many stay
            else:
                kept = self.resampling(boxes_K4, scores_K, *truth)
            kept = kept[: self.config.post_nms]
            boxes.append(boxes_K4[kept])
            scores.append(scores_K[kept])
        order = torch.cat(scores).sort(descending=True, stable=True).indices[: self.config.post_nms]
        return torch.cat(boxes)[order]

    @record_function("RPN matching, sampling, losses")
    def losses(
        self,
        features: list[Tensor],
        anchors: list[Tensor],
        padded_sizes: list[tuple[int, int]],
        truths: list[Tensor],
        seeds: Sequence[int | None] = (),
        ignored: Sequence[Tensor | None] = (),
    ) -> LossSums:
        """Objectness BCE and box L1, to be divided by the number of sampled anchors of the batch.

        truths: ground-truth boxes (G, 4) per image; seeds: of each image's random numbers; ignored: per image the
        regions (M, 4) that are no background either, or nothing. Only sampled anchors have a gradient, so the head is
        evaluated at them alone, see `at`.
        """
        anchors_A4, shapes = torch.cat(anchors), [(x.shape[2], x.shape[3]) for x in features]
        slots, targets = [], []
        for i, truths_G4 in enumerate(truths):
            # Candidates: no anchor in an ignored region, or in the padding that other images of the batch need.
            matched_A = self.match(anchors_A4, truths_G4)
            matched_A = leave_out(matched_A, anchors_A4, ignored[i] if ignored else None)
            matched_A = matched_A.masked_fill(~_validity(shapes, padded_sizes[i], anchors_A4.device), BETWEEN)

            # Slots of fixed number, some of them unused.
            generator = generator_for(seeds[i] if seeds else None, ANCHORS, anchors_A4.device)
            slots.append(sample(matched_A, self.config.batch_per_image, self.config.positive_fraction, generator))
            positives_P = slots[-1][0]
            picked_P4 = anchors_A4[positives_P]
            matched_P4 = truths_G4[matched_A[positives_P].clamp(min=0)] if len(truths_G4) else picked_P4
            targets.append(encode(picked_P4, matched_P4, RPN_STDS))

        # The head at all slots, so that shapes are fixed; unused ones are left out of the sums.
        positives_BP, is_object_BP, negatives_BK, is_none_BK = (torch.stack(x) for x in zip(*slots, strict=True))
        logits_BS, deltas_BS4 = self.at(features, torch.cat([positives_BP, negatives_BK], dim=1))
        number = positives_BP.shape[1]
        logits_BP, logits_BK = logits_BS[:, :number].float(), logits_BS[:, number:].float()
        errors_BP4 = (deltas_BS4[:, :number].float() - torch.stack(targets)).abs()
        box = torch.where(is_object_BP[..., None], errors_BP4, 0).sum()
        objectness = (F.softplus(-logits_BP) * is_object_BP).sum() + (F.softplus(logits_BK) * is_none_BK).sum()
        count = (is_object_BP.sum(dim=1).clamp(min=1) + is_none_BK.sum(dim=1).clamp(min=1)).sum()
        return LossSums({"loss_rpn_cls": objectness, "loss_rpn_box": box}, count)

    def at(self, features: list[Tensor], anchors_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and deltas (B, K, 4) of `forward` at some anchors of each image.

        Up to rounding the same numbers and gradients; the work grows with K, not with the image. K: indices in anchor
        order; they may repeat. J: pixels that the 3 x 3 convolution reads there, 9 an anchor.
        """
        conv, device, batch = self.head.conv[0][0], anchors_BK.device, len(anchors_BK)

        # Of each level, its first cell, and its map's height and width; of each anchor, its level's.
        table, cells = [], 0
        for h, w in [(x.shape[2], x.shape[3]) for x in features]:
            table += [cells, h, w]
            cells += h * w
        table_3L = constants((*table[0::3], *table[1::3], *table[2::3]), device, torch.long).view(3, -1)
        cell_BK, ratio_BK = anchors_BK // len(RATIOS), anchors_BK % len(RATIOS)
        level_BK = torch.bucketize(cell_BK, table_3L[0], right=True) - 1
        first_BK, height_BK, width_BK = table_3L.index_select(1, level_BK.flatten()).view(3, batch, -1)
        cell_BK = cell_BK - first_BK

        # The pixels around its cell; those outside the map are zeros.
        around = constants((-1, 0, 1), device, torch.long)
        y_BK33 = (cell_BK // width_BK)[..., None, None] + around[:, None]
        x_BK33 = (cell_BK % width_BK)[..., None, None] + around
        height_BK11, width_BK11 = height_BK[..., None, None], width_BK[..., None, None]
        inside_BK33 = (y_BK33 >= 0) & (y_BK33 < height_BK11) & (x_BK33 >= 0) & (x_BK33 < width_BK11)
        pixel_BJ = (y_BK33 * width_BK11 + x_BK33).flatten(1)
        level_BJ = torch.where(inside_BK33, level_BK[..., None, None], -1).flatten(1)
        patch_BDJ = torch.zeros((), dtype=features[0].dtype, device=device)
        for level, maps in enumerate(features):
            pixels_BDA = maps.flatten(2)
            index_BJ = pixel_BJ.remainder(pixels_BDA.shape[2])  # of other levels' pixels anything, to be thrown away
            found_BDJ = pixels_BDA.gather(2, index_BJ[:, None].expand(-1, maps.shape[1], -1))
            patch_BDJ = torch.where((level_BJ == level)[:, None], found_BDJ, patch_BDJ)

        # Through the head's layers as matrix products, with D x 9 inputs in the order of the convolution's weight.
        patch_NI = patch_BDJ.unflatten(2, (-1, 9)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        x_ND = F.relu(F.linear(patch_NI, conv.weight.flatten(1), conv.bias))
        score, box = self.head.cls_logits, self.head.bbox_pred
        logits_NR = F.linear(x_ND, score.weight.flatten(1), score.bias)
        deltas_NR4 = F.linear(x_ND, box.weight.flatten(1), box.bias).reshape(-1, len(RATIOS), 4)
        ratio_N = ratio_BK.flatten()
        each_N = torch.arange(len(ratio_N), device=device)
        return logits_NR[each_N, ratio_N].view(batch, -1), deltas_NR4[each_N, ratio_N].view(batch, -1, 4)

    def match(self, anchors_A4: Tensor, truths_G4: Tensor) -> Tensor:
        """(A,) ground truth of every anchor, by the RPN's thresholds."""
        low = self.config.negative_iou
        return match_boxes(anchors_A4, truths_G4, self.config.positive_iou, low, low)
