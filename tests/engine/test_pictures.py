"""Sheets of pictures: the samples are those of training, colours tell the groups, and making them changes nothing."""

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from loce.config import load_config
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import train_annotations, train_dataset
from loce.data.dataset import TrainDataset
from loce.data.loader import train_batches, training_plan
from loce.engine import drawing, pictures
from loce.engine.drawing import (
    CAPTION,
    CELL,
    GAP,
    LINE,
    TITLE,
    class_text,
    draw_objects,
    shade,
    sheet,
    write,
    write_picture,
)
from loce.engine.pictures import RULE, comparison_sheet, examples, first_samples
from loce.evaluation.stream import DetectionWriter
from loce.utils.classes import GROUP_RGB


def test_the_first_samples_are_those_of_training(config: Path) -> None:
    options = load_config([str(config), "train.batch_size=2"])
    dataset = train_dataset(options, train_annotations(options))
    plan = training_plan(dataset, options.sampler, options.data, 2, options.seed)
    shown: list[tuple[int, float]] = []

    class Watched(TrainDataset):
        def __getitem__(self, key: tuple[int, ...]) -> dict:
            sample = super().__getitem__(key)
            shown.append((sample["image_id"], float(sample["image"].double().mean())))
            return sample

    watched = Watched(dataset.annotations, dataset.folder, options.data, options.seed)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    picture = first_samples(watched, plan)
    assert torch.equal(torch.get_rng_state(), before)
    batches = train_batches(dataset, plan, epochs=1)
    trained = [(s["image_id"], float(s["image"].double().mean())) for batch in batches for s in batch]
    assert shown == trained[:16] and len(shown) == 12  # all there are
    rows = 3
    assert picture.shape == (TITLE + rows * (CELL + GAP + CAPTION), 4 * (CELL + GAP) + GAP, 3)
    group = str(dataset.annotations.stats.groups[0])
    assert (np.abs(picture[TITLE:].astype(int) - GROUP_RGB[group]).max(axis=2) == 0).sum() > 1000


def test_examples_show_each_group(config: Path) -> None:
    options = load_config([str(config)])
    dataset = train_dataset(options, train_annotations(options))
    annotations = dataset.annotations
    groups = np.array(["r", "c", "f", "f", "f", "f"])
    stats = dataclasses.replace(annotations.stats, groups=groups)
    chosen = examples(dataset, stats, 6)
    assert len(set(chosen)) == 6 and chosen == examples(dataset, stats, 6)
    for place, image in enumerate(chosen[:3]):
        assert groups[place] in groups[annotations.labels[annotations.rows(image)]]
    assert len(examples(dataset, stats, 1000)) == len(annotations.train_images)


