"""The feature memory against a list of deques, the sampler against loops written from Eq. 7-8."""

import itertools
import math
from collections import deque

import pytest
import torch

from loce.memory_bank import FeatureMemoryBank, sampling_probability
from loce.utils.classes import IGNORED


class BankSlow:
    """Eq. 6 as it is written: one queue of length M for each class."""

    def __init__(self, classes, capacity):
        self.queues = [deque(maxlen=capacity) for _ in range(classes)]

    def enqueue(self, features, labels, box_targets):
        for feature, label, target in zip(features, labels.tolist(), box_targets, strict=True):
            if 0 <= label < len(self.queues):
                self.queues[label].append((feature, target))


def probability_slow(scores, counts):
    """Eq. 7-8 with f of s + 1e-7, over the classes that have something stored, in Python floats."""
    weights = [1 / (s + 1e-7) if n > 0 else 0.0 for s, n in zip(scores, counts, strict=True)]
    total = sum(weights)
    return [w / total if total else 0.0 for w in weights]


def draw_slow(scores, counts, uniform_classes, uniform_features):
    """(class, slot) pairs: the first class whose cumulative probability reaches u; slot floor(u n)."""
    picks = []
    cumulative = list(itertools.accumulate(probability_slow(scores, counts)))
    for u, row in zip(uniform_classes, uniform_features, strict=True):
        label = next(label for label, reached in enumerate(cumulative) if u <= reached)
        picks += [(label, math.floor(v * counts[label])) for v in row]
    return picks


def random_rows(rows, classes, shape, generator):
    """Features (rows, *shape), labels with some background and negative ones, few classes with many rows, targets."""
    labels = (classes * torch.rand(rows, generator=generator) ** 2).long()
    labels[torch.rand(rows, generator=generator) < 0.1] = IGNORED
    labels[torch.rand(rows, generator=generator) < 0.05] = classes
    features = torch.randn(rows, *shape, generator=generator)
    return features, labels, torch.randn(rows, 4, generator=generator)


def same_contents(bank, slow):
    assert bank.counts.tolist() == [len(queue) for queue in slow.queues]
    for label, queue in enumerate(slow.queues):
        features, targets = bank.contents(label)
        assert len(features) == len(targets) == len(queue)
        for row, (feature, target) in enumerate(queue):
            assert torch.equal(features[row].cpu(), feature.to(features.dtype))
            assert torch.equal(targets[row].cpu(), target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (2, 2, 2)])
def test_equals_a_list_of_queues(device, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    for classes, capacity in ((1, 1), (3, 4), (7, 5), (5, 16)):
        bank, slow = FeatureMemoryBank(classes, shape, capacity, dtype).to(device), BankSlow(classes, capacity)
        for step in range(12):
            # from no row at all to several times the capacity of a class in one call
            rows = random_rows((step * 7) % 40, classes, shape, generator)
            bank.enqueue(*(x.to(device) for x in rows))
            slow.enqueue(*rows)
            same_contents(bank, slow)
        assert not bank.features[-1].any()
        assert not bank.box_targets[-1].any()


def test_the_last_rows_remain_when_a_call_has_more_than_fit(device):
    bank = FeatureMemoryBank(2, (1,), capacity=3).to(device)
    numbers = torch.arange(10.0, device=device)
    bank.enqueue(numbers[:, None], torch.ones(10, dtype=torch.long, device=device), numbers[:, None].expand(10, 4))
    features, targets = bank.contents(1)
    assert features[:, 0].tolist() == [7, 8, 9]
    assert targets[:, 2].tolist() == [7, 8, 9]
    assert bank.counts.tolist() == [0, 3]
    torch.testing.assert_close(bank.fill.cpu(), torch.tensor([0.0, 1.0]))


def test_a_label_beyond_the_background_is_an_error():
    bank = FeatureMemoryBank(2, (1,))
    with pytest.raises((IndexError, RuntimeError)):
        bank.enqueue(torch.zeros(1, 1), torch.tensor([3]), torch.zeros(1, 4))


def test_goes_on_in_the_same_order_after_saving_and_loading(device, tmp_path):
    generator = torch.Generator().manual_seed(1)
    bank, slow = FeatureMemoryBank(4, (2,), 5).to(device), BankSlow(4, 5)
    for step in range(6):
        rows = random_rows(11, 4, (2,), generator)
        bank.enqueue(*(x.to(device) for x in rows))
        slow.enqueue(*rows)
        torch.save(bank.state_dict(), tmp_path / "bank.pt")
        fresh = FeatureMemoryBank(4, (2,), 5)
        fresh.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
        assert (bank.written > 5).any() or step < 3  # rings have gone round while this is tested
        bank = fresh.to(device)
    same_contents(bank, slow)


def test_size_at_lvis_v1():
    """Bytes of all buffers for LVIS v1: no more than 190 MiB in bf16 and 380 MiB in fp32 (4.5 GiB as 256 x 7 x 7)."""
    for dtype, limit in ((torch.bfloat16, 190), (torch.float32, 380)):
        with torch.device("meta"):
            bank = FeatureMemoryBank(1203, (1024,), 80, dtype)
        assert sum(buffer.numel() * buffer.element_size() for buffer in bank.buffers()) <= limit * 2**20
        assert set(bank.state_dict()) == dict(bank.named_buffers()).keys()


def test_probability_equals_the_equation(device):
    generator = torch.Generator().manual_seed(2)
    for classes in (1, 2, 9, 300):
        scores = torch.rand(classes + 1, generator=generator) ** 6
        scores[0] = 0  # a class that is never recognised
        counts = torch.randint(3, (classes,), generator=generator)
        slow = probability_slow(scores[:-1].double().tolist(), counts.tolist())
        want = torch.tensor(slow, dtype=torch.float64)
        for given in (scores, scores[:-1]):
            got = sampling_probability(given.to(device), counts.to(device))
            torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-9)


