"""The federated loss head against plain loops written from its equation, and its draw against the law of the draw."""

import math
from itertools import permutations

import pytest
import torch

from loce.config import FedLossOptions, HeadConfig
from loce.heads import HEADS
from loce.heads.fedloss import FedLossHead, federated_loss
from loce.utils.classes import IGNORED
from tests.heads.cases import random_case, rois_of


def loss_slow(logits, labels, taking_part):
    """Sum of the sigmoid losses of the classes that take part, over the number of rows that do."""
    total, rows = 0.0, 0
    for z, y in zip(logits, labels, strict=True):
        if y == IGNORED:
            continue
        rows += 1
        for c in taking_part:
            p = 1 / (1 + math.exp(-z[c]))
            total -= math.log(p if y == c else 1 - p)
    return total / rows


@pytest.mark.parametrize("classes", [2, 5, 50])
def test_loss_equals_the_equation(classes, device):
    logits, labels = random_case(40, classes, classes, seed=classes)
    chosen = torch.arange(classes) % 2 == 0
    loss = federated_loss(logits.float().to(device), rois_of(labels.to(device)), chosen.to(device))
    want = loss_slow(logits.tolist(), labels.tolist(), range(0, classes, 2))
    assert loss.item() == pytest.approx(want, rel=1e-5)


def make(make_stats, classes, keep) -> FedLossHead:
    return HEADS["fedloss"](8, make_stats(classes), HeadConfig(fedloss=FedLossOptions(classes=keep)))


def test_classes_of_the_batch_take_part_and_fill_up_to_the_wanted_number(make_stats):
    head = make(make_stats, 30, keep=10)
    labels = torch.tensor([3, 3, 7, 30, IGNORED, 30])  # with the background three, so seven more are drawn
    for seed in range(20):
        chosen = head.draw(labels, torch.Generator().manual_seed(seed))
        assert chosen[3] and chosen[7] and chosen.sum() == 9
    assert head.draw(torch.arange(30)).sum() == 30  # more than wanted: all are kept
    assert head.draw(torch.tensor([IGNORED])).sum() == 10


def test_classes_without_images_are_never_drawn(make_stats):
    stats = make_stats(12)
    stats.image_counts[6:] = 0
    head = HEADS["fedloss"](8, stats, HeadConfig(fedloss=FedLossOptions(classes=50)))
    assert head.draw(torch.tensor([12])).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert head.draw(torch.tensor([9])).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 9]


def test_the_draw_has_the_law_of_drawing_one_after_the_other(make_stats):
    """Share of 20,000 draws that hold each class, against the sum over all orders of three draws."""
    head = make(make_stats, 5, keep=4)  # background is in the batch: three are drawn
    weight = [math.sqrt(count) for count in make_stats(5).image_counts]
    want = [0.0] * 5
    for order in permutations(range(5), 3):
        chance, left = 1.0, sum(weight)
        for c in order:
            chance, left = chance * weight[c] / left, left - weight[c]
        for c in order:
            want[c] += chance
    generator = torch.Generator().manual_seed(0)
    share = sum(head.draw(torch.tensor([5]), generator).double() for _ in range(20_000)) / 20_000
    assert share.tolist() == pytest.approx(want, abs=0.02)


def test_the_same_generator_draws_the_same_classes(make_stats):
    head, labels = make(make_stats, 50, keep=10), torch.tensor([50])
    first, again, other = (head.draw(labels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_gradient(make_stats):
    logits, labels = random_case(9, 4, 4, seed=0)
    chosen = torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(lambda z: federated_loss(z, rois_of(labels), chosen), logits.requires_grad_(True))
