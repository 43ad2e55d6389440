"""Seesaw Loss against plain loops written from its equations."""

import math

import pytest
import torch

from loce.config import HeadConfig, SeesawOptions
from loce.heads.seesaw import SeesawHead
from loce.utils.classes import IGNORED
from tests.heads.cases import random_case, rois_of


class Slow:
    """The method in Python floats: one step after the other."""

    def __init__(self, classes, p=0.8, q=2.0):
        self.classes, self.p, self.q = classes, p, q
        self.counts = [0] * classes

    def factor(self, i, j, sigma):
        n_i, n_j = max(self.counts[i], 1), max(self.counts[j], 1)
        mitigation = (n_j / n_i) ** self.p if n_i > n_j else 1.0
        compensation = max(1.0, sigma[j] / max(sigma[i], 0.01)) ** self.q
        return mitigation * compensation

    def step(self, logits, labels):
        classes = self.classes
        rows = [(z, y) for z, y in zip(logits.tolist(), labels.tolist(), strict=True) if y != IGNORED]
        for _, y in rows:
            if y < classes:
                self.counts[y] += 1
        loss_cls = loss_objectness = 0.0
        for z, y in rows:
            two = [math.exp(z[classes]), math.exp(z[classes + 1])]
            loss_objectness -= math.log(two[0 if y < classes else 1] / sum(two))
            if y < classes:
                e = [math.exp(value) for value in z[:classes]]
                sigma = [value / sum(e) for value in e]
                others = sum(self.factor(y, j, sigma) * e[j] for j in range(classes) if j != y)
                loss_cls -= math.log(e[y] / (e[y] + others))
        return loss_cls / max(len(rows), 1), loss_objectness / max(len(rows), 1)


def make(stats, features=8, **options):
    return SeesawHead(features, stats, HeadConfig(name="seesaw", seesaw=SeesawOptions(**options)))


@pytest.mark.parametrize("options", [{}, {"p": 0.0, "q": 0.0}, {"p": 2.0, "q": 0.5}])
def test_losses_and_counts_of_several_steps_equal_the_equations(make_stats, device, options):
    head, slow = make(make_stats(5), **options).to(device), Slow(5, **options)
    for step in range(6):
        logits, labels = random_case(40, 5, 7, step, scale=3.0)  # many own scores below 0.01
        labels[(labels == 4) | (labels == 3) & (labels.roll(1) < 4)] = 5  # class 4 is never seen, class 3 seldom
        found = head.losses(logits.to(device), rois_of(labels.to(device)))
        assert list(found) == ["loss_cls", "loss_objectness"]
        assert [value.item() for value in found.values()] == pytest.approx(slow.step(logits, labels), rel=1e-12)
        assert head.counts.tolist() == slow.counts
    assert slow.counts[4] == 0 and 0 < slow.counts[3] < slow.counts[0]


def test_without_factors_it_is_the_softmax(make_stats):
    head = make(make_stats(3), p=0.0, q=0.0)
    logits, labels = random_case(20, 3, 5, 0)
    foreground = (labels >= 0) & (labels < 3)
    want = torch.nn.functional.cross_entropy(logits[foreground, :3], labels[foreground], reduction="sum")
    torch.testing.assert_close(head.losses(logits, rois_of(labels))["loss_cls"], want / (labels != IGNORED).sum())


def test_gradient_of_the_equation_with_constant_factors(make_stats):
    """The gradient on z_j is S_yj e^{z_j} / (e^{z_y} + sum S e^{z}) and none goes through S."""
    head = make(make_stats(3))
    logits = torch.tensor([[0.3, -0.2, 1.1, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    head.counts = torch.tensor([50, 4, 9])
    head.eval().losses(logits, rois_of(torch.tensor([0])))["loss_cls"].backward()
    slow = Slow(3)
    slow.counts = [50, 4, 9]
    e = [math.exp(value) for value in logits[0, :3].tolist()]
    sigma = [value / sum(e) for value in e]
    weighted = [e[0], slow.factor(0, 1, sigma) * e[1], slow.factor(0, 2, sigma) * e[2]]
    want = [value / sum(weighted) - (j == 0) for j, value in enumerate(weighted)]
    torch.testing.assert_close(logits.grad[0], torch.tensor([*want, 0, 0], dtype=torch.float64))


def test_gradcheck_without_compensation(make_stats):
    head = make(make_stats(4), q=0.0).eval()
    head.counts = torch.tensor([50, 4, 9, 0])
    logits, labels = random_case(9, 4, 6, 0)

    def total(z):
        return sum(head.losses(z, rois_of(labels)).values())

    assert torch.autograd.gradcheck(total, logits.requires_grad_())


def test_counts_are_exact_and_move_in_training_only(make_stats):
    head = make(make_stats(3))
    head.counts = torch.tensor([2**24, 0, 2**40])
    logits = torch.zeros(4, 5)
    head.losses(logits, rois_of(torch.tensor([0, 2, 3, IGNORED])))
    head.eval().losses(logits, rois_of(torch.tensor([0, 2, 3, IGNORED])))
    assert head.counts.tolist() == [2**24 + 1, 0, 2**40 + 1]


def test_extreme_logits_and_counts_stay_finite(make_stats):
    head = make(make_stats(3))
    head.counts = torch.tensor([10**9, 0, 1])
    logits = torch.tensor(
        [[-300.0, 300.0, 0.0, 100.0, -100.0], [300.0, -300.0, 0.0, -100.0, 100.0]], requires_grad=True
    )
    losses = head.losses(logits, rois_of(torch.tensor([0, 1])))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values()) and torch.isfinite(logits.grad).all()


def test_scores(make_stats):
    head = make(make_stats(3))
    z = [-2.0, 0.5, 3.0, -0.7, 0.4]
    e = [math.exp(value) for value in z]
    want = torch.tensor([[value / sum(e[:3]) * e[3] / (e[3] + e[4]) for value in e[:3]]])
    torch.testing.assert_close(head.scores(torch.tensor([z])), want)


def test_layer_and_initial_values(make_stats):
    torch.manual_seed(0)
    head = make(make_stats(40), features=256)
    assert {name: tuple(p.shape) for name, p in head.state_dict().items()} == {
        "fc_cls.weight": (42, 256),
        "fc_cls.bias": (42,),
        "counts": (40,),
    }
    assert abs(head.fc_cls.weight.std().item() - 0.01) < 3e-4  # 10,000 numbers: standard error 7e-5
    assert not head.fc_cls.bias.any()


def test_logits_are_cosines(make_stats, device):
    torch.manual_seed(0)
    head = make(make_stats(3), features=4, temperature=7.0).to(device)
    torch.nn.init.normal_(head.fc_cls.bias)
    x = 100 * torch.randn(6, 4, device=device)
    found = head(x)
    for row, logits in zip(x.tolist(), found.tolist(), strict=True):
        for weight, bias, z in zip(head.fc_cls.weight.tolist(), head.fc_cls.bias.tolist(), logits, strict=True):
            product = sum(a * b for a, b in zip(row, weight, strict=True))
            lengths = (math.hypot(*row) + 1e-6) * (math.hypot(*weight) + 1e-6)
            assert z == pytest.approx(7 * product / lengths + bias, rel=1e-4, abs=1e-5)
    with torch.autocast(device.type, torch.bfloat16):
        near = head(x.bfloat16())
    torch.testing.assert_close(near.float(), found, rtol=0.05, atol=0.1)
    empty = head(torch.zeros(1, 4, device=device))
    torch.testing.assert_close(empty[0], head.fc_cls.bias)
