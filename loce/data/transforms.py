"""Image reading, and resizing and flipping of images and boxes with MMDetection 2.8's numerics.

8-bit RGB, OpenCV's bilinear resize on integers, sides rounded as int(side * scale + 0.5), boxes scaled by the ratio of
new to old sides per axis (float32) and clipped. Random choices depend on (seed, epoch, image, how often this epoch has
shown it) and nothing else, so that workers and ranks do not change them.
"""

import contextlib
import io
import os
import re
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from loce.utils.errors import UserError
from loce.utils.files import kind_of

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # what follows 0xff in compressed data is none of these
_WIDE = "its pixels have 32 bits or more, and which of their values is white is not known; save it with 8 or 16 bits"
PADDING = (124, 116, 104)  # RGB beside an image on a canvas: the pixel mean, which becomes nearly 0
FEW_LEVELS = 64  # of 256; a 16-bit file that has no more was made by a camera of 14 bits or fewer
_ORIENTATION = 0x0112  # the tag in EXIF data
_STREAM = 0x10CE  # keeps these random numbers apart from those of the samplers
_SEED_STREAM = 0x3E4  # and these from both
_pillow = threading.Lock()  # its limit is a global variable


class ImageError(UserError):
    """An image file that cannot be used; the message names it."""


def read_image(
    path: Path,
    size: tuple[int, int] | None,
    exif: str = "ignore",
    scale_16bit: str = "high_byte",
) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a file of any kind (grey, palette, with alpha, 16 bits, CMYK); PNG's alpha is left out.

    exif: "ignore" leaves the pixels as they are stored, on which COCO and LVIS are annotated; "apply" turns them as the
    file's EXIF orientation asks. size: (height, width) that the annotation file gives; ImageError where the file has
    another, or cannot be read. None: a picture without annotations, turned upright by its EXIF orientation.
    scale_16bit: what becomes of 16 bits; "high_byte" the upper eight, "range" the image's lowest to highest value.
    """
    return read_levels(path, size, exif, scale_16bit)[0]


def read_levels(
    path: Path,
    size: tuple[int, int] | None,
    exif: str = "ignore",
    scale_16bit: str = "high_byte",
) -> tuple[np.ndarray, str]:
    """`read_image`, and a sentence where little is left of a 16-bit file, so that it looks black; else ""."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have here
        link = f"a link to {os.readlink(path)}: " if os.path.islink(path) else ""
        raise ImageError(f"{path}: cannot be read ({link}{getattr(error, 'strerror', None) or error})") from None
    image = _decode(path, content, upright=size is None or exif == "apply")
    if size is not None and image.shape[:2] != tuple(size):
        orientation = _orientation(content)
        turned = "; turned by 90 degrees they agree" if image.shape[1::-1] == tuple(size) else ""
        if turned and orientation > 4:
            other = "apply" if exif == "ignore" else "ignore"
            turned += f": its EXIF orientation is {orientation}, data.exif={other} turns it"
        raise ImageError(
            f"{path}: is {image.shape[1]} x {image.shape[0]} pixels (width x height), "
            f"but its annotation file says {size[1]} x {size[0]}{turned}"
        )
    return (image, "") if image.dtype == np.uint8 else _to_8_bits(path, image, scale_16bit)


def _to_8_bits(path: Path, image: np.ndarray, scale_16bit: str) -> tuple[np.ndarray, str]:
    """From uint16, with a sentence where few levels are left."""
    low, high = int(image.min()), int(image.max())
    if scale_16bit == "range" and low < high:
        return ((image - np.uint16(low)) * np.float32(255 / (high - low)) + np.float32(0.5)).astype(np.uint8), ""
    levels = (high >> 8) - (low >> 8) + 1
    few = (
        f"{path}: has 16 bits, but its values {low} to {high} become {levels} of 256 levels: the camera had fewer "
        "bits, or the image is dark; data.scale_16bit=range spreads each 16-bit image over all levels"
    )
    return (image >> 8).astype(np.uint8), few if levels <= FEW_LEVELS else ""


def _decode(path: Path, content: bytes, upright: bool) -> np.ndarray:
    """(H, W, 3) RGB, uint8 or uint16. OpenCV decodes, Pillow what it cannot; JPEGs cut short are refused.

    OpenCV 4 fills those up with grey.
    """
    image = None
    data = np.frombuffer(content, np.uint8)
    flags = cv2.IMREAD_COLOR | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION)
    with contextlib.suppress(cv2.error):  # an empty file, for example
        image = cv2.imdecode(data, flags | cv2.IMREAD_ANYDEPTH)
        if image is not None and image.dtype not in (np.uint8, np.uint16):  # light in floating point
            image = cv2.imdecode(data, flags)
    if image is not None and is_whole(content):
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    try:
        if image is not None:
            raise ValueError("it is cut short")
        with _opened(content) as picture:
            picture.load()
            if picture.mode[0] in "IF":
                raise ValueError(_WIDE)
            return np.asarray((ImageOps.exif_transpose(picture) if upright else picture).convert("RGB"))
    except Exception as error:  # Pillow raises almost anything on a damaged file
        reason = _kind(path, data) or "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise ImageError(f"{path}: damaged or not an image, {len(content)} bytes ({reason})") from None


def _kind(path: Path, data: np.ndarray) -> str:
    """What a file is that neither library decodes as an image of 8 or 16 bits; "" where that is not known."""
    if data[4:8].tobytes() == b"ftyp" and data[8:12].tobytes() in (b"heic", b"heix", b"mif1", b"msf1"):
        return "a photo in HEIC; save it as JPEG or PNG"
    with contextlib.suppress(cv2.error):
        image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
        if image is not None and image.dtype.itemsize > 2:
            return _WIDE
    return kind_of(path)


