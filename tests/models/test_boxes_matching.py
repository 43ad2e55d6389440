"""Assigner and sampler: every rule written out as loops, and each rule alone."""

import pytest
import torch

from loce.models.boxes import BETWEEN, NEGATIVE, box_iou, choose_random, leave_out, match, match_boxes, sample


def slow_match(iou: list[list[float]], positive: float, negative: float, low: float) -> list[int]:
    """The assigner's steps one after the other, later ones over earlier ones."""
    truths = len(iou[0]) if iou else 0
    assigned = []
    for row in iou:
        best = max(row)
        if best < negative:
            assigned.append(NEGATIVE)
        elif best >= positive:
            assigned.append(row.index(best))
        else:
            assigned.append(BETWEEN)
    for truth in range(truths):
        best = max(row[truth] for row in iou)
        if best >= low:
            for box, row in enumerate(iou):
                if row[truth] == best:
                    assigned[box] = truth
    return assigned


@pytest.mark.parametrize("thresholds", [(0.7, 0.3, 0.3), (0.5, 0.5, 0.5)], ids=["RPN", "RoIs"])
@pytest.mark.parametrize("seed", range(20))
def test_against_loops_with_many_ties(thresholds, seed):
    """IoUs on a coarse grid, so that ties are common, with each other and with the thresholds."""
    generator = torch.Generator().manual_seed(seed)
    iou = torch.randint(0, 11, (25, 4), generator=generator).double() / 10
    iou = iou * torch.randint(0, 2, (25, 1), generator=generator)
    assert match(iou, *thresholds).tolist() == slow_match(iou.tolist(), *thresholds)


def test_thresholds_belong_to_the_upper_side():
    iou = torch.tensor([[0.7], [0.69], [0.3], [0.29], [0.9]])
    assert match(iou, 0.7, 0.3, 1.0).tolist() == [0, BETWEEN, BETWEEN, NEGATIVE, 0]


def test_a_truth_takes_all_boxes_that_tie_for_its_best():
    iou = torch.tensor([[0.4, 0.0], [0.4, 0.0], [0.39, 0.0], [0.0, 0.8]])
    assert match(iou, 0.7, 0.3, 0.3).tolist() == [0, 0, BETWEEN, 1]


def test_a_later_truth_takes_a_box_from_one_that_fits_better():
    """Box 0 overlaps truth 0 by 0.9, yet it is also the best box of truth 1: it learns from truth 1."""
    iou = torch.tensor([[0.9, 0.4], [0.2, 0.1]])
    assert match(iou, 0.7, 0.3, 0.3).tolist() == [1, NEGATIVE]
    assert match(iou.flip(1), 0.7, 0.3, 0.3).tolist() == [1, NEGATIVE]  # the better fit comes last: it stays


def test_no_low_quality_match_below_the_minimum():
    iou = torch.tensor([[0.29, 0.31], [0.1, 0.2]])
    assert match(iou, 0.7, 0.3, 0.3).tolist() == [1, NEGATIVE]
    assert match(iou[:, :1], 0.7, 0.3, 0.3).tolist() == [NEGATIVE, NEGATIVE]
    assert match(torch.zeros(3, 2), 0.7, 0.3, 0.3).tolist() == [NEGATIVE] * 3  # best IoU 0 matches nothing


def test_the_first_of_equally_good_truths():
    assert match(torch.tensor([[0.6, 0.6, 0.1]]), 0.5, 0.5, 1.0).tolist() == [0]


@pytest.mark.parametrize("shape", [(5, 0), (0, 3), (0, 0)])
def test_without_truths_or_boxes(shape):
    matched = match(torch.zeros(shape), 0.5, 0.5, 0.5)
    assert matched.dtype == torch.long and matched.tolist() == [NEGATIVE] * shape[0]


def test_choose_is_uniform_and_without_replacement():
    candidates = torch.tensor([True, False, True, True, False, True])
    counts = torch.zeros(6)
    for _ in range(3000):
        indices, valid = choose_random(candidates, 2, 2)
        assert valid.all() and len(set(indices.tolist())) == 2
        counts[indices] += 1
    assert counts[~candidates].sum() == 0
    # 1500 expected each; the standard deviation is sqrt(3000 / 4) = 27
    assert (counts[candidates] - 1500).abs().max() < 5 * 27.4


