"""Equalization Loss against plain loops written from Eq. 3-4."""

import math

import numpy as np
import pytest
import torch

from loce.config import EQLOptions, HeadConfig
from loce.heads.eql import EQLHead
from loce.utils.classes import IGNORED
from tests.heads.cases import random_case, rois_of


def make(stats, threshold, features=8):
    return EQLHead(features, stats, HeadConfig(name="eql", eql=EQLOptions(threshold=threshold)))


def loss_slow(logits, labels, image_counts, image_total, threshold):
    """Eq. 3-4 in Python floats."""
    classes, total, rows = len(image_counts), 0.0, 0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        if y == IGNORED:
            continue
        rows += 1
        for c in range(classes):
            target = 1 if c == y else 0
            foreground = 1 if y < classes else 0
            tail = 1 if image_counts[c] / image_total < threshold else 0
            weight = 1 - foreground * tail * (1 - target)
            p = 1 / (1 + math.exp(-z[c]))
            total -= weight * (target * math.log(p) + (1 - target) * math.log(1 - p))
    return total / max(rows, 1)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 1.0])
def test_loss_equals_the_equation(make_stats, device, threshold):
    stats = make_stats(6)  # in 200, 69, 24, 8, 3, 1 of 300 images
    head = make(stats, threshold).to(device)
    for seed in range(5):
        logits, labels = random_case(30, 6, 6, seed)
        found = head.losses(logits.to(device), rois_of(labels.to(device)))
        assert list(found) == ["loss_cls"]
        want = loss_slow(logits, labels, stats.image_counts.tolist(), stats.image_total, threshold)
        assert found["loss_cls"].item() == pytest.approx(want, rel=1e-12)


def test_gradient(make_stats):
    head = make(make_stats(4), 0.1)
    logits, labels = random_case(9, 4, 4, 0)
    assert torch.autograd.gradcheck(lambda z: head.losses(z, rois_of(labels))["loss_cls"], logits.requires_grad_())


def test_only_objects_of_other_classes_spare_a_tail_class(make_stats):
    """The gradient on a tail class's logit: none from another class's object, one from background and from its own."""
    head = make(make_stats(3), 0.02)  # in 200, 14, 1 of 300 images
    assert head.tail.tolist() == [False, False, True]
    logits = torch.zeros(3, 3, requires_grad=True)
    head.losses(logits, rois_of(torch.tensor([0, 3, 2])))["loss_cls"].backward()
    third = 0.5 / 3
    want = [[-third, third, 0], [third, third, third], [third, third, -third]]
    torch.testing.assert_close(logits.grad, torch.tensor(want))


def test_a_class_at_the_threshold_is_not_spared(make_stats):
    head = make(make_stats(6), 24 / 300)
    assert head.tail.tolist() == [False, False, False, True, True, True]


def test_scores_are_sigmoids(make_stats):
    head = make(make_stats(3), 0.1)
    z = [-6.9, 0.0, 3.0]
    want = torch.tensor([[1 / (1 + math.exp(-value)) for value in z]])
    torch.testing.assert_close(head.scores(torch.tensor([z])), want)


def test_layer_and_initial_values(make_stats):
    torch.manual_seed(0)
    head = make(make_stats(40), 0.1, features=256)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "fc_cls.weight": (40, 256),
        "fc_cls.bias": (40,),
    }
    assert abs(head.fc_cls.weight.std().item() - 0.01) < 3e-4  # 10,000 numbers: standard error 7e-5
    np.testing.assert_allclose(head.scores(head(torch.zeros(1, 256))).detach(), 0.001, rtol=1e-5)
