"""Which regions of an image the second stage learns from: 24 of them, at most a quarter positive."""

import pytest
import torch

from loce.utils.classes import IGNORED

from .conftest import first, truth_of

CLASSES = 6


@pytest.fixture
def roi_heads(make_model, monkeypatch):
    monkeypatch.setattr("loce.models.boxes.choose_random", first)
    return make_model().roi_heads


def test_ground_truth_stands_in_front_as_its_own_positive(roi_heads, truths):
    far = torch.tensor([[0.0, 0, 3, 3]]).repeat(30, 1)
    found = roi_heads.select(far, truths[0])
    assert torch.equal(found.boxes[:3], truths[0].boxes)
    assert found.instances.tolist() == [0, 1, 2] + [-1] * 21
    assert found.labels.tolist() == truths[0].labels.tolist() + [CLASSES] * 21


def test_equal_ground_truth_boxes_stay_themselves(roi_heads, make_sample):
    """Two classes on the same box: each of the two keeps its own label; a proposal there goes to the later."""
    box = [10.0, 10, 50, 50]
    found = roi_heads.select(torch.tensor([box]), truth_of(make_sample([box, box], [1, 4])))
    assert found.instances[:3].tolist() == [0, 1, 1] and found.labels[:3].tolist() == [1, 4, 4]


def test_ground_truth_boxes_take_no_part_in_matching(roi_heads, make_sample):
    """With an IoU of 0.55 the proposal is its instance's best one, although the instance itself has IoU 1."""
    sample = make_sample([[0, 0, 40, 40], [0, 0, 40, 24]], [1, 4])
    found = roi_heads.select(torch.tensor([[0.0, 0, 40, 22]]), truth_of(sample))
    # IoU 0.55 with the first, 0.917 with the second; the best of both is this box: the later one takes it.
    assert found.instances[:3].tolist() == [0, 1, 1]
    flipped = make_sample([[0, 0, 40, 24], [0, 0, 40, 40]], [4, 1])
    found = roi_heads.select(torch.tensor([[0.0, 0, 40, 22]]), truth_of(flipped))
    assert found.instances[:3].tolist() == [0, 1, 1] and found.labels[2] == 1  # a worse fit, but the later one


def test_half_an_iou_is_positive(roi_heads, make_sample):
    found = roi_heads.select(
        torch.tensor([[0.0, 0, 40, 20], [0, 0, 40, 19.9]]), truth_of(make_sample([[0, 0, 40, 40]], [2]))
    )
    assert found.labels[:3].tolist() == [2, 2, CLASSES]


def test_counts(roi_heads, truths, proposals):
    for truth, boxes in zip(truths, proposals, strict=True):
        found = roi_heads.select(boxes, truth)
        positive = found.instances >= 0
        assert len(found.boxes) == 24 and int(positive.sum()) == 6 and positive[:6].all()
        assert (found.labels[positive] == truth.labels[found.instances[positive]]).all()
        assert (found.labels[~positive] == CLASSES).all()


def test_an_image_with_fewer_boxes_than_wanted(roi_heads, truths):
    """3 ground truths and 2 proposals: 5 slots are used, in front."""
    found = roi_heads.select(torch.tensor([[0.0, 0, 3, 3], [80, 1, 84, 4]]), truths[0])
    assert (found.labels != IGNORED).tolist() == [True] * 5 + [False] * (len(found.labels) - 5)
    assert (found.instances[5:] == -1).all()


def test_no_objects(roi_heads, make_sample, proposals):
    found = roi_heads.select(proposals[0], truth_of(make_sample([], [])))
    assert found.labels.tolist() == [CLASSES] * 24 and (found.instances == -1).all()


def test_no_proposals(roi_heads, truths, make_sample):
    found = roi_heads.select(torch.zeros(0, 4), truths[0])
    assert found.labels[:3].tolist() == truths[0].labels.tolist() and (found.labels[3:] == IGNORED).all()
    found = roi_heads.select(torch.zeros(0, 4), truth_of(make_sample([], [])))
    assert (found.labels == IGNORED).all()


def test_random_choice_keeps_the_order_within_positives_and_negatives(make_model, truths, proposals):
    found = make_model().roi_heads.select(proposals[0], truths[0])
    positive = found.instances >= 0
    assert positive[: int(positive.sum())].all() and int(positive.sum()) == 6
