"""Large-scale jitter and copy-paste against full-size masks in plain loops; what is pasted, and from where."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from loce.config import DataConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.copy_paste import Scene, paste
from loce.data.dataset import TrainDataset
from loce.data.loader import fill_batches
from loce.data.transforms import PADDING, Geometry, image_generator, large_scale_jitter, on_canvas, read_image

SEED, CANVAS = 5, 80


@pytest.fixture(scope="module")
def annotations(glyphs: Path) -> LVISAnnotations:
    return LVISAnnotations.open(glyphs / "annotations/train.json")


def dataset_of(annotations: LVISAnnotations, folder: Path, **options: object) -> TrainDataset:
    return TrainDataset(annotations, folder, DataConfig(short_edges=(48, 64, 90), **options), SEED)  # type: ignore[arg-type]


def slow_scene(annotations: LVISAnnotations, folder: Path, index: int, rows: np.ndarray, rng: np.random.Generator):
    """Image, full-size masks and boxes of one image on the canvas, the draws in the order that is promised."""
    height, width = annotations.image_sizes[index].tolist()
    side = CANVAS * rng.uniform(0.1, 2.0)
    scale = side / max(height, width)
    new_h, new_w = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    flip = rng.random() < 0.5
    y, x = (int(rng.integers(max(0, new - CANVAS) + 1)) for new in (new_h, new_w))

    def shown(picture: np.ndarray, filling: object, how: int) -> np.ndarray:
        picture = (
            cv2.resize(picture, (new_w, new_h), interpolation=how) if (new_h, new_w) != (height, width) else picture
        )
        picture = picture[:, ::-1] if flip else picture
        page = np.full((CANVAS, CANVAS, *picture.shape[2:]), filling, np.uint8)
        part = picture[y : y + CANVAS, x : x + CANVAS]
        page[: part.shape[0], : part.shape[1]] = part
        return page

    image = shown(read_image(annotations.image_path(index, folder), (height, width)), PADDING, cv2.INTER_LINEAR)
    masks, boxes = [], []
    sx, sy = (float(np.float32(new / old)) for new, old in ((new_w, width), (new_h, height)))
    for runs, box in zip(
        annotations.segmentations.runs(rows, height, width), annotations.clipped_boxes(rows).tolist(), strict=True
    ):
        full = np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8).reshape(width, height).T
        masks.append(shown(np.ascontiguousarray(full), 0, cv2.INTER_NEAREST).astype(bool))
        x1, x2 = (min(box[i] * sx, new_w) for i in (0, 2))
        y1, y2 = (min(box[i] * sy, new_h) for i in (1, 3))
        x1, x2 = (new_w - x2, new_w - x1) if flip else (x1, x2)
        whole = [x1 - x, y1 - y, x2 - x, y2 - y]
        cut = [min(max(value, 0), CANVAS) for value in whole]
        boxes.append(tight(masks[-1]) if cut != whole and masks[-1].any() else cut)
    seen = [i for i, mask in enumerate(masks) if mask.any()]
    return image, [masks[i] for i in seen], [boxes[i] for i in seen], [int(rows[i]) for i in seen]


def tight(mask: np.ndarray) -> list[int]:
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_samples_equal_a_full_canvas_twin(annotations: LVISAnnotations, glyphs: Path) -> None:
    """Images bit for bit, masks pixel for pixel, boxes and what is ignored, for all images in eight epochs."""
    dataset = dataset_of(annotations, glyphs, resize="lsj", canvas=CANVAS, copy_paste=0.8)
    seen = dict.fromkeys(("pasted", "cut", "plain"), 0)
    for epoch in range(8):
        for index in annotations.train_images.tolist():
            rng = image_generator(SEED, epoch, int(annotations.image_ids[index]), 0)
            image, masks, boxes, rows = slow_scene(annotations, glyphs, index, annotations.rows(index), rng)
            ignored, pasted = [], 0
            if rng.random() < 0.8:
                other = index
                while other == index:
                    other = int(annotations.train_images[rng.integers(len(annotations.train_images))])
                own = annotations.rows(other)
                number = int(rng.integers(len(own))) + 1
                if number < len(own):
                    own = own[np.sort(np.lexsort((rng.random(len(own)),))[:number])]
                top, top_masks, top_boxes, top_rows = slow_scene(annotations, glyphs, other, own, rng)
                pasted = len(top_rows)
                alpha = np.zeros((CANVAS, CANVAS), bool)
                for mask in top_masks:
                    alpha |= mask
                image = np.where(alpha[..., None], top, image)
                left = []
                for mask, box, row in zip(masks, boxes, rows, strict=True):
                    rest = mask & ~alpha
                    share = rest.sum() / mask.sum()
                    seen["cut"] += 0 < share < 1
                    if share >= 0.1:
                        left.append((rest, box if share == 1 else tight(rest), row))
                    elif share > 0:
                        ignored.append(tight(rest))
                masks, boxes, rows = ([entry[i] for entry in left] for i in range(3))
                masks, boxes, rows = masks + top_masks, boxes + top_boxes, rows + top_rows
            sample = dataset[index, epoch]
            seen["pasted" if pasted else "plain"] += 1
            assert sample.get("pasted", 0) == pasted and sample["rows"].tolist() == rows
            np.testing.assert_array_equal(sample["image"].permute(1, 2, 0).numpy(), image)
            expected = np.array(masks, np.uint8).reshape(-1, CANVAS, CANVAS)
            np.testing.assert_array_equal(sample["masks"].full().numpy(), expected)
            np.testing.assert_allclose(sample["boxes"].numpy(), np.array(boxes).reshape(-1, 4), atol=1e-4)
            np.testing.assert_allclose(sample["ignored"].numpy(), np.array(ignored).reshape(-1, 4), atol=1e-4)
            assert sample["labels"].tolist() == annotations.labels[rows].tolist()
    assert all(seen.values()), seen


def test_without_a_canvas_of_its_own_the_other_image_is_cut_to_this_one(
    annotations: LVISAnnotations, glyphs: Path
) -> None:
    """Short-edge jitter and copy-paste: sizes stay, and below the pasted masks lie the same image and objects."""
    plain, both = (dataset_of(annotations, glyphs, copy_paste=p) for p in (0.0, 1.0))
    for index in annotations.train_images.tolist():
        below, sample = plain[index, 3], both[index, 3]
        alpha = sample["masks"].full()[len(sample["rows"]) - sample["pasted"] :].bool().any(dim=0)
        assert sample["image"].shape == below["image"].shape and torch.equal(
            sample["image"][:, ~alpha], below["image"][:, ~alpha]
        )
        masks = dict(zip(below["rows"].tolist(), below["masks"].full(), strict=True))
        for row, mask in zip(sample["rows"].tolist(), sample["masks"].full(), strict=True):
            assert row not in masks or torch.equal(mask, masks[row] * ~alpha)
        again = both[index, 3]  # whatever was made in between
        assert all(torch.equal(sample[key], again[key]) for key in ("image", "boxes", "rows"))


def test_rare_classes_first(annotations: LVISAnnotations, glyphs: Path) -> None:
    """Images by class, all classes alike; of an image the rarest objects."""
    dataset = dataset_of(annotations, glyphs, copy_paste=1.0, paste_from="rare")
    rng, counts, rows = np.random.default_rng(0), annotations.stats.image_counts, annotations.train_rows
    drawn = np.array([dataset._paste_image(rng) for _ in range(3000)])
    shown = {int(label): annotations.image_of[rows[annotations.labels[rows] == label]] for label in annotations.labels}
    expected = np.zeros(len(annotations))
    for images in shown.values():  # a class, then one of its objects
        np.add.at(expected, images, 1 / len(shown) / len(images))
    assert np.abs(np.bincount(drawn, minlength=len(annotations)) / 3000 - expected).max() < 0.03
    for index in annotations.train_images.tolist() * 3:
        source, _ = dataset._paste_source(index, 99, (200, 200), rng)
        assert source is not None
        own = annotations.rows(int(annotations.image_of[source.rows[0]]))
        others = counts[annotations.labels[np.setdiff1d(own, source.rows)]]
        assert not len(others) or counts[annotations.labels[source.rows]].max() <= others.min()


@pytest.mark.parametrize("resize", ["short_edge", "lsj"])
def test_crowds_stay_and_are_never_pasted_and_lists_of_images_change_nothing(
    glyphs: Path, tmp_path: Path, resize: str
) -> None:
    """Crowds are regions to ignore where they are; LVIS's negative and not exhaustive classes are not read."""
    made = json.loads((glyphs / "annotations/train.json").read_text())
    for row in made["annotations"][::2]:
        row["iscrowd"] = 1
    files = []
    for name, negative, unsure in (("one", [], []), ("two", made["images"][0]["neg_category_ids"], [1, 2])):
        known = [category["id"] for category in made["categories"]]
        lists = {"neg_category_ids": negative, "not_exhaustive_category_ids": [i for i in known if i in unsure]}
        made["images"] = [image | lists for image in made["images"]]
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
        files.append(LVISAnnotations.open(tmp_path / f"{name}.json"))
    options = {"resize": resize, "canvas": CANVAS, "lsj_scale": (0.5, 2.0)}
    plain = dataset_of(files[0], glyphs, **options)
    one, two = (dataset_of(file, glyphs, copy_paste=1.0, **options) for file in files)
    crowds, pasted = 0, 0
    for index in files[0].train_images.tolist():
        below, sample, again = plain[index, 0], one[index, 0], two[index, 0]
        assert not files[0].crowd[sample["rows"].numpy()].any()
        assert torch.equal(sample["ignored"][: len(below["ignored"])], below["ignored"])
        crowds, pasted = crowds + len(below["ignored"]), pasted + sample["pasted"]
        assert all(torch.equal(sample[key], again[key]) for key in ("image", "boxes", "labels", "rows", "ignored"))
    assert crowds and pasted


