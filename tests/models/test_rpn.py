"""Anchors, which of them count, proposals and losses of the RPN, each against loops."""

import math

import pytest
import torch

from loce.config import RPNConfig
from loce.models.boxes import BETWEEN, NEGATIVE, RPN_STDS, choose_random, decode, encode
from loce.models.rpn import RPN, STRIDES, level_anchors, level_validity

CPU = torch.device("cpu")
SIZES = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]  # maps of a padded 64 x 96 image


def slow_anchors(height: int, width: int, stride: int, scale: float) -> list[list[float]]:
    boxes = []
    for y in range(height):
        for x in range(width):
            for ratio in (0.5, 1.0, 2.0):
                w, h = scale * stride / math.sqrt(ratio), scale * stride * math.sqrt(ratio)
                boxes.append([x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2])
    return boxes


@pytest.fixture
def rpn():
    return RPN(8, RPNConfig(pre_nms_train=50, pre_nms_test=20, post_nms=30, batch_per_image=32))


@pytest.fixture
def maps(rpn):
    features = [torch.randn(2, 8, *size) for size in SIZES]
    with torch.no_grad():  # livelier than the initialisation
        for layer in (rpn.head.cls_logits, rpn.head.bbox_pred):
            layer.weight.normal_(std=0.3)
    logits, deltas = rpn(features)
    return features, logits, deltas, rpn.anchors(features)


@pytest.mark.parametrize("scale", [8.0, 4.0])
def test_anchors(scale):
    for stride in STRIDES:
        own = level_anchors(3, 5, stride, scale, CPU)
        expected = torch.tensor(slow_anchors(3, 5, stride, scale), dtype=torch.float64).float()
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-4)


def test_anchors_are_not_rounded():
    first = level_anchors(1, 1, 4, 8.0, CPU)[0]
    assert first[2].item() == pytest.approx(16 * math.sqrt(2), rel=1e-6)  # 22.63, and not 23
    assert first[3].item() == pytest.approx(16 / math.sqrt(2), rel=1e-6)


