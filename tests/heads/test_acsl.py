"""The adaptive class suppression head against plain loops written from its equation."""

import math

import pytest
import torch

from loce.heads import HEADS
from loce.heads.acsl import draw_rows
from loce.utils.classes import IGNORED
from tests.heads.cases import random_case, rois_of

THRESHOLD, COMMON, RARE = 0.7, 0.1, 0.01


def loss_slow(logits, labels, groups, common_rows, rare_rows):
    """Every entry by itself; common_rows, rare_rows: the background rows that were drawn for a group."""
    classes = len(groups)
    total, rows = 0.0, 0
    for row, (z_row, y) in enumerate(zip(logits, labels, strict=True)):
        if y == IGNORED:
            continue
        rows += 1
        for j, z in enumerate(z_row):
            p = 1 / (1 + math.exp(-z))
            if y < classes:
                weight = j == y or p >= THRESHOLD
            elif j == classes or groups[j] == "f":
                weight = True
            else:
                weight = row in (common_rows if groups[j] == "c" else rare_rows)
            total -= weight * math.log(p if j == y else 1 - p)
    return total / rows


def drawn(labels, background, seed, device):
    generator = torch.Generator(device).manual_seed(seed)
    common, rare = (draw_rows(labels == background, share, generator) for share in (COMMON, RARE))
    return set(common.nonzero()[:, 0].tolist()), set(rare.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("classes", [3, 8, 50])
def test_loss_equals_the_equation(make_stats, device, classes):
    stats = make_stats(classes)
    assert set(stats.groups) == {"r", "c", "f"}
    logits, labels = random_case(600, classes, classes + 1, seed=classes)
    labels[100:] = classes
    head = HEADS["acsl"](8, stats).to(device)
    common, rare = drawn(labels.to(device), classes, 5, device)
    assert len(common) > 40 and len(rare) > 3 and common != rare
    rois = rois_of(labels.to(device), generator=torch.Generator(device).manual_seed(5))
    loss = head.losses(logits.float().to(device), rois)["loss_cls"]
    want = loss_slow(logits.tolist(), labels.tolist(), stats.groups.tolist(), common, rare)
    assert loss.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(("rows", "share", "wanted"), [(640, 0.1, 64), (99, 0.01, 0), (100, 0.01, 1), (0, 0.1, 0)])
def test_as_many_background_rows_are_drawn_as_the_share_says(rows, share, wanted):
    among = torch.cat([torch.ones(rows), torch.zeros(30)]).bool()
    found = draw_rows(among, share, torch.Generator().manual_seed(0))
    assert found.sum() == wanted and not (found & ~among).any()


def test_rows_are_drawn_evenly():
    among, generator = torch.arange(20) % 2 == 0, torch.Generator().manual_seed(0)
    times = sum(draw_rows(among, 0.3, generator).long() for _ in range(3000))
    assert (times[among] / 3000).tolist() == pytest.approx([0.3] * 10, abs=0.03)


def test_initial_values_and_scores(make_stats):
    head = HEADS["acsl"](8, make_stats(3))
    assert head.fc_cls.bias.tolist() == pytest.approx([-math.log(99)] * 4)
    z = torch.tensor([[0.0, 1.0, -1.0, 5.0]])
    assert head.scores(z)[0].tolist() == pytest.approx([1 / (1 + math.exp(-v)) for v in (0.0, 1.0, -1.0)])
