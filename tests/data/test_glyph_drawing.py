"""One image of Glyph-LVIS: exact masks, and outlines and run-length codes that rasterise to them."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from loce.data.glyphs.characters import CHARACTERS
from loce.data.glyphs.drawing import VISIBLE, draw_background, draw_image
from loce.data.glyphs.records import Settings, Task, describe_mask, draw_task, outline
from loce.utils.errors import UserError

SIDES = (0.14, 0.36)


def rasterise(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    return coco_mask.decode(segmentation).astype(bool)


def has_hole(mask: np.ndarray) -> bool:
    """Flood from outside, step by step over edges: is there background that it does not reach?"""
    padded = np.pad(mask, 1)
    reached = {(0, 0)}
    border = [(0, 0)]
    while border:
        y, x = border.pop()
        for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= place[0] < padded.shape[0] and 0 <= place[1] < padded.shape[1]
            if inside and place not in reached and not padded[place]:
                reached.add(place)
                border.append(place)
    return len(reached) < (~padded).sum()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_outline_is_the_mask(share: float) -> None:
    rng = np.random.default_rng(int(100 * share))
    with_hole = 0
    for _ in range(100):
        mask = rng.random(rng.integers(1, 9, 2)) < share
        mask.flat[rng.integers(mask.size)] = True
        top, left = rng.integers(0, 5, 2)
        polygons = outline(mask, int(left), int(top))
        with_hole += has_hole(mask)
        assert (polygons is None) == has_hole(mask)
        if polygons is not None:
            expected = np.zeros((16, 16), bool)
            expected[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
            assert np.array_equal(rasterise(polygons, 16, 16), expected)
    assert with_hole < 100


def test_outline_of_a_rectangle_has_four_corners() -> None:
    polygons = outline(np.ones((2, 3), bool), left=5, top=7)
    assert polygons is not None
    corners = {tuple(polygons[0][i : i + 2]) for i in range(0, 8, 2)}
    assert len(polygons[0]) == 8
    assert corners == {(5, 7), (8, 7), (5, 9), (8, 9)}


def test_describe_mask() -> None:
    mask = np.zeros((20, 30), bool)
    mask[4:9, 11:18] = True
    assert isinstance(describe_mask(mask)["segmentation"], list)
    mask[6, 13] = False
    record = describe_mask(mask)
    assert record["bbox"] == [11.0, 4.0, 7.0, 5.0]
    assert record["area"] == 34.0
    assert record["segmentation"]["size"] == [20, 30]
    assert np.array_equal(rasterise(record["segmentation"], 20, 30), mask)


@pytest.mark.parametrize("size", [96, 128, 256])
def test_every_object_can_be_seen(size: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        characters = "".join(rng.choice(list(CHARACTERS), 12))
        image, owners = draw_image(characters, size, SIDES, rng)
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
        assert set(np.unique(owners)) == {-1, *range(12)}
        assert np.bincount(owners[owners >= 0]).min() >= 20


def test_masks_are_where_something_is_drawn() -> None:
    """Against the background drawn alone: away from all masks nothing changes but the final noise, in them it does."""
    changed, visible = [], []
    for seed in range(10):
        background = draw_background(128, np.random.default_rng(seed))
        image, owners = draw_image("OgΣβ★", 128, SIDES, np.random.default_rng(seed))
        difference = np.abs(image - background).max(axis=2)
        near = cv2.dilate((owners >= 0).astype(np.uint8), np.ones((5, 5))) > 0
        near[[0, -1]] = near[:, [0, -1]] = True  # the blended edge of an object whose mask is outside the image
        unclipped = (background.min(axis=2) > 0) & (background.max(axis=2) < 255)
        assert difference[~near & unclipped].max() < 45
        core = cv2.erode((owners >= 0).astype(np.uint8), np.ones((3, 3))) > 0
        changed.append((difference[core] > 20).mean())
        visible.append(core.sum())
    assert np.average(changed, weights=visible) > 0.95


def test_later_objects_lie_in_front_and_hide_little() -> None:
    """The first objects, drawn without the later ones, lose some of their pixels, but at most what is allowed."""
    hidden = 0
    for seed in range(20):
        _, few = draw_image("AB", 64, (0.5, 0.6), np.random.default_rng(seed))
        _, all_ = draw_image("ABKT", 64, (0.5, 0.6), np.random.default_rng(seed))
        if not np.array_equal(few == 1, (few == 1) & np.isin(all_, (1, 2, 3))):
            continue  # everything was made smaller for the third and fourth object: nothing to compare
        for index in (0, 1):
            before, after = few == index, all_ == index
            assert not (after & ~before).any()
            assert np.isin(all_[before & ~after], (2, 3)).all()
            assert after.sum() >= VISIBLE * before.sum() * 0.99
            hidden += (before & ~after).sum()
    assert hidden > 100


def test_objects_scale_with_the_image() -> None:
    areas = []
    for size in (64, 256):
        drawn = [draw_image("HX", size, (0.3, 0.3), np.random.default_rng(seed))[1] for seed in range(10)]
        areas.append(np.mean([(owners >= 0).mean() for owners in drawn]))
    assert areas[0] == pytest.approx(areas[1], rel=0.3)


def test_too_many_objects_is_a_user_error() -> None:
    with pytest.raises(UserError, match="40 objects do not fit in an image of 32 pixels"):
        draw_image("W" * 40, 32, (0.6, 0.8), np.random.default_rng(0))


def test_task_writes_image_and_annotations(tmp_path: Path) -> None:
    settings = Settings(folder=tmp_path, size=96, characters="OB8k", category_ids=(9, 3, 4, 12))
    shown = (True, True, False, True)
    task = Task(image_id=5, path="a.jpg", seed=(7, 8), labels=(0, 1, 3, 0), sides=(SIDES,) * 4, annotated=shown)
    annotations = draw_task(settings, task)
    image, owners = draw_image("OBkO", 96, SIDES, np.random.default_rng((7, 8)))
    stored = np.asarray(Image.open(tmp_path / "a.jpg"))
    assert np.abs(stored.astype(int) - image).mean() < 4
    assert [annotation["category_id"] for annotation in annotations] == [9, 3, 9]
    for annotation, index in zip(annotations, (0, 1, 3), strict=True):
        assert annotation["image_id"] == 5
        assert np.array_equal(rasterise(annotation["segmentation"], 96, 96), owners == index)
