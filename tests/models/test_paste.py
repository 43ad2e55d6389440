"""Pasting masks against pixel by pixel and mask by mask, and run lengths against pycocotools."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from loce.models.paste import encode_runs, paste_and_encode, paste_full, run_edges
from loce.models.paste import paste as paste_columns


def slow_paste(mask: torch.Tensor, box: list[float], size: tuple[int, int]) -> np.ndarray:
    """Each pixel's centre, in the mask's own coordinates, sampled bilinearly; zeros outside of the mask."""
    side = mask.shape[0]
    m = mask.double().numpy()
    x1, y1, x2, y2 = box
    out = np.zeros(size, bool)

    def at(row: int, column: int) -> float:
        return m[row, column] if 0 <= row < side and 0 <= column < side else 0.0

    for y in range(size[0]):
        for x in range(size[1]):
            u = (x + 0.5 - x1) / (x2 - x1) * side - 0.5
            v = (y + 0.5 - y1) / (y2 - y1) * side - 0.5
            column, row = math.floor(u), math.floor(v)
            a, b = u - column, v - row
            top = at(row, column) * (1 - a) + at(row, column + 1) * a
            bottom = at(row + 1, column) * (1 - a) + at(row + 1, column + 1) * a
            out[y, x] = top * (1 - b) + bottom * b >= 0.5
    return out


def paste(mask: torch.Tensor, box: torch.Tensor, window: tuple[int, int, int, int]) -> torch.Tensor:
    """One mask, bool (h, w)."""
    return paste_columns(mask[None], box[None], torch.tensor([window]))[0].T


def sampled_paste(mask: torch.Tensor, box: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """MMDetection's: `grid_sample` at the pixels' centres of the whole image."""
    x = (torch.arange(size[1]) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    y = (torch.arange(size[0]) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)
    return F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]


@pytest.mark.parametrize(("size", "most"), [((37, 41), 60), ((120, 161), 90), ((300, 500), 400)])
def test_codes_are_those_of_masks_pasted_one_by_one(size, most):
    """Boxes of all sizes, so that groups have windows of several sizes; some reach out of the image."""
    masks, limit = smooth_masks(60), torch.tensor(size[::-1])
    centre, side = torch.rand(60, 2) * limit, torch.rand(60, 2) ** 2 * most + 0.5
    boxes = torch.cat([centre - side / 2, centre + side / 2], dim=1)
    codes = paste_and_encode(masks, boxes, size)
    full = coco_mask.decode([{"size": size, "counts": code} for code in codes])
    assert np.array_equal(paste_full(masks, boxes, size).numpy(), full.transpose(2, 0, 1).astype(bool))
    for mask, box, code in zip(masks, boxes, codes, strict=True):
        share = sampled_paste(mask, box, size)
        wanted = (share >= 0.5).numpy()
        if ((share - 0.5).abs() < 1e-5).any():  # cut one way or the other by rounding
            own = coco_mask.decode({"size": size, "counts": code}).astype(bool)
            assert not (own != wanted)[((share - 0.5).abs() >= 1e-5).numpy()].any()
        else:
            assert code == coco_mask.encode(np.asfortranarray(wanted.astype(np.uint8)))["counts"]


def encode_crop(crop: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> bytes:
    """A bool crop (h, w) placed at corner (x0, y0) of an image (height, width)."""
    window = torch.tensor([[*corner, *corner]])
    piece, position = run_edges(torch.from_numpy(crop.T.copy())[None], window, size[0])
    return encode_runs(piece.numpy(), position.numpy(), 1, size)[0]


def smooth_masks(count: int, side: int = 28) -> torch.Tensor:
    coarse = torch.randn(count, 1, 5, 5)
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")[:, 0].mul(4).sigmoid()


BOXES = [
    [3.2, 4.7, 30.9, 25.1],
    [-8.0, -5.5, 20.0, 18.3],  # out of the image at the upper left
    [25.0, 20.0, 60.0, 50.0],  # and at the lower right
    [10.1, 10.2, 11.0, 10.9],  # within a pixel
    [-10.0, -10.0, 70.0, 60.0],  # larger than the image
    [0.0, 0.0, 40.0, 36.0],  # exactly the image
]


@pytest.mark.parametrize("box", BOXES)
def test_every_pixel(box):
    mask = smooth_masks(1)[0]
    expected = slow_paste(mask, box, (36, 40))
    own = paste(mask, torch.tensor(box), (0, 0, 40, 36)).numpy()
    assert (own != expected).sum() <= 1  # a probability within rounding of one half
    code = {"size": (36, 40), "counts": paste_and_encode(mask[None], torch.tensor([box]), (36, 40))[0]}
    assert (coco_mask.decode(code).astype(bool) == own).all()  # the window misses nothing


def test_a_probability_of_one_half_is_mask():
    """A 1 x 1 box on one pixel samples the middle of the mask, between four cells."""
    mask = torch.zeros(28, 28)
    mask[13:15, 13:15] = 0.5
    assert paste(mask, torch.tensor([5.0, 5.0, 6.0, 6.0]), (5, 5, 6, 6)).tolist() == [[True]]
    mask[13, 13] = 0.49
    assert paste(mask, torch.tensor([5.0, 5.0, 6.0, 6.0]), (5, 5, 6, 6)).tolist() == [[False]]


def test_the_box_is_not_rounded():
    """A full mask over [2.4, 2.6) x ... covers the pixels whose centres lie inside."""
    mask = torch.ones(28, 28)
    own = paste(mask, torch.tensor([2.4, 2.6, 6.4, 6.6]), (0, 0, 10, 10)).numpy()
    columns, rows = np.flatnonzero(own.any(0)), np.flatnonzero(own.any(1))
    assert columns.tolist() == [2, 3, 4, 5] and rows.tolist() == [3, 4, 5, 6][:4]


@pytest.mark.parametrize("box", [[5.0, 5.0, 5.0, 9.0], [5.0, 5.0, 9.0, 5.0], [5.0, 5.0, 5.0, 5.0]])
def test_a_box_without_area_breaks_nothing(box):
    codes = paste_and_encode(smooth_masks(1), torch.tensor([box]), (20, 30))
    assert coco_mask.decode({"size": (20, 30), "counts": codes[0]}).shape == (20, 30)


def test_no_detections():
    assert paste_and_encode(torch.zeros(0, 28, 28), torch.zeros(0, 4), (20, 30)) == []
    assert paste_full(torch.zeros(0, 28, 28), torch.zeros(0, 4), (20, 30)).shape == (0, 20, 30)


def reference_code(crop: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> bytes:
    full = np.zeros(size, np.uint8)
    full[corner[1] : corner[1] + crop.shape[0], corner[0] : corner[0] + crop.shape[1]] = crop
    return coco_mask.encode(np.asfortranarray(full))["counts"]


@pytest.mark.parametrize("seed", range(60))
def test_code_of_random_crops(seed):
    """Crops of all positions and densities, a third of them as high as the image."""
    source = np.random.default_rng(seed)
    size = tuple(int(n) for n in source.integers(3, 14, 2))
    h, w = int(source.integers(1, size[0] + 1)), int(source.integers(1, size[1] + 1))
    h = size[0] if seed % 3 == 0 else h
    corner = (int(source.integers(0, size[1] - w + 1)), int(source.integers(0, size[0] - h + 1)))
    crop = source.random((h, w)) < source.choice([0.1, 0.5, 0.95])
    assert encode_crop(crop, corner, size) == reference_code(crop, corner, size)


@pytest.mark.parametrize(
    ("crop", "corner"),
    [
        (np.ones((6, 4), bool), (0, 0)),  # everything
        (np.zeros((6, 4), bool), (0, 0)),  # nothing
        (np.ones((6, 2), bool), (1, 0)),  # full columns: a run goes on at the top of the next
        (np.array([[1, 1], [0, 0], [0, 0], [0, 0], [0, 0], [1, 1]], bool), (2, 0)),  # touches top and bottom
        (np.ones((1, 1), bool), (3, 5)),  # the last pixel
        (np.ones((1, 1), bool), (0, 0)),  # the first pixel
        (np.zeros((0, 0), bool), (2, 2)),
        (np.zeros((3, 0), bool), (4, 1)),
    ],
)
def test_code_at_the_borders(crop, corner):
    assert encode_crop(crop, corner, (6, 4)) == reference_code(crop, corner, (6, 4))


def test_code_of_a_large_mask():
    """Counts that take several characters each."""
    crop = np.zeros((900, 700), bool)
    crop[10:890, 5:690] = True
    assert encode_crop(crop, (100, 50), (1000, 1200)) == reference_code(crop, (100, 50), (1000, 1200))


@pytest.mark.parametrize("budget", [1, 5000])
def test_a_mask_made_column_by_column_is_the_same(budget):
    """Runs that go on over the parts' borders, masks of all kinds and boxes beyond the image."""
    masks = torch.cat([smooth_masks(len(BOXES)), torch.ones(1, 28, 28), torch.zeros(1, 28, 28)])
    boxes = torch.tensor([*BOXES, [-50.0, -50.0, 90.0, 90.0], [0.0, 0.0, 40.0, 36.0]])
    assert paste_and_encode(masks, boxes, (36, 40), budget) == paste_and_encode(masks, boxes, (36, 40))


MEMORY = """
import resource, torch
from loce.models.paste import BUDGET, paste_and_encode
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
masks = torch.rand(3, 7, 7)
masks = torch.nn.functional.interpolate(masks[:, None], (28, 28), mode="bilinear")[:, 0]
paste_and_encode(masks, torch.tensor([[0.0, 0.0, 600.0, 600.0]] * 3), (600, 600))
before = peak()
codes = paste_and_encode(masks, torch.tensor([[0.0, 0.0, 6000.0, 6000.0]] * 3), (6000, 6000))
print(sum(map(len, codes)) > 3000, (peak() - before) / BUDGET)
"""


def test_masks_of_an_image_of_6000_pixels_a_side_fit_into_the_budget():
    """One of its masks is 36 MB as bytes and 288 MB as sampling coordinates."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    made, times = done.stdout.split()
    assert made == "True" and float(times) < 1.25, done.stdout
