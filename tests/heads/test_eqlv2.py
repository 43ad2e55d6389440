"""EQL v2 against plain loops written from its equations."""

import math

import numpy as np
import pytest
import torch

from loce.config import EQLv2Options, HeadConfig
from loce.heads.eqlv2 import EQLv2Head
from loce.utils.classes import IGNORED
from tests.heads.cases import random_case, rois_of


class Slow:
    """The method in Python floats: one step after the other."""

    def __init__(self, classes, gamma=12.0, mu=0.8, alpha=4.0):
        self.classes, self.gamma, self.mu, self.alpha = classes, gamma, mu, alpha
        self.positive, self.negative = [0.0] * classes, [0.0] * classes
        self.ratio = [100.0] * classes

    def weight(self, j, target):
        if j == self.classes:
            return 1.0
        f = 1 / (1 + math.exp(-self.gamma * (self.ratio[j] - self.mu)))
        return 1 + self.alpha * (1 - f) if target else f

    def step(self, logits, labels):
        total, rows = 0.0, 0
        positive, negative = [0.0] * self.classes, [0.0] * self.classes
        for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
            if y == IGNORED:
                continue
            rows += 1
            for j in range(self.classes + 1):
                target = 1 if j == y else 0
                weight, p = self.weight(j, target), 1 / (1 + math.exp(-z[j]))
                total -= weight * (math.log(p) if target else math.log(1 - p))
                if j < self.classes:
                    (positive if target else negative)[j] += weight * abs(p - target)
        for j in range(self.classes):
            self.positive[j] += positive[j]
            self.negative[j] += negative[j]
            self.ratio[j] = self.positive[j] / (self.negative[j] + 1e-10)
        return total / max(rows, 1)


@pytest.mark.parametrize("options", [{}, {"gamma": 3.0, "mu": 0.2, "alpha": 0.0}, {"alpha": 10.0}])
def test_losses_and_statistics_of_several_steps_equal_the_equations(make_stats, device, options):
    head = EQLv2Head(8, make_stats(4), HeadConfig(name="eqlv2", eqlv2=EQLv2Options(**options))).to(device)
    head.double()
    slow = Slow(4, **options)
    for step in range(6):
        logits, labels = random_case(40, 4, 5, step)
        labels[labels == 3] = 4  # class 3 is never seen
        found = head.losses(logits.to(device), rois_of(labels.to(device)))
        assert list(found) == ["loss_cls"]
        assert found["loss_cls"].item() == pytest.approx(slow.step(logits, labels), rel=1e-9)
        np.testing.assert_allclose(head.gradients.cpu(), [slow.positive, slow.negative], rtol=1e-9)
    assert head.gradients[0, 3] == 0 and (head.gradients > 0).sum() == 7
    assert head.gradients.dtype == torch.float64  # as the rest of this double head; fp32 otherwise, see the contract


def test_gradient_and_no_gradient_through_the_weights(make_stats):
    head = EQLv2Head(8, make_stats(3)).double()
    logits, labels = random_case(12, 3, 4, 0)
    head.losses(logits, rois_of(labels))
    head.eval()  # the same weights each time
    assert torch.autograd.gradcheck(lambda z: head.losses(z, rois_of(labels))["loss_cls"], logits.requires_grad_())


def test_statistics_move_in_training_only(make_stats):
    head = EQLv2Head(8, make_stats(3))
    logits, labels = random_case(12, 3, 4, 0)
    before = head.gradients
    head.eval().losses(logits, rois_of(labels))
    assert head.gradients is before
    head.train().losses(logits, rois_of(labels))
    assert not before.any() and head.gradients.any()


def test_a_class_without_objects_is_no_longer_pushed_down(make_stats):
    """After one step: w- = f(0) = 6.8e-5 and w+ = 5 for a class that has seen negatives only."""
    head = EQLv2Head(8, make_stats(2))
    assert torch.equal(head.weights(), torch.ones(2, 2))
    head.losses(torch.zeros(4, 3), rois_of(torch.tensor([0, 0, 2, IGNORED])))
    f = 1 / (1 + math.exp(12 * 0.8))
    np.testing.assert_allclose(head.weights()[:, 1], [1 + 4 * (1 - f), f], rtol=1e-4)
    np.testing.assert_allclose(head.gradients, [[1.0, 0.0], [0.5, 1.5]])
    assert f == pytest.approx(6.8e-5, rel=0.01)


def test_steps_without_rows_leave_the_start(make_stats):
    head = EQLv2Head(8, make_stats(2))
    head.losses(torch.zeros(0, 3), rois_of(torch.zeros(0, dtype=torch.long)))
    head.losses(torch.zeros(3, 3), rois_of(torch.full((3,), IGNORED)))
    assert torch.equal(head.weights(), torch.ones(2, 2))


def test_scores(make_stats):
    head = EQLv2Head(8, make_stats(3))
    z = [-2.0, 0.5, 3.0, -0.7]
    p = [1 / (1 + math.exp(-value)) for value in z]
    torch.testing.assert_close(head.scores(torch.tensor([z])), torch.tensor([[value * (1 - p[3]) for value in p[:3]]]))


def test_layer_and_initial_values(make_stats):
    torch.manual_seed(0)
    head = EQLv2Head(256, make_stats(40))
    assert {name: tuple(p.shape) for name, p in head.state_dict().items()} == {
        "fc_cls.weight": (41, 256),
        "fc_cls.bias": (41,),
        "gradients": (2, 40),
    }
    assert head.gradients.dtype == torch.float32
    assert abs(head.fc_cls.weight.std().item() - 0.01) < 3e-4  # 10,000 numbers: standard error 7e-5
    np.testing.assert_allclose(head.fc_cls.bias.detach().sigmoid(), 0.001, rtol=1e-5)
