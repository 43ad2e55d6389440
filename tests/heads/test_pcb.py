"""The pairwise class balance head against plain loops written from its equations, over several steps."""

import math

import pytest
import torch

from loce.config import HeadConfig, PCBOptions
from loce.heads import HEADS
from loce.utils.classes import IGNORED
from tests.heads.cases import random_case, rois_of

ALPHA, MOMENTUM = 0.4, 0.99


def softmax(values):
    top = max(values)
    parts = [math.exp(value - top) for value in values]
    return [part / sum(parts) for part in parts]


class Slow:
    """The state and the loss, one row and one class at a time."""

    def __init__(self, classes):
        self.m = [[0.0] * classes for _ in range(classes)]
        self.seen = [0] * classes

    def step(self, logits, labels, late):
        classes = len(self.m)
        for y in range(classes):
            rows = [softmax(z[:classes]) for z, label in zip(logits, labels, strict=True) if label == y]
            if rows:
                mean = [sum(row[j] for row in rows) / len(rows) for j in range(classes)]
                moved = [MOMENTUM * a + (1 - MOMENTUM) * b for a, b in zip(self.m[y], mean, strict=True)]
                self.m[y] = [value / sum(moved) for value in moved]
                self.seen[y] += len(rows)
        active = late and all(self.seen)
        losses = []
        for z, y in zip(logits, labels, strict=True):
            if y == IGNORED:
                continue
            p = softmax(z)
            loss = -math.log(p[y])
            if active and y < classes:
                column = [self.m[j][y] for j in range(classes)]
                tau = [value / sum(column) for value in column]
                divergence = sum(t * math.log(t / p[j]) for j, t in enumerate(tau) if t > 0)
                loss = (1 - ALPHA) * loss + ALPHA * divergence
            losses.append(loss)
        return sum(losses) / len(losses)


@pytest.mark.parametrize("classes", [2, 5, 12])
@pytest.mark.parametrize("late", [True, False])
def test_steps_equal_the_equations(make_stats, device, classes, late):
    head, slow = HEADS["pcb"](8, make_stats(classes)).to(device), Slow(classes)
    for step in range(4):
        logits, labels = random_case(60, classes, classes + 1, seed=step)
        if step == 0:
            labels[labels == 0] = classes  # not every class has been seen: plain cross-entropy
        loss = head.losses(logits.float().to(device), rois_of(labels.to(device), progress=0.9 if late else 0.5))
        want = slow.step(logits.tolist(), labels.tolist(), late)
        assert loss["loss_cls"].item() == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(head.confusion.cpu(), torch.tensor(slow.m), rtol=1e-5, atol=1e-6)
    assert head.seen.tolist() == slow.seen


def test_a_class_that_never_appears_holds_it_back_unless_told(make_stats):
    logits, labels = random_case(60, 4, 5, seed=0)
    labels[labels == 3] = 4
    found = []
    for wait in (True, False):
        head = HEADS["pcb"](8, make_stats(4), HeadConfig(pcb=PCBOptions(wait_for_all=wait)))
        found.append(head.losses(logits, rois_of(labels, progress=0.9))["loss_cls"].item())
    plain = HEADS["softmax"](8, make_stats(4)).losses(logits, rois_of(labels))["loss_cls"].item()
    assert found[0] == pytest.approx(plain) and found[1] != pytest.approx(plain)


def test_evaluation_changes_no_state(make_stats):
    head = HEADS["pcb"](8, make_stats(4)).eval()
    logits, labels = random_case(20, 4, 5, seed=0)
    head.losses(logits, rois_of(labels))
    assert not head.seen.any() and not head.confusion.any()


def test_gradient(make_stats):
    head = HEADS["pcb"](8, make_stats(4)).double()
    logits, labels = random_case(30, 4, 5, seed=0)
    head.losses(logits, rois_of(labels, progress=0.9))
    head.eval()
    assert torch.autograd.gradcheck(
        lambda z: head.losses(z, rois_of(labels, progress=0.9))["loss_cls"], logits.requires_grad_(True)
    )
