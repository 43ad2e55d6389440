"""Cropped masks against full-size masks: filling, cutting, resizing, flipping and RoIAlign."""

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import roi_align

from loce.data.annotations.run_lengths import decode_runs
from loce.data.annotations.segmentations import SegmentationBuilder
from loce.data.masks import MARGIN, CroppedMasks, cut_runs, nearest_source, resize_crop
from loce.models.mask_head import mask_targets
from tests.data.made_annotations import full_mask, uncompressed


def random_mask(rng, height, width):
    """A few rectangles, or noise, or nothing, or everything."""
    mask = np.zeros((height, width), np.uint8)
    for _ in range(int(rng.integers(0, 4))):
        y0, y1 = np.sort(rng.integers(0, height + 1, 2))
        x0, x1 = np.sort(rng.integers(0, width + 1, 2))
        mask[y0:y1, x0:x1] ^= 1
    if rng.random() < 0.1:
        mask ^= rng.integers(0, 2, mask.shape, dtype=np.uint8)
    return mask


def nasty_polygon(rng, height, width):
    """Corners inside and far outside, on the grid where rounding is decided, repeated, collinear."""
    corners = rng.uniform([-0.5 * width, -0.5 * height], [1.5 * width, 1.5 * height], (int(rng.integers(3, 12)), 2))
    if rng.random() < 0.5:
        corners = corners.clip(0, [width, height])
    steps = (None, 1, 2, 5, 10, 20)[int(rng.integers(6))]
    if steps:
        corners = np.round(corners * steps) / steps
    if rng.random() < 0.2:
        corners[1] = corners[0]
    if rng.random() < 0.2:
        corners[:, int(rng.integers(2))] = corners[0, 0]
    return corners.ravel().tolist()


def pasted(bits, corner, height, width):
    full = np.zeros((height, width), np.uint8)
    full[corner[1] : corner[1] + bits.shape[0], corner[0] : corner[0] + bits.shape[1]] = bits
    return full


def test_polygons_are_filled_as_the_coco_library_fills_them():
    """Corners kept in fifths of a pixel and masks cut out of run lengths lose nothing, for thousands of polygons."""
    rng = np.random.default_rng(0)
    empty = 0
    for _ in range(1000):
        height, width = (int(side) for side in rng.integers(1, 80, 2))
        instances = [[nasty_polygon(rng, height, width) for _ in range(int(rng.integers(1, 3)))] for _ in range(3)]
        builder = SegmentationBuilder()
        for parts in instances:
            builder.add(parts)
        runs = builder.finish().runs(np.arange(3), height, width)
        for parts, own in zip(instances, runs, strict=True):
            bits, corner = cut_runs(own, height)
            expected = full_mask(parts, height, width)
            np.testing.assert_array_equal(pasted(bits, corner, height, width), expected)
            empty += not expected.any()
            if bits.size:  # tight
                assert bits[0].any() and bits[-1].any() and bits[:, 0].any() and bits[:, -1].any()
    assert 0 < empty < 1500


def test_large_coordinates_keep_their_fifths():
    builder = SegmentationBuilder()
    polygon = [9000.3, 10.0, 9020.7, 10.0, 9020.7, 30.5]
    builder.add([polygon])
    segmentations = builder.finish()
    assert segmentations.corners.dtype == np.int32
    bits, corner = cut_runs(segmentations.runs(np.arange(1), 40, 9100)[0], 40)
    np.testing.assert_array_equal(pasted(bits, corner, 40, 9100), full_mask([polygon], 40, 9100))


def test_run_lengths_are_decoded():
    rng = np.random.default_rng(0)
    for _ in range(500):
        height, width = (int(side) for side in rng.integers(1, 90, 2))
        mask = random_mask(rng, height, width)
        code = coco_mask.encode(np.asfortranarray(mask))
        assert decode_runs(code["counts"]).tolist() == uncompressed(mask)
        bits, corner = cut_runs(decode_runs(code["counts"]), height)
        np.testing.assert_array_equal(pasted(bits, corner, height, width), mask)


def test_zero_lengths_between_runs_are_nothing():
    bits, corner = cut_runs(np.array([3, 2, 0, 3, 0, 0, 4]), 4)  # 000 11 111 0000, down columns of 4
    np.testing.assert_array_equal(pasted(bits, corner, 4, 3), np.array([[0, 1, 0], [0, 1, 0], [0, 1, 0], [1, 1, 0]]))


@pytest.mark.parametrize("text", [b"", b"~~", b"P", b"0!0", b"PPPPPPPPPP0"])
def test_broken_run_lengths_are_refused(text):
    with pytest.raises(ValueError):
        decode_runs(text)


def test_nearest_resize_is_opencvs():
    row = np.arange(1400, dtype=np.float32)[None]
    rng = np.random.default_rng(0)
    for old in range(1, 1400, 3):
        for new in (1333, 800, 640, int(rng.integers(1, 1500))):
            expected = cv2.resize(row[:, :old], (new, 1), interpolation=cv2.INTER_NEAREST)[0]
            np.testing.assert_array_equal(nearest_source(old, new), expected)


