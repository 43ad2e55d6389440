"""Near misses of lost objects: what the detector found at an object and did not output (after TIDE, arXiv 2008.08115).

Shapes: G objects, L of them without a right detection, N proposals, C classes, M detections, K candidates (proposal,
class) of the classes of lost objects; X of any. All boxes x1, y1, x2, y2 in px of the original image.
"""

import torch
from torch import Tensor

from loce.config import EvalConfig
from loce.models.boxes import box_iou
from loce.models.detection import class_wise_nms

HALF = 0.5  # IoU from which on a box is at an object
Found = tuple[Tensor, Tensor, Tensor]  # boxes (X, 4), scores (X,), labels (X,)


def find_near_misses(
    objects: tuple[Tensor, Tensor],
    proposals_N4: Tensor,
    boxes_NC4: Tensor,
    scores_NC: Tensor,
    found: Found,
    allowed_C: Tensor | None,
    config: EvalConfig,
) -> dict[str, Found]:
    """At most one near miss of each kind (see evaluation/near_misses.py) for an object, on the device.

    objects: boxes (G, 4), labels (G,); found: the detections, before those that are not `allowed_C` were left out.
    """
    boxes_G4, labels_G = objects
    boxes_M4, _, labels_M = found
    near_GM = box_iou(boxes_G4, boxes_M4) >= HALF
    same_GM = labels_G[:, None] == labels_M
    lost_G = ~(near_GM & same_GM).any(dim=1)
    misses = _dropped(boxes_G4[lost_G], labels_G[lost_G], boxes_NC4, scores_NC, config)
    if allowed_C is not None:
        misses["classified_as"] = _best(near_GM & ~same_GM & ~allowed_C[labels_M], found)[0]
    if len(proposals_N4):
        nearest_G = box_iou(boxes_G4, proposals_N4).argmax(dim=1)
        misses["proposed"] = (proposals_N4[nearest_G], scores_NC[nearest_G, labels_G], labels_G)
    return misses


def _dropped(
    boxes_L4: Tensor,
    labels_L: Tensor,
    boxes_NC4: Tensor,
    scores_NC: Tensor,
    config: EvalConfig,
) -> dict[str, Found]:
    """The best candidates of lost objects: what NMS leaves was cut by the cap on detections, the rest NMS removed."""
    classes = labels_L.unique()
    proposal_K, place_K = (scores_NC[:, classes] > config.score_threshold).nonzero(as_tuple=True)
    labels_K = classes[place_K]
    candidates = (boxes_NC4[proposal_K, labels_K], scores_NC[proposal_K, labels_K], labels_K)
    stays_K = torch.zeros_like(labels_K, dtype=torch.bool)
    stays_K[class_wise_nms(*candidates, config.nms)] = True
    right_LK = (labels_L[:, None] == labels_K) & (box_iou(boxes_L4, candidates[0]) >= HALF)
    cut, was_cut_L = _best(right_LK & stays_K, candidates)
    removed, _ = _best(right_LK & ~was_cut_L[:, None], candidates)
    return {"cut_by_cap": cut, "removed_by_nms": removed}


def _best(holds_GX: Tensor, found: Found) -> tuple[Found, Tensor]:
    """Of the boxes that hold for an object the one with the highest score; which objects (G,) have one."""
    boxes_X4, scores_X, labels_X = found
    some_G = holds_GX.any(dim=1)
    if not len(scores_X):
        return found, some_G
    best = torch.where(holds_GX, scores_X, -torch.inf).argmax(dim=1)[some_G]
    return (boxes_X4[best], scores_X[best], labels_X[best]), some_G
