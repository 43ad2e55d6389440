"""A real device against the CPU: the same steps and detections up to the rounding of other kernels.

Tolerances, fp32 without TF32: losses and scores 1e-3 relative, boxes a twentieth of a pixel. Random numbers are drawn
on the host for both, since the generators of the two devices differ. On the CPU both sides must be equal.
"""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loce.heads import HEADS
from loce.models.boxes import generator_for
from tests.device.steps import CPU, LOCE, build, detections, train

RTOL, PIXELS = 1e-3, 0.05


@pytest.fixture(autouse=True)
def _the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Random numbers of the host on every device; no TF32."""
    plain, keyed = torch.rand, generator_for

    def rand(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return plain(*size, **options).to(device or CPU)

    monkeypatch.setattr(torch, "rand", rand)
    modules = [module for name, module in sys.modules.items() if name.startswith("loce.models.")]
    for module in (module for module in modules if hasattr(module, "generator_for")):
        monkeypatch.setattr(module, "generator_for", lambda seed, purpose, _: keyed(seed, purpose, CPU))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield


def close(found: Any, expected: Any, device: torch.device) -> None:
    """Fail where numbers differ by more than the tolerance; on the CPU, at all."""
    tolerance = {"rtol": 0.0, "atol": 0.0} if device.type == "cpu" else {"rtol": RTOL, "atol": 1e-5}
    torch.testing.assert_close(found, expected, check_device=False, **tolerance)


@pytest.mark.parametrize("head", [name for name in HEADS if HEADS[name].depth == 2])
def test_losses_of_a_step(device: torch.device, head: str):
    """LOCE's second stage with each head that reads vectors."""
    options: dict[str, Any] = {"head": head, "memory": LOCE, "freeze": "trunk"}
    found, expected = (train(build(d, **options), 1, fill=True)["losses"] for d in (device, CPU))
    close(found, expected, device)


def test_losses_of_stage1(device: torch.device):
    found, expected = (train(build(d), 2, ahead=True)["losses"] for d in (device, CPU))
    close(found, expected, device)


def test_detections(device: torch.device):
    """The best ones; of those near the threshold rounding decides."""
    found, expected = (detections(build(d, "equilibrium")) for d in (device, CPU))
    for one, other in zip(found[:-1], expected[:-1], strict=True):
        assert abs(len(one["scores"]) - len(other["scores"])) <= 1
        close(one["scores"][:5], other["scores"][:5], device)
        torch.testing.assert_close(one["boxes"][:3], other["boxes"][:3], rtol=0, atol=PIXELS)
