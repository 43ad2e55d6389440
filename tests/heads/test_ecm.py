"""The effective class-margin head against plain loops written from its equations."""

import math

import pytest
import torch

from loce.config import ECMOptions, HeadConfig
from loce.heads import HEADS
from loce.heads.base import NormalisedLinear
from loce.utils.classes import IGNORED
from tests.heads.cases import random_case, rois_of

RATIO = 6.3313


def loss_slow(logits, labels, counts):
    """p_c = e^{z + g+} / (e^{z + g+} + e^{-z + g-}), weighted binary cross-entropy, over the rows that take part."""
    n = [max(count, 1) for count in counts]
    n.append(RATIO * sum(n))
    total, rows = 0.0, 0
    for z_row, y in zip(logits, labels, strict=True):
        if y == IGNORED:
            continue
        rows += 1
        for c, z in enumerate(z_row):
            others = sum(n) - n[c]
            up = math.log(1 + (n[c] / others) ** 0.25)
            down = math.log(1 + (others / n[c]) ** 0.25)
            p = math.exp(z + up) / (math.exp(z + up) + math.exp(-z + down))
            weight = others / n[c] * math.log1p(n[c] / others)
            total -= weight * math.log(p if y == c else 1 - p)
    return total / rows


@pytest.mark.parametrize("classes", [2, 5, 50])
def test_loss_equals_the_equation(make_stats, device, classes):
    stats = make_stats(classes)
    stats.instance_counts[1] = 0  # never seen: counted as 1
    logits, labels = random_case(30, classes, classes + 1, seed=classes)
    head = HEADS["ecm"](8, stats).to(device)
    loss = head.losses(logits.float().to(device), rois_of(labels.to(device)))["loss_cls"]
    want = loss_slow(logits.tolist(), labels.tolist(), stats.instance_counts.tolist())
    assert loss.item() == pytest.approx(want, rel=1e-5)


def test_far_logits_stay_finite(make_stats):
    head = HEADS["ecm"](8, make_stats(5))
    logits = torch.tensor([[200.0, -200.0, 0.0, 90.0, -90.0, 500.0]], requires_grad=True)
    loss = head.losses(logits, rois_of(torch.tensor([1])))["loss_cls"]
    loss.backward()
    assert loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


def test_scores_are_without_margins(make_stats):
    z = torch.tensor([[0.5, -1.0, 2.0]])
    p = [1 / (1 + math.exp(-v)) for v in z[0].tolist()]
    found = HEADS["ecm"](8, make_stats(2)).scores(z)[0].tolist()
    assert found == pytest.approx([p[0] * (1 - p[2]), p[1] * (1 - p[2])])


def test_weights_are_near_one_but_for_the_background(make_stats):
    weight = HEADS["ecm"](8, make_stats(1203)).weight_L
    assert ((weight[:-1] > 0.98) & (weight[:-1] <= 1)).all() and weight[-1].item() == pytest.approx(0.3146, abs=1e-3)


def test_the_classifier_is_normalised_or_plain(make_stats):
    assert isinstance(HEADS["ecm"](8, make_stats(4)).fc_cls, NormalisedLinear)
    plain = HEADS["ecm"](8, make_stats(4), HeadConfig(ecm=ECMOptions(normalised=False)))
    assert isinstance(plain.fc_cls, torch.nn.Linear)


def test_gradient(make_stats):
    logits, labels = random_case(9, 4, 5, seed=0)
    head = HEADS["ecm"](8, make_stats(4)).double()
    assert torch.autograd.gradcheck(lambda z: head.losses(z, rois_of(labels))["loss_cls"], logits.requires_grad_(True))
