"""Drawing on images: objects with masks and names, crops, sheets of pictures, text of any script.

OpenCV scales images and finds outlines, Pillow draws; figures with axes are matplotlib's (loce/report/figures.py).
"""

import colorsys
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from loce.utils.classes import GROUP_NAMES, GROUP_RGB, GROUPS
from loce.utils.files import atomic_write

CELL, GAP, CAPTION, TITLE, LINE = 448, 8, 26, 44, 20  # pixels: side of a picture, between two, lines of text
CROP = 160  # pixels: side of the picture of one object
WHITE, INK, GREY = (255, 255, 255), (40, 40, 40), (128, 128, 128)
LUMA, BRIGHT = (0.299, 0.587, 0.114), 140  # of a colour; on brighter ones letters are dark
SHADES = ((0.0, 0.0), (0.035, 0.08), (-0.035, -0.1), (0.035, -0.1), (-0.035, 0.08))  # of hue and lightness
TINT = 0.45  # how much of the colour goes into a mask
READABLE = 480  # pixels of the short side; smaller images are enlarged by a whole number, so that names fit
LARGEST = 4096  # pixels of the long side, beyond which nothing is enlarged
LONGEST_NAME = 60  # letters
Colour = tuple[int, int, int]
_truetype = cache(ImageFont.truetype)