def test_an_unreadable_source_is_told_and_another_one_taken(annotations: LVISAnnotations, glyphs: Path) -> None:
    class Damaged(TrainDataset):
        def _read(self, index: int):  # type: ignore[no-untyped-def]
            return super()._read(index) if index % 2 == 0 else self._fail(index)

        def _fail(self, index: int):  # type: ignore[no-untyped-def]
            return read_image(Path("gone.jpg"), None), ""

    dataset = Damaged(annotations, glyphs, DataConfig(short_edges=(64,), copy_paste=1.0), SEED)
    told = [dataset[0, epoch] for epoch in range(6)]
    bad = [message for sample in told for message in sample.get("replaced", ())]
    assert bad and all("gone.jpg: cannot be read" in message for message in bad)
    assert all(sample["image_id"] == int(annotations.image_ids[0]) and sample["pasted"] for sample in told)


def test_the_memory_is_filled_from_whole_images(annotations: LVISAnnotations, glyphs: Path) -> None:
    dataset = dataset_of(annotations, glyphs, resize="lsj", canvas=CANVAS, copy_paste=1.0)
    for samples in fill_batches(dataset, 5, True, 0, 2):
        for sample in samples:
            index = int(np.flatnonzero(annotations.image_ids == sample["image_id"])[0])
            assert sample["rows"].tolist() == annotations.rows(index).tolist() and "pasted" not in sample
            assert sample["image"].shape == (3, CANVAS, CANVAS)


