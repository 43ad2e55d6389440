"""Mask head with the normalised mask predictor (Sec. 4.1, after Seesaw), its targets and its loss.

Shapes: P regions of interest, D channels, C classes, S = 14 pooled side, 2S = 28 mask side.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torchvision.ops import roi_align

from loce.data.masks import CroppedMasks
from loce.models.boxes import clip, finite

MASK_SIZE = 28


class MaskHead(nn.Module):
    """Convolutions, a deconvolution and class-specific 1x1 predictors, of which only the asked class is computed."""

    def __init__(
        self,
        channels: int,
        width: int,
        convs: int,
        num_classes: int,
        normalised: bool = True,
        temperature: float = 20.0,
    ) -> None:
        super().__init__()
        self.normalised, self.temperature = normalised, temperature
        self.convs = nn.ModuleList(nn.Conv2d(channels if i == 0 else width, width, 3, padding=1) for i in range(convs))
        self.upsample = nn.ConvTranspose2d(width if convs else channels, width, 2, stride=2)
        self.predictor = nn.Conv2d(width, num_classes, 1)
        for layer in (*self.convs, self.upsample, self.predictor):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    @record_function("mask head")
    def forward(self, x_PDSS: Tensor, labels_P: Tensor) -> Tensor:
        """Mask logits (P, 2S, 2S) of each region's class `labels_P` (long, 0..C-1).

        Normalised: temperature * <x / |x|, w_c / |w_c|> + b_c, norms over channels (no gradient is lost on other
        classes: their channels do not enter the loss).
        """
        x = x_PDSS
        for conv in self.convs:
            x = F.relu_(conv(x))
        regions, channels, *side = x.shape
        # The deconvolution's 2 x 2 windows do not overlap: it is a 1 x 1 convolution to four pixels. They stay in
        # this order, channels last, until only logits are left to be put into place.
        weight = self.upsample.weight.permute(2, 3, 1, 0).reshape(-1, channels, 1, 1)
        assert self.upsample.bias is not None and self.predictor.bias is not None
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.conv2d(x, weight, self.upsample.bias.repeat(4)).relu_()
        x = x.permute(0, 2, 3, 1).reshape(regions, 4 * side[0] * side[1], self.upsample.out_channels)
        weight_PD = self.predictor.weight.flatten(1)[labels_P]
        if self.normalised:
            weight_PD = F.normalize(weight_PD, dim=1)
            logits = self.temperature * UnitProduct.apply(x, weight_PD.to(x.dtype))
        else:
            logits = (x @ weight_PD.to(x.dtype)[:, :, None])[:, :, 0]
        logits = logits.view(regions, *side, 2, 2).transpose(2, 3).reshape(regions, 2 * side[0], 2 * side[1])
        return logits + self.predictor.bias[labels_P, None, None]


class UnitProduct(torch.autograd.Function):
    """<x / |x|, w> over the channels of x (P, N, D), with w (P, D): (P, N), fp32 at least.

    Its gradient by x, g (w - <x / |x|, w> x / |x|) / |x|, is made in two passes over x; PyTorch's own of the two
    operations takes three times as long. Where no gradient is wanted, x is used up.
    """

    @staticmethod
    def forward(ctx: Any, x_PND: Tensor, weight_PD: Tensor) -> Tensor:
        length_PN = torch.linalg.vector_norm(x_PND, dim=2, dtype=torch.promote_types(x_PND.dtype, torch.float32))
        length_PN = length_PN.clamp(min=1e-12)
        if any(ctx.needs_input_grad):
            product_PN = (x_PND @ weight_PD[:, :, None])[:, :, 0] / length_PN
            ctx.save_for_backward(x_PND, weight_PD, length_PN, product_PN)
            return product_PN
        return x_PND.mul_(weight_PD[:, None]).sum(dim=2) / length_PN  # in place it is faster on a CPU

    @staticmethod
    def backward(ctx: Any, gradient_PN: Tensor) -> tuple[Tensor, Tensor]:
        x_PND, weight_PD, length_PN, product_PN = ctx.saved_tensors
        along_w_PN = gradient_PN / length_PN
        along_x_PN = -along_w_PN * product_PN / length_PN
        along_w_PN, along_x_PN = along_w_PN.to(x_PND.dtype), along_x_PN.to(x_PND.dtype)
        of_x_PND = torch.mul(x_PND, along_x_PN[:, :, None]).addcmul_(along_w_PN[:, :, None], weight_PD[:, None])
        return of_x_PND, (along_w_PN[:, None] @ x_PND)[:, 0]


def mask_loss(logits_PHW: Tensor, targets_PHW: Tensor, positives: Tensor) -> Tensor:
    """Mean binary cross-entropy over all pixels of the positives; 0 (still connected) without positives.

    positives: (), what the sum is divided by: P, at least 1, or with several ranks its mean over them.
    """
    total = F.binary_cross_entropy_with_logits(logits_PHW.float(), targets_PHW.float(), reduction="sum")
    return total / (positives * logits_PHW.shape[1:].numel())


@torch.no_grad()
def mask_targets(masks: CroppedMasks, instances_P: Tensor, boxes_P4: Tensor) -> Tensor:
    """(P, 28, 28) bool: each region's instance mask, averaged over the region's cells (RoIAlign) and cut at 0.5.

    masks: ground truth of one image; instances_P: which instance; boxes_P4: regions, in pixels of that image.
    """
    shifted_P4 = finite(clip(boxes_P4, masks.size)) - masks.windows[instances_P, :2].repeat(1, 2)
    sheet_P1, slot_P1 = masks.places[instances_P].split(1, dim=1)
    regions_P5 = torch.cat([slot_P1, shifted_P4], dim=1)
    share_PSS = shifted_P4.new_zeros(len(boxes_P4), MASK_SIZE, MASK_SIZE)
    for number, sheet in enumerate(masks.sheets()):
        here_P5 = torch.where(sheet_P1 == number, regions_P5, 0)  # the others: a box without area, which gives zeros
        share_PSS += roi_align(sheet[:, None].float(), here_P5, MASK_SIZE, aligned=True, sampling_ratio=0)[:, 0]
    return share_PSS >= 0.5