def sheet(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str],
    title: str,
    columns: int = 4,
) -> np.ndarray:
    """(H, W, 3) uint8 RGB: pictures of any size in rows, a line below each, title and colours on top."""
    columns = min(columns, max(1, len(pictures)))
    fitted = [_fitted(picture, CELL / max(picture.shape[:2])) for picture in pictures]
    rows = [fitted[first : first + columns] for first in range(0, len(fitted), columns)]
    # The title, in as many lines as it needs, and on the right the colours of the groups.
    width = max(columns, 2) * (CELL + GAP) + GAP
    lines = textwrap.wrap(title, (width - 325) // 9)  # 9 pixels: a letter at most, on average
    top = TITLE + LINE * (len(lines) - 1) if lines else TITLE
    tops = top + np.cumsum([0, *(max(len(picture) for picture in row) + CAPTION + GAP for row in rows)])
    page = Image.new("RGB", (width, int(tops[-1])), WHITE)
    pen = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        write(pen, line, (GAP, 29 + LINE * number), INK, 16)
    for number, group in enumerate(GROUPS):
        left = page.width - 325 + 108 * number
        pen.rectangle((left, 16, left + 15, 31), fill=GROUP_RGB[group])
        write(pen, GROUP_NAMES[group], (left + 22, 29), INK, 15)
    for place, (picture, caption) in enumerate(zip(fitted, captions, strict=True)):
        top, left = int(tops[place // columns]), GAP + place % columns * (CELL + GAP)
        page.paste(Image.fromarray(picture), (left, top))
        write(pen, caption, (left, top + len(picture) + CAPTION - 9), INK, 13)
    return np.array(page)


def write_picture(file: Path, picture: np.ndarray) -> None:
    """A picture (H, W, 3) uint8 RGB as a file, in the format of its suffix."""
    with atomic_write(file) as temporary:
        Image.fromarray(picture).save(temporary, quality=88)


def crop_object(
    image: np.ndarray,
    box: np.ndarray,
    code: Mapping[str, Any] | None,
    group: str,
) -> np.ndarray:
    """(CROP, CROP, 3) uint8 RGB: an object with what is around it, its outline in the colour of its group.

    image: (H, W, 3) uint8 RGB; box: (4,) xyxy; code: run-length code of the mask, of the image's size; None: the box
    is drawn.
    """
    # A square, half as large again as the object; beyond the image it is grey.
    side = max(16, round(1.5 * float(max(box[2] - box[0], box[3] - box[1]))))
    corner = np.round((box[:2] + box[2:]) / 2 - side / 2).astype(int)
    shift = np.array([[1, 0, -corner[0]], [0, 1, -corner[1]]], np.float32)
    square = cv2.warpAffine(image, shift, (side, side), flags=cv2.INTER_NEAREST, borderValue=GREY)
    large = cv2.resize(square, (CROP, CROP), interpolation=cv2.INTER_AREA if side > CROP else cv2.INTER_LINEAR)
    if code is None:
        ends = ((box - np.tile(corner, 2)) * CROP / side).round().astype(int).tolist()
        cv2.rectangle(large, tuple(ends[:2]), tuple(ends[2:]), GROUP_RGB[group], 1)
        return large
    mask = cv2.warpAffine(coco_mask.decode(code), shift, (side, side), flags=cv2.INTER_NEAREST)
    mask = cv2.resize(mask, (CROP, CROP), interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(large, contours, -1, GROUP_RGB[group], 1)
    return large


def draw_objects(
    image: np.ndarray,
    boxes: np.ndarray,
    codes: Sequence[dict[str, Any] | None],
    texts: Sequence[str],
    groups: Sequence[str],
    labels: Sequence[int],
    longest: int | None = None,
) -> np.ndarray:
    """A scaled copy of the (H, W, 3) uint8 RGB image with N objects, the best first.

    boxes: (N, 4) xyxy; codes: N run-length codes of masks of the image's size, or none at all; None: the box is drawn;
    texts: what is written at each; groups: "r", "c" or "f", which gives the colour, and labels, which give its shade;
    longest: pixels of the picture's longer side (None: those of the image, times a whole number where it is small).
    """
    height, width = image.shape[:2]
    whole = max(1, min(READABLE // min(height, width), LARGEST // max(height, width)))
    scale = longest / max(height, width) if longest else whole
    canvas = _fitted(image, scale)
    pixels = max(12, round(min(canvas.shape[:2]) / 40))  # of the letters
    line = max(1, round(pixels / 15))
    corners = (boxes * scale).round().astype(int).tolist()
    colours = [shade(group, label) for group, label in zip(groups, labels, strict=True)]
    # Where the label of each object may be: over its box's top left corner, within it, below, beside.
    points: list[Points] = [
        [(x1, y1, 0, 1), (x1, y1, 0, 0), (x1, y2, 0, 0), (x2, y1, 0, 0), (x1, y1, 1, 0), (x2, y2, 0, 1)]
        for x1, y1, x2, y2 in corners
    ]
    for place in reversed(range(len(boxes))):  # the best on top
        colour = colours[place]
        if len(codes) and codes[place] is not None:
            mask = cv2.resize(coco_mask.decode(codes[place]), canvas.shape[1::-1], interpolation=cv2.INTER_NEAREST)
            shown = mask.astype(bool)
            canvas[shown] = ((1 - TINT) * canvas[shown] + TINT * np.array(colour)).astype(np.uint8)
            contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
            cv2.drawContours(canvas, contours, -1, colour, line)
            if contours:
                points[place] = _mask_points(np.concatenate(contours)[:, 0])
        else:
            cv2.rectangle(canvas, tuple(corners[place][:2]), tuple(corners[place][2:]), colour, line)
    # Letters on plates at their objects, the best first, each where it covers least of the plates before it.
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    plates: list[tuple[int, int, int, int]] = []
    for text, own in zip(texts, points, strict=True):
        plate = int(pen.textlength(*_letters(text, pixels))) + 4, pixels + 4
        plates.append(_free_place(own, plate, picture.size, plates))
    for (left, top, right, bottom), text, colour in reversed(list(zip(plates, texts, colours, strict=True))):
        pen.rectangle((left, top, right, bottom), fill=colour)
        bright = np.dot(colour, LUMA) > BRIGHT
        write(pen, text, (left + 2, bottom - pixels // 4 - 1), INK if bright else WHITE, pixels)
    return np.array(picture)


def shade(group: str, label: int) -> Colour:
    """A class's colour: its group's, lighter or darker and of a neighbouring hue, so that few classes share one."""
    turn, lighter = SHADES[label % len(SHADES)]
    hue, lightness, saturation = colorsys.rgb_to_hls(*(part / 255 for part in GROUP_RGB[group]))
    red, green, blue = colorsys.hls_to_rgb((hue + turn) % 1, min(max(lightness + lighter, 0), 1), saturation)
    return round(255 * red), round(255 * green), round(255 * blue)


# x, y of an object, and which share of a plate lies left of and above it
Points = list[tuple[float, float, float, float]]


def _mask_points(outline: np.ndarray) -> Points:
    """Where the label of a mask may be, touching its outline (P, 2) of x, y: over, below, beside; on its middle."""
    x, y = outline[:, 0], outline[:, 1]
    top, bottom, right, left = (outline[i].tolist() for i in (y.argmin(), y.argmax(), x.argmax(), x.argmin()))
    middle = (float(x.mean()), float(y.mean()))
    return [(*top, 0.5, 1), (*bottom, 0.5, 0), (*right, 0, 0.5), (*left, 1, 0.5), (*middle, 0.5, 0.5)]


def _free_place(
    points: Points,
    plate: tuple[int, int],
    size: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a plate (width, height) within a picture (width, height), at the first of the points
    where it covers none that are taken, or least of them."""

    def covered(place: tuple[int, int, int, int]) -> int:
        sides = [(min(place[2], o[2]) - max(place[0], o[0]), min(place[3], o[3]) - max(place[1], o[1])) for o in taken]
        return sum(max(width, 0) * max(height, 0) for width, height in sides)

    places = []
    for x, y, left, above in points:
        corner = x - left * plate[0], y - above * plate[1]
        a, b = (max(0, min(round(corner[n]), size[n] - plate[n] - 1)) for n in (0, 1))
        places.append((a, b, a + plate[0], b + plate[1]))
    return min(places, key=covered)  # the first of equal ones


def _fitted(picture: np.ndarray, scale: float) -> np.ndarray:
    """A scaled copy; enlarged by a whole number, pixels become squares."""
    size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
    larger = cv2.INTER_NEAREST if scale == int(scale) else cv2.INTER_LINEAR
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else larger)


def write(
    pen: ImageDraw.ImageDraw,
    text: str,
    corner: tuple[int, int],
    colour: Colour,
    pixels: int,
) -> None:
    """Text of any script; letters that no font here has become `?`. corner: (x, y), where the baseline begins."""
    shown, font = _letters(text, pixels)
    pen.text(corner, shown, fill=colour, font=font, anchor="ls")


def class_text(name: str, number: int) -> str:
    """A class's name, or its number (category id) where it has none, or no font here has its letters.

    A long name is cut, and has the number, too: it may begin as another does.
    """
    if not name.strip() or not _font_file(unicodedata.normalize("NFC", name)):
        return f"class {number}"
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}... (class {number})"


def _letters(text: str, pixels: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """What is drawn of a text, on one line and accents joined with their letters, and the font for it."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if not _font_file(text):
        text = text.encode("ascii", "replace").decode()
    return text, _truetype(_font_file(text), pixels)


@cache
def _font_file(text: str) -> str:
    """A font file with all letters of a text; "" where there is none."""
    wanted = {ord(c) for c in text if not c.isspace() and unicodedata.category(c) != "Cf"}
    return next((file for file in _font_files() if wanted <= _characters(file)), "")


def _font_files() -> Iterator[str]:
    """DejaVu Sans, which comes with matplotlib, then the machine's fonts, upright and of normal weight first."""
    yield str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))
    from matplotlib import font_manager  # half a second, and rarely needed

    fonts = [font for font in font_manager.fontManager.ttflist if not font.name.startswith("Last Resort")]
    fonts.sort(key=lambda font: (font.style != "normal", str(font.weight) not in ("400", "normal"), font.name))
    yield from (font.fname for font in fonts)


@cache
def _characters(file: str) -> frozenset[int]:
    """Code points of a font; none where it cannot be read."""
    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
