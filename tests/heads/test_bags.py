"""Balanced Group Softmax against plain loops written from its equations."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from loce.config import BAGSOptions, HeadConfig
from loce.heads.bags import BAGSHead
from loce.utils.classes import IGNORED
from tests.heads.cases import random_case, rois_of

COUNTS = [5, 2000, 9, 10, 99, 100, 1000, 0]
BOUNDS = (10, 100, 1000)
CLASSES, LOGITS = len(COUNTS), len(COUNTS) + 1 + 5


def make(make_stats, features=8, counts=COUNTS, **options):
    stats = dataclasses.replace(make_stats(len(counts)), instance_counts=np.array(counts))
    return BAGSHead(features, stats, HeadConfig(name="bags", bags=BAGSOptions(**options)))


def group_of(label):
    """0 for the background, else 1..4 by training instances, as the paper bins them."""
    if label == CLASSES:
        return 0
    n = COUNTS[label]
    return 1 if n < 10 else 2 if n < 100 else 3 if n < 1000 else 4


def members(group):
    """Logits of a group: its classes (or the background) and its others."""
    return [j for j in range(CLASSES + 1) if group_of(j) == group] + [CLASSES + 1 + group]


def softmax_slow(z, group, j):
    return math.exp(z[j]) / sum(math.exp(z[i]) for i in members(group))


def group_losses_slow(z, y):
    """The loss of one row in each group, and whether its label is in the group."""
    found = []
    for group in range(5):
        inside = group_of(y) == group
        target = y if inside else CLASSES + 1 + group
        found.append((-math.log(softmax_slow(z, group, target)), inside))
    return found


def test_groups(make_stats):
    head = make(make_stats)
    assert head.groups.tolist() == [1, 4, 1, 2, 2, 3, 4, 1, 0, 0, 1, 2, 3, 4]
    assert make(make_stats, bounds=()).groups.tolist() == [1] * 8 + [0, 0, 1]


def test_loss_equals_the_equation_when_all_others_are_kept(make_stats, device):
    head = make(make_stats, others_ratio=1000.0).to(device)
    for seed in range(4):
        logits, labels = random_case(40, CLASSES, LOGITS, seed)
        labels[(labels == 3) | (labels == 4)] = 1  # group 2 has no row: it gives no loss
        rows = [group_losses_slow(z, y) for z, y in zip(logits.tolist(), labels.tolist(), strict=True) if y != IGNORED]
        want = 0.0
        for group in range(5):
            if group == 0 or any(row[group][1] for row in rows):
                want += sum(row[group][0] for row in rows) / len(rows)
        found = head.losses(logits.to(device), rois_of(labels.to(device)))
        assert list(found) == ["loss_cls"]
        assert found["loss_cls"].item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("ratio", [0.4, 1.0, 2.5])  # with 3, 0, 1 and 1 rows of the groups 1 to 4
def test_others_are_a_random_part_of_the_right_size(make_stats, device, ratio):
    """In each group: all rows of its classes, and floor of ratio x as many others, never an ignored row."""
    head = make(make_stats, others_ratio=ratio).to(device)
    labels = torch.tensor([0, 0, 2, 1, 5] + [CLASSES] * 30 + [IGNORED] * 9, device=device)
    part = (labels != IGNORED)[:, None]
    inside = part & (head.groups[labels.clamp(min=0)][:, None] == torch.arange(5, device=device))
    counts = torch.zeros(len(labels), 5, device=device)
    for _ in range(300):
        drawn = head._draw_others(inside, part)
        assert not (drawn & (inside | ~part)).any()
        assert drawn.sum(dim=0).tolist() == [5, int(3 * ratio), 0, int(ratio), int(ratio)]
        counts += drawn
    share = counts[5:35, 1] / 300  # background rows are others of group 1, beside rows 3 and 4
    expected = int(3 * ratio) / 32
    assert (share - expected).abs().max() < 5 * math.sqrt(expected * (1 - expected) / 300)


def test_the_loss_of_drawn_others_is_divided_by_the_rows_kept(make_stats, monkeypatch):
    """One of the possible draws, written out: row 3 alone is kept as another of groups 1, 3 and 4."""
    head = make(make_stats, others_ratio=1.0)
    logits, _ = random_case(5, CLASSES, LOGITS, 0)
    labels = torch.tensor([0, 5, 1, CLASSES, IGNORED])
    draws = torch.rand(5, 5)
    draws[3] = 0.0
    monkeypatch.setattr(torch, "rand", lambda *_, **__: draws.clone())
    rows = [group_losses_slow(z, y) for z, y in zip(logits[:4].tolist(), labels[:4].tolist(), strict=True)]
    want = sum(row[0][0] for row in rows) / 4
    for group, own in ((1, 0), (3, 1), (4, 2)):
        want += (rows[own][group][0] + rows[3][group][0]) / 2
    assert head.losses(logits, rois_of(labels))["loss_cls"].item() == pytest.approx(want, rel=1e-12)


def test_gradient(make_stats):
    head = make(make_stats, others_ratio=1000.0)
    logits, labels = random_case(8, CLASSES, LOGITS, 0)
    assert torch.autograd.gradcheck(lambda z: head.losses(z, rois_of(labels))["loss_cls"], logits.requires_grad_())


def test_scores_equal_the_equation(make_stats, device):
    head = make(make_stats).to(device)
    logits, _ = random_case(6, CLASSES, LOGITS, 0, scale=4.0)
    want = [
        [softmax_slow(z, group_of(c), c) * softmax_slow(z, 0, CLASSES + 1) for c in range(CLASSES)]
        for z in logits.tolist()
    ]
    found = head.scores(logits.float().to(device))
    torch.testing.assert_close(found.cpu(), torch.tensor(want), rtol=1e-4, atol=1e-7)


def test_layer_and_initial_values(make_stats):
    torch.manual_seed(0)
    head = make(make_stats, features=1000)
    assert {name: tuple(p.shape) for name, p in head.state_dict().items()} == {
        "fc_cls.weight": (LOGITS, 1000),
        "fc_cls.bias": (LOGITS,),
        "groups": (LOGITS,),
    }
    assert abs(head.fc_cls.weight.std().item() - 0.01) < 3e-4  # 14,000 numbers: standard error 6e-5
    assert not head.fc_cls.bias.any()
