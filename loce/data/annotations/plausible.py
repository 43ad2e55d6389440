"""Plausibility of boxes and masks: corners in place of width and height, shares of the image in place of pixels,
another scale, x and y exchanged.

Legend: N boxes (or masks and their boxes), A annotations, P polygon parts. Boxes are x, y, width, height in pixels.
"""

import numpy as np
from pycocotools import mask as coco_mask

from loce.data.annotations.segmentations import GRID, Segmentations

MANY_OUTSIDE = 0.1  # of the boxes beyond the border: the file's boxes mean something else
MANY_MISPLACED = 0.05  # of the masks: they are those of other images, or mean something else
SINGLE = 2  # misplaced masks that are accepted in any file, also a small one
_SMALL = 4.0  # px^2; a polygon of less may fill no pixel
_PARTS = 1 << 16  # polygon parts whose area is computed at a time


def beyond_border(xywh: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(N,) bool: boxes that reach more than 1 pixel over their image's border; sizes: (N, 2) heights, widths."""
    with np.errstate(invalid="ignore"):  # NaN: not beyond
        return np.maximum(-xywh[:, :2], xywh[:, :2] + xywh[:, 2:] - sizes[:, ::-1]).max(axis=1, initial=0) > 1


def suspicious_boxes(
    xywh: np.ndarray, sizes: np.ndarray, outline: np.ndarray, kind: str, ids: np.ndarray | None = None
) -> str:
    """What boxes (N, 4) may be where they are not x, y, width, height in pixels; "" where nothing speaks against it.

    sizes: (N, 2) heights and widths of their images; outline: (N, 4) x1, y1, x2, y2 around their masks, NaN where there
    is none; kind, ids (N,): what the message calls a box ("annotation", its
    id); by default by its place.
    """
    finite = np.isfinite(xywh).all(axis=1)
    if not finite.any():
        return ""

    def named(rows: np.ndarray) -> str:
        first = int(np.flatnonzero(rows)[0])
        return f"{kind} {first if ids is None else ids[first]}"

    beyond, own = beyond_border(xywh, sizes), xywh[finite]
    if beyond.sum() > MANY_OUTSIDE * len(xywh):
        return (
            f"{beyond.sum()} of {len(xywh)} boxes reach over their image's border (the first: {named(beyond)}). `bbox` "
            "must be x, y, width, height in pixels; are these corners (x1, y1, x2, y2)?"
        )
    if own.max() <= 1.5 and own.min() >= -0.5 and own.any() and sizes.min() > 2:
        return (
            f"all {len(own)} boxes are within one or two pixels (the first: {named(finite)}). `bbox` "
            "must be x, y, width, height in pixels; are these shares of the image (0 to 1)?"
        )
    masked = finite & np.isfinite(outline).all(axis=1) & (xywh[:, 2:] > 0).all(axis=1)
    if masked.sum() > SINGLE and (form := other_form(outline[masked], xywh[masked])):
        return (
            f"boxes fit their masks only when they are read as {form} (the first: {named(masked)}). `bbox` must be "
            "x, y, width, height in pixels"
        )
    return ""


def misplaced_masks(
    masks: Segmentations,
    outline: np.ndarray,
    xywh: np.ndarray,
    sizes: np.ndarray,
    compared: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows whose mask has no pixel, rows whose mask lies for more than half of its extent outside of its box, and rows
    whose mask has no pixel since it is small, and lies where its box is.

    outline: (A, 4), see `outlines`; xywh: (A, 4) boxes; sizes: (A, 2) height and width of each annotation's image;
    compared: (A,) bool, annotations with a usable mask and a sensible box. The extent of a polygon is that of
    its corners inside the image.
    """
    limits = np.tile(sizes[:, ::-1], 2)
    inside = np.clip(outline, 0, limits)  # NaN, of what has no mask, stays
    extent = inside[:, 2:] - inside[:, :2]
    # Only a small or thin mask may fill no pixel at all: the mask library decides.
    doubtful = compared & ((extent.min(axis=1) < 2) | (_polygon_areas(masks) < _SMALL))
    empty = np.array(
        [
            row
            for row in np.flatnonzero(doubtful).tolist()
            if not coco_mask.area(masks.rles([row], *sizes[row].tolist())[0])
        ],
        dtype=np.int64,
    )
    common = np.minimum(inside[:, 2:], xywh[:, :2] + xywh[:, 2:] + 1) - np.maximum(inside[:, :2], xywh[:, :2] - 1)
    with np.errstate(invalid="ignore"):
        outside = np.maximum(common, 0).prod(axis=1) < 0.5 * extent.prod(axis=1)
    outside &= compared
    outside[empty] = False
    box = np.concatenate([xywh[empty, :2], xywh[empty, :2] + xywh[empty, 2:]], axis=1)
    tiny = (outline[empty, :2] >= box[:, :2] - 1).all(axis=1) & (outline[empty, 2:] <= box[:, 2:] + 1).all(axis=1)
    return empty[~tiny], np.flatnonzero(outside), empty[tiny]


def outlines(masks: Segmentations, sizes: np.ndarray) -> np.ndarray:
    """(A, 4) float64 x1, y1, x2, y2 around each mask, of polygons around all corners; NaN where there is none."""
    found = np.full((len(sizes), 4), np.nan)
    polygons = np.flatnonzero(np.diff(masks.first_part) > 0)
    if len(polygons):
        for side in (0, 1):
            line = masks.corners[side::2]
            for column, extreme in ((side, np.minimum), (side + 2, np.maximum)):
                of_parts = extreme.reduceat(line, masks.part_bounds[:-1] // 2)
                found[polygons, column] = extreme.reduceat(of_parts, masks.first_part[polygons]) / GRID
    codes = np.flatnonzero(np.diff(masks.first_byte) > 0)
    if len(codes):
        boxes = coco_mask.toBbox([masks.rles([row], *sizes[row].tolist())[0] for row in codes.tolist()])
        found[codes] = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return found


def _polygon_areas(masks: Segmentations) -> np.ndarray:
    """(A,) float64 px^2, summed over parts; inf where there is no polygon.

    The sum over corners of x y' - x' y, with x', y' the next corner, which after the last one is the part's first.
    """
    areas = np.zeros(len(masks.part_bounds) - 1)
    for begin in range(0, len(areas), _PARTS):
        bounds = masks.part_bounds[begin : begin + _PARTS + 1] // 2
        corners = masks.corners[2 * bounds[0] : 2 * bounds[-1]].reshape(-1, 2).astype(np.float64) / GRID
        after = np.arange(1, len(corners) + 1)
        after[bounds[1:] - bounds[0] - 1] = bounds[:-1] - bounds[0]
        x, y = corners.T
        areas[begin : begin + _PARTS] = np.abs(
            np.add.reduceat(x * y[after] - x[after] * y, bounds[:-1] - bounds[0]) / 2
        )
    sums = np.append(0, np.cumsum(areas))
    own = sums[masks.first_part[1:]] - sums[masks.first_part[:-1]]
    return np.where(np.diff(masks.first_part) > 0, own, np.inf)


def other_form(outline: np.ndarray, xywh: np.ndarray) -> str:
    """What boxes (N, 4) are where they only fit the outlines x1, y1, x2, y2 of their masks when read otherwise."""
    corner, sides = xywh[:, :2], xywh[:, 2:]
    forms = {
        "": np.concatenate([corner, corner + sides], axis=1),
        "corners (x1, y1, x2, y2)": xywh,
        "centre, width, height": np.concatenate([corner - sides / 2, corner + sides / 2], axis=1),
    }
    return next((form for form, box in forms.items() if len(xywh) and _agree(outline, box)), "")


def likely_cause(outline: np.ndarray, xywh: np.ndarray, sizes: np.ndarray) -> str:
    """What happened to misplaced masks, from their outlines x1, y1, x2, y2 and boxes (N, 4), and their images' heights
    and widths (N, 2)."""
    if np.abs(outline).max() <= 1.5:
        return "their corners look like shares of the image (0 to 1): multiply them by width and height"
    if form := other_form(outline, xywh):
        return f"their boxes look like {form}: `bbox` must be x, y, width, height in pixels"
    box = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    if _agree(outline[:, [1, 0, 3, 2]], box):
        return "x and y look exchanged"
    height, width = sizes[:, :1], sizes[:, 1:]
    # Of a flipped image: left and right, or top and bottom, change places.
    if _agree(
        np.concatenate([width - outline[:, 2:3], outline[:, 1:2], width - outline[:, :1], outline[:, 3:]], 1), box
    ):
        return "they look like masks of images flipped left to right"
    if _agree(
        np.concatenate([outline[:, :1], height - outline[:, 3:], outline[:, 2:3], height - outline[:, 1:2]], 1), box
    ):
        return "they look like masks of images flipped upside down"
    shift = np.median((outline - box)[:, :2], axis=0)
    if len(box) > SINGLE and _agree(outline - np.tile(shift, 2), box):
        return f"they look shifted by {shift[0]:.3g} and {shift[1]:.3g} pixels (x and y)"
    scale = float(np.median((outline[:, 2:] - outline[:, :2]) / xywh[:, 2:]))
    if scale > 0 and _agree(outline / scale, box):
        return f"they look like masks of images {scale:.3g} times as large: scale them as the images were"
    return "perhaps they belong to other images, to images before resizing, or to other boxes"


def _agree(outline: np.ndarray, box: np.ndarray) -> bool:
    """Whether most outlines (N, 4) are their boxes (N, 4), within a tenth of the box."""
    sides = np.maximum(box[:, 2:] - box[:, :2], 1)
    return bool(np.median(np.abs(outline - box).max(axis=1) / sides.max(axis=1)) < 0.1)
