"""Drawing of one image of Glyph-LVIS: glyphs with exact masks over a textured background.

A glyph is rendered once per face, then turned, scaled and placed at four times the final resolution and averaged down,
which gives the share of every pixel that it covers. Its mask is the pixels covered by half or more; its edge is blended
by the share. Later objects lie over earlier ones, and an object's mask is what can still be seen of it at the end.
All random numbers come from the generator that is passed in.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from loce.utils.errors import UserError

FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
)
SUPERSAMPLING = 4
ROTATION = 15.0  # degrees to either side
STRETCH = 0.08  # of width against height, to either side
VISIBLE = 0.6  # least share of an object's pixels that stays visible and inside the image
FEWEST_PIXELS = 20  # visible, of an object
TRIES = 25  # places tried for an object before all objects of the image are made smaller
SHRINK, MOST_SHRINKS = 0.9, 10
OUTLINED, SHADED = 0.25, 0.4  # shares of the objects
CONTRAST = 80.0  # least distance (RGB, 0..255) of a glyph's colour from what lies under it


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A glyph of its final size. coverage: (h, w) float32 in [0, 1]; inner: (h, w), the same without the outline."""

    coverage: np.ndarray
    inner: np.ndarray

    def cut(self, rows: slice, columns: slice) -> "Shape":
        """The part of it in a window."""
        return Shape(coverage=self.coverage[rows, columns], inner=self.inner[rows, columns])

    @property
    def mask(self) -> np.ndarray:
        """(h, w) bool."""
        return self.coverage >= 0.5


Window = tuple[slice, slice]  # rows and columns of the image
Placed = tuple[Shape, Window]
Sides = tuple[float, float] | tuple[tuple[float, float], ...]  # of all objects, or of each, back to front


def draw_image(
    characters: str,
    size: int,
    sides: Sides,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """An image that shows all of `characters` (repeats allowed), later ones in front.

    size: pixels a side; sides: smallest and largest object, or these of each object, the mean of width and height
    as a share of `size`.
    Returns the image (size, size, 3) uint8 RGB and the owners (size, size) int64: the index in `characters` of the
    object that each pixel shows, -1 for the background. UserError when the objects fit at no size.
    """
    canvas = draw_background(size, rng)
    placed = _arrange(characters, size, sides, rng)
    for shape, window in placed:
        _paint(canvas[window], shape, rng)
    canvas += rng.normal(0, rng.uniform(0, 7), canvas.shape).astype(np.float32)
    owners = np.full((size, size), -1)
    for index, (shape, window) in enumerate(placed):
        owners[window][shape.mask] = index
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), owners


# ---- glyphs ----------------------------------------------------------------------------------------------------------


def _face_file(face: str) -> str:
    """The font file of a face, which comes with matplotlib."""
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf")


@cache
def faces_with(character: str) -> tuple[str, ...]:
    """The faces that can draw `character`."""
    return tuple(face for face in FACES if ord(character) in _code_points(face))


@cache
def _code_points(face: str) -> frozenset[int]:
    return frozenset(FT2Font(_face_file(face)).get_charmap())


@cache
def font(face: str, pixels: int) -> ImageFont.FreeTypeFont:
    """A face at a height (em) in pixels."""
    return ImageFont.truetype(_face_file(face), pixels, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=4096)