def test_resized_crops_equal_resized_full_masks():
    rng = np.random.default_rng(0)
    for case in range(500):
        (height, width), (tall, wide) = rng.integers(1, 70, 2).tolist(), rng.integers(1, 120, 2).tolist()
        mask = random_mask(rng, height, width)
        expected = cv2.resize(mask, (wide, tall), interpolation=cv2.INTER_NEAREST)
        flip = bool(case % 2)
        expected = expected[:, ::-1] if flip else expected
        sources = nearest_source(width, wide), nearest_source(height, tall)
        bits, corner = resize_crop(*cut_runs(np.array(uncompressed(mask)), height), *sources, flip)
        np.testing.assert_array_equal(pasted(bits, corner, tall, wide), expected)
        if expected.any():  # the margin: zeros all around, unless the image ends there
            assert corner[0] == 0 or not bits[:, :MARGIN].any()
            assert corner[1] == 0 or not bits[:MARGIN].any()
            assert corner[0] + bits.shape[1] == wide or not bits[:, -MARGIN:].any()
            assert corner[1] + bits.shape[0] == tall or not bits[-MARGIN:].any()
        else:
            assert bits.shape == (1, 1)


def make_masks(rng, count, height, width):
    fulls = [random_mask(rng, height, width) for _ in range(count)]
    sources = nearest_source(width, width), nearest_source(height, height)
    crops = [resize_crop(*cut_runs(np.array(uncompressed(m)), height), *sources, False) for m in fulls]
    return CroppedMasks.pack(crops, (height, width)), torch.from_numpy(
        np.array(fulls, dtype=np.uint8).reshape(-1, height, width)
    )


def test_full_masks_come_back(device):
    rng = np.random.default_rng(0)
    for count in (0, 1, 7, 30):
        masks, fulls = make_masks(rng, count, 40, 53)
        masks = masks.to(device)
        assert len(masks) == count
        torch.testing.assert_close(masks.full().cpu(), fulls, rtol=0, atol=0)


def test_sheets_are_crops_with_one_repeated_edge(monkeypatch):
    """Every instance has a place of its own; sheets hold crops of similar size, and not too many of them."""
    monkeypatch.setattr("loce.data.masks.SHEET_PIXELS", 2000)
    masks, fulls = make_masks(np.random.default_rng(1), 12, 30, 37)
    sheets = masks.sheets()
    assert len(masks.places.unique(dim=0)) == 12 == sum(map(len, sheets)) and len(sheets) > 3
    assert all(len(sheet) == 1 or sheet.numel() <= 2000 for sheet in sheets)
    for row, ((sheet, slot), window) in enumerate(zip(masks.places.tolist(), masks.windows.tolist(), strict=True)):
        x0, y0, width, height = window
        rest, side = sheets[sheet].shape[1:], max(width, height)
        longest = [
            max(w) for w, place in zip(masks.windows[:, 2:].tolist(), masks.places, strict=True) if place[0] == sheet
        ]
        assert max(longest) < 2 * side
        for y in range(rest[0]):
            for x in range(rest[1]):
                inside = x <= width and y <= height
                source = fulls[row, y0 + min(y, height - 1), x0 + min(x, width - 1)]
                assert sheets[sheet][slot, y, x] == (source if inside else 0)
    empty = CroppedMasks.pack([], (30, 37))
    assert empty.sheets() == [] and empty.full().shape == (0, 30, 37)


def test_targets_from_crops_equal_roi_align_on_full_masks(device):
    """For boxes anywhere in the image, as RoIAlign(28, aligned, adaptive) makes mask targets, to 1e-4."""
    rng = np.random.default_rng(2)
    disagreeing = total = 0
    for _ in range(40):
        height, width = (int(side) for side in rng.integers(40, 120, 2))
        masks, fulls = make_masks(rng, 6, height, width)
        rows = torch.from_numpy(rng.integers(0, 6, 20))
        x, y = np.sort(rng.uniform(-20, width + 20, (20, 2))), np.sort(rng.uniform(-20, height + 20, (20, 2)))
        boxes = torch.tensor(np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1), dtype=torch.float32)
        boxes[:3] = boxes[:3].round()
        boxes[3] = torch.tensor([0.0, 0.0, width, height])
        boxes[4, 2:] = torch.tensor([width, height])
        limits = torch.tensor([width, height, width, height], dtype=torch.float32)
        boxes = torch.minimum(boxes.clamp(min=0), limits).to(device)
        masks, rows = masks.to(device), rows.to(device)
        index = torch.arange(20, device=device)[:, None]
        full = roi_align(
            fulls.to(device)[rows].float()[:, None], torch.cat([index, boxes], 1), 28, aligned=True, sampling_ratio=0
        )
        targets = mask_targets(masks, rows, boxes)
        different = targets != (full >= 0.5)[:, 0]
        assert not different[(full[:, 0] - 0.5).abs() > 1e-4].any()
        disagreeing += int(different.sum())
        total += full.numel()
    assert disagreeing / total < 1e-4  # ties at one half only


def test_a_larger_canvas_costs_nothing():
    """The same small object in a small and in a huge image takes the same memory."""
    polygon = [[10.0, 10.0, 60.0, 10.0, 60.0, 50.0, 10.0, 50.0]]
    builder = SegmentationBuilder()
    builder.add(polygon)
    segmentations = builder.finish()
    sizes = []
    for side in (100, 6000):
        source = nearest_source(side, side)
        crop = resize_crop(*cut_runs(segmentations.runs(np.arange(1), side, side)[0], side), source, source, False)
        sizes.append(CroppedMasks.pack([crop], (side, side)).bits.numel())
    assert sizes[0] == sizes[1] == 55 * 45
