"""Mask head with the normalised mask predictor (Sec. 4.1, after Seesaw), its targets and its loss.

Shapes: P regions of interest, D channels, C classes, S = 14 pooled side, 2S = 28 mask side.
"""

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
            x = F.relu(conv(x))
        x = F.relu(self.upsample(x))
        weight_CD = self.predictor.weight.flatten(1)
        if self.normalised:
            x = self.temperature * F.normalize(x, dim=1)
            weight_CD = F.normalize(weight_CD, dim=1)
        assert self.predictor.bias is not None
        logits = torch.einsum("pdhw,pd->phw", x, weight_CD[labels_P].to(x.dtype))
        return logits + self.predictor.bias[labels_P, None, None]


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
