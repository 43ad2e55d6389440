"""From class scores and box deltas of all proposals to the detections of an image, MMDetection's way.

Shapes: N proposals, C classes, K candidates (proposal, class), M detections.
"""

from dataclasses import replace

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


def detect_of_classes(boxes_NC4: Tensor, scores_NC: Tensor, allowed_C: Tensor, config: EvalConfig) -> Found:
    """`detect` of the classes `allowed_C` alone, without the cap (but UNCAPPED_LIMIT)."""
    classes = allowed_C.nonzero()[:, 0]
    wide = replace(config, detections=UNCAPPED_LIMIT)
    boxes_M4, scores_M, places_M = detect(boxes_NC4[:, classes], scores_NC[:, classes], wide)
    return boxes_M4, scores_M, classes[places_M]


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
