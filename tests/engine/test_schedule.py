"""Optimisers and schedules: Sec. 4.1's, AdamW, layer-wise rates and the cosine, each against plain Python."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from loce.config import ModelConfig, TrainConfig, from_dict
from loce.engine.loop import learning_rate
from loce.models.backbone import build_backbone
from loce.models.build import build_model, build_optimizer, lr_scales
from tests.conftest import stats_of

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
    found = [learning_rate(train, i, i // PER_EPOCH, epochs * PER_EPOCH) for i in range(epochs * PER_EPOCH)]
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


def test_cosine_equals_its_equation() -> None:
    """A line from a tenth to all of it in 50 iterations, then half a cosine; 0 is reached after the last one."""
    train = TrainConfig(schedule="cosine", epochs=2, lr=3e-4, batch_size=32, warmup_iterations=50, warmup_factor=0.1)
    expected = []
    for iteration in range(200):
        if iteration < 50:
            expected.append(6e-4 * (0.1 + 0.9 * iteration / 50))
        else:
            expected.append(6e-4 * 0.5 * (1 + math.cos(math.pi * (iteration - 50) / 150)))
    found = [learning_rate(train, i, i // PER_EPOCH, 200) for i in range(200)]
    assert found == pytest.approx(expected, rel=1e-12) and found[50] == 6e-4 and found[-1] < 1e-7
    short = dataclasses.replace(train, warmup_iterations=500)  # a training that ends within its warm-up
    assert learning_rate(short, 199, 1, 200) == pytest.approx(6e-4 * (0.1 + 0.9 * 199 / 500))


def test_adamw_step_equals_the_equation() -> None:
    """m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; w <- w - lr wd w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t))
    + 1e-8); the bias has no weight decay."""
    layer = nn.Linear(2, 1).double()
    train = TrainConfig(optimizer="adamw", lr=1e-3, weight_decay=0.05, decay_norms=False)
    optimizer = build_optimizer(layer, train)
    decays = [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in optimizer.param_groups]
    assert decays == [(0.05, [2]), (0.0, [1])]
    names = ("w0", "w1", "b")
    values = dict(zip(names, [*layer.weight[0].tolist(), layer.bias.item()], strict=True))
    first, second = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for t, rate in enumerate((1e-3, 2e-3, 5e-4), start=1):
        gradients = {"w0": 0.5 * t, "w1": -0.2, "b": 0.7 - t}
        layer.weight.grad = torch.tensor([[gradients["w0"], gradients["w1"]]], dtype=torch.float64)
        layer.bias.grad = torch.tensor([gradients["b"]], dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for name in names:
            values[name] -= rate * (0.05 if name != "b" else 0.0) * values[name]
            first[name] = 0.9 * first[name] + 0.1 * gradients[name]
            second[name] = 0.999 * second[name] + 0.001 * gradients[name] ** 2
            step = (first[name] / (1 - 0.9**t)) / (math.sqrt(second[name] / (1 - 0.999**t)) + 1e-8)
            values[name] -= rate * step
        assert [*layer.weight[0].tolist(), layer.bias.item()] == pytest.approx(list(values.values()), rel=1e-12)


def test_norms_and_biases_have_no_weight_decay_where_asked() -> None:
    config = from_dict({"model": {"backbone": "resnet18", "weights": "none", "norm": "batch", "frozen_stages": 0}})
    model = build_model(config, stats_of(3), pretrained=False)
    names = {p: name for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, TrainConfig(decay_norms=False))
    without = {names[p] for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    norms = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    expected = {f"{n}.{part}" for n, m in model.named_modules() if isinstance(m, norms) for part in ("weight", "bias")}
    assert without == expected | {name for name in names.values() if name.endswith("bias")} and len(without) > 40
    assert len(build_optimizer(model, TrainConfig()).param_groups) == 1


def test_layer_wise_rates_by_stage() -> None:
    """The stem trains with the fifth power, a stage with one power less than the one before, the pyramid with all."""
    model = nn.Module()
    model.backbone = build_backbone(ModelConfig(backbone="resnet18", weights="none", norm="batch", frozen_stages=0))
    model.classifier = nn.Linear(2, 2)
    scales = lr_scales(model, 0.7)
    places = {"conv1": 5, "bn1": 5, "layer1": 4, "layer2": 3, "layer3": 2, "layer4": 1}
    for name, p in model.named_parameters():
        expected = 0.7 ** places[name.split(".")[2]] if name.startswith("backbone.body.") else 1.0
        assert scales.get(p, 1.0) == pytest.approx(expected), name
    optimizer = build_optimizer(model, TrainConfig(layer_decay=0.7))
    assert sorted(group["lr_scale"] for group in optimizer.param_groups) == pytest.approx(
        [0.7**5, 0.7**4, 0.7**3, 0.7**2, 0.7, 1.0]
    )
