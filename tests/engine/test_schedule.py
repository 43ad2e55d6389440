"""Sec. 4.1's optimiser: the learning rate and a step of SGD against plain Python."""

import pytest
import torch
from torch import nn

from loce.config import TrainConfig
from loce.engine.loop import learning_rate
from loce.models.build import build_optimizer

PER_EPOCH = 100  # iterations


def slow_rate(epochs: int, drops: list[int], batch: int) -> list[float]:
    """Every iteration's rate: 0.02 at a batch of 16, a line from a thousandth of it, a tenth after each drop."""
    rates = []
    for iteration in range(epochs * PER_EPOCH):
        rate = 0.02 * batch / 16
        for drop in drops:
            if iteration >= drop * PER_EPOCH:
                rate = rate / 10
        if iteration < 500:
            rate = rate * (0.001 + 0.999 * iteration / 500)
        rates.append(rate)
    return rates


@pytest.mark.parametrize(("epochs", "drops", "batch"), [(24, [16, 22], 16), (6, [3, 5], 16), (6, [3, 5], 4)])
def test_learning_rate_equals_the_papers_schedule(epochs: int, drops: list[int], batch: int) -> None:
    train = TrainConfig(epochs=epochs, drops=tuple(drops), batch_size=batch)
    found = [learning_rate(train, i, i // PER_EPOCH) for i in range(epochs * PER_EPOCH)]
    assert found == pytest.approx(slow_rate(epochs, drops, batch), rel=1e-12)


def test_sgd_step_equals_the_equation() -> None:
    """v <- 0.9 v + g + 0.0001 w;  w <- w - lr v. Frozen weights stay."""
    layer = nn.Linear(1, 1).double()
    layer.bias.requires_grad_(False)
    weight, bias, velocity = layer.weight.item(), layer.bias.item(), 0.0
    optimizer = build_optimizer(layer, TrainConfig())
    for gradient in (0.5, -2.0, 1.0):
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        layer.weight.grad = torch.full((1, 1), gradient, dtype=torch.float64)
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 0.0001 * weight
        weight -= 0.02 * velocity
        assert layer.weight.item() == pytest.approx(weight, rel=1e-12)
    assert layer.bias.item() == bias
