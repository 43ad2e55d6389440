"""FASA's sampling rates and their groups against plain loops. The authors' numbers: tests/heads/test_authors.py."""

import numpy as np
import pytest
import torch

from loce.adaptive_rates import AdaptiveRates, affinity_propagation, groups, initial_rates


def groups_slow(similarity):
    """Affinity propagation as Frey and Dueck write it, one message at a time."""
    points = range(len(similarity))
    preference = float(np.median(similarity))
    s = [[preference if i == k else float(similarity[i, k]) for k in points] for i in points]
    noise = np.random.RandomState(1).standard_normal((len(s), len(s)))
    s = [[s[i][k] + (2.0**-52 * s[i][k]) * noise[i, k] for k in points] for i in points]
    r, a = ([[0.0] * len(s) for _ in points] for _ in range(2))
    for _ in range(200):
        for i in points:
            both = [a[i][k] + s[i][k] for k in points]
            r[i] = [0.5 * r[i][k] + 0.5 * (s[i][k] - max(both[:k] + both[k + 1 :])) for k in points]
        for k in points:
            for i in points:
                support = sum(max(0.0, r[j][k]) for j in points if j not in (i, k))
                a[i][k] = 0.5 * a[i][k] + 0.5 * (support if i == k else min(0.0, r[k][k] + support))
    centres = [k for k in points if a[k][k] + r[k][k] > 0]
    return [max(centres, key=lambda k: s[i][k] if i != k else np.inf) for i in points]


def together(group):
    """Which pairs of classes are in one group."""
    return [[a == b for b in group] for a in group]


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (5, 1), (12, 2), (12, 3), (16, 4)])
def test_groups_equal_the_loops(classes, seed):
    means = np.random.default_rng(seed).normal(size=(classes, 3)) * 2
    distance = ((means[:, None] - means[None]) ** 2).sum(axis=2)
    assert together(groups(means).tolist()) == together(groups_slow(-distance))


def test_groups_of_clear_clusters():
    means = (
        np.repeat([[0.0, 0], [9, 0], [0, 9]], [4, 3, 5], axis=0) + np.random.default_rng(0).normal(size=(12, 2)) * 0.3
    )
    assert together(groups(means).tolist()) == together([0] * 4 + [1] * 3 + [2] * 5)
    assert len(set(groups(means.reshape(12, 2, 1)).tolist())) == 3


@pytest.mark.parametrize("classes", [1, 2, 9])
def test_classes_that_are_all_alike_are_each_alone(classes):
    assert groups(np.ones((classes, 4))).tolist() == list(range(classes))
    assert affinity_propagation(np.zeros((classes, classes))).tolist() == list(range(classes))


def test_rates_at_the_start():
    counts = np.array([4, 1, 0, 2])
    assert initial_rates(counts).tolist() == pytest.approx([0.25 / 1.75, 1 / 1.75, 0, 0.5 / 1.75])
    assert initial_rates(counts, power=0.5, scale=2).tolist() == pytest.approx([2 * (0.25 / 1.75) ** 0.5, 1, 0, 1])
    assert initial_rates(np.zeros(2, int)).tolist() == [0, 0]


def test_draws_follow_the_rates(device):
    rates = AdaptiveRates(np.ones(4)).to(device)
    rates.rates.copy_(torch.tensor([0.5, 0.1, 1.0, 0.7]))
    u, stored = torch.tensor([0.49, 0.1, 0.999, 0.2], device=device), torch.tensor([3, 1, 1, 0], device=device)
    assert rates.draw(u, stored).tolist() == [0, 2]
    assert rates.draw(u, stored * 0).tolist() == []


def test_rates_follow_the_change_of_their_groups():
    rates, group = AdaptiveRates(np.array([10, 10, 10, 1])), np.array([0, 0, 1, 2])
    start = rates.rates.clone()
    rates.rates[3] = 0.95
    rates.adapt(np.array([1.0, 1.0, 1.0, 1.0]), group, 1)
    assert torch.equal(rates.rates[:3], start[:3])  # there is nothing to compare with
    rates.adapt(np.array([1.5, 0.2, 2.0, 0.5]), group, 2)  # class 0 rose, its group fell
    wanted = torch.tensor([1.1, 1.1, 0.9]) * start[:3]
    torch.testing.assert_close(rates.rates, torch.tensor([*wanted.tolist(), 1.0]))  # never above 1
    before = rates.rates.clone()
    rates.adapt(np.array([1.5, 0.2, 2.0, 0.5]), group, 3)
    assert torch.equal(rates.rates, before) and int(rates.epochs) == 3
    again = AdaptiveRates(np.ones(4))
    again.load_state_dict(rates.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(rates.buffers(), again.buffers(), strict=True))
