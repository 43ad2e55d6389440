"""Evaluation on LVIS- and COCO-style data: exact, in columns, with intervals and a table per category."""

from loce.evaluation.annotations import FederatedFilter, GroundTruth, load_annotations
from loce.evaluation.detections import Detections, Masks, read_results
from loce.evaluation.lvis_ap import Evaluation, evaluate_lvis
from loce.evaluation.stream import DetectionWriter, read_detections

__all__ = [
    "DetectionWriter",
    "Detections",
    "Evaluation",
    "FederatedFilter",
    "GroundTruth",
    "Masks",
    "evaluate_lvis",
    "load_annotations",
    "read_detections",
    "read_results",
]
