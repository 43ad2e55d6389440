"""NMS resampling (Forest R-CNN, ACM MM 2020, Sec. 3.4): looser NMS for training proposals near rarer classes.

Of the proposals of a level, before the cut to post_nms; an image's ground truth says what a proposal is near to:
discrete: NMS runs with 0.9, 0.8 and 0.7. Kept are, of the first run, proposals near a rare object, of the second, near
    a common one, of the third, near neither; near is IoU >= 0.3. A proposal near both kinds is kept twice.
linear: one run with a threshold for each box, that of the class of its best object, or of the background where the IoU
    is under 0.3; the kept box's threshold decides. With m images, it falls from 0.95 to 0.85 over the rare classes,
    from 0.85 to 0.75 over the common, from 0.75 to 0.65 over the frequent ones; background 0.65.
At test time NMS is plain, with model.rpn.nms.

State: none; which class belongs where follows from the statistics of the training set.

Differences from the paper / the released code:
- A threshold of the linear form falls from the fewest to the most images that a class of the group has in the data. The
  released table is of LVIS v0.5: 1 to 10, 11 to 100, 102 to 1145 images. Classes without images have the highest.
- NMS with a threshold for each box is done by matrices and gives what the one-by-one form gives; the released one runs
  on the host.

Shapes: K proposals of a level, best first; G ground-truth boxes; C classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from loce.models.boxes import box_iou
from loce.utils.classes import GROUPS, ClassStats

NEAR = 0.3  # IoU
DISCRETE = (0.9, 0.8, 0.7)  # near rare, near common, elsewhere
LINEAR = {"r": (0.95, 0.85), "c": (0.85, 0.75), "f": (0.75, 0.65)}
BACKGROUND = 0.65  # linear


def linear_thresholds(stats: ClassStats) -> np.ndarray:
    """(C+1,) the threshold of each class, linear in its number of images within its group, and the background's."""
    thresholds = np.full(len(stats) + 1, LINEAR["r"][0])
    for group, (high, low) in LINEAR.items():
        members = np.flatnonzero(stats.group_mask(group) & (stats.image_counts > 0))
        if len(members):
            images = stats.image_counts[members]
            share = (images - images.min()) / max(np.ptp(images), 1)
            thresholds[members] = high - (high - low) * share
    thresholds[-1] = BACKGROUND
    return thresholds


def nms_of_each(boxes_K4: Tensor, thresholds_K: Tensor) -> Tensor:
    """(n,) indices, ascending, that greedy NMS keeps when each kept box suppresses by its own threshold.

    boxes: best first. The rule "kept if no better box is kept that suppresses it" is applied until nothing changes:
    after n rounds the first n boxes are settled, and usually all are after a few.
    """
    suppresses_KK = (box_iou(boxes_K4, boxes_K4) > thresholds_K[:, None]).triu(diagonal=1)
    kept_K = torch.ones_like(thresholds_K, dtype=torch.bool)
    while True:
        settled_K = ~(suppresses_KK & kept_K[:, None]).any(dim=0)
        if torch.equal(settled_K, kept_K):  # sync: NMS decides how many stay
            return kept_K.nonzero()[:, 0]  # sync: the same
        kept_K = settled_K


class NMSResampling(nn.Module):
    """Takes plain NMS's place in training. Buffers, not in checkpoints: `group_C` (C,) long, 0 rare, 1 common, 2
    frequent; `threshold_L` (C+1,), of the linear form.
    """

    group_C: Tensor  # noqa: N815
    threshold_L: Tensor  # noqa: N815

    def __init__(self, kind: str, stats: ClassStats) -> None:
        super().__init__()
        if kind not in ("discrete", "linear"):
            raise ValueError(f"no NMS resampling is called {kind}")
        self.kind = kind
        groups = torch.tensor([GROUPS.index(group) for group in stats.groups])
        self.register_buffer("group_C", groups, persistent=False)
        thresholds = torch.from_numpy(linear_thresholds(stats)).float()
        self.register_buffer("threshold_L", thresholds, persistent=False)

    def forward(
        self,
        boxes_K4: Tensor,
        scores_K: Tensor,
        truths_G4: Tensor,
        labels_G: Tensor,
    ) -> Tensor:
        """(n,) indices of the proposals that stay, best first. boxes: best first, with their scores."""
        iou_KG = F.pad(box_iou(boxes_K4, truths_G4), (0, 1))  # a last column for images without objects
        if self.kind == "linear":
            best_K, own_K = iou_KG.max(dim=1)
            labels_G = F.pad(labels_G, (0, 1))
            class_K = torch.where(best_K >= NEAR, labels_G[own_K], len(self.group_C))
            return nms_of_each(boxes_K4, self.threshold_L[class_K])
        groups_G = F.pad(self.group_C[labels_G], (0, 1), value=2)
        rare_K, common_K = (((iou_KG >= NEAR) & (groups_G == group)).any(dim=1) for group in (0, 1))
        parts = []
        for threshold, wanted_K in zip(DISCRETE, (rare_K, common_K, ~(rare_K | common_K)), strict=True):
            kept = nms(boxes_K4, scores_K, threshold)  # sync: NMS decides how many stay
            parts.append(kept[wanted_K[kept]])  # sync: the same
        return torch.cat(parts).sort(stable=True).values
