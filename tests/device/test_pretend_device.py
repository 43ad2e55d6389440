"""The pretended device refuses what a real one refuses, counts what a real one waits for, and computes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import nms, roi_align

from benchmarks.pretend_device import CUDA, PretendDevice, PretendTensor


def there(*values: float) -> Tensor:
    return torch.tensor(values).pin_memory().to(CUDA, non_blocking=True)


def test_it_says_where_it_is(gpu: PretendDevice):
    x = torch.rand(2, 3, device=CUDA)
    for made in (
        x,
        x[0],
        x.new_zeros(2),
        torch.zeros_like(x),
        x * 2,
        torch.where(x > 0, x, 0),
        torch.tensor(1, device=CUDA),
    ):
        assert isinstance(made, PretendTensor) and made.device == CUDA and made.is_cuda and not made.is_cpu
    for made in (x.cpu(), torch.rand(2), torch.zeros(2, device="cpu")):
        assert type(made) is Tensor and made.device.type == "cpu"
    assert torch.cuda.is_available() and torch.Generator(CUDA).device == CUDA


def test_nothing_of_it_is_left():
    if torch.cuda.is_available():
        pytest.skip("a device is there")
    generator, load = torch.Generator, torch.load
    with PretendDevice():
        x = torch.rand(2, device=CUDA)
    assert torch.Generator is generator and torch.load is load and not torch.cuda.is_available()
    assert isinstance(torch.rand(2) + torch.rand(2), Tensor)
    with pytest.raises(RuntimeError, match="outside of it"):
        x + 1


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x + torch.zeros(2),
        lambda x: torch.cat([x, torch.zeros(2)]),
        lambda x: torch.stack([x.sum(), torch.zeros(())]),
        lambda x: torch.arange(5)[x.long()],
        lambda x: x.masked_fill(torch.ones(2, dtype=torch.bool), 0),
        lambda x: torch.nn.functional.linear(x, torch.ones(3, 2)),
        lambda x: x.scatter_(0, torch.arange(2), 1.0),
        lambda x: torch.rand(2, generator=torch.Generator().manual_seed(1), device=CUDA),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: nms(torch.rand(2, 4), x, 0.5),
        lambda x: torch.bincount(torch.arange(2), weights=x),
        lambda x: torch.nn.functional.cross_entropy(x[None], torch.tensor([1])),
        lambda x: torch.load("nowhere.pt"),
    ],
)
def test_mistakes_are_refused(gpu: PretendDevice, mistake: Callable[[Tensor], object]):
    with pytest.raises((RuntimeError, TypeError)):
        mistake(there(1.0, 2.0))


@pytest.mark.parametrize(
    ("wait", "times"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: bool(x.sum() > 0), 1),
        (lambda x: [0, 1, 2, 3][x.long().sum()], 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: torch.where(x > 0), 1),
        (lambda x: x.masked_select(x > 0), 1),
        (lambda x: x.unique(), 1),
        (lambda x: x.repeat_interleave(x.long()), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x + torch.tensor([1.0, 2.0], device=CUDA), 1),
        (lambda x: x + x.new_tensor([1.0, 2.0]), 1),
        (lambda x: x[[0, 1]], 1),
        (lambda x: torch.ones(2).to(CUDA), 1),
        (lambda x: torch.ones(2).pin_memory().to(CUDA, non_blocking=True), 0),
        (lambda x: x.to("cpu", non_blocking=True), 0),
        (lambda x: x.topk(1).values + x.sort().values[:1] + x.cumsum(0)[:1] * 3, 0),
        (lambda x: torch.rand(2, generator=torch.Generator(CUDA).manual_seed(1), device=CUDA) + x, 0),
        (lambda x: x + torch.zeros(()), 0),
        (lambda x: nms(torch.stack([x, x, x + 1, x + 2], dim=1), x, 0.5), 1),
    ],
)
def test_waits_are_counted(gpu: PretendDevice, wait: Callable[[Tensor], object], times: int):
    x = there(1.0, 2.0)
    gpu.reset()
    wait(x)
    assert sum(gpu.waits.values()) == times
    assert all(place.startswith("tests/device/test_pretend_device.py:") for _, place in gpu.waits)


def test_copies_are_measured(gpu: PretendDevice):
    x = torch.ones(10).to(CUDA)
    torch.ones(5).pin_memory().to(CUDA, non_blocking=True)
    assert (gpu.bytes_to_device, sum(gpu.pageable.values())) == (60, 1)
    x[:3].cpu()
    assert gpu.bytes_to_host == 12


def test_launches_are_operations_that_are_no_views(gpu: PretendDevice):
    x = torch.ones(4, 4, device=CUDA)
    gpu.reset()
    x[1:].T.reshape(-1)[0].add_(x.view(-1)[2:][0]).detach()
    assert dict(gpu.launches) == {"aten.clone.default": 1, "aten.add_.Tensor": 1}


def test_gradients_and_random_numbers_are_those_of_the_host(gpu: PretendDevice):
    torch.manual_seed(3)
    host = torch.rand(3, 4)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3, 4, device=CUDA).cpu(), host)
    keyed = [torch.rand(5, generator=torch.Generator(d).manual_seed(7), device=d).cpu() for d in ("cpu", CUDA)]
    assert torch.equal(*keyed)

    def gradient(device: torch.device) -> Tensor:
        x = host[None, None].to(device).requires_grad_()
        pooled = roi_align(x, torch.tensor([[0.0, 0, 0, 3, 3]], device=device), 2, aligned=True)
        (pooled.flatten(1) @ torch.ones(4, 3, device=device)).log_softmax(1)[:, 0].sum().backward()
        assert x.grad is not None
        return x.grad.cpu()

    assert torch.equal(gradient(CUDA), gradient(torch.device("cpu")))


def test_autocast_is_that_of_the_device(gpu: PretendDevice):
    x, weight = torch.rand(2, 3, device=CUDA), torch.rand(4, 3, device=CUDA, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = torch.nn.functional.linear(x, weight)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad is not None and weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(x, weight).dtype == torch.float32