def render_glyph(character: str, face: str, pixels: int) -> np.ndarray:
    """(h, w) uint8, 255 on the glyph, cut to its ink. pixels: the height of the font (em)."""
    bitmap = font(face, pixels).getmask(character, mode="L")
    array = np.array(bitmap, dtype=np.uint8).reshape(bitmap.size[1], bitmap.size[0])
    rows, columns = np.flatnonzero(array.max(1)), np.flatnonzero(array.max(0))
    return array[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _make_shape(
    character: str,
    side: float,
    size: int,
    rng: np.random.Generator,
) -> Shape:
    """A glyph in a random face, turned and stretched; side: the mean of its width and height, in pixels."""
    faces = faces_with(character)
    glyph = render_glyph(character, faces[rng.integers(len(faces))], max(48, 3 * size // 4))
    height, width = glyph.shape
    # Turned, stretched, and scaled to four times its final size.
    angle, stretch = np.deg2rad(rng.uniform(-ROTATION, ROTATION)), np.exp(rng.uniform(-STRETCH, STRETCH))
    scale = SUPERSAMPLING * side / ((height + width) / 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = scale * turn @ np.diag([stretch, 1 / stretch])
    outline = rng.uniform(0.8, 0.06 * side + 0.8) if rng.random() < OUTLINED else 0.0
    # Room for it all, whole pixels; where in the pixel its middle lies is random.
    room = np.ceil((np.abs(matrix) @ [width, height]) / SUPERSAMPLING + 2 * outline + 3).astype(int)
    shift = SUPERSAMPLING * (room / 2 + rng.uniform(-0.5, 0.5, 2)) - matrix @ [width / 2, height / 2]
    warped = cv2.warpAffine(
        glyph, np.column_stack([matrix, shift]), (SUPERSAMPLING * room).tolist(), flags=cv2.INTER_LINEAR
    )
    return _shrink_and_trim(warped, outline)


def _shrink_and_trim(fine: np.ndarray, outline: float) -> Shape:
    """From four times the resolution to pixels, without empty borders; outline: its width in pixels, 0 for none."""
    thick = fine
    if outline:
        reach = round(SUPERSAMPLING * outline)
        thick = cv2.dilate(fine, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1)))
    size = (fine.shape[1] // SUPERSAMPLING, fine.shape[0] // SUPERSAMPLING)
    coverage, inner = (
        cv2.resize(layer, size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255 for layer in (thick, fine)
    )
    rows, columns = np.flatnonzero(coverage.max(1) > 0), np.flatnonzero(coverage.max(0) > 0)
    shape = Shape(coverage=coverage, inner=inner)
    return shape.cut(slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))


# ---- places ----------------------------------------------------------------------------------------------------------


def _arrange(
    characters: str,
    size: int,
    sides: Sides,
    rng: np.random.Generator,
) -> list[Placed]:
    """Places for all; when one finds none, everything starts again with objects a tenth smaller."""
    log_sides = np.broadcast_to(np.log(size * np.array(sides)).reshape(-1, 2), (len(characters), 2))
    for shrinks in range(MOST_SHRINKS + 1):
        placed = _try_to_arrange(characters, size, log_sides + shrinks * np.log(SHRINK), rng)
        if len(placed) == len(characters):
            return placed
    raise UserError(
        f"{len(characters)} objects do not fit in an image of {size} pixels a side; lower most_objects or largest"
    )


def _try_to_arrange(
    characters: str,
    size: int,
    log_sides: np.ndarray,
    rng: np.random.Generator,
) -> list[Placed]:
    placed: list[Placed] = []
    owners = np.full((size, size), -1)
    least = np.zeros(len(characters))  # pixels of each object that must stay visible
    for index, character in enumerate(characters):
        shape = _make_shape(character, float(np.exp(rng.uniform(*log_sides[index]))), size, rng)
        # It must be seen itself, and no object below it may lose more than it has to spare.
        needed = max(FEWEST_PIXELS, VISIBLE * shape.mask.sum())
        spare = np.bincount(owners[owners >= 0], minlength=len(characters)) - least
        for part, window in (_drop(shape, size, rng) for _ in range(TRIES)):
            hidden = owners[window][part.mask]
            lost = np.bincount(hidden[hidden >= 0], minlength=len(characters))
            if part.mask.sum() >= needed and (lost[:index] <= spare[:index]).all():
                break
        else:
            return placed
        owners[window][part.mask] = index
        least[index] = needed
        placed.append((part, window))
    return placed


def _drop(shape: Shape, size: int, rng: np.random.Generator) -> Placed:
    """A random place, at most a quarter of the height and of the width outside the image, and the part inside it."""
    extent = np.array(shape.coverage.shape)
    start = np.floor(rng.uniform(-extent / 4, size - 0.75 * extent)).astype(int)
    low, high = np.maximum(start, 0), np.minimum(start + extent, size)
    part = shape.cut(*(slice(a, b) for a, b in zip(low - start, high - start, strict=True)))
    return part, (slice(low[0], high[0]), slice(low[1], high[1]))


# ---- colours ---------------------------------------------------------------------------------------------------------


def draw_background(size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size, 3) float32 RGB, 0..255: two colours in clouds, a grain, and meaningless strokes and blobs."""
    grey, tint = rng.uniform(40, 215), rng.uniform(-60, 60, 3)
    first = np.clip(grey + tint - tint.mean(), 10, 245)
    second = np.clip(first + rng.uniform(-60, 60, 3), 10, 245)
    clouds = np.clip(_smooth_noise(size, int(rng.integers(2, 7)), rng) * 0.6 + 0.5, 0, 1)[..., None]
    grain = _smooth_noise(size, size // int(rng.integers(2, 7)), rng)[..., None] * rng.uniform(2, 14)
    canvas = (first * (1 - clouds) + second * clouds + grain).astype(np.float32)
    for _ in range(rng.integers(3, 10)):
        share = _distractor(size, rng)[..., None] * np.float32(rng.uniform(0.4, 0.95) / 255)
        canvas += (rng.uniform(0, 255, 3).astype(np.float32) - canvas) * share
    return canvas


def _smooth_noise(size: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size) float32, normal noise of `cells` cells a side, smoothly enlarged."""
    noise = rng.normal(size=(cells, cells)).astype(np.float32)
    return cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)


def _distractor(size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size) uint8, 255 on a curved stroke or on a blob."""
    layer = np.zeros((size, size), np.uint8)
    centre = rng.uniform(0, size, 2)
    if rng.random() < 0.6:
        ends = centre + rng.normal(0, 0.15 * size, (3, 2))
        t = np.linspace(0, 1, 12)[:, None]
        curve = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * ends[1] + t**2 * ends[2]
        thickness = max(1, round(size * rng.uniform(0.008, 0.035)))
        cv2.polylines(layer, [np.rint(curve * 16).astype(np.int32)], False, 255, thickness, cv2.LINE_AA, shift=4)
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        radii = size * rng.uniform(0.02, 0.1, len(angles))
        corners = centre + radii[:, None] * np.column_stack([np.cos(angles), np.sin(angles)])
        cv2.fillPoly(layer, [np.rint(corners * 16).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
    return layer


def _paint(canvas: np.ndarray, shape: Shape, rng: np.random.Generator) -> None:
    """Blend the glyph into its window (h, w, 3) of the canvas, in place."""
    coverage, share_inner = shape.coverage[..., None], (shape.inner / np.maximum(shape.coverage, 1e-6))[..., None]
    under = (canvas * coverage).sum((0, 1)) / coverage.sum()
    colour = _contrasting(under, rng)
    fill = np.broadcast_to(colour, canvas.shape)
    if rng.random() < SHADED:
        height, width = shape.coverage.shape
        angle = rng.uniform(0, 2 * np.pi)
        ramp = np.add.outer(np.linspace(-1, 1, height) * np.sin(angle), np.linspace(-1, 1, width) * np.cos(angle))
        fill = np.clip(colour + ramp[..., None] * rng.uniform(-60, 60, 3), 0, 255)
    edge = _contrasting(colour, rng)
    canvas += (fill * share_inner + edge * (1 - share_inner) - canvas) * coverage


def _contrasting(other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A colour (3,) that contrasts with `other`."""
    while True:
        colour = rng.uniform(0, 255, 3)
        if np.linalg.norm(colour - other) >= CONTRAST:
            return colour
