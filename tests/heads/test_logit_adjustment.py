"""The logit adjustment head against plain loops written from its equation."""

import math

import pytest
import torch

from loce.config import HeadConfig, LogitAdjustmentOptions
from loce.heads import HEADS, RoIs, SoftmaxHead
from loce.utils.classes import IGNORED


def rois_of(labels):
    return RoIs(labels, torch.full_like(labels, -1), torch.zeros_like(labels, dtype=torch.bool))


def head_of(stats, tau=1.0):
    options = HeadConfig(name="logit_adjustment", logit_adjustment=LogitAdjustmentOptions(tau=tau))
    return HEADS["logit_adjustment"](8, stats, options)


def loss_slow(logits, labels, counts, tau):
    """CE(z + tau log pi), pi = n / (n_1 ... n_C)^(1/C), 1 for background, averaged over the rows that take part."""
    n = [max(count, 1) for count in counts]
    mean = math.exp(sum(math.log(count) for count in n) / len(n))
    pi = [count / mean for count in n] + [1.0]
    losses = []
    for z, y in zip(logits, labels, strict=True):
        if y != IGNORED:
            adjusted = [value + tau * math.log(share) for value, share in zip(z, pi, strict=True)]
            losses.append(-math.log(math.exp(adjusted[y]) / sum(map(math.exp, adjusted))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("classes", "tau"), [(2, 1.0), (5, 1.0), (5, 0.5), (50, 2.0)])
def test_loss_equals_the_equation(make_stats, device, classes, tau):
    generator = torch.Generator().manual_seed(0)
    stats = make_stats(classes)
    stats.instance_counts[1] = 0  # never seen: counted as 1
    head = head_of(stats, tau).to(device)
    logits = 4 * torch.randn(40, classes + 1, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes + 1, (40,), generator=generator)
    labels[1::4] = IGNORED
    losses = head.losses(logits.float().to(device), rois_of(labels.to(device)))
    assert list(losses) == ["loss_cls"]
    want = loss_slow(logits.tolist(), labels.tolist(), stats.instance_counts.tolist(), tau)
    assert losses["loss_cls"].item() == pytest.approx(want, rel=1e-5)


def test_gradient(make_stats):
    head = head_of(make_stats(4)).double()
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    rois = rois_of(torch.tensor([0, 1, 2, 3, 4, IGNORED]))
    assert torch.autograd.gradcheck(lambda z: head.losses(z, rois)["loss_cls"], logits)


@pytest.mark.parametrize("classes", [2, 50, 830, 1203, 1230])
def test_foreground_as_a_whole_is_not_shifted(make_stats, classes):
    shift = head_of(make_stats(classes), tau=0.7).shift_L
    assert shift[-1] == 0 and shift[0] > 0 > shift[-2]
    assert shift.sum().item() == pytest.approx(0, abs=1e-3)


def test_is_the_softmax_head_but_for_the_loss(make_stats):
    torch.manual_seed(0)
    plain, adjusted = SoftmaxHead(8, make_stats(4)), head_of(make_stats(4))
    adjusted.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(9, 8)
    assert torch.equal(plain.scores(plain(x)), adjusted.scores(adjusted(x)))


def test_with_tau_1_it_is_balanced_softmax_but_for_the_scale(make_stats):
    """The scale moves background alone: the losses agree once its logit is moved back."""
    stats = make_stats(6)
    adjusted, balanced = head_of(stats), HEADS["balanced_softmax"](8, stats)
    logits, labels = torch.randn(9, 7), torch.randint(7, (9,))
    moved = logits.clone()
    moved[:, -1] += (adjusted.shift_L - balanced.shift_L)[0]
    torch.testing.assert_close(
        adjusted.losses(moved, rois_of(labels))["loss_cls"], balanced.losses(logits, rois_of(labels))["loss_cls"]
    )
