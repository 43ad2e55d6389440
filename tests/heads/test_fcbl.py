"""The foreground classification balance loss against plain loops written from its equations, over several steps."""

import math

import pytest
import torch

from loce.config import FCBLOptions, HeadConfig
from loce.heads import HEADS
from loce.utils.classes import IGNORED
from tests.heads.cases import random_case, rois_of

ALPHA, STRONG = 0.85, 0.7


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


class Slow:
    """The state and the loss, one row and one class at a time."""

    def __init__(self, classes, reweight):
        self.a, self.g, self.reweight = [[0.0] * classes for _ in range(classes)], [0] * classes, reweight

    def k(self, y, j):
        return max(self.a[y][j] / max(self.g[y], 1), 1e-3)

    def step(self, logits, labels):
        classes = len(self.g)
        total, rows = 0.0, 0
        for z, y in zip(logits, labels, strict=True):
            if y == IGNORED:
                continue
            rows += 1
            score = [sigmoid(value) * (1 - sigmoid(z[classes])) for value in z[:classes]]
            for j in range(classes + 1):
                margin, weight = 0.0, 1.0
                if y < classes and j < classes:
                    margin = ALPHA * math.log(self.k(y, j) / self.k(j, y))
                    if self.reweight:
                        weight = float(score[j] >= score[y] or score[j] >= STRONG)
                p = sigmoid(z[j] + margin)
                total -= weight * math.log(p if j == y else 1 - p)
        for z, y in zip(logits, labels, strict=True):
            if 0 <= y < classes:
                parts = [math.exp(value) for value in z[:classes]]
                self.a[y] = [a + part / sum(parts) for a, part in zip(self.a[y], parts, strict=True)]
                self.g[y] += 1
        return total / rows


@pytest.mark.parametrize("classes", [2, 5, 12])
@pytest.mark.parametrize("reweight", [True, False])
def test_steps_equal_the_equations(make_stats, device, classes, reweight):
    options = HeadConfig(fcbl=FCBLOptions(reweight=reweight))
    head, slow = HEADS["fcbl"](8, make_stats(classes), options).to(device), Slow(classes, reweight)
    for step in range(4):
        logits, labels = random_case(60, classes, classes + 1, seed=step)
        labels[labels == 0] = classes if step < 2 else 0  # a class that is unseen at first
        loss = head.losses(logits.float().to(device), rois_of(labels.to(device)))["loss_cls"]
        assert loss.item() == pytest.approx(slow.step(logits.tolist(), labels.tolist()), rel=1e-5)
    torch.testing.assert_close(head.sums.cpu(), torch.tensor(slow.a), rtol=1e-5, atol=1e-5)
    assert head.rows.tolist() == slow.g


def test_margins_pull_apart_what_is_confused(make_stats):
    """Rows of class 0 that look like class 1, and not the other way round: class 0 must win by more."""
    head = HEADS["fcbl"](8, make_stats(3))
    logits = torch.tensor([[0.0, 3.0, 0.0, 0.0], [-3.0, 3.0, -3.0, 0.0]])
    head.losses(logits, rois_of(torch.tensor([0, 1])))
    margins = head.margins()
    assert margins[0, 1] > 0 > margins[1, 0]
    torch.testing.assert_close(margins, -margins.t())


def test_evaluation_changes_no_state(make_stats):
    head = HEADS["fcbl"](8, make_stats(4)).eval()
    logits, labels = random_case(20, 4, 5, seed=0)
    head.losses(logits, rois_of(labels))
    assert not head.rows.any() and not head.sums.any()


def test_gradient(make_stats):
    options = HeadConfig(fcbl=FCBLOptions(reweight=False))
    head = HEADS["fcbl"](8, make_stats(4), options).double()
    logits, labels = random_case(30, 4, 5, seed=0)
    head.losses(logits, rois_of(labels))
    head.eval()
    assert torch.autograd.gradcheck(lambda z: head.losses(z, rois_of(labels))["loss_cls"], logits.requires_grad_(True))
