"""From scores and boxes of all classes to detections: thresholds, class-wise NMS, and its shortcut for the best."""

import pytest
import torch
from torchvision.ops import batched_nms

from loce.config import EvalConfig
from loce.models import detection
from loce.models.detection import best_detections, class_wise_nms, detect


def slow_iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def slow_nms(boxes, scores, labels, threshold) -> list[int]:
    """All pairs, best first: a box falls when a better one of its class, that stays, overlaps it by more."""
    boxes, labels = boxes.double().tolist(), labels.tolist()
    order = sorted(range(len(boxes)), key=lambda i: -float(scores[i]))
    kept: list[int] = []
    for i in order:
        rivals = [j for j in kept if labels[j] == labels[i]]
        if all(slow_iou(boxes[i], boxes[j]) <= threshold for j in rivals):
            kept.append(i)
    return kept


def crowd(count: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heavily overlapping boxes with distinct scores."""
    centre, side = torch.rand(count, 2) * 40 + 30, torch.rand(count, 2) * 30 + 5
    boxes = torch.cat([centre - side / 2, centre + side / 2], dim=1)
    scores = (torch.randperm(count).float() + 1) / (count + 1)
    return boxes, scores, torch.randint(0, classes, (count,))


@pytest.mark.parametrize("classes", [1, 4, 1203])
def test_class_wise_nms(classes):
    boxes, scores, labels = crowd(400, classes)
    assert class_wise_nms(boxes, scores, labels, 0.5).tolist() == slow_nms(boxes, scores, labels, 0.5)


@pytest.mark.parametrize("label", [0, 1202])
def test_an_iou_of_exactly_the_threshold_stays(label):
    """Only a larger IoU suppresses, also in a class whose boxes are moved far away."""
    boxes = torch.tensor([[0.0, 0, 16, 16], [0, 0, 16, 8], [0, 0, 16, 8.001]])
    labels = torch.full((3,), label)
    assert class_wise_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), labels, 0.5).tolist() == [0, 1]
    assert class_wise_nms(boxes[[0, 2]], torch.tensor([0.9, 0.7]), labels[:2], 0.5).tolist() == [0]


def test_moving_classes_apart_rounds_no_box():
    """Two thin boxes 1/64 px apart: float32 offsets of class 1202 would make them one."""
    boxes = torch.tensor([[0.0, 0, 1 / 64, 600], [1 / 64, 0, 2 / 64, 600]])
    assert len(class_wise_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([1202, 1202]), 0.5)) == 2


@pytest.mark.parametrize("limit", [1, 7, 25, 60, 400])
@pytest.mark.parametrize("first", [1, 4])
def test_growing_portions_are_exact(monkeypatch, limit, first):
    monkeypatch.setattr(detection, "_FIRST_CANDIDATES", first)
    for classes in (1, 3, 40):
        boxes, scores, labels = crowd(500, classes)
        expected = slow_nms(boxes, scores, labels, 0.5)[:limit]
        assert best_detections(boxes, scores, labels, 0.5, limit).tolist() == expected


@pytest.mark.parametrize("limit", [3, 20, 400])
@pytest.mark.parametrize("levels", [1, 3, 20])
def test_of_equal_scores_the_first_comes_first(monkeypatch, limit, levels):
    """Few distinct scores: the same boxes in the same order as torchvision's, and as in the slow loop.

    Also where a portion ends among equals. Whole pixels, since torchvision moves classes apart in float32.
    """
    monkeypatch.setattr(detection, "_FIRST_CANDIDATES", 1)
    for classes in (1, 4):
        boxes, _, labels = crowd(400, classes)
        boxes, scores = boxes.round(), (torch.randint(levels, (400,)).float() + 1) / levels
        expected = slow_nms(boxes, scores, labels, 0.5)[:limit]
        assert best_detections(boxes, scores, labels, 0.5, limit).tolist() == expected
        assert batched_nms(boxes, scores, labels, 0.5)[:limit].tolist() == expected


def test_scores_must_exceed_the_threshold():
    scores = torch.tensor([[1e-4, 2e-4], [0.5, 0.0]])
    boxes = torch.tensor([[[0.0, 0, 5, 5]] * 2, [[20.0, 20, 30, 30]] * 2])
    _, found, labels = detect(boxes, scores, EvalConfig(score_threshold=1e-4))
    assert found.tolist() == pytest.approx([0.5, 2e-4]) and labels.tolist() == [0, 1]


def test_boxes_without_area_are_detections():
    boxes = torch.tensor([[[3.0, 3, 3, 9]], [[3.0, 3, 3, 9]], [[0.0, 0, 8, 8]]])
    found, _, _ = detect(boxes, torch.tensor([[0.9], [0.8], [0.7]]), EvalConfig())
    assert len(found) == 3  # two equal lines have IoU 0


def test_best_first_over_all_classes_and_at_most_so_many():
    boxes = torch.rand(50, 6, 2) * 1000
    boxes = torch.cat([boxes, boxes + 1], dim=2)  # no overlaps
    scores = torch.rand(50, 6)
    found, found_scores, labels = detect(boxes, scores, EvalConfig(detections=30))
    expected = sorted(((float(scores[n, c]), n, c) for n in range(50) for c in range(6)), reverse=True)[:30]
    assert found_scores.tolist() == [score for score, _, _ in expected]
    assert labels.tolist() == [c for _, _, c in expected]
    assert torch.equal(found, torch.stack([boxes[n, c] for _, n, c in expected]))


@pytest.mark.parametrize("proposals", [0, 4])
def test_nothing_to_detect(proposals):
    boxes, scores, labels = detect(torch.zeros(proposals, 3, 4), torch.zeros(proposals, 3), EvalConfig())
    assert boxes.shape == (0, 4) and len(scores) == len(labels) == 0
