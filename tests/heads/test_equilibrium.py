"""The equilibrium head: its loss from Eq. 3-4, everything else the softmax head's."""

import math

import pytest
import torch

from loce.heads import EquilibriumHead, RoIs, SoftmaxHead


def rois_of(labels, indicator):
    none = torch.full_like(labels, -1)
    return RoIs(labels, none, torch.zeros_like(labels, dtype=torch.bool), indicator)


def test_loss_equals_the_equation(make_stats, device):
    generator = torch.Generator().manual_seed(0)
    head = EquilibriumHead(8, make_stats(4)).to(device)
    logits = 3 * torch.randn(30, 5, generator=generator)
    labels = torch.randint(5, (30,), generator=generator)
    scores = torch.tensor([0.7, 0.2, 0.05, 0.003, 0.01])
    total = 0.0
    for z, y in zip(logits.double().tolist(), labels.tolist(), strict=True):
        terms = [math.exp(z[j] - z[y] + math.log(scores[j].item() / scores[y].item())) for j in range(5) if j != y]
        total += math.log(1 + sum(terms))
    losses = head.losses(logits.to(device), rois_of(labels.to(device), scores.to(device)))
    assert list(losses) == ["loss_cls"]
    torch.testing.assert_close(losses["loss_cls"].item(), total / 30, rtol=1e-5, atol=0)


def test_goes_on_from_a_softmax_head(make_stats):
    torch.manual_seed(0)
    before, after = SoftmaxHead(8, make_stats(4)), EquilibriumHead(8, make_stats(4))
    after.load_state_dict(before.state_dict(), strict=True)
    features = torch.randn(9, 8)
    assert torch.equal(before.scores(before(features)), after.scores(after(features)))
    labels = torch.randint(5, (9,))
    equal_scores = rois_of(labels, torch.full((5,), 0.3))
    torch.testing.assert_close(
        before.losses(before(features), equal_scores)["loss_cls"],
        after.losses(after(features), equal_scores)["loss_cls"],
    )


def test_weak_classes_are_pushed_up_harder(make_stats):
    """With equal logits the gradient on a weak class's own logit is the larger one: the purpose of Sec. 3.2."""
    head = EquilibriumHead(8, make_stats(2))
    logits = torch.zeros(2, 3, requires_grad=True)
    head.losses(logits, rois_of(torch.tensor([0, 1]), torch.tensor([0.9, 0.05, 0.01])))["loss_cls"].backward()
    strong, weak = -logits.grad[0, 0], -logits.grad[1, 1]
    assert weak > 5 * strong > 0


def test_without_an_indicator_it_says_so(make_stats):
    head = EquilibriumHead(8, make_stats(2))
    with pytest.raises(ValueError, match=r"rois\.indicator"):
        head.losses(torch.zeros(1, 3), rois_of(torch.tensor([0]), None))
