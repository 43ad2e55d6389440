"""The next batch goes to the device while one is trained on: nothing waits, nothing is read too early, none is lost."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.pretend_device import CUDA, PretendDevice, reason
from loce.data import prefetch
from loce.data.prefetch import prefetched
from tests.device.steps import CPU, LOCE, build, same, samples, train
from tests.device.test_mistakes import Mistake

MISTAKES = (
    Mistake("a copy that is not waited for", prefetched, "training.wait_event(copied)", "pass"),
    Mistake("memory that may be used anew", prefetched, "sample[name].record_stream(training)", "pass"),
    Mistake("a copy that the host waits for", prefetch._moved, "non_blocking=True", "non_blocking=False"),
    Mistake("no labels on the host", prefetch._moved, ': sample["labels"]', ': there["labels"]'),
)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Steps of the host."""
    return train(build(CPU, "equilibrium", LOCE, "trunk"), 2, accumulate=2)


def look(expected: dict[str, Any]) -> None:
    """Fail where the pretended device shows a mistake."""
    with PretendDevice() as gpu:
        model = build(CUDA, "equilibrium", LOCE, "trunk")
        gpu.reset()
        same(train(model, 2, accumulate=2, ahead=True), expected)
        assert not gpu.pageable, gpu.pageable
        assert all(reason(place) for _, place in gpu.waits if not place.startswith("tests/")), gpu.waits


def test_steps_are_the_same(expected: dict[str, Any]) -> None:
    look(expected)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_caught(expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, mistake: Mistake) -> None:
    monkeypatch.setattr(inspect.unwrap(mistake.function), "__code__", mistake.code())
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        look(expected)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_every_batch_comes_once_and_one_is_copied_ahead(gpu: PretendDevice, device: torch.device) -> None:
    asked: list[int] = []

    def shown() -> Iterator[list[dict[str, Any]]]:
        for number in range(4):
            asked.append(number)
            yield samples(number)

    seeds = []
    for number, batch in enumerate(prefetched(shown(), device)):
        assert len(asked) == min(4, number + (1 if device == CPU else 2))
        assert {sample[name].device for sample in batch for name in ("image", "boxes", "labels", "ignored")} == {device}
        assert {x.device for sample in batch for x in sample["masks"]._tensors()} == {device}
        seeds.append([sample["seed"] for sample in batch])
    assert seeds == [[sample["seed"] for sample in samples(number)] for number in range(4)]


def test_no_batches(gpu: PretendDevice) -> None:
    assert list(prefetched(iter([]), CUDA)) == []