def is_whole(content: bytes) -> bool:
    """False for a JPEG file that lacks its end; phones write further data behind that."""
    if not content.startswith(_JPEG_START) or content.endswith(_JPEG_END):
        return True
    place = len(_JPEG_START)
    while marker := _JPEG_MARKER.search(content, place):
        if marker[0] == _JPEG_END:
            return True
        # A segment begins with its length, which is not of compressed data but of all that may look like markers.
        place = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
    return False


def _opened(content: bytes) -> Image.Image:
    """Pillow's view of a file of any number of pixels: its limit is against strangers' files, these are the user's."""
    with _pillow:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(content))
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _orientation(content: bytes) -> int:
    """The EXIF orientation of a file, 1 to 8; 1 where it says nothing sensible."""
    try:
        with _opened(content) as picture:
            found = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged header may raise anything; the pixels were read already
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


@dataclass(frozen=True)
class Geometry:
    """How one image is resized, flipped and, where there is a canvas, cut or padded to that; sizes are (height, width).

    corner: (y, x) in the resized and flipped image of what lies in the canvas's upper left corner.
    """

    old: tuple[int, int]
    new: tuple[int, int]
    flip: bool = False
    canvas: tuple[int, int] | None = None
    corner: tuple[int, int] = (0, 0)

    @property
    def size(self) -> tuple[int, int]:
        """Of what comes out."""
        return self.canvas or self.new

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y) new / old, rounded to float32."""
        return float(np.float32(self.new[1] / self.old[1])), float(np.float32(self.new[0] / self.old[0]))

    def image(self, image: np.ndarray) -> np.ndarray:
        """A uint8 image (H, W, 3) as it is shown."""
        if self.new != self.old:
            image = cv2.resize(image, (self.new[1], self.new[0]), interpolation=cv2.INTER_LINEAR)
        image = cv2.flip(image, 1) if self.flip else image
        if self.canvas is None:
            return image
        (y, x), (height, width) = self.corner, self.canvas
        shown = image[y : y + height, x : x + width]
        below, right = height - shown.shape[0], width - shown.shape[1]
        return cv2.copyMakeBorder(shown, 0, below, 0, right, cv2.BORDER_CONSTANT, value=PADDING)

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 4) float32 xyxy boxes, scaled, clipped to [0, width] and [0, height], flipped, clipped to the canvas."""
        height, width = self.new
        limits = np.array([width, height, width, height], dtype=np.float32)
        boxes = np.clip(boxes * np.array(self.scale * 2, dtype=np.float32), 0, limits)
        if self.flip:
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        if self.canvas is not None:
            (y, x), (height, width) = self.corner, self.canvas
            boxes = np.clip(boxes - np.array([x, y, x, y]), 0, np.array([width, height, width, height]))
        return boxes.astype(np.float32)

    def cuts(self, boxes: np.ndarray) -> np.ndarray:
        """(N,) bool: of which of the boxes (N, 4) not all lies on the canvas."""
        whole, (y, x) = replace(self, canvas=None).boxes(boxes), self.corner
        return (self.boxes(boxes) != (whole - np.array([x, y, x, y])).astype(np.float32)).any(axis=1)


def resized(size: tuple[int, int], short_edge: float, long_edge: float) -> tuple[int, int]:
    """The (height, width) with the short side at `short_edge`, unless that takes the long side over `long_edge`."""
    scale = min(long_edge / max(size), short_edge / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def random_geometry(
    size: tuple[int, int],
    short_edges: tuple[int, ...],
    long_edge: int,
    flip: float,
    generator: np.random.Generator,
) -> Geometry:
    """Training's scale jitter and flip: a short edge drawn from `short_edges`, mirrored with probability `flip`."""
    short_edge = short_edges[int(generator.integers(len(short_edges)))]
    return Geometry(size, resized(size, short_edge, long_edge), bool(generator.random() < flip))


def large_scale_jitter(
    size: tuple[int, int],
    canvas: int,
    scales: tuple[float, ...],
    flip: float,
    generator: np.random.Generator,
) -> Geometry:
    """Large-scale jitter (arXiv 2012.07177, Sec. 3) on a square canvas of `canvas` pixels, and a flip.

    The image fits the canvas times a scale drawn from `scales` (lowest, highest); see `on_canvas`.
    """
    side = canvas * generator.uniform(scales[0], scales[1])
    geometry = Geometry(size, resized(size, side, side), bool(generator.random() < flip))
    return on_canvas(geometry, (canvas, canvas), generator)


def on_canvas(geometry: Geometry, canvas: tuple[int, int], generator: np.random.Generator) -> Geometry:
    """Where the image is larger than the canvas, a part of it at a random place; else padded on the right and below."""
    corner = [int(generator.integers(max(0, new - side) + 1)) for new, side in zip(geometry.new, canvas, strict=True)]
    return replace(geometry, canvas=canvas, corner=(corner[0], corner[1]))


def sample_seed(seed: int, epoch: int, image_id: int, draw: int) -> int:
    """63 bits: what the model's random choices for one showing of an image depend on."""
    entropy = np.random.SeedSequence([_SEED_STREAM, seed, epoch, image_id % (1 << 62), draw])
    return int(entropy.generate_state(1, np.uint64)[0] >> 1)


def image_generator(seed: int, epoch: int, image_id: int, draw: int) -> np.random.Generator:
    """The random numbers of one image: its `draw`-th showing (from 0) in an epoch."""
    return np.random.default_rng([_STREAM, seed, epoch, image_id % (1 << 62), draw])