def test_a_sheet_of_few_pictures() -> None:
    page = sheet([np.full((30, 60, 3), 7, np.uint8)], ["é"], "title")
    tile = page[TITLE : TITLE + CELL // 2, GAP : GAP + CELL]
    assert (tile == 7).all() and (page[TITLE + CELL // 2 + CAPTION :] == 255).all()


def test_a_row_of_a_sheet_is_as_high_as_its_highest_picture() -> None:
    flat, high = np.full((30, 60, 3), 7, np.uint8), np.full((60, 30, 3), 9, np.uint8)
    page = sheet([flat, flat, flat, high], [""] * 4, "title", columns=2)
    second = TITLE + CELL // 2 + CAPTION + GAP
    assert (page[second : second + CELL // 2, GAP : GAP + CELL] == 7).all()
    assert (page[second : second + CELL, 2 * GAP + CELL : 2 * GAP + CELL + CELL // 2] == 9).all()
    assert len(page) == second + CELL + CAPTION + GAP


@pytest.fixture
def validation(tmp_path):
    """Two images with one object each, the rare class in the second; detections of a run."""
    side, categories = 40, [{"id": 7, "name": "often", "frequency": "f"}, {"id": 3, "name": "seldom", "frequency": "r"}]
    images, objects = [], []
    for number, category in ((1, 7), (2, 3)):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((side, side, 3), 90, np.uint8))
        images.append({"id": number, "height": side, "width": side, "file_name": f"{number}.png"})
        box = [5.0, 6.0, 20.0, 10.0]
        corners = [5.0, 6.0, 25.0, 6.0, 25.0, 16.0, 5.0, 16.0]
        known = {"id": number, "image_id": number, "category_id": category, "bbox": box, "area": 200.0}
        objects.append({**known, "iscrowd": 0, "segmentation": [corners]})
    file = tmp_path / "val.json"
    file.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    mask = np.zeros((side, side), np.uint8, order="F")
    mask[6:16, 5:25] = 1
    code = coco_mask.encode(mask)["counts"]
    boxes = [[5.0, 6, 25, 16], [5, 6, 25, 15], [30, 30, 38, 38], [30, 5, 38, 12]]
    with DetectionWriter(tmp_path / "detections") as writer:
        writer.add(1, boxes, [0.4, 0.9, 0.3, 0.09], [7, 3, 7, 7], [code] * 4, (side, side))
        writer.add(2, [], [], [], [], (side, side))
    return LVISAnnotations.open(file), tmp_path


def test_comparisons_show_the_rare_class_first_and_one_label_for_each_place(
    validation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two classes at one place the better one, although they are two classes; nothing below the score."""
    written: list[list[str]] = []
    draw = pictures.draw_objects

    def noted(image, boxes, codes, texts, *others):
        written.append(list(texts))
        return draw(image, boxes, codes, texts, *others)

    monkeypatch.setattr(pictures, "draw_objects", noted)
    annotations, folder = validation
    picture = comparison_sheet(annotations, str(folder), {"run": folder}, count=6)
    assert written == [["seldom"], [], ["often"], ["seldom 0.90", "often 0.30"]]
    more = picture.shape[0] - (TITLE + 2 * (CELL + GAP + CAPTION))  # the title is longer than this sheet is wide
    assert more == 3 * LINE and picture.shape[1:] == (2 * (CELL + GAP) + GAP, 3)
    assert "one label for each place" in RULE and "0.1 where an evaluation has none" in RULE
    (folder / "per_category.csv").write_text("id,threshold\n7,0.35\n3,0.95\n")  # its own, of best F1
    comparison_sheet(annotations, str(folder), {"run": folder}, count=6)
    assert written[4:] == [["seldom"], [], ["often"], ["often 0.40"]]


def test_a_picture_is_written_as_a_whole(tmp_path: Path) -> None:
    picture = np.full((40, 60, 3), (200, 90, 10), np.uint8)
    write_picture(tmp_path / "new/picture.jpg", picture)
    found = cv2.imread(str(tmp_path / "new/picture.jpg"))[:, :, ::-1].astype(int)
    assert found.shape == picture.shape and np.abs(found - picture).max() < 6
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["picture.jpg"]


NAMES = ["bicycle", "Fahrrad für Kinder", "велосипед", "自行车", "자전거", "دراجة", "U\u0308bung", "साइकिल", "🚲"]


def lettered(text: str, corner: tuple[int, int] = (10, 40)) -> np.ndarray:
    canvas = Image.new("RGB", (400, 60))
    write(ImageDraw.Draw(canvas), text, corner, (255, 200, 100), 24)
    return np.array(canvas)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_drawn_or_is_its_number_and_never_question_marks(name: str) -> None:
    text = class_text(name, 17)
    assert text in (name, "class 17")
    picture = lettered(text)
    assert picture.any() and not any(np.array_equal(picture, lettered("?" * n)) for n in range(1, 2 * len(name) + 1))


def test_names_of_the_fonts_that_every_machine_has() -> None:
    """matplotlib brings DejaVu Sans."""
    for name in ("Fahrrad für Kinder", "велосипед", "ποδήλατο", "U\u0308bung", "دراجة"):
        assert class_text(name, 1) == name
    assert np.array_equal(lettered("U\u0308bung"), lettered("Übung"))
    assert not np.array_equal(lettered("велосипед"), lettered("велосипет"))


def test_without_letters_a_name_is_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = frozenset(range(32, 127))
    monkeypatch.setattr(drawing, "_characters", lambda file: ascii_only)
    drawing._font_file.cache_clear()
    try:
        assert class_text("велосипед", 23) == "class 23" and class_text("bicycle", 23) == "bicycle"
        assert np.array_equal(lettered("ш 0.5"), lettered("? 0.5"))  # a caption, say
    finally:
        drawing._font_file.cache_clear()


@pytest.mark.parametrize("name", ["", " ", "\n", "a\0b", "\x1b[31mred", "\ud83d"])
def test_a_name_that_shows_nothing_is_its_number(name: str) -> None:
    assert class_text(name, 5) == "class 5"


def test_names_of_several_lines_and_long_ones() -> None:
    """A class list read line by line keeps the ends of its lines."""
    assert np.array_equal(lettered("cat\n"), lettered("cat")) and np.array_equal(
        lettered("a\n b\tc"), lettered("a b c")
    )
    image, boxes = np.zeros((60, 90, 3), np.uint8), np.array([[5, 30, 50, 55]], np.float32)
    drawn = [
        draw_objects(image, boxes, [], [f"{class_text(name, 3)} 0.5"], ["r"], [0])
        for name in ("left\nhand", "left hand")
    ]
    assert np.array_equal(*drawn)
    assert class_text("long " * 99, 3) != class_text("long " * 99, 4) and len(class_text("x" * 10**5, 3)) < 80


@pytest.mark.parametrize("size", [(3, 3000), (30_000, 2), (1, 1)])
def test_pictures_of_narrow_images_stay_small(size: tuple[int, int]) -> None:
    boxes = np.array([[0, 0, size[1], size[0]]], np.float32)
    codes = [coco_mask.encode(np.ones(size, np.uint8, order="F"))]
    drawn = draw_objects(np.zeros((*size, 3), np.uint8), boxes, codes, ["a 0.5"], ["r"], [0])
    assert drawn.any() and max(drawn.shape) <= max(drawing.LARGEST, *size) and drawn.shape[0] % size[0] == 0


def test_labels_touch_their_masks_and_keep_off_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long, oblique mask the corner of the box is far away; three objects at one place have three labels."""
    mask = np.zeros((500, 500), np.uint8)
    cv2.line(mask, (50, 450), (450, 50), 1, 9)
    around = coco_mask.encode(np.asfortranarray(mask))
    box = coco_mask.toBbox(around)
    boxes = np.array([[*box[:2], *(box[:2] + box[2:])]] * 3, np.float32)
    plates: list[tuple[float, ...]] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", lambda pen, place, fill: plates.append(place))
    draw_objects(np.zeros((500, 500, 3), np.uint8), boxes, [around] * 3, ["a", "b", "c"], ["r"] * 3, [0, 1, 2])
    outline = np.argwhere(mask)[:, ::-1]
    for n, (left, top, right, bottom) in enumerate(plates):
        gap = np.maximum(np.maximum([left, top] - outline, outline - [right, bottom]), 0).sum(axis=1).min()
        assert gap <= 5 and len(plates) == 3
        assert all(right <= o[0] or o[2] <= left or bottom <= o[1] or o[3] <= top for o in plates[:n])


def test_classes_of_a_group_have_shades_and_letters_are_read_on_them() -> None:
    for group, base in GROUP_RGB.items():
        colours = {shade(group, label) for label in range(5)}
        assert len(colours) == 5 and shade(group, 0) == shade(group, 5) == base
        others = [np.array(rgb) for other, rgb in GROUP_RGB.items() if other != group]
        for colour in colours:  # nearer to its own group's than to another's
            assert all(np.abs(np.array(colour) - base).sum() < np.abs(colour - other).sum() for other in others)
    image, boxes = np.zeros((100, 100, 3), np.uint8), np.array([[20, 60, 80, 90]], np.float32)
    for group, letters in (("f", drawing.WHITE), ("c", drawing.INK)):
        drawn = draw_objects(image, boxes, [], ["name"], [group], [0])
        assert (np.abs(drawn.astype(int) - letters).max(axis=2) < 40).sum() > 10


def test_letters_stay_within_the_image() -> None:
    for corner in ((-15, 40), (390, 40), (10, 3), (10, 70), (-500, -500), (900, 900)):
        lettered("Жук", corner)
    picture = np.full((30, 40, 3), 90, np.uint8)
    boxes = np.array([[20, 0, 24, 4]], np.float32)
    assert draw_objects(picture, boxes, [], ["очень длинное имя 0.98"], ["c"], [0]).shape == (480, 640, 3)
    assert (picture == 90).all()
