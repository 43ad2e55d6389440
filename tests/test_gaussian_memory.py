"""The Gaussian memory against loops in float64 written from its equations; what is drawn from it."""

import math

import pytest
import torch

from loce.gaussian_memory import GaussianMemory, confusion_probability
from loce.utils.classes import IGNORED
from tests.test_memory_bank import random_rows


class Slow:
    """A mean and a variance of each class, one coordinate at a time."""

    def __init__(self, classes, size, momentum):
        self.momentum = momentum
        self.mean = [[0.0] * size for _ in range(classes)]
        self.variance = [[0.0] * size for _ in range(classes)]
        self.used = [False] * classes

    def enqueue(self, features, labels):
        for c in range(len(self.used)):
            own = [row for row, label in zip(features, labels, strict=True) if label == c]
            for i in range(len(self.mean[c]) if own else 0):
                values = [row[i] for row in own]
                mean = sum(values) / len(values)
                variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1) if len(values) > 1 else 0.0
                a = self.momentum if self.used[c] else 0.0
                self.mean[c][i] = a * self.mean[c][i] + (1 - a) * mean
                self.variance[c][i] = a * self.variance[c][i] + (1 - a) * variance
            self.used[c] |= bool(own)


@pytest.mark.parametrize(("classes", "shape"), [(1, (3,)), (2, (2, 2, 2)), (7, (4,)), (50, (2,))])
def test_equals_the_equations(device, classes, shape):
    """Batches without rows, of background alone and with classes seen for the first time are among them."""
    generator = torch.Generator().manual_seed(0)
    memory, slow = GaussianMemory(classes, shape, 0.9).to(device), Slow(classes, math.prod(shape), 0.9)
    for step in range(8):
        features, labels, _ = random_rows((step * 7) % 40, classes, shape, generator)
        if step == 4:
            labels = torch.full_like(labels, classes)
        memory.enqueue(features.to(device), labels.to(device))
        slow.enqueue(features.flatten(1).double().tolist(), labels.tolist())
        for found, wanted in ((memory.mean, slow.mean), (memory.variance, slow.variance)):
            torch.testing.assert_close(
                found.flatten(1).cpu().double(), torch.tensor(wanted).double(), rtol=1e-5, atol=1e-6
            )
        assert memory.used.tolist() == slow.used and memory.counts.tolist() == [int(used) for used in slow.used]


def test_a_batch_of_others_changes_no_bit():
    memory = GaussianMemory(3, (4,))
    memory.enqueue(torch.randn(5, 4), torch.tensor([0, 0, 1, 1, 1]))
    before = {name: value.clone() for name, value in memory.state_dict().items()}
    for labels in (torch.tensor([3, 3, IGNORED]), torch.zeros(0, dtype=torch.long)):
        memory.enqueue(torch.full((len(labels), 4), math.nan), labels)
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_stored_in_fp32(device, dtype):
    """Also under autocast: a variance of values that differ in the last digits of bf16 alone."""
    features = (100 + torch.randn(40, 3)).to(device, dtype)
    labels = torch.zeros(40, dtype=torch.long, device=device)
    memory = GaussianMemory(2, (3,)).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        memory.enqueue(features, labels)
        vectors, _, _ = memory.rows_of(labels[:2], torch.ones(2, 3, 3, device=device))
    assert memory.mean.dtype == memory.variance.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(memory.variance[0], features.float().var(dim=0), rtol=1e-5, atol=1e-6)


def test_rows_are_mean_plus_deviation_times_noise(device):
    memory = GaussianMemory(4, (2,)).to(device)
    memory.enqueue(torch.tensor([[1.0, 5], [3, 5], [7, 9]], device=device), torch.tensor([2, 2, 0], device=device))
    noise = torch.tensor([[[1.0, 1], [-2, 3]]], device=device).expand(3, 2, 2)
    vectors, labels, targets = memory.rows_of(torch.tensor([2, 1, 0], device=device), noise)
    deviation = math.sqrt(2)
    wanted = [[2 + deviation, 5], [2 - 2 * deviation, 5], [0, 0], [0, 0], [7, 9], [7, 9]]
    torch.testing.assert_close(vectors.cpu(), torch.tensor(wanted))
    assert labels.tolist() == [2, 2, IGNORED, IGNORED, 0, 0] and not targets.any() and targets.shape == (6, 4)


def test_draws_by_the_mean_score_take_stored_classes_only(device):
    memory = GaussianMemory(3, (1,)).to(device)
    u, noise = torch.linspace(0.01, 1, 100, dtype=torch.float64, device=device), torch.zeros(100, 1, 1, device=device)
    assert memory.draw(torch.full((4,), 0.1, device=device), u, noise)[1].tolist() == [IGNORED] * 100
    memory.enqueue(torch.ones(2, 1, device=device), torch.tensor([0, 2], device=device))
    labels = memory.draw(torch.tensor([0.4, 0.01, 0.1, 0.01], device=device), u, noise)[1]
    assert torch.bincount(labels, minlength=3).tolist() == [20, 0, 80]  # 1 / 0.4 to 1 / 0.1


def test_probability_by_confusion():
    share, stored = torch.tensor([0.9, 0.0, 0.6, 0.2], dtype=torch.float64), torch.tensor([1, 1, 0, 1])
    wanted = [0.1 / 1.9, 1 / 1.9, 0, 0.8 / 1.9]
    assert confusion_probability(share, stored).tolist() == pytest.approx(wanted)
    assert confusion_probability(torch.ones(4), stored).tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert confusion_probability(share, stored * 0).tolist() == [0, 0, 0, 0]


def test_no_gradient_enters_and_what_was_drawn_stays():
    memory = GaussianMemory(1, (3,))
    memory.enqueue(torch.ones(2, 3, requires_grad=True), torch.zeros(2, dtype=torch.long))
    weight = torch.ones(3, requires_grad=True)
    vectors, _, _ = memory.rows_of(torch.tensor([0]), torch.zeros(1, 2, 3))
    assert not vectors.requires_grad and not memory.mean.requires_grad
    loss = (vectors * weight).sum()
    memory.enqueue(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    loss.backward()
    assert weight.grad.tolist() == [2, 2, 2]


def test_size_at_lvis_v1():
    with torch.device("meta"):
        memory = GaussianMemory(1203, (1024,))
    assert sum(buffer.numel() * buffer.element_size() for buffer in memory.buffers()) <= 10 * 2**20
    assert set(memory.state_dict()) == dict(memory.named_buffers()).keys()
