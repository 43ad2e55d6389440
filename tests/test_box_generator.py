"""The box generator against plain loops written from Eq. 5."""

import itertools

import pytest
import torch

from loce.box_generator import choose_instances, dense_boxes, valid


def dense_boxes_slow(boxes, image_size, eta):
    """Eq. 5 in Python floats: x1 +- eta1 w/6, y1 +- eta2 h/6, x2 +- eta3 w/6, y2 +- eta4 h/6, cut to the image."""
    height, width = image_size
    result = []
    for (x1, y1, x2, y2), eta_box in zip(boxes, eta, strict=True):
        w, h = x2 - x1, y2 - y1
        rows = []
        for signs, (e1, e2, e3, e4) in zip(itertools.product((-1, 1), repeat=4), eta_box, strict=True):
            x1_, y1_ = x1 + signs[0] * e1 * w / 6, y1 + signs[1] * e2 * h / 6
            x2_, y2_ = x2 + signs[2] * e3 * w / 6, y2 + signs[3] * e4 * h / 6
            rows.append(
                [
                    min(max(x1_, 0), width),
                    min(max(y1_, 0), height),
                    min(max(x2_, 0), width),
                    min(max(y2_, 0), height),
                ]
            )
        result.append(rows)
    return torch.tensor(result, dtype=torch.float64).reshape(-1, 16, 4)


def random_boxes(count, height, width, generator):
    """Boxes (count, 4) float32 of all sizes down to a point, inside the image, many of them at its border."""
    a = torch.rand(count, 2, 2, generator=generator) * 1.4 - 0.2
    corners = a.clamp(0, 1).sort(dim=1).values * torch.tensor([width, height])
    return corners.reshape(count, 4)


def iou(a, b):
    """IoU of boxes a (..., 4) and b (..., 4), in float64."""
    a, b = a.double(), b.double()
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    area = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
    return overlap / (area - overlap)


def test_dense_boxes_equal_the_equation(device):
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        height, width = 50 + 17 * trial, 400 - 13 * trial
        boxes = random_boxes(trial, height, width, generator)
        eta = torch.rand(trial, 16, 4, generator=generator)
        got = dense_boxes(boxes.to(device), (height, width), eta.to(device))
        assert got.shape == (trial, 16, 4)
        assert got.dtype == torch.float32
        assert got.device.type == device.type
        want = dense_boxes_slow(boxes.double().tolist(), (height, width), eta.double().tolist())
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=1e-4)


def test_order_of_the_sign_patterns():
    got = dense_boxes(torch.tensor([[60.0, 60.0, 120.0, 180.0]]), (1000, 1000), torch.ones(1, 16, 4))[0]
    step = torch.tensor([10.0, 20.0, 10.0, 20.0])  # a sixth of width 60, height 120
    signs = (got - torch.tensor([60.0, 60.0, 120.0, 180.0])) / step
    assert signs[:3].tolist() == [[-1, -1, -1, -1], [-1, -1, -1, 1], [-1, -1, 1, -1]]
    assert signs[8].tolist() == [1, -1, -1, -1]
    assert signs[15].tolist() == [1, 1, 1, 1]
    assert len({tuple(row) for row in signs.tolist()}) == 16


def test_each_box_has_its_own_eta_from_the_generator(device):
    boxes = torch.tensor([[10.0, 20.0, 70.0, 90.0]] * 50, device=device)

    def draw(seed):
        return dense_boxes(boxes, (200, 200), generator=torch.Generator(device).manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    shift = (draw(1) - boxes[:, None]).abs() / torch.tensor([10.0, 70 / 6, 10.0, 70 / 6], device=device)
    assert len(shift.flatten().unique()) > 3000  # 3200 independent numbers, not one 4 x 16 matrix for all
    assert 0.48 < shift.mean() < 0.52
    assert shift.min() >= 0
    assert shift.max() <= 1 + 1e-5


def test_iou_with_the_instance_is_at_least_four_ninths():
    """The paper says the IoU is above 0.5: it is not when all sides move inwards, though that is rare."""
    box = torch.tensor([[100.0, 100.0, 160.0, 190.0]])
    whole = iou(dense_boxes(box, (500, 500), torch.ones(1, 16, 4)), box)[0]
    assert whole.min().item() == pytest.approx(4 / 9)
    assert whole.argmin().item() == 0b1100  # x1, y1 grow, x2, y2 shrink
    drawn = iou(dense_boxes(box.expand(40000, 4), (500, 500), generator=torch.Generator().manual_seed(3)), box)
    assert drawn.min() > 4 / 9
    assert 0 < (drawn < 0.5).double().mean() < 1e-3
    assert drawn.mean().item() == pytest.approx(0.726, abs=0.002)


def test_boxes_under_a_pixel_are_not_valid():
    boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 0.99, 5], [3, 3, 9, 3.5], [5, 5, 5, 5], [2, 2, 40, 3]])
    assert valid(boxes).tolist() == [True, False, False, False, True]
    assert valid(boxes[None, :, :], min_side=0.5).tolist() == [[True, True, True, False, True]]
    # A thin instance at the right border: the boxes moved outwards are cut to nothing, the others stay.
    edge = dense_boxes(torch.tensor([[98.8, 10.0, 100.0, 40.0]]), (100, 100), torch.ones(1, 16, 4))
    assert valid(edge).tolist() == [[bool(side >= 1) for side in (edge[0, :, 2] - edge[0, :, 0])]]
    assert 0 < valid(edge).sum() < 16


def test_choose_instances_keeps_at_most_so_many_of_a_class():
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        labels = torch.randint(-2, 1 + trial % 7, (trial % 40,), generator=generator)
        chosen = choose_instances(labels, 5, generator)
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        for label in set(labels.tolist()):
            have, took = (labels == label).sum(), (labels[chosen] == label).sum()
            assert took == (min(have, 5) if label >= 0 else 0)


def test_choose_instances_is_uniform_and_reproducible():
    labels = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1])  # 6 of class 1 and 2 of class 0, at most 2 of each
    generator = torch.Generator().manual_seed(1)
    times = torch.zeros(8)
    pairs = set()
    for _ in range(3000):
        chosen = choose_instances(labels, 2, generator)
        times[chosen] += 1
        pairs.add(tuple(i for i in chosen.tolist() if labels[i] == 1))
    assert times[labels == 0].tolist() == [3000, 3000]
    # binomial(3000, 1/3): standard deviation 26
    torch.testing.assert_close(times[labels == 1], torch.full((6,), 1000.0), rtol=0, atol=110)
    assert len(pairs) == 15
    again = [choose_instances(labels, 2, torch.Generator().manual_seed(5)).tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_choose_instances_refuses_labels_on_a_device():
    with pytest.raises(ValueError, match="cpu"):
        choose_instances(torch.zeros(3, dtype=torch.long, device="meta"), 5)
