"""Objects drawn into an image at its own size: masks tinted by frequency group, outlines, names and scores."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
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
    text = text.encode("ascii", "replace").decode()  # OpenCV's font has no other letters
    (width, height), base = cv2.getTextSize(text, FONT, size, line)
    x = max(0, min(corner[0], canvas.shape[1] - width))
    y = max(height + base, corner[1])
    cv2.rectangle(canvas, (x, y - height - base), (x + width, y), colour, cv2.FILLED)
    cv2.putText(canvas, text, (x, y - base // 2), FONT, size, (255, 255, 255), line, cv2.LINE_AA)
