"""Clues to lost objects against plain loops over every candidate."""

import pytest
import torch

from loce.config import EvalConfig
from loce.models.detection import detect
from loce.models.lost_objects import find_near_misses
from tests.models.test_detection import slow_iou, slow_nms

CLASSES = 4


def slow_misses(objects, proposals, boxes, scores, found, allowed, config) -> dict[str, dict[int, tuple]]:
    """kind -> object -> (box, score, label), from the meaning of each kind."""
    misses: dict[str, dict[int, tuple]] = {"removed_by_nms": {}, "cut_by_cap": {}, "classified_as": {}, "proposed": {}}
    candidates = [(n, c) for n in range(len(boxes)) for c in range(CLASSES) if scores[n, c] > config.score_threshold]
    flat = [boxes[n, c] for n, c in candidates], [float(scores[n, c]) for n, c in candidates]
    labels = torch.tensor([c for _, c in candidates], dtype=torch.long)
    stays = {candidates[i] for i in slow_nms(torch.stack(flat[0]), flat[1], labels, config.nms)}
    for g, (box, label) in enumerate(zip(objects[0].tolist(), objects[1].tolist(), strict=True)):
        at_it = [
            (b.tolist(), float(s), int(c)) for b, s, c in zip(*found, strict=True) if slow_iou(b.tolist(), box) >= 0.5
        ]
        others = [d for d in at_it if d[2] != label and not allowed[d[2]]]
        if others:
            misses["classified_as"][g] = max(others, key=lambda d: d[1])
        right = [n for n, c in candidates if c == label and slow_iou(boxes[n, c].tolist(), box) >= 0.5]
        if right and all(d[2] != label for d in at_it):
            left = [n for n in right if (n, label) in stays]
            n = max(left or right, key=lambda n: float(scores[n, label]))
            kind = "cut_by_cap" if left else "removed_by_nms"
            misses[kind][g] = (boxes[n, label].tolist(), float(scores[n, label]), label)
        n = max(range(len(proposals)), key=lambda n: slow_iou(proposals[n].tolist(), box))
        misses["proposed"][g] = (proposals[n].tolist(), float(scores[n, label]), label)
    return misses


def scene(seed: int, count: int = 30):
    """Objects, and proposals, boxes and scores around them."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(5, 2, generator=generator) * 60
    objects = torch.cat([corner, corner + 12 + torch.rand(5, 2, generator=generator) * 20], dim=1)
    near = objects[torch.randint(0, 5, (count,), generator=generator)]
    proposals = near + torch.randn(count, 4, generator=generator) * 3
    boxes = proposals[:, None] + torch.randn(count, CLASSES, 4, generator=generator)
    scores = torch.rand(count, CLASSES, generator=generator).pow(3)
    return (objects, torch.randint(0, CLASSES, (5,), generator=generator)), proposals, boxes, scores


def test_misses_are_what_they_are_called() -> None:
    seen = dict.fromkeys(("removed_by_nms", "cut_by_cap", "classified_as", "proposed"), 0)
    for seed in range(40):
        objects, proposals, boxes, scores = scene(seed)
        config = EvalConfig(detections=6, score_threshold=0.05, nms=0.3)
        found = detect(boxes, scores, config)
        allowed = torch.tensor([True, False, True, False])
        misses = find_near_misses(objects, proposals, boxes, scores, found, allowed, config)
        expected = slow_misses(objects, proposals, boxes, scores, found, allowed.tolist(), config)
        for kind, (box, score, label) in misses.items():
            rows = [
                (b, pytest.approx(s), c) for b, s, c in zip(box.tolist(), score.tolist(), label.tolist(), strict=True)
            ]
            assert [e for _, e in sorted(expected[kind].items())] == rows, (seed, kind)
            seen[kind] += len(rows)
    assert min(seen.values()) >= 10, seen


def test_without_a_filter_no_category_is_left_out() -> None:
    objects, proposals, boxes, scores = scene(0)
    misses = find_near_misses(
        objects, proposals, boxes, scores, detect(boxes, scores, EvalConfig()), None, EvalConfig()
    )
    assert set(misses) == {"removed_by_nms", "cut_by_cap", "proposed"}


@pytest.mark.parametrize(("count", "number"), [(0, 5), (30, 0), (0, 0)])
def test_nothing_proposed_and_nothing_to_find(count: int, number: int) -> None:
    objects, proposals, boxes, scores = scene(0, count=max(count, 1))
    objects = (objects[0][:number], objects[1][:number])
    proposals, boxes, scores = proposals[:count], boxes[:count], scores[:count]
    found = detect(boxes, scores, EvalConfig())
    misses = find_near_misses(
        objects, proposals, boxes, scores, found, torch.ones(CLASSES, dtype=torch.bool), EvalConfig()
    )
    assert all(len(column) == 0 for columns in misses.values() for column in columns)


def test_every_score_too_low() -> None:
    """Then only the proposals are left to tell of."""
    objects, proposals, boxes, scores = scene(0)
    config = EvalConfig(score_threshold=0.9999)
    misses = find_near_misses(
        objects, proposals, boxes, scores * 0.5, detect(boxes, scores * 0.5, config), None, config
    )
    assert {kind: len(columns[0]) for kind, columns in misses.items()} == {
        "removed_by_nms": 0,
        "cut_by_cap": 0,
        "proposed": 5,
    }
