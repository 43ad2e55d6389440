"""The Gumbel head against plain loops written from its equation."""

import math

import pytest
import torch

from loce.heads import HEADS
from loce.utils.classes import IGNORED
from tests.heads.cases import random_case, rois_of


def loss_slow(logits, labels):
    """-t log eta - (1 - t) log(1 - eta), eta = exp(-exp(-z)), all outputs of the rows that take part."""
    total, rows = 0.0, 0
    for z_row, y in zip(logits, labels, strict=True):
        if y == IGNORED:
            continue
        rows += 1
        for j, value in enumerate(z_row):
            log_eta = -math.exp(-min(max(value, -4.0), 10.0))
            total += -log_eta if j == y else -math.log(-math.expm1(log_eta))
    return total / rows


@pytest.mark.parametrize("classes", [2, 5, 50])
def test_loss_equals_the_equation(make_stats, device, classes):
    logits, labels = random_case(30, classes, classes + 1, seed=classes)
    head = HEADS["gumbel"](8, make_stats(classes)).to(device)
    loss = head.losses(logits.float().to(device), rois_of(labels.to(device)))["loss_cls"]
    assert loss.item() == pytest.approx(loss_slow(logits.tolist(), labels.tolist()), rel=1e-5)


def test_a_large_loss_still_has_a_gradient(make_stats):
    """The released code cuts the loss at 20, where learning stops."""
    head = HEADS["gumbel"](8, make_stats(50))
    logits = torch.zeros(4, 51, requires_grad=True)
    loss = head.losses(logits, rois_of(torch.tensor([0, 1, 50, 50])))["loss_cls"]
    loss.backward()
    assert loss > 20 and logits.grad is not None and (logits.grad != 0).all()


def test_scores_and_initial_values(make_stats):
    head = HEADS["gumbel"](8, make_stats(3))
    scores = head.scores(torch.tensor([[-2.0, 0.0, 3.0, 9.0]]))
    assert scores[0].tolist() == pytest.approx([math.exp(-math.exp(-v)) for v in (-2.0, 0.0, 3.0)], rel=1e-5)
    assert (head.fc_cls.weight == 0.001).all() and (head.fc_cls.bias == -2).all()