def test_jitter_has_its_range_and_cuts_anywhere() -> None:
    rng = np.random.default_rng(0)
    made = [large_scale_jitter((60, 120), 100, (0.1, 2.0), 0.5, rng) for _ in range(2000)]
    widths = np.array([geometry.new[1] for geometry in made])
    assert 10 <= widths.min() < 13 and 197 < widths.max() <= 200 and abs((widths > 105).mean() - 0.5) < 0.04
    assert all(abs(g.new[0] - g.new[1] / 2) <= 1 and g.size == (100, 100) for g in made)
    for g in made:
        assert all(0 <= c <= max(0, n - 100) for c, n in zip(g.corner, g.new, strict=True))
    large = np.array([g.corner[1] / (g.new[1] - 100) for g in made if g.new[1] > 150])
    assert large.min() == 0 and large.max() == 1 and abs(large.mean() - 0.5) < 0.04
    fits = on_canvas(Geometry((10, 10), (10, 10)), (10, 10), rng)
    picture = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    np.testing.assert_array_equal(fits.image(picture), picture)


def test_what_is_left_below_pasted_blocks_equals_plain_loops() -> None:
    """Objects that stay, become slivers or are gone; what was given stays as it was."""
    rng = np.random.default_rng(0)
    kinds = dict.fromkeys(("whole", "cut", "sliver", "gone"), 0)

    def blocks(number: int, colour: int) -> tuple[Scene, list[set[tuple[int, int]]]]:
        crops, pixels = [], []
        for _ in range(number):
            x0, y0, w, h = (int(v) for v in (*rng.integers(0, 14, 2), *rng.integers(1, 7, 2)))
            bits = rng.integers(0, 4, (h, w)).astype(bool).astype(np.uint8)
            bits[0, 0] = 1
            crops.append((bits, (x0, y0)))
            pixels.append({(x0 + x, y0 + y) for y in range(h) for x in range(w) if bits[y, x]})
        boxes = np.array([[x, y, x + b.shape[1], y + b.shape[0]] for b, (x, y) in crops], np.float32).reshape(-1, 4)
        page = np.full((20, 20, 3), colour, np.uint8)
        return Scene(page, boxes, crops, np.arange(number) + 100 * colour, np.array([[1, 1, 3, 3]], np.float32)), pixels

    for _ in range(80):
        (below, under), (above, over) = blocks(12, 1), blocks(9, 2)
        before = [bits.copy() for bits, _ in below.crops]
        made, covered = paste(below, above), set.union(*over)
        assert {(x, y) for y in range(20) for x in range(20) if made.image[y, x, 0] == 2} == covered
        rows, boxes, ignored = [], [], below.ignored.tolist()
        for row, pixels in enumerate(under):
            left = pixels - covered
            kind = "whole" if left == pixels else "gone" if not left else "cut"
            kind = "sliver" if kind == "cut" and 10 * len(left) < len(pixels) else kind
            kinds[kind] += 1
            xs, ys = [x for x, _ in left] or [0], [y for _, y in left] or [0]
            box = below.boxes[row].tolist() if kind == "whole" else [min(xs), min(ys), max(xs) + 1, max(ys) + 1]
            if kind in ("whole", "cut"):
                rows, boxes = [*rows, row + 100], [*boxes, box]
                bits, (x0, y0) = made.crops[len(rows) - 1]
                assert {(x0 + x, y0 + y) for y, x in np.argwhere(bits).tolist()} == left
            elif kind == "sliver":
                ignored.append(box)
        assert made.rows.tolist() == rows + above.rows.tolist() and made.ignored.tolist() == ignored
        assert made.boxes.tolist() == boxes + above.boxes.tolist() and made.crops[len(rows) :] == above.crops
        assert all((bits == old).all() for (bits, _), old in zip(below.crops, before, strict=True))
    assert all(kinds.values()), kinds
