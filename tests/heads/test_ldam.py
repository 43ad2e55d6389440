"""The LDAM head against plain loops written from its equations."""

import math

import pytest
import torch

from loce.config import HeadConfig, LDAMOptions
from loce.heads import HEADS
from loce.utils.classes import IGNORED
from tests.heads.cases import random_case, rois_of

FEATURES = 8


def head_of(stats, **options):
    return HEADS["ldam"](FEATURES, stats, HeadConfig(name="ldam", ldam=LDAMOptions(**options)))


def loss_slow(logits, labels, counts, max_margin, scale, beta):
    """CE(s (cos - D_y)) with D_c = A / n_c^(1/4), each row times its class's weight; beta None: no weights."""
    n = [max(count, 1) for count in counts]
    a = max_margin / max(count**-0.25 for count in n)
    margins = [a / count**0.25 for count in n] + [0.0]
    weights = [1.0] * len(margins)
    if beta is not None:
        raw = [(1 - beta) / (1 - beta**count) for count in n]
        mean = sum(count * value for count, value in zip(n, raw, strict=True)) / sum(n)
        weights = [value / mean for value in raw] + [1.0]
    total = rows = 0
    for z, y in zip(logits, labels, strict=True):
        if y != IGNORED:
            moved = [value - scale * margins[y] * (c == y) for c, value in enumerate(z)]
            total += weights[y] * (math.log(sum(map(math.exp, moved))) - moved[y])
            rows += 1
    return total / rows


@pytest.mark.parametrize("progress", [0.0, 0.79, 0.8, 1.0])
@pytest.mark.parametrize(
    ("classes", "options"),
    [
        (2, {"max_margin": 0.5, "scale": 30.0, "beta": 0.9999}),
        (6, {"max_margin": 0.2, "scale": 10.0, "beta": 0.99}),
        (50, {"max_margin": 0.5, "scale": 30.0, "beta": 0.9999}),
        (6, {"max_margin": 0.5, "scale": 30.0, "beta": 0.0}),
    ],
)
def test_loss_equals_the_equations(make_stats, classes, options, progress):
    stats = make_stats(classes)
    stats.instance_counts[1] = 0  # never seen: counted as 1
    head = head_of(stats, **options)
    logits, labels = random_case(40, classes, classes + 1, seed=classes)
    losses = head.losses(logits, rois_of(labels, progress=progress))
    assert list(losses) == ["loss_cls"]
    options = {**options, "beta": options["beta"] if progress >= 0.8 else None}
    want = loss_slow(logits.tolist(), labels.tolist(), stats.instance_counts.tolist(), **options)
    assert losses["loss_cls"].item() == pytest.approx(want, rel=1e-6)


def test_weights_can_be_left_out(make_stats):
    logits, labels = random_case(40, 6, 7, seed=0)
    never, early = head_of(make_stats(6), reweight_from=1.0), head_of(make_stats(6))
    last, start = rois_of(labels, progress=0.999), rois_of(labels)
    assert never.losses(logits, last)["loss_cls"] == early.losses(logits, start)["loss_cls"]
    assert never.losses(logits, last)["loss_cls"] != early.losses(logits, last)["loss_cls"]


def test_logits_are_scaled_cosines(make_stats):
    torch.manual_seed(0)
    head = head_of(make_stats(3))
    x = torch.rand(4, FEATURES) * 5
    for row, z in zip(x.tolist(), head(x).tolist(), strict=True):
        for w, value in zip(head.fc_cls.weight.tolist(), z, strict=True):
            dot = sum(a * b for a, b in zip(row, w, strict=True))
            assert value == pytest.approx(30 * dot / math.hypot(*row) / math.hypot(*w), rel=1e-4, abs=1e-4)
    scores = head.scores(head(x))
    torch.testing.assert_close(scores, head(x).softmax(1)[:, :3])


def test_a_zero_feature_is_finite(make_stats):
    """After a ReLU all features of a row can be 0."""
    head = head_of(make_stats(3))
    x = torch.zeros(2, FEATURES, requires_grad=True)
    head.losses(head(x), rois_of(torch.tensor([0, 3])))["loss_cls"].backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(head.fc_cls.weight.grad).all()


def test_gradient(make_stats):
    head = head_of(make_stats(4)).double()
    rois = rois_of(torch.tensor([0, 1, 2, 3, 4, IGNORED]), progress=0.9)
    x = torch.randn(6, FEATURES, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: head.losses(head(x), rois)["loss_cls"], x)


@pytest.mark.parametrize("classes", [2, 1203])
def test_layer_and_initial_values(make_stats, classes):
    torch.manual_seed(0)
    head = HEADS["ldam"](256, make_stats(classes))
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == {
        "fc_cls.weight": (classes + 1, 256)
    }
    weight = head.fc_cls.weight.detach()
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(classes + 1))
    assert abs(weight.mean().item()) < 4 / (16 * math.sqrt(weight.numel()))  # standard deviation 1/16
    assert head.margin_L[-2] == 0.5 and head.margin_L[-1] == 0
    assert head.weight_L[-2] == head.weight_L.max() and head.weight_L[-1] == 1


def test_margins_and_weights_of_lvis(make_stats):
    """With the counts of LVIS v1's extremes, 1 and 50552, D and v are the numbers of its facts."""
    stats = make_stats(2)
    stats.instance_counts[:] = [50552, 1]
    head = head_of(stats)
    assert head.margin_L.tolist() == pytest.approx([0.5 / 50552**0.25, 0.5, 0], rel=1e-5)
    assert (head.weight_L[1] / head.weight_L[0]).item() == pytest.approx((1 - 0.9999**50552) / 1e-4, rel=1e-4)