def test_probability_by_instance_counts():
    """The supplement's f(n) = 1 / n: twice as many instances, half the probability; background does not matter."""
    p = sampling_probability(torch.tensor([1, 2, 4, 1]), torch.tensor([5, 5, 5]))
    torch.testing.assert_close(p, torch.tensor([4.0, 2.0, 1.0]) / 7)


def test_probability_of_an_empty_bank():
    assert sampling_probability(torch.full((4,), 0.01), torch.zeros(3, dtype=torch.long)).tolist() == [0, 0, 0]


def filled_bank(classes, shape, capacity, generator, device="cpu", dtype=torch.float32):
    """A bank some of whose classes are empty, some half full and some gone round; a row's features say where it is."""
    bank = FeatureMemoryBank(classes, shape, capacity, dtype).to(device)
    amounts = torch.randint(2 * capacity, (classes,), generator=generator)
    amounts[torch.rand(classes, generator=generator) < 0.3] = 0
    labels = torch.arange(classes).repeat_interleave(amounts)
    where = torch.arange(len(labels), dtype=torch.float32)
    features = where.reshape(-1, *[1] * len(shape)).expand(-1, *shape)
    bank.enqueue(features.to(device), labels.to(device), where[:, None].expand(-1, 4).to(device))
    return bank


def test_draw_equals_the_equations(device):
    generator = torch.Generator().manual_seed(3)
    for classes in (1, 2, 8, 60):
        for _ in range(10):
            bank = filled_bank(classes, (3,), 6, generator, device)
            scores = torch.rand(classes + 1, generator=generator) ** 3 + 1e-3
            uniform_K = 1 - torch.rand(8, generator=generator, dtype=torch.float64)
            uniform_KF = torch.rand(8, 4, generator=generator, dtype=torch.float64)
            got = bank.draw(scores.to(device), uniform_K.to(device), uniform_KF.to(device))
            features, labels, targets = (x.cpu() for x in got)
            if not bank.counts.any():
                assert labels.tolist() == [IGNORED] * 32
                continue
            stored, known = bank.counts.tolist(), scores.double().tolist()[:-1]
            picks = draw_slow(known, stored, uniform_K.tolist(), uniform_KF.tolist())
            assert labels.tolist() == [label for label, _ in picks]
            for row, (label, slot) in enumerate(picks):
                assert torch.equal(features[row], bank.features[label * 6 + slot].cpu())
                assert torch.equal(targets[row], bank.box_targets[label * 6 + slot].cpu())


def test_extreme_random_numbers_stay_inside_what_is_stored(device):
    bank = FeatureMemoryBank(5, (1,), 80).to(device)
    for label, amount in ((1, 7), (3, 80)):
        labels = torch.full((amount,), label, device=device)
        bank.enqueue(torch.full((amount, 1), float(label), device=device), labels, torch.zeros(amount, 4).to(device))
    last = torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)).item()
    uniform_K = torch.tensor([1.0, last, 2.0**-53, 0.5], dtype=torch.float64, device=device)
    uniform_KF = torch.tensor([[0.0, last]] * 4, dtype=torch.float64, device=device)
    for scores in (torch.full((6,), 0.01), torch.tensor([0.9, 1e-12, 0.9, 0.9, 0.0, 0.01])):
        features, labels, _ = bank.draw(scores.to(device), uniform_K, uniform_KF)
        assert torch.equal(features[:, 0], labels.float())
        assert set(labels.tolist()) <= {1, 3}
        assert labels[:2].tolist() == [3, 3]
        assert labels[4:6].tolist() == [1, 1]