def test_strides_do_not_depend_on_the_maps_size(rpn):
    """A padded width of 416 gives P6 a width of 7: its anchors still stand 64 pixels apart."""
    anchors = rpn.anchors([torch.zeros(1, 8, 80 // 2**i, 104 // 2**i) for i in range(4)] + [torch.zeros(1, 8, 5, 7)])
    centres = (anchors[4][:, 0] + anchors[4][:, 2]) / 2
    torch.testing.assert_close(centres.reshape(5, 7, 3)[0, :, 0], torch.arange(7) * 64.0)


def test_anchors_of_the_batch_padding_are_invalid():
    """An image padded to 40 x 33 itself, in a batch of 64 x 64: cells ceil(40 / 16) x ceil(33 / 16) are its own."""
    valid = level_validity(4, 4, 16, (40, 33), CPU).reshape(4, 4, 3)
    assert valid[:3, :3].all() and not valid[3:].any() and not valid[:, 3:].any()


def test_anchors_that_cross_the_border_stay_valid():
    assert level_validity(4, 4, 16, (64, 64), CPU).all()


def test_flattening_is_row_column_ratio(rpn):
    feature = torch.randn(1, 8, 3, 4)
    logits, deltas = rpn([feature])
    raw_logits, raw_deltas = rpn.head([feature])
    for y in range(3):
        for x in range(4):
            for ratio in range(3):
                index = (y * 4 + x) * 3 + ratio
                assert logits[0][0, index] == raw_logits[0][0, ratio, y, x]
                assert (deltas[0][0, index] == raw_deltas[0][0, 4 * ratio : 4 * ratio + 4, y, x]).all()


def slow_proposals(logits, deltas, anchors, size, pre_nms, post_nms):
    """Per level: the best, decoded and clipped, NMS; then the best of all levels."""
    found = []
    for level_logits, level_deltas, level_anchors_ in zip(logits, deltas, anchors, strict=True):
        order = sorted(range(len(level_logits)), key=lambda i: -float(level_logits[i]))[:pre_nms]
        boxes = [decode(level_anchors_[i][None], level_deltas[i][None], RPN_STDS, size)[0] for i in order]
        scores = [1 / (1 + math.exp(-float(level_logits[i]))) for i in order]
        kept: list[int] = []
        for i, box in enumerate(boxes):
            if all(float(_iou(box, boxes[j])) <= 0.7 for j in kept):
                kept.append(i)
        found += [(scores[i], boxes[i]) for i in kept]
    found.sort(key=lambda pair: -pair[0])
    return torch.stack([box for _, box in found[:post_nms]])


def _iou(a, b):
    w = max(0.0, min(float(a[2]), float(b[2])) - max(float(a[0]), float(b[0])))
    h = max(0.0, min(float(a[3]), float(b[3])) - max(float(a[1]), float(b[1])))
    areas = [(float(x[2]) - float(x[0])) * (float(x[3]) - float(x[1])) for x in (a, b)]
    return w * h / max(sum(areas) - w * h, 1e-9)


@pytest.mark.parametrize(("training", "pre_nms"), [(True, 50), (False, 20)])
def test_proposals_against_loops(rpn, maps, training, pre_nms):
    _, logits, deltas, anchors = maps
    rpn.train(training)
    sizes = [(64, 96), (50, 70)]  # the content of each image, not the padded size
    proposals = rpn.proposals(logits, deltas, anchors, sizes)
    for image, size in enumerate(sizes):
        own = [x[image].detach() for x in logits], [x[image].detach() for x in deltas]
        expected = slow_proposals(*own, anchors, size, pre_nms, 30)
        torch.testing.assert_close(proposals[image], expected)
        assert proposals[image][:, 2].max() <= size[1] and proposals[image][:, 3].max() <= size[0]
        assert not proposals[image].requires_grad


def test_proposals_without_area_stay(rpn):
    """An anchor that lies outside the image is clipped to nothing; it is kept, since its score is the best."""
    anchors = [torch.tensor([[100.0, 10, 130, 40], [10, 10, 40, 40]])] * 5
    logits = [torch.tensor([[3.0, 2.0]])] + [torch.tensor([[-9.0, -9.0]])] * 4
    proposals = rpn.proposals(logits, [torch.zeros(1, 2, 4)] * 5, anchors, [(64, 96)])[0]
    assert proposals[0].tolist() == [96, 10, 96, 40]


def test_nms_of_proposals_keeps_an_iou_of_exactly_the_threshold():
    rpn = RPN(8, RPNConfig(nms=0.5))
    anchors = [torch.tensor([[0.0, 0, 16, 16], [0, 0, 16, 8], [0, 0, 16, 9]])] + [torch.tensor([[0.0, 0, 1, 1]])] * 4
    logits = [torch.tensor([[3.0, 2.0, 1.0]])] + [torch.tensor([[-1.0]])] * 4
    deltas = [torch.zeros(1, len(x), 4) for x in anchors]
    proposals = rpn.proposals(logits, deltas, anchors, [(64, 96)])[0].tolist()
    assert [0, 0, 16, 8] in proposals  # IoU 1/2 with the best: only more is too much
    assert [0, 0, 16, 9] not in proposals
    assert proposals.count([0, 0, 1, 1]) == 4  # NMS runs level by level


def test_the_head_at_some_anchors_is_the_head_everywhere(rpn):
    """Values and every gradient, at corners and borders of all levels, with anchors that are asked for twice."""
    rpn = rpn.double()
    features = [torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True) for size in SIZES]
    every = sum(3 * h * w for h, w in SIZES)
    picked = torch.cat([torch.arange(0, every, 7), torch.arange(every - 9, every), torch.arange(12)])
    weight_K5 = torch.randn(len(picked), 5, dtype=torch.float64)

    def gradients(logits, deltas):
        loss = (torch.cat([logits[:, None], deltas], 1) * weight_K5).sum()
        return torch.autograd.grad(loss, [*features, *rpn.parameters()])

    logits, deltas = (torch.cat(x, dim=1)[1, picked] for x in rpn(features))
    other = torch.zeros_like(picked)  # of the first image, without a weight in the loss
    own_logits, own_deltas = (x[1] for x in rpn.at(features, torch.stack([other, picked])))
    torch.testing.assert_close(own_logits, logits)
    torch.testing.assert_close(own_deltas, deltas)
    for own, expected in zip(gradients(own_logits, own_deltas), gradients(logits, deltas), strict=True):
        assert expected.any()
        torch.testing.assert_close(own, expected)


def test_a_forward_pass_without_gradients_before_takes_none_away_under_autocast(rpn):
    """Autocast keeps weights that it has cast; those of a pass under no_grad must not be used for the losses."""
    features = [torch.randn(1, 8, *size) for size in SIZES]
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            rpn(features)
        logits, deltas = rpn.at(features, torch.arange(100)[None])
    (logits.float().sum() + deltas.float().sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in rpn.parameters())


def slow_losses(logits, deltas, anchors, truths, chosen):
    """chosen: per image (positives, negatives) as lists; matched by the caller."""
    bce, l1, count = 0.0, 0.0, 0
    logits, deltas = logits.detach(), deltas.detach()
    for image, (positives, matched, negatives) in enumerate(chosen):
        for index in positives:
            bce += math.log1p(math.exp(-float(logits[image, index])))
            target = encode(anchors[index][None], truths[image][matched[index]][None], RPN_STDS)[0]
            l1 += sum(abs(float(d) - float(t)) for d, t in zip(deltas[image, index], target, strict=True))
        for index in negatives:
            bce += math.log1p(math.exp(float(logits[image, index])))
        count += max(len(positives), 1) + max(len(negatives), 1)
    return bce / count, l1 / count


TRUTHS = [torch.tensor([[4.0, 6, 40, 50], [30, 20, 90, 60]]), torch.tensor([[10.0, 10, 60, 50]])]


def run_losses(rpn, maps, truths, padded):
    """The losses, and per image what was chosen: (positives, matched, negatives)."""
    features, _, _, anchors = maps
    calls = []

    def spy(candidates, limit, slots, generator):
        indices, valid = choose_random(candidates, limit, slots, generator)
        calls.append(indices[valid].tolist())
        return indices, valid

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loce.models.boxes.choose_random", spy)
        sums = rpn.losses(features, anchors, padded, truths)
        losses = sums.divided(sums.number)
    every = torch.cat(anchors)
    chosen = []
    for image, boxes in enumerate(truths):
        chosen.append((calls[2 * image], rpn.match(every, boxes), calls[2 * image + 1]))
    return losses, chosen


def test_losses_against_loops(rpn, maps):
    _, logits, deltas, anchors = maps
    losses, chosen = run_losses(rpn, maps, TRUTHS, [(64, 96), (64, 96)])
    assert all(positives and negatives for positives, _, negatives in chosen)
    bce, l1 = slow_losses(torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors), TRUTHS, chosen)
    assert losses["loss_rpn_cls"].item() == pytest.approx(bce, rel=1e-5)
    assert losses["loss_rpn_box"].item() == pytest.approx(l1, rel=1e-5)


def test_padding_of_the_batch_is_never_sampled(rpn, maps):
    features, _, _, anchors = maps
    padded = [(64, 96), (32, 64)]
    _, chosen = run_losses(rpn, maps, TRUTHS, padded)
    shapes = [tuple(x.shape[2:]) for x in features]
    valid = torch.cat([level_validity(h, w, s, padded[1], CPU) for (h, w), s in zip(shapes, STRIDES, strict=True)])
    assert valid[chosen[1][0]].all() and valid[chosen[1][2]].all()
    assert not valid.all() and len(valid) == sum(len(x) for x in anchors)


def test_an_image_without_objects_counts_at_least_one_positive(rpn, maps):
    """All 32 of its anchors are negatives, and its part of the divisor is 1 + 32."""
    _, logits, deltas, anchors = maps
    truths = [TRUTHS[0], torch.zeros(0, 4)]
    losses, chosen = run_losses(rpn, maps, truths, [(64, 96)] * 2)
    assert chosen[1][0] == [] and len(chosen[1][2]) == 32
    bce, l1 = slow_losses(torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors), truths, chosen)
    assert losses["loss_rpn_cls"].item() == pytest.approx(bce, rel=1e-5)
    assert losses["loss_rpn_box"].item() == pytest.approx(l1, rel=1e-5)


def test_a_batch_without_objects_still_gives_every_parameter_a_gradient(rpn, maps):
    losses, _ = run_losses(rpn, maps, [torch.zeros(0, 4)] * 2, [(64, 96)] * 2)
    assert losses["loss_rpn_box"].item() == 0 and losses["loss_rpn_cls"].item() > 0
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in rpn.parameters())


def test_thresholds_of_the_assigner(rpn):
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 2], [0, 0, 10, 8]])
    truth = torch.tensor([[0.0, 0, 10, 10]])
    assert rpn.match(anchors, truth).tolist() == [0, BETWEEN, NEGATIVE, 0]