def test_choose_marks_slots_without_a_candidate():
    indices, valid = choose_random(torch.tensor([False, True, False, True]), 4, 4)
    assert valid.tolist() == [True, True, False, False] and sorted(indices[:2].tolist()) == [1, 3]
    indices, valid = choose_random(torch.tensor([True, True]), 5, 5)
    assert len(indices) == 2 and valid.all()  # never more slots than boxes
    indices, valid = choose_random(torch.zeros(0, dtype=torch.bool), 5, 5)
    assert len(indices) == len(valid) == 0


def test_choose_obeys_a_limit_below_its_slots():
    for limit in (1, torch.tensor(1)):
        _, valid = choose_random(torch.ones(6, dtype=torch.bool), limit, 4)
        assert valid.tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("positives", "negatives", "between", "expected"),
    [
        (20, 100, 5, (4, 12)),  # enough of both: a quarter positives
        (2, 100, 5, (2, 14)),  # negatives fill up
        (0, 100, 5, (0, 16)),
        (20, 3, 5, (4, 3)),  # too few negatives: fewer in all, positives stay at their share
        (1, 2, 50, (1, 2)),  # fewer boxes than asked for
        (0, 0, 9, (0, 0)),  # nothing at all
    ],
)
def test_how_many_are_sampled(positives, negatives, between, expected):
    matched = torch.tensor([3] * positives + [NEGATIVE] * negatives + [BETWEEN] * between)
    matched = matched[torch.randperm(len(matched))]
    chosen, chosen_valid, others, others_valid = sample(matched, 16, 0.25)
    assert (int(chosen_valid.sum()), int(others_valid.sum())) == expected
    assert (matched[chosen[chosen_valid]] == 3).all() and (matched[others[others_valid]] == NEGATIVE).all()
    used = torch.cat([chosen[chosen_valid], others[others_valid]])
    assert len(used.unique()) == len(used)


def test_the_share_of_positives_is_rounded_down():
    matched = torch.tensor([0] * 50 + [NEGATIVE] * 50)
    _, valid, _, _ = sample(matched, 7, 0.5)
    assert int(valid.sum()) == 3


@pytest.mark.parametrize("pairs", [1, 7, 60, 10_000])
def test_matching_in_parts_is_the_same(pairs):
    """Also where a ground truth takes boxes of several parts, and where nothing overlaps."""
    generator = torch.Generator().manual_seed(pairs)
    for truths in (0, 1, 9):
        corners = torch.rand(50, 2, generator=generator).mul(6).round()
        boxes = torch.cat([corners, corners + 1 + torch.rand(50, 2, generator=generator).mul(4).round()], dim=1)
        others = boxes[torch.randperm(50, generator=generator)[:truths]] + 0.5
        others[:1] += 100
        for thresholds in ((0.7, 0.3, 0.3), (0.5, 0.5, 0.5)):
            whole = match(box_iou(boxes, others), *thresholds)
            assert match_boxes(boxes, others, *thresholds, pairs=pairs).tolist() == whole.tolist()


@pytest.mark.parametrize("pairs", [1, 10_000])
def test_background_in_ignored_regions_is_left_out(pairs):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(80, 2, generator=generator) * 50
    boxes = torch.cat([corners, corners + torch.rand(80, 2, generator=generator) * 30], dim=1)
    boxes[0] = torch.tensor([10.0, 10.0, 10.0, 30.0])  # no area
    regions = torch.tensor([[5.0, 5.0, 40.0, 40.0], [30.0, 30.0, 70.0, 60.0]])
    matched = torch.randint(-2, 4, (80,), generator=generator)
    expected = []
    for (x1, y1, x2, y2), index in zip(boxes.double().tolist(), matched.tolist(), strict=True):
        covered = 0.0
        for a1, b1, a2, b2 in regions.tolist():
            shared = max(0.0, min(x2, a2) - max(x1, a1)) * max(0.0, min(y2, b2) - max(y1, b1))
            covered = max(covered, shared / ((x2 - x1) * (y2 - y1)) if x2 > x1 and y2 > y1 else 0.0)
        expected.append(BETWEEN if index == NEGATIVE and covered > 0.5 else index)
    assert leave_out(matched, boxes, regions, pairs).tolist() == expected
    assert 3 < sum(a != b for a, b in zip(expected, matched.tolist(), strict=True)) < 40
    for nothing in (None, torch.zeros(0, 4)):
        assert leave_out(matched, boxes, nothing) is matched
