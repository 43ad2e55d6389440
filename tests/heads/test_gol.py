"""GOL and DropLoss against plain loops written from their equations."""

import math

import pytest
import torch

from loce.config import GOLOptions, HeadConfig
from loce.heads import HEADS
from loce.heads.gol import LEAST, MOST, gumbel_cross_entropy
from loce.utils.classes import IGNORED
from tests.heads.cases import random_case, rois_of

ACTIVATIONS = ("gumbel", "sigmoid")


def make(make_stats, classes, activation="gumbel", threshold=0.1):
    return HEADS["gol"](8, make_stats(classes), HeadConfig(gol=GOLOptions(activation=activation, threshold=threshold)))


def loss_slow(logits, labels, uniform, tail, activation):
    """Every entry by itself: which weight it has, and its loss."""
    classes = len(tail)
    foreground = [y for y in labels if 0 <= y < classes]
    tail_share = sum(tail[y] for y in foreground) / len(foreground) if foreground else math.nan
    total, rows = 0.0, 0
    for z_row, y, u_row in zip(logits, labels, uniform, strict=True):
        if y == IGNORED:
            continue
        rows += 1
        for c in range(classes):
            target = 1 if y == c else 0
            m = 1 if y < classes else (1 if u_row[c] > tail_share else 0)
            weight = 1 - tail[c] * m * (1 - target)
            if activation == "gumbel":
                z = min(max(z_row[c], LEAST), MOST)
                log_eta = -math.exp(-z)
                entry = -log_eta if target else -math.log(-math.expm1(log_eta))
            else:
                p = 1 / (1 + math.exp(-z_row[c]))
                entry = -math.log(p if target else 1 - p)
            total += weight * entry
    return total / rows


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["mixed", "background", "no tail"])
def test_loss_equals_the_equation(make_stats, device, activation, kind):
    head = make(make_stats, 6, activation).to(device)
    tail = head.tail_C.tolist()
    assert 0 < sum(tail) < 6
    logits, labels = random_case(40, 6, 6, seed=1)
    if kind == "background":
        labels = torch.where(labels == IGNORED, IGNORED, 6)
    elif kind == "no tail":
        labels = torch.where((labels >= 0) & (labels < 6), 0, labels)
    generator = torch.Generator(device).manual_seed(3)
    rois = rois_of(labels.to(device), generator=generator)
    loss = head.losses(logits.float().to(device), rois)["loss_cls"]
    uniform = torch.rand((40, 6), generator=torch.Generator(device).manual_seed(3), device=device)
    want = loss_slow(logits.tolist(), labels.tolist(), uniform.tolist(), tail, activation)
    assert loss.item() == pytest.approx(want, rel=1e-5)


def test_background_pushes_the_tail_down_as_often_as_the_batch_has_tail_objects(make_stats):
    head = make(make_stats, 6)
    tail, labels = head.tail_C, torch.full((4000,), 6)
    labels[0], labels[1] = int(tail.nonzero()[0]), 0  # half of the foreground is of the tail
    weight = head.weights(labels, torch.rand(4000, 6, generator=torch.Generator().manual_seed(0)))
    assert weight[2:, ~tail].all()
    assert weight[2:, tail].double().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("target", [True, False])
def test_gumbel_loss_is_exact_to_the_ends_of_its_range(target):
    """In fp32 against float64 and its true derivative, -e^-z for a target and eta e^-z / (1 - eta) for none."""
    for value in (-3.99, -3.9, -3.0, 0.0, 6.0, 9.0, 9.9):
        z = torch.tensor(value, requires_grad=True)
        loss = gumbel_cross_entropy(z, torch.tensor(target))
        loss.backward()
        eta = math.exp(-math.exp(-value))
        slope = -math.exp(-value) if target else eta * math.exp(-value) / -math.expm1(-math.exp(-value))
        want = math.exp(-value) if target else -math.log(-math.expm1(-math.exp(-value)))
        assert loss.item() == pytest.approx(want, rel=1e-5, abs=1e-7)
        assert z.grad is not None and z.grad.item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_gradient():
    z = torch.linspace(-3.5, 8, 12, dtype=torch.float64, requires_grad=True)
    target = torch.arange(12) % 2 == 0
    assert torch.autograd.gradcheck(lambda x: gumbel_cross_entropy(x, target), z)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scores_are_the_activation(make_stats, activation):
    z = torch.tensor([[-9.0, -4.0, 0.0, 2.0, 12.0, 30.0]])
    exact = {
        "gumbel": [math.exp(-math.exp(-v)) for v in z[0].tolist()],
        "sigmoid": [1 / (1 + math.exp(-v)) for v in z[0].tolist()],
    }
    assert make(make_stats, 6, activation).scores(z)[0].tolist() == pytest.approx(exact[activation], rel=1e-5)


def test_initial_values(make_stats):
    gumbel, sigmoid = (make(make_stats, 6, name).fc_cls for name in ACTIVATIONS)
    assert (gumbel.weight == 0.001).all() and (gumbel.bias == -2).all()
    assert sigmoid.bias.tolist() == pytest.approx([-math.log(999)] * 6) and 0.005 < sigmoid.weight.std() < 0.015