def test_rounding_never_draws_an_empty_class(device):
    """Probabilities whose sum in floating point ends below 1, and the last class empty."""
    scores = torch.full((11,), 0.01, dtype=torch.float64)
    bank = FeatureMemoryBank(11, (1,), 1).to(device)
    bank.enqueue(torch.ones(10, 1).to(device), torch.arange(10).to(device), torch.zeros(10, 4).to(device))
    assert sampling_probability(scores, bank.counts.cpu()).cumsum(0)[-1] < 1
    uniform_K = torch.ones(1, dtype=torch.float64, device=device)
    assert bank.draw(scores.to(device), uniform_K, uniform_K[:, None] * 0)[1].tolist() == [9]


def test_zeros_from_the_generator_draw_what_is_stored(monkeypatch):
    """torch.rand may give 0, and no class may be drawn by u = 0: the first one could be empty."""
    bank = FeatureMemoryBank(3, (1,), 1)
    bank.enqueue(torch.ones(1, 1), torch.tensor([1]), torch.zeros(1, 4))
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape, dtype=options["dtype"]))
    assert bank.sample(torch.full((4,), 0.01), 2, 1)[1].tolist() == [1, 1]


def test_an_empty_bank_gives_ignored_rows(device):
    bank = FeatureMemoryBank(3, (2, 2), 4, torch.bfloat16).to(device)
    features, labels, targets = bank.sample(torch.full((4,), 0.01, device=device), 5, 2)
    assert features.shape == (10, 2, 2)
    assert features.dtype == torch.bfloat16
    assert labels.tolist() == [IGNORED] * 10
    assert not features.any()
    assert not targets.any()


def test_sample_follows_the_probabilities(device):
    bank = FeatureMemoryBank(4, (1,), 10).to(device)
    labels = torch.tensor([0] * 10 + [1] * 4 + [3] * 2, device=device)
    bank.enqueue(torch.arange(16.0, device=device)[:, None], labels, torch.zeros(16, 4, device=device))
    scores = torch.tensor([0.4, 0.1, 0.0001, 0.2, 0.01], device=device)  # weights 2.5, 10, nothing stored, 5
    generator = torch.Generator(device).manual_seed(4)
    features, drawn, _ = bank.sample(scores, 2000, 10, generator)
    by_class = torch.bincount(drawn[::10], minlength=4) / 2000
    torch.testing.assert_close(by_class.cpu(), torch.tensor([1, 4, 0, 2]) / 7, rtol=0, atol=0.04)  # 3.6 deviations
    assert torch.equal(drawn.view(2000, 10), drawn.view(2000, 10)[:, :1].expand(-1, 10))  # one class after the other
    within = torch.bincount(features[drawn == 1, 0].long(), minlength=16)[10:14]
    assert within.sum() == (drawn == 1).sum()
    torch.testing.assert_close((within / within.sum()).cpu(), torch.full((4,), 0.25), rtol=0, atol=0.02)


def test_sample_is_reproducible(device):
    bank = filled_bank(20, (2,), 8, torch.Generator().manual_seed(5), device)
    scores = torch.full((21,), 0.01, device=device)

    def drawn(seed):
        return bank.sample(scores, generator=torch.Generator(device).manual_seed(seed))

    assert all(torch.equal(a, b) for a, b in zip(drawn(0), drawn(0), strict=True))
    assert not torch.equal(drawn(0)[0], drawn(1)[0])
    assert drawn(0)[0].shape == (32, 2)


def test_the_shape_of_the_features_does_not_change_the_draw():
    generator = torch.Generator().manual_seed(6)
    vectors, maps = FeatureMemoryBank(10, (196,), 5), FeatureMemoryBank(10, (4, 7, 7), 5)
    for _ in range(4):
        features, labels, targets = random_rows(30, 10, (4, 7, 7), generator)
        maps.enqueue(features, labels, targets)
        vectors.enqueue(features.flatten(1), labels, targets)
    draws = [
        bank.sample(torch.full((11,), 0.01), generator=torch.Generator().manual_seed(7)) for bank in (vectors, maps)
    ]
    assert torch.equal(draws[0][0], draws[1][0].flatten(1))
    assert torch.equal(draws[0][1], draws[1][1])
    assert torch.equal(draws[0][2], draws[1][2])


def test_what_was_drawn_does_not_change_when_more_is_stored():
    bank = FeatureMemoryBank(1, (3,), 2)
    rows = torch.ones(2, 3, requires_grad=True), torch.zeros(2, dtype=torch.long), torch.ones(2, 4)
    bank.enqueue(*rows)  # no gradient is kept
    weight = torch.ones(3, requires_grad=True)
    features, _, targets = bank.sample(torch.full((2,), 0.01), 1, 2)
    assert not features.requires_grad
    loss = (features * weight).sum()
    bank.enqueue(torch.zeros(2, 3), rows[1], torch.zeros(2, 4))
    loss.backward()
    assert weight.grad.tolist() == [2, 2, 2]
    assert targets.tolist() == [[1, 1, 1, 1]] * 2
