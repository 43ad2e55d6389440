"""Box arithmetic against plain loops in float64, and the conventions that whole-model numbers do not show."""

import math

import pytest
import torch

from loce.models.boxes import MAX_LOG_RATIO, ROI_STDS, RPN_STDS, box_iou, clip, constants, decode, encode, finite


def random_boxes(count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    corner = torch.rand(count, 2, dtype=dtype) * 60
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, dtype=dtype) * 40], dim=1)


def slow_iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / max(union, 1e-6)


def slow_decode(reference: list[float], deltas: list[float], stds: tuple[float, ...], size: tuple[int, int]):
    x1, y1, x2, y2 = reference
    dx, dy, dw, dh = (d * s for d, s in zip(deltas, stds, strict=True))
    limit = abs(math.log(16 / 1000))
    dw, dh = (min(max(d, -limit), limit) for d in (dw, dh))
    cx, cy = (x1 + x2) / 2 + (x2 - x1) * dx, (y1 + y2) / 2 + (y2 - y1) * dy
    w, h = (x2 - x1) * math.exp(dw), (y2 - y1) * math.exp(dh)
    height, width = size
    corners = (cx - w / 2, width), (cy - h / 2, height), (cx + w / 2, width), (cy + h / 2, height)
    return [min(max(value, 0.0), limit) for value, limit in corners]


def test_iou_of_many_boxes():
    boxes, others = random_boxes(40), random_boxes(30)
    slow = [[slow_iou(a, b) for b in others.tolist()] for a in boxes.tolist()]
    torch.testing.assert_close(box_iou(boxes, others), torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=0)


def test_iou_has_no_plus_one():
    """Two halves of a 2 x 1 box share an edge, which is no area; a box of one pixel has area 1."""
    boxes = torch.tensor([[0.0, 0, 1, 1], [1, 0, 2, 1], [0, 0, 2, 1]])
    torch.testing.assert_close(box_iou(boxes, boxes), torch.tensor([[1, 0, 0.5], [0, 1, 0.5], [0.5, 0.5, 1]]))


def test_boxes_of_no_area_overlap_nothing_not_even_themselves():
    flat = torch.tensor([[5.0, 5, 5, 9], [5, 5, 5, 5]])
    assert (box_iou(flat, flat) == 0).all()
    assert (box_iou(flat, torch.tensor([[0.0, 0, 10, 10]])) == 0).all()


def test_union_is_at_least_a_millionth():
    tiny = torch.tensor([[0.0, 0, 1e-4, 1e-3]], dtype=torch.float64)  # area 1e-7, below 1e-6
    torch.testing.assert_close(box_iou(tiny, tiny), torch.tensor([[0.1]], dtype=torch.float64))


@pytest.mark.parametrize("empty", [(0, 3), (3, 0)])
def test_iou_of_no_boxes(empty):
    assert box_iou(torch.zeros(empty[0], 4), torch.zeros(empty[1], 4)).shape == empty


def test_encode_by_hand():
    reference, target = torch.tensor([[10.0, 20, 30, 60]]), torch.tensor([[20.0, 20, 60, 40]])
    expected = torch.tensor([[1.0, -0.25, math.log(2), -math.log(2)]])
    torch.testing.assert_close(encode(reference, target, RPN_STDS), expected)
    torch.testing.assert_close(encode(reference, target, ROI_STDS), expected / torch.tensor([0.1, 0.1, 0.2, 0.2]))


def test_encode_works_in_fp32_whatever_comes():
    reference, target = random_boxes(5, torch.float32), random_boxes(5, torch.float32)
    assert encode(reference.double(), target.double(), ROI_STDS).dtype == torch.float32
    assert encode(reference.bfloat16(), target.bfloat16(), ROI_STDS).dtype == torch.float32


@pytest.mark.parametrize("stds", [RPN_STDS, ROI_STDS])
def test_decode_of_random_deltas(stds):
    """Deltas large enough that clamps and clips of either side take part."""
    size = (70, 90)
    references, deltas = random_boxes(300, torch.float32), torch.randn(300, 4) * 6 / torch.tensor(stds) ** 0.5
    slow = [slow_decode(r, d, stds, size) for r, d in zip(references.tolist(), deltas.tolist(), strict=True)]
    expected = torch.tensor(slow, dtype=torch.float64).float()
    assert (expected == 0).any() and (expected == 90).any() and (expected == 70).any()
    torch.testing.assert_close(decode(references, deltas, stds, size), expected, rtol=1e-4, atol=1e-3)


def test_both_sides_of_the_clamp():
    """A box may grow by at most 1000/16 and shrink to no less than 16/1000 of its side."""
    reference = torch.tensor([[100.0, 100, 200, 200]])
    huge = decode(reference, torch.tensor([[0.0, 0, 9, 9]]), RPN_STDS, (10**5, 10**5))
    tiny = decode(reference, torch.tensor([[0.0, 0, -9, -9]]), RPN_STDS, (10**5, 10**5))
    torch.testing.assert_close(tiny[0, 2:] - tiny[0, :2], torch.tensor([1.6, 1.6]), rtol=1e-4, atol=0)
    assert huge[0, 2:].tolist() == pytest.approx([150 + 3125, 150 + 3125]) and (huge[0, :2] == 0).all()
    assert pytest.approx(math.log(1000 / 16)) == MAX_LOG_RATIO


def test_the_clamp_comes_after_the_stds():
    """dw = 10 with std 0.2 is a factor exp(2): not clamped."""
    reference = torch.tensor([[100.0, 100, 110, 110]])
    box = decode(reference, torch.tensor([[0.0, 0, 10, 0]]), ROI_STDS, (1000, 1000))
    assert float(box[0, 2] - box[0, 0]) == pytest.approx(10 * math.exp(2), rel=1e-5)


def test_decode_undoes_encode():
    references, targets = random_boxes(50, torch.float32), random_boxes(50, torch.float32)
    for stds in (RPN_STDS, ROI_STDS):
        decoded = decode(references, encode(references, targets, stds), stds, (200, 200))
        torch.testing.assert_close(decoded, targets, rtol=1e-5, atol=1e-4)


def test_one_reference_for_the_deltas_of_all_classes():
    references, deltas = random_boxes(4, torch.float32), torch.randn(4, 3, 4)
    together = decode(references[:, None], deltas, ROI_STDS, (64, 64))
    for label in range(3):
        torch.testing.assert_close(together[:, label], decode(references, deltas[:, label], ROI_STDS, (64, 64)))


def test_clip_reaches_width_and_height():
    box = torch.tensor([[-3.0, -4, 500, 600]])
    assert clip(box, (70, 90)).tolist() == [[0, 0, 90, 70]]  # not 89, 69
    assert clip(torch.tensor([[95.0, 10, 99, 20]]), (70, 90)).tolist() == [[90, 10, 90, 20]]  # of no width, kept


def test_boxes_that_are_no_numbers_become_empty_and_others_stay():
    boxes = torch.tensor([[1.0, 2, 3, 4], [1, 2, math.nan, 4], [1, 2, math.inf, 4], [-5, -6, 0, 1]])
    assert finite(boxes).tolist() == [[1, 2, 3, 4], [0, 0, 0, 0], [0, 0, 0, 0], [-5, -6, 0, 1]]


def test_constants():
    assert torch.equal(constants(ROI_STDS, torch.device("cpu")), torch.tensor(ROI_STDS))
