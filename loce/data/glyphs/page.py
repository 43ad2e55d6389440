"""The page of samples of a Glyph-LVIS set: training images beside their annotations, and a glyph of every class."""

import colorsys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from loce.data.glyphs.drawing import FACES, face_file
from loce.data.glyphs.records import Record

COLUMNS, SAMPLES = 4, 16
TILE = 256  # pixels a side of an image on the page; images are enlarged by a whole factor up to it
CAPTION, MARGIN = 44, 10
MOST_CLASSES, CLASSES_A_ROW = 100, 25
CLASS_HEIGHT = 76
GROUP_COLOURS = {"r": (200, 60, 60), "c": (205, 130, 20), "f": (40, 120, 80)}


def draw_samples(folder: Path, images: list[Record], annotations: list[Record], categories: list[Record]) -> None:
    """Write folder/samples.png. images, annotations: of the training split, whose image files are in `folder`."""
    by_image: dict[int, list[Record]] = {}
    for annotation in annotations:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    shown = [image for image in images if image["id"] in by_image][:SAMPLES]
    by_category = {category["id"]: category for category in categories}
    side = max(1, TILE // shown[0]["width"]) * shown[0]["width"] if shown[0]["width"] < TILE else TILE
    cell = (2 * side + MARGIN, side + CAPTION)
    sample_rows, class_rows = -(-len(shown) // COLUMNS), -(-min(MOST_CLASSES, len(categories)) // CLASSES_A_ROW)
    height = MARGIN + sample_rows * cell[1] + class_rows * CLASS_HEIGHT
    page = Image.new("RGB", (MARGIN + COLUMNS * cell[0], height), "white")
    for index, image in enumerate(shown):
        place = (MARGIN + index % COLUMNS * cell[0], MARGIN + index // COLUMNS * cell[1])
        _draw_sample(page, place, side, folder / _path(image), by_image[image["id"]], by_category)
    _draw_classes(page, MARGIN + sample_rows * cell[1], categories)
    page.save(folder / "samples.png")


def _path(image: Record) -> str:
    return "/".join(image["coco_url"].split("/")[-2:])


def _font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(face_file(FACES[0]), pixels, layout_engine=ImageFont.Layout.BASIC)


def _draw_sample(
    page: Image.Image,
    place: tuple[int, int],
    side: int,
    path: Path,
    annotations: list[Record],
    by_category: dict[int, Record],
) -> None:
    """The image, the same with masks, boxes and characters, and the names under both."""
    plain = np.asarray(Image.open(path))
    marked = plain.astype(np.float64) * 0.4
    for annotation, colour in zip(annotations, _palette(len(annotations)), strict=True):
        inside = _decode(annotation["segmentation"], *plain.shape[:2])
        marked[inside] = 0.3 * plain[inside] + 0.7 * colour
    for offset, pixels in ((0, plain), (side + 2, marked.astype(np.uint8))):
        enlarged = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        page.paste(enlarged, (place[0] + offset, place[1]))
    pen, scale = ImageDraw.Draw(page), side / plain.shape[1]
    for annotation, colour in zip(annotations, _palette(len(annotations)), strict=True):
        x, y, width, height = (scale * value for value in annotation["bbox"])
        x, y = x + place[0] + side + 2, y + place[1]
        pen.rectangle((x, y, x + width - 1, y + height - 1), outline=tuple(colour.astype(int)))
        character = by_category[annotation["category_id"]]["synonyms"][0]
        pen.text((x + 2, y - 1), character, fill="white", font=_font(13), stroke_width=1, stroke_fill="black")
    counts = Counter(annotation["category_id"] for annotation in annotations)
    names = [
        f"{by_category[i]['name'].replace('_', ' ')} ({by_category[i]['frequency']}) x{n}" for i, n in counts.items()
    ]
    lines = textwrap.wrap(", ".join(names), 2 * side // 6, max_lines=3)
    pen.text((place[0], place[1] + side + 1), "\n".join(lines), fill="black", font=_font(10))


def _palette(number: int) -> np.ndarray:
    """(number, 3) bright colours, 0..255."""
    return 255 * np.array([colorsys.hsv_to_rgb(i / number, 0.8, 1.0) for i in range(number)])


def _decode(segmentation: list[list[float]] | Record, height: int, width: int) -> np.ndarray:
    """(height, width) bool."""
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    return coco_mask.decode(segmentation).astype(bool)


def _draw_classes(page: Image.Image, top: int, categories: list[Record]) -> None:
    """The classes from frequent to rare, at most 100 of them, with their training images; the colour is the group."""
    ranked = sorted(categories, key=lambda category: -category["image_count"])
    chosen = np.linspace(0, len(ranked) - 1, min(MOST_CLASSES, len(ranked))).round().astype(int)
    pen, pitch = ImageDraw.Draw(page), page.width // CLASSES_A_ROW
    for index, rank in enumerate(chosen):
        category = ranked[rank]
        centre = (index % CLASSES_A_ROW + 0.5) * pitch, top + (index // CLASSES_A_ROW) * CLASS_HEIGHT + 26
        colour = GROUP_COLOURS[category["frequency"]]
        pen.text(centre, category["synonyms"][0], fill=colour, font=_font(40), anchor="mm")
        note = f"{category['frequency']} {category['image_count']}"
        pen.text((centre[0], centre[1] + 36), note, fill="black", font=_font(12), anchor="mm")
