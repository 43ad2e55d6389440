"""Objects drawn into an image at its own size: masks tinted by frequency group, outlines, names and scores."""

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from torchvision.ops import nms

from loce.utils.classes import GROUP_RGB

TINT = 0.45  # how much of the colour goes into a mask
READABLE = 480  # pixels of the short side; smaller images are enlarged by a whole number, so that names fit
FONT = cv2.FONT_HERSHEY_SIMPLEX


def worth_drawing(
    boxes_N4: np.ndarray, scores_N: np.ndarray, threshold: float, most: int, overlap: float
) -> np.ndarray:
    """Rows to draw, best first: scores of at least `threshold`, one for each place (boxes of all classes together
    overlap at most `overlap`), and at most `most`.
    """
    rows = np.flatnonzero(scores_N >= threshold)
    boxes, scores = torch.from_numpy(boxes_N4[rows]).float(), torch.from_numpy(scores_N[rows]).float()
    return rows[nms(boxes, scores, overlap).numpy()][:most]


def draw_objects(
    image: np.ndarray, boxes: np.ndarray, masks: Sequence[dict[str, Any]], texts: Sequence[str], groups: Sequence[str]
) -> np.ndarray:
    """A copy of the (H, W, 3) uint8 RGB image with N objects, enlarged where it is small.

    boxes: (N, 4) xyxy; masks: N run-length codes of the image's size, or none; texts: what is written at each; groups:
    "r", "c" or "f", which gives the colour.
    """
    zoom = max(1, READABLE // min(image.shape[:2]))
    canvas = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
    boxes = boxes * zoom
    size = max(0.4, min(canvas.shape[:2]) / 1200)  # of the letters
    line = max(1, round(2 * size))
    for place in reversed(range(len(boxes))):  # the best on top
        colour = GROUP_RGB[groups[place]]
        if masks:
            mask = coco_mask.decode(masks[place]).astype(bool)
            _tint(canvas, mask.repeat(zoom, axis=0).repeat(zoom, axis=1), colour, line)
        else:
            x1, y1, x2, y2 = (round(float(side)) for side in boxes[place])
            cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, line)
    for box, text, group in zip(boxes, texts, groups, strict=True):
        _write(canvas, text, (round(float(box[0])), round(float(box[1]))), GROUP_RGB[group], size, line)
    return canvas


def _tint(canvas: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], line: int) -> None:
    canvas[mask] = ((1 - TINT) * canvas[mask] + TINT * np.array(colour)).astype(np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(canvas, contours, -1, colour, line)


def _write(
    canvas: np.ndarray, text: str, corner: tuple[int, int], colour: tuple[int, int, int], size: float, line: int
) -> None:
    """White letters on a plate above `corner`, moved where they would leave the image."""
    width, height, base = text_size(text, size, line)
    x = max(0, min(corner[0], canvas.shape[1] - width))
    y = max(height + base, corner[1])
    cv2.rectangle(canvas, (x, y - height - base), (x + width, y), colour, cv2.FILLED)
    put_text(canvas, text, (x, y - base // 2), (255, 255, 255), size, line)


def class_text(name: str, number: int) -> str:
    """A class's name, or its number (category id) where no font here has the letters of the name."""
    return name if _font(unicodedata.normalize("NFC", name)) is not None else f"class {number}"


def text_size(text: str, size: float, line: int = 1) -> tuple[int, int, int]:
    """Width, height above the baseline and depth below it of what `put_text` draws, in pixels."""
    text, font = _letters(text)
    if not font:
        (width, height), base = cv2.getTextSize(text, FONT, size, line)
        return width, height, base
    left, top, right, bottom = _truetype(font, size).getbbox(text, anchor="ls")
    return int(right - min(left, 0)) + 1, int(-top), int(max(bottom, 0)) + 1


def put_text(
    canvas: np.ndarray,
    text: str,
    corner: tuple[int, int],
    colour: tuple[int, int, int],
    size: float,
    line: int = 1,
) -> None:
    """Text of any script into an (H, W, 3) uint8 image, in place; letters that no font here has become `?`.

    corner: (x, y), where the baseline begins; size: as OpenCV's `fontScale`; line: thickness of OpenCV's letters.
    """
    text, font = _letters(text)
    if not font:
        cv2.putText(canvas, text, corner, FONT, size, colour, line, cv2.LINE_AA)
        return
    # Pillow draws how much ink each pixel gets; what lies outside the image is cut off.
    width, height, base = text_size(text, size, line)
    ink = Image.new("L", (width, height + base))
    ImageDraw.Draw(ink).text((0, height), text, fill=255, font=_truetype(font, size), anchor="ls")
    x, y = corner[0], corner[1] - height
    patch = canvas[max(y, 0) : max(y + height + base, 0), max(x, 0) : max(x + width, 0)]
    share = np.asarray(ink)[max(-y, 0) :, max(-x, 0) :][: patch.shape[0], : patch.shape[1], None] / 255
    patch[:] = (patch + share * (np.array(colour) - patch)).round()


def _letters(text: str) -> tuple[str, str]:
    """What is drawn of a text, accents joined with their letters, and the font file for it ("": OpenCV's own font)."""
    text = unicodedata.normalize("NFC", text)
    font = _font(text)
    return (text, font) if font is not None else (text.encode("ascii", "replace").decode(), "")


@cache
def _font(text: str) -> str | None:
    """A font file with all letters of a text; "" for OpenCV's own font, None where there is none."""
    if text.isascii():
        return ""
    # OpenCV sets letter beside letter: wrong for scripts from right to left, and for marks above and below.
    shaped = any(unicodedata.bidirectional(c) in ("R", "AL") or unicodedata.category(c).startswith("M") for c in text)
    if not shaped and all(_opencv_has(c) for c in text):
        return ""
    wanted = {ord(c) for c in text if not c.isspace() and unicodedata.category(c) != "Cf"}
    return next((file for file in _font_files() if wanted <= _characters(file)), None)


@cache
def _opencv_has(character: str) -> bool:
    """Whether OpenCV draws it (since 5.0 it has more than ASCII); what it lacks comes out as question marks."""

    def drawn(text: str) -> bytes:
        canvas = np.zeros((48, 160), np.uint8)
        cv2.putText(canvas, text, (4, 36), FONT, 1, (255,))
        return canvas.tobytes()

    unknown = [drawn("?" * number) for number in range(1, 5)]
    return character.isascii() or drawn(character) not in unknown


@cache
def _font_files() -> list[str]:
    """TrueType fonts of this machine, upright and of normal weight first; without the one of mere placeholders."""
    from matplotlib import font_manager  # half a second, and rarely needed

    fonts = [font for font in font_manager.fontManager.ttflist if not font.name.startswith("Last Resort")]
    fonts.sort(key=lambda font: (font.style != "normal", str(font.weight) not in ("400", "normal"), font.name))
    return [font.fname for font in fonts]


@cache
def _characters(file: str) -> frozenset[int]:
    """Code points of a font; none where it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@cache
def _truetype(file: str, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, max(8, round(30 * size)))  # OpenCV's letters of scale 1 are about as large
