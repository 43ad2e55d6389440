"""NMS resampling against plain loops, and against plain NMS where its thresholds are all equal."""

import dataclasses

import numpy as np
import pytest
import torch
from torchvision.ops import nms

from loce.config import RPNConfig
from loce.models import nms_resampling
from loce.models.nms_resampling import NMSResampling, linear_thresholds, nms_of_each
from loce.utils.classes import frequency_groups
from tests.models.conftest import CLASSES, SMALL

COUNTS = np.array([3, 200, 40, 10, 0, 101, 100, 1, 11, 1145])


@pytest.fixture
def stats(make_stats):
    return dataclasses.replace(make_stats(len(COUNTS)), image_counts=COUNTS, groups=frequency_groups(COUNTS))


def case(seed, boxes=120, truths=6):
    """Proposals in heaps, best first, their scores, and ground truth that some of them are near to."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(8, 2, generator=generator) * 80
    corner = centres[torch.randint(8, (boxes,), generator=generator)] + torch.randn(boxes, 2, generator=generator) * 3
    proposals = torch.cat([corner, corner + 20 + torch.randn(boxes, 2, generator=generator) * 3], dim=1)
    scores = torch.rand(boxes, generator=generator).sort(descending=True).values
    around = proposals[torch.randint(boxes, (truths,), generator=generator)]
    labels = torch.randint(len(COUNTS), (truths,), generator=generator)
    return proposals, scores, around + torch.randn(truths, 4, generator=generator), labels


def iou_slow(a, b):
    width, height = (min(a[2 + i], b[2 + i]) - max(a[i], b[i]) for i in (0, 1))
    overlap = max(width, 0) * max(height, 0)
    area = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return overlap / (area[0] + area[1] - overlap)


def nms_slow(boxes, thresholds):
    """One by one, best first: a kept box removes every later one that it overlaps by more than its own threshold."""
    kept, gone = [], set()
    for i, box in enumerate(boxes):
        if i not in gone:
            kept.append(i)
            gone |= {j for j in range(i + 1, len(boxes)) if iou_slow(box, boxes[j]) > thresholds[i]}
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_each_box_suppresses_by_its_own_threshold(seed, device):
    boxes, _, _, _ = case(seed)
    thresholds = 0.2 + 0.7 * torch.rand(len(boxes), generator=torch.Generator().manual_seed(seed))
    found = nms_of_each(boxes.to(device), thresholds.to(device)).tolist()
    assert found == nms_slow(boxes.double().tolist(), thresholds.double().tolist())
    assert 0 < len(found) < len(boxes)


def test_a_long_chain_is_settled(device):
    """Box i suppresses box i + 1 only: every second one stays, each decided after the one before."""
    x = torch.arange(60.0, device=device) * 4
    boxes = torch.stack([x, torch.zeros_like(x), x + 10, torch.full_like(x, 10)], dim=1)
    assert nms_of_each(boxes, torch.full_like(x, 0.3)).tolist() == list(range(0, 60, 2))


def test_thresholds_fall_linearly_within_the_groups(stats):
    found = linear_thresholds(stats)
    for label, images in enumerate(COUNTS.tolist()):
        if images == 0:
            want = 0.95
        elif images <= 10:
            want = 0.95 - 0.1 * (images - 1) / 9
        elif images <= 100:
            want = 0.85 - 0.1 * (images - 11) / 89
        else:
            want = 0.75 - 0.1 * (images - 101) / 1044
        assert found[label] == pytest.approx(want, abs=1e-12)
    assert found[-1] == 0.65


@pytest.mark.parametrize("counts", [[5], [5, 5], [0, 50], [500, 1]])
def test_groups_without_classes_or_with_one(make_stats, counts):
    images = np.array(counts)
    made = dataclasses.replace(make_stats(len(counts)), image_counts=images, groups=frequency_groups(images))
    found = linear_thresholds(made)
    assert found[:-1].tolist() == [{"r": 0.95, "c": 0.85, "f": 0.75}[g] for g in made.groups]


def classes_slow(boxes, truths, labels):
    """(best IoU, its class) of each box; (0, None) without objects."""
    best = []
    for box in boxes:
        found = [(iou_slow(box, truth), label) for truth, label in zip(truths, labels, strict=True)]
        best.append(max(found, key=lambda pair: pair[0], default=(0.0, None)))
    return best


@pytest.mark.parametrize("truths", [0, 1, 6])
@pytest.mark.parametrize("seed", range(3))
def test_linear_form(stats, device, seed, truths):
    boxes, scores, around, labels = case(seed, truths=truths)
    thresholds = linear_thresholds(stats)
    own = classes_slow(boxes.tolist(), around.tolist(), labels.tolist())
    want = nms_slow(boxes.double().tolist(), [thresholds[c] if iou >= 0.3 else 0.65 for iou, c in own])
    resampling = NMSResampling("linear", stats).to(device)
    assert resampling(*(x.to(device) for x in (boxes, scores, around, labels))).tolist() == want


@pytest.mark.parametrize("truths", [0, 1, 6])
@pytest.mark.parametrize("seed", range(3))
def test_discrete_form(stats, device, seed, truths):
    boxes, scores, around, labels = case(seed, truths=truths)
    near = [
        {str(stats.groups[y]) for t, y in zip(around.tolist(), labels.tolist(), strict=True) if iou_slow(b, t) >= 0.3}
        for b in boxes.tolist()
    ]
    want = []
    for group, threshold in (("r", 0.9), ("c", 0.8), ("f", 0.7)):
        kept = nms_slow(boxes.double().tolist(), [threshold] * len(boxes))
        want += [i for i in kept if (group in near[i] if group != "f" else not near[i] & {"r", "c"})]
    resampling = NMSResampling("discrete", stats).to(device)
    found = resampling(*(x.to(device) for x in (boxes, scores, around, labels))).tolist()
    assert found == sorted(want)


@pytest.mark.parametrize("kind", ["discrete", "linear"])
def test_equal_thresholds_give_plain_nms(stats, device, kind, monkeypatch):
    """Of the discrete form, boxes near both a rare and a common object come twice."""
    monkeypatch.setattr(nms_resampling, "DISCRETE", (0.6, 0.6, 0.6))
    resampling = NMSResampling(kind, stats).to(device)
    resampling.threshold_L.fill_(0.6)
    twice = 0
    for seed in range(10):
        boxes, scores, around, labels = (x.to(device) for x in case(seed))
        found = resampling(boxes, scores, around, labels).tolist()
        assert sorted(set(found)) == nms(boxes, scores, 0.6).tolist()
        twice += len(found) - len(set(found))
    assert (twice > 0) == (kind == "discrete")


def test_no_boxes(stats, device):
    none = torch.zeros((0, 4), device=device)
    for kind in ("discrete", "linear"):
        resampling = NMSResampling(kind, stats).to(device)
        assert resampling(none, none[:, 0], none, none[:, 0].long()).tolist() == []


@pytest.mark.parametrize("kind", ["discrete", "linear"])
def test_rare_objects_keep_more_proposals_where_the_truth_is_known(make_model, make_stats, batch, kind):
    model = make_model(config=dataclasses.replace(SMALL, rpn=RPNConfig(pre_nms_train=200, post_nms=1000)))
    rare = np.ones(CLASSES, np.int64)
    stats = dataclasses.replace(make_stats(CLASSES), image_counts=rare, groups=frequency_groups(rare))
    images, sizes, _ = model.batch_images([sample["image"] for sample in batch])
    features = model.features(images)
    inputs = (*model.rpn(features), model.rpn.anchors(features), sizes)
    known = [(sample["boxes"], sample["labels"]) for sample in batch]
    plain = model.rpn.proposals(*inputs, known)
    model.rpn.resampling = NMSResampling(kind, stats)
    for ours, theirs, tested in zip(
        model.rpn.proposals(*inputs, known), plain, model.rpn.proposals(*inputs), strict=True
    ):
        assert len(ours) > len(theirs)
        torch.testing.assert_close(tested, theirs, rtol=0, atol=0)
    assert all(torch.isfinite(loss) for loss in model.train()(batch).values())
