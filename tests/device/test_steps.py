"""Training and evaluation on the pretended device: nothing is left behind on the host, every wait says why, and the
numbers are those of the CPU to the last bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.pretend_device import CUDA, PretendDevice, reason
from loce.config import MemoryConfig
from loce.heads import HEADS
from loce.models.boxes import generator_for
from tests.device.steps import CPU, LOCE, build, detections, same, samples, train
from tests.models.conftest import SMALL

ROI = MemoryConfig(enabled=True, capacity=30, level="roi")


def unexplained(gpu: PretendDevice) -> dict[Any, int]:
    """Waits whose line does not say why, in our code."""
    return {key: n for key, n in gpu.waits.items() if not reason(key[1])}


def on_both(options: dict[str, Any], **training: Any) -> PretendDevice:
    """Train on both devices and compare; the device, which counted."""
    expected = train(build(CPU, **options), **training)
    with PretendDevice() as gpu:
        model = build(CUDA, **options)
        gpu.reset()
        found = train(model, **training)
        assert not unexplained(gpu), gpu.waits
        assert not gpu.pageable, gpu.pageable
        same(found, expected)
    return gpu


def test_stage1():
    on_both({}, steps=2)


@pytest.mark.parametrize("head", HEADS)
def test_a_second_stage_with_each_head(head: str):
    """After the memory is filled, so that rows are drawn from it."""
    memory = LOCE if HEADS[head].depth == 2 else ROI
    on_both({"head": head, "memory": memory, "freeze": "trunk"}, steps=1, fill=True)


@pytest.mark.parametrize("freeze", ["none", "backbone", "detector"])
def test_what_is_frozen(freeze: str):
    on_both({"head": "equilibrium", "memory": LOCE, "freeze": freeze}, steps=1)


@pytest.mark.parametrize(
    "options",
    [
        {"memory": ROI},
        {"freeze": "none", "config": replace(SMALL, backbone="resnet18", norm="frozen", frozen_stages=2)},
        {"memory": MemoryConfig(enabled=True, capacity=30, shared=True)},
        {"memory": LOCE, "indicator": "prior"},
        {"memory": LOCE, "resampling": "discrete"},
        {"memory": LOCE, "resampling": "linear"},
    ],
    ids=lambda options: "-".join(map(str, options)) + str(options.get("resampling", "")),
)
def test_other_options(options: dict[str, Any]):
    on_both({"head": "equilibrium", "freeze": "trunk", **options}, steps=1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision(precision: str):
    """Autocast reaches the model, the losses are scaled where they must be, and the weights stay fp32."""
    expected = train(build(CPU, "equilibrium", LOCE), 1, precision=precision)
    full = train(build(CPU, "equilibrium", LOCE), 1)
    assert not torch.equal(expected["losses"][0]["loss_mask"], full["losses"][0]["loss_mask"])
    with PretendDevice() as gpu:
        model = build(CUDA, "equilibrium", LOCE)
        gpu.reset()
        found = train(model, 1, precision=precision)
        assert not unexplained(gpu), gpu.waits
        same(found, expected)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_accumulated_micro_batches():
    on_both({"head": "equilibrium", "memory": LOCE, "freeze": "trunk"}, steps=1, accumulate=2)


def test_evaluation():
    """Detections with masks and near misses, scores of ground truth, pictures' predictions."""
    expected = detections(build(CPU, "equilibrium"))
    image = samples(0)[0]["image"]
    pictures = build(CPU).eval()([image])
    with PretendDevice():
        same(detections(build(CUDA, "equilibrium")), expected)
        same(build(CUDA).only_predict()([image]), pictures)
    assert len(expected[0]["rles"]) and len(expected[0]["near_misses"])


def test_random_numbers_follow_an_image(gpu: PretendDevice):
    """The same batch gives the same step whatever was drawn before, and the numbers are of the device."""
    losses = []
    for drawn in (0, 5):
        model = build(CUDA, "simcal", ROI, "detector")
        torch.rand(drawn, device=CUDA)
        losses.append(model(samples(3)))
    same(losses[0], losses[1])
    assert generator_for(5, 0, CUDA).device == CUDA  # type: ignore[union-attr]
