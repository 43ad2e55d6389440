"""Pyramid level of a box, and pooling: the same as RoIAlign called box by box, and as loops over its samples."""

import math

import pytest
import torch
from torchvision.ops import roi_align

from loce.models.roi_heads import pool, pyramid_level


def slow_level(box: list[float], finest: float) -> int:
    x1, y1, x2, y2 = box
    scale = math.sqrt((x2 - x1) * (y2 - y1))
    return min(max(math.floor(math.log2(scale / finest + 1e-6)), 0), 3)


def slow_align(feature: torch.Tensor, box: list[float], stride: int, side: int) -> torch.Tensor:
    """Mean of bilinear samples at the centres of ceil(bin size) points a bin and axis, shifted by half a pixel."""
    height, width = feature.shape
    x1, y1, x2, y2 = (value / stride - 0.5 for value in box)
    bin_w, bin_h = (x2 - x1) / side, (y2 - y1) / side
    samples_x, samples_y = math.ceil((x2 - x1) / side), math.ceil((y2 - y1) / side)
    out = torch.zeros(side, side, dtype=torch.float64)

    def value(y: float, x: float) -> float:
        if y < -1 or y > height or x < -1 or x > width:
            return 0.0
        y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
        y0, x0 = int(y), int(x)
        y1_, x1_ = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
        ly, lx = y - y0, x - x0
        f = feature.double()
        return float(
            f[y0, x0] * (1 - ly) * (1 - lx)
            + f[y0, x1_] * (1 - ly) * lx
            + f[y1_, x0] * ly * (1 - lx)
            + f[y1_, x1_] * ly * lx
        )

    for row in range(side):
        for column in range(side):
            total = 0.0
            for i in range(samples_y):
                for j in range(samples_x):
                    y = y1 + bin_h * (row + (i + 0.5) / samples_y)
                    x = x1 + bin_w * (column + (j + 0.5) / samples_x)
                    total += value(y, x)
            out[row, column] = total / max(samples_x * samples_y, 1)
    return out


@pytest.fixture
def features():
    return [torch.randn(2, 5, 256 // stride, 320 // stride) for stride in (4, 8, 16, 32)]


def test_level_boundaries():
    """112 and 224 pixels belong to the coarser level, exactly."""
    sides = torch.tensor([1.0, 55, 56, 111.9, 112, 223.9, 224, 447.9, 448, 5000])
    boxes = torch.stack([torch.zeros(10), torch.zeros(10), sides, sides], dim=1)
    assert pyramid_level(boxes, 56.0).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_level_of_random_boxes():
    corner = torch.rand(500, 2) * 100
    boxes = torch.cat([corner, corner + torch.exp(torch.rand(500, 2) * 7)], dim=1)
    for finest in (56.0, 8.0):
        assert pyramid_level(boxes, finest).tolist() == [slow_level(box, finest) for box in boxes.double().tolist()]


def test_level_of_boxes_without_area():
    assert pyramid_level(torch.tensor([[5.0, 5, 5, 9], [5, 5, 5, 5], [9, 9, 5, 5]]), 56.0).tolist()[:2] == [0, 0]


@pytest.mark.parametrize("side", [7, 14])
def test_equals_roi_align_box_by_box(features, side):
    """Boxes of all levels and both images, interleaved, some reaching out of the image: order is kept."""
    boxes = []
    for _ in range(2):
        corner = torch.rand(30, 2) * 200 - 20
        boxes.append(torch.cat([corner, corner + torch.exp(torch.rand(30, 2) * 5 + 1)], dim=1))
    levels = pyramid_level(torch.cat(boxes), 56.0)
    assert len(levels.unique()) >= 3
    pooled = pool(features, boxes, side, 56.0)
    expected = []
    for image, own in enumerate(boxes):
        for box in own:
            level = slow_level(box.tolist(), 56.0)
            feature = features[level][image : image + 1]
            expected.append(roi_align(feature, [box[None]], side, 1 / (4 * 2**level), 0, aligned=True)[0])
    torch.testing.assert_close(pooled, torch.stack(expected), rtol=0, atol=0)
    with torch.no_grad():  # boxes of one level are not put into another order
        for level in levels.unique():
            own = [b[pyramid_level(b, 56.0) == level] for b in boxes]
            assert torch.equal(pool(features, own, side, 56.0), pooled[levels == level])


@pytest.mark.parametrize("box", [[10.3, 20.7, 75.2, 51.1], [-12.0, -9.0, 30.0, 40.0], [280.0, 230.0, 330.0, 300.0]])
def test_equals_bilinear_sampling_by_hand(features, box):
    """Aligned (half a pixel), adaptive number of samples: ceil(size / bins), not 2."""
    pooled = pool(features, [torch.tensor([box]), torch.zeros(0, 4)], 7, 56.0)
    level = slow_level(box, 56.0)
    expected = slow_align(features[level][0, 3], box, 4 * 2**level, 7)
    torch.testing.assert_close(pooled[0, 3].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_box_without_area_gives_zeros(features):
    boxes = torch.tensor([[50.0, 60, 50, 60], [50, 60, 90, 60]])
    assert (pool(features, [boxes, boxes[:0]], 7, 56.0) == 0).all()


def test_no_boxes(features):
    none = torch.zeros(0, 4)
    assert pool(features, [none, none], 7, 56.0).shape == (0, 5, 7, 7)


def test_gradients_reach_the_levels_that_were_used(features):
    for feature in features:
        feature.requires_grad_()
    pool(features, [torch.tensor([[0.0, 0, 20, 20]]), torch.tensor([[0.0, 0, 250, 250]])], 7, 56.0).sum().backward()
    used = [feature.grad is not None and bool(feature.grad.abs().sum() > 0) for feature in features]
    assert used == [True, False, True, False]


def test_a_box_that_is_no_number_keeps_its_row(features):
    """What a diverged model makes: each such box gives a row of zeros, the others are pooled as ever."""
    nan, inf = math.nan, math.inf
    broken = torch.tensor([[nan, nan, nan, nan], [5.0, 5, nan, 30], [nan, 5, 50, 30], [0, 0, inf, 9]])
    fine = torch.tensor([[10.0, 10, 200, 150], [3, 4, 30, 40]])
    assert pyramid_level(broken[:3], 56.0).tolist() == [0, 0, 0]
    pooled = pool(features, [torch.cat([broken[:2], fine]), broken[2:]], 7, 56.0)
    assert len(pooled) == 6 and (pooled[[0, 1, 4, 5]] == 0).all()
    assert torch.equal(pooled[2:4], pool(features, [fine, broken[:0]], 7, 56.0))
