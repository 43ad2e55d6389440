"""The balanced softmax head against plain loops written from its equation."""

import math

import numpy as np
import pytest
import torch

from loce.heads import HEADS, RoIs, SoftmaxHead
from loce.utils.classes import IGNORED


def rois_of(labels):
    return RoIs(labels, torch.full_like(labels, -1), torch.zeros_like(labels, dtype=torch.bool))


def loss_slow(logits, labels, counts):
    """-log(n_y e^{z_y} / sum n_j e^{z_j}), n_bg the mean of the others, averaged over the rows that take part."""
    n = [max(count, 1) for count in counts]
    n.append(sum(n) / len(n))
    losses = [
        -math.log(n[y] * math.exp(z[y]) / sum(count * math.exp(value) for count, value in zip(n, z, strict=True)))
        for z, y in zip(logits, labels, strict=True)
        if y != IGNORED
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("classes", [2, 5, 50])
def test_loss_equals_the_equation(make_stats, device, classes):
    generator = torch.Generator().manual_seed(0)
    stats = make_stats(classes)
    stats.instance_counts[1] = 0  # never seen: counted as 1
    head = HEADS["balanced_softmax"](8, stats).to(device)
    logits = 4 * torch.randn(40, classes + 1, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes + 1, (40,), generator=generator)
    labels[1::4] = IGNORED
    losses = head.losses(logits.float().to(device), rois_of(labels.to(device)))
    assert list(losses) == ["loss_cls"]
    want = loss_slow(logits.tolist(), labels.tolist(), stats.instance_counts.tolist())
    assert losses["loss_cls"].item() == pytest.approx(want, rel=1e-5)


def test_gradient(make_stats):
    head = HEADS["balanced_softmax"](8, make_stats(4)).double()
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    rois = rois_of(torch.tensor([0, 1, 2, 3, 4, IGNORED]))
    assert torch.autograd.gradcheck(lambda z: head.losses(z, rois)["loss_cls"], logits)


def test_is_the_softmax_head_but_for_the_loss(make_stats):
    torch.manual_seed(0)
    plain, balanced = SoftmaxHead(8, make_stats(4)), HEADS["balanced_softmax"](8, make_stats(4))
    balanced.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(9, 8)
    assert torch.equal(plain.scores(plain(x)), balanced.scores(balanced(x)))


def test_with_equal_counts_it_is_the_plain_softmax_loss(make_stats):
    stats = make_stats(4)
    stats.instance_counts[:] = 7
    labels, logits = torch.randint(5, (9,)), torch.randn(9, 5)
    plain = SoftmaxHead(8, stats).losses(logits, rois_of(labels))["loss_cls"]
    torch.testing.assert_close(HEADS["balanced_softmax"](8, stats).losses(logits, rois_of(labels))["loss_cls"], plain)


@pytest.mark.parametrize("classes", [2, 50, 830, 1203, 1230])
def test_a_uniform_prior_is_recovered(make_stats, classes):
    """Logits that fit a share n_c of each class, background included, are the log of uniform shares plus the shift:
    the head's scores are then equal over classes, and background keeps its share."""
    stats = make_stats(classes)
    head = HEADS["balanced_softmax"](4, stats)
    foreground = stats.instance_counts / stats.instance_counts.sum() * 0.2
    logits = torch.tensor(np.log([*foreground, 0.8])) - head.shift_L  # the minimum of the loss on such rows
    scores = head.scores(logits[None])
    torch.testing.assert_close(scores, torch.full((1, classes), 0.2 / classes), rtol=1e-4, atol=0)
