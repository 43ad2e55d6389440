"""From class scores and box deltas of all proposals to the detections of an image, MMDetection's way.

Shapes: N proposals, C classes, K candidates (proposal, class), M detections.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torchvision.ops import nms

from loce.config import EvalConfig

UNCAPPED_LIMIT = 10_000  # detections of an image for protocols without a cap, whose cap of a category this is, too
_FIRST_CANDIDATES = 4  # times the number of detections asked for
Found = tuple[Tensor, Tensor, Tensor]  # boxes (M, 4), scores (M,), labels (M,)


def class_wise_nms(boxes_K4: Tensor, scores_K: Tensor, labels_K: Tensor, threshold: float) -> Tensor:
    """Indices kept by NMS within each class, best first. Classes are moved apart in float64, so no box is rounded."""
    if len(boxes_K4) == 0:
        return labels_K
    apart_K1 = labels_K[:, None].double() * (boxes_K4.max().double() + 1)
    return nms(boxes_K4.double() + apart_K1, scores_K.double(), threshold)


def best_detections(boxes_K4: Tensor, scores_K: Tensor, labels_K: Tensor, threshold: float, limit: int) -> Tensor:
    """Indices of the `limit` best boxes after class-wise NMS.

    Greedy NMS decides on a box by better boxes only, so the first `limit` survivors among the best candidates are the
    first `limit` of all: candidates are taken in growing portions until there are enough survivors. Of equal scores the
    one with the lower index comes first, as in torchvision's `batched_nms`.
    """
    order = scores_K.sort(descending=True, stable=True).indices
    portion = _FIRST_CANDIDATES * limit
    while True:
        best = order[:portion]
        kept = best[class_wise_nms(boxes_K4[best], scores_K[best], labels_K[best], threshold)]
        if len(kept) >= limit or portion >= len(order):
            return kept[:limit]
        portion *= 4


def detect_of_classes(
    boxes_NC4: Tensor,
    scores_NC: Tensor,
    found: Found,
    allowed_C: Tensor,
    config: EvalConfig,
    uncapped: bool,
    classes_NC: Tensor | None = None,
) -> tuple[Found, Tensor]:
    """Of the detections `found` (`detect` of the same) those of the classes `allowed_C`, and how many better ones of
    any class each has (M,). uncapped: also those of these classes that come after the cap (up to UNCAPPED_LIMIT)."""
    kept = allowed_C[found[2]]
    ranks_M = kept.nonzero()[:, 0]
    if not uncapped:
        return (found[0][kept], found[1][kept], found[2][kept]), ranks_M
    counts = allowed_C if classes_NC is None else allowed_C[classes_NC]
    found = detect(boxes_NC4, scores_NC * counts, replace(config, detections=UNCAPPED_LIMIT), classes_NC)
    return found, torch.cat([ranks_M, ranks_M.new_full((len(found[1]) - len(ranks_M),), config.detections)])


def detect(
    boxes_NC4: Tensor,
    scores_NC: Tensor,
    config: EvalConfig,
    classes_NC: Tensor | None = None,
) -> Found:
    """(boxes (M, 4), scores (M,), labels (M,)), best first. Scores must exceed the threshold; no box is too small.

    classes_NC: the label of each column, ascending in each row, where not all classes have one.
    """
    proposal_K, column_K = (scores_NC > config.score_threshold).nonzero(as_tuple=True)
    scores_K, boxes_K4 = scores_NC[proposal_K, column_K], boxes_NC4[proposal_K, column_K]
    labels_K = column_K if classes_NC is None else classes_NC[proposal_K, column_K]
    kept = best_detections(boxes_K4, scores_K, labels_K, config.nms, config.detections)
    return boxes_K4[kept], scores_K[kept], labels_K[kept]
