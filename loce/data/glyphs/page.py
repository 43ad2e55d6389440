"""Page of samples of a Glyph-LVIS set: training images beside their annotations, and a glyph of every class."""

import colorsys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from loce.data.glyphs.drawing import FACES, font
from loce.data.glyphs.records import Record
from loce.utils.classes import GROUP_RGB

COLUMNS, SAMPLES = 4, 16
TILE = 256  # pixels a side of an image on the page; images are enlarged by a whole factor up to it
CAPTION, MARGIN = 44, 10
MOST_CLASSES, CLASSES_A_ROW = 100, 25
CLASS_HEIGHT = 76


def draw_samples(
    folder: Path,
    images: list[Record],
    annotations: list[Record],
    categories: list[Record],
) -> None:
    """Write folder/samples.png. images, annotations: of the training split, whose image files are in `folder`."""
    by_image: dict[int, list[Record]] = {}
    for annotation in annotations:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    by_category = {category["id"]: category for category in categories}
    shown = [image for image in images if image["id"] in by_image][:SAMPLES]
    side = max(1, TILE // shown[0]["width"]) * shown[0]["width"] if shown[0]["width"] < TILE else TILE
    # Above the images, four a row and each twice; below them the classes.
    cell = (2 * side + MARGIN, side + CAPTION)
    sample_rows, class_rows = -(-len(shown) // COLUMNS), -(-min(MOST_CLASSES, len(categories)) // CLASSES_A_ROW)
    height = MARGIN + sample_rows * cell[1] + class_rows * CLASS_HEIGHT
    page = Image.new("RGB", (MARGIN + COLUMNS * cell[0], height), "white")
    for index, image in enumerate(shown):
        place = (MARGIN + index % COLUMNS * cell[0], MARGIN + index // COLUMNS * cell[1])
        file = folder / "/".join(image["coco_url"].split("/")[-2:])
        _draw_sample(page, place, side, file, by_image[image["id"]], by_category)
    _draw_classes(page, MARGIN + sample_rows * cell[1], categories)
    page.save(folder / "samples.png")


def _draw_sample(
    page: Image.Image,
    place: tuple[int, int],
    side: int,
    file: Path,
    annotations: list[Record],
    by_category: dict[int, Record],
) -> None:
    """The image, the same with masks, boxes and characters, and the names under both."""
    plain = np.asarray(Image.open(file))
    marked = plain.astype(np.float64) * 0.4
    colours = [255 * np.array(colorsys.hsv_to_rgb(i / len(annotations), 0.8, 1.0)) for i in range(len(annotations))]
    for annotation, colour in zip(annotations, colours, strict=True):
        code = annotation["segmentation"]
        code = coco_mask.merge(coco_mask.frPyObjects(code, *plain.shape[:2])) if isinstance(code, list) else code
        inside = coco_mask.decode(code).astype(bool)
        marked[inside] = 0.3 * plain[inside] + 0.7 * colour
    left, top = place[0] + side + 2, place[1]
    for x, pixels in ((place[0], plain), (left, marked.astype(np.uint8))):
        page.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x, top))
    # Boxes and characters at the size of the page.
    pen, scale = ImageDraw.Draw(page), side / plain.shape[1]
    for annotation, colour in zip(annotations, colours, strict=True):
        x, y, width, height = (scale * value for value in annotation["bbox"])
        x, y = x + left, y + top
        pen.rectangle((x, y, x + width - 1, y + height - 1), outline=tuple(colour.astype(int)))
        character = by_category[annotation["category_id"]]["synonyms"][0]
        pen.text((x + 2, y - 1), character, fill="white", font=font(FACES[0], 13), stroke_width=1, stroke_fill="black")
    counts = Counter(annotation["category_id"] for annotation in annotations)
    names = [
        f"{by_category[i]['name'].replace('_', ' ')} ({by_category[i]['frequency']}) x{n}" for i, n in counts.items()
    ]
    lines = textwrap.wrap(", ".join(names), 2 * side // 6, max_lines=3)
    pen.text((place[0], top + side + 1), "\n".join(lines), fill="black", font=font(FACES[0], 10))


def _draw_classes(page: Image.Image, top: int, categories: list[Record]) -> None:
    """The classes from frequent to rare, at most 100 of them, with their training images; the colour is the group."""
    ranked = sorted(categories, key=lambda category: -category["image_count"])
    chosen = np.linspace(0, len(ranked) - 1, min(MOST_CLASSES, len(ranked))).round().astype(int)
    pen, pitch = ImageDraw.Draw(page), page.width // CLASSES_A_ROW
    for index, rank in enumerate(chosen):
        category = ranked[rank]
        group, character = category["frequency"], category["synonyms"][0]
        centre = (index % CLASSES_A_ROW + 0.5) * pitch, top + (index // CLASSES_A_ROW) * CLASS_HEIGHT + 26
        pen.text(centre, character, fill=GROUP_RGB[group], font=font(FACES[0], 40), anchor="mm")
        note = f"{group} {category['image_count']}"
        pen.text((centre[0], centre[1] + 36), note, fill="black", font=font(FACES[0], 12), anchor="mm")
