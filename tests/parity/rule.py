"""The rule that the weights and inputs behind the stored official numbers were made by; nothing of them is stored.

Every array is drawn from numpy's RandomState seeded with the CRC-32 of a name, in float64, and cast to float32 last, so
the same name and shape give the same numbers everywhere. tests/fixtures/README.md says what the numbers are.
"""

import zlib
from dataclasses import dataclass

import numpy as np

GAINS = {  # spread of a layer's output beside that of its input; not listed: 1
    "neck.fpn_convs.1.conv.weight": 2.0,
    "neck.fpn_convs.2.conv.weight": 3.0,
    "neck.fpn_convs.3.conv.weight": 5.0,
    "rpn_head.rpn_cls.weight": 0.3,
    "rpn_head.rpn_reg.weight": 0.07,
    "roi_head.bbox_head.fc_cls.weight": 0.8,
    "roi_head.bbox_head.fc_reg.weight": 0.2,
}
CAPACITY = 80  # slots of a class in the seeded memory


@dataclass(frozen=True)
class ImageSize:
    """(height, width) of the network's input without and with padding, and of the image it was resized from."""

    content: tuple[int, int]
    padded: tuple[int, int]
    original: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y): resized / original, rounded to float32 as the official pipeline stores it."""
        x, y = (np.float32(self.content[i] / self.original[i]) for i in (1, 0))
        return float(x), float(y)


SIZES = (
    ImageSize(content=(312, 416), padded=(320, 416), original=(480, 640)),
    ImageSize(content=(250, 375), padded=(256, 384), original=(333, 500)),
)


def _source(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of one entry of an MMDetection state dict."""
    *_, module, kind = key.split(".")
    if kind == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    normal = _source(key).standard_normal(shape)
    if module.startswith("bn") or "downsample.1." in key:
        value = _batch_norm(module, kind, normal)
    elif kind == "bias":
        value = 0.01 * normal - (1 if key == "rpn_head.rpn_cls.bias" else 0)
    else:
        inputs = (0,) if module == "upsample" else tuple(range(1, len(shape)))
        fan_in = np.prod([shape[axis] for axis in inputs])
        value = (normal - normal.mean(axis=inputs, keepdims=True)) * np.sqrt(2 / fan_in) * GAINS.get(key, 1.0)
    return value.astype(np.float32)


def _batch_norm(module: str, kind: str, normal: np.ndarray) -> np.ndarray:
    if kind == "weight":
        return (1 + 0.1 * normal) * (0.5 if module == "bn3" else 1)
    return 1 + 0.1 * np.abs(normal) if kind == "running_var" else 0.1 * normal


def image(index: int) -> np.ndarray:
    """(3, padded height, padded width): an image, already normalised; zero in the padding."""
    size = SIZES[index]
    height, width = size.padded
    pixels = np.zeros((3, height, width))
    for cell, level in ((64, 0.9), (16, 0.7), (4, 0.4), (1, 0.2)):
        coarse = _source(f"img{index}/{cell}").standard_normal((3, -(-height // cell), -(-width // cell)))
        pixels += level * coarse.repeat(cell, axis=1).repeat(cell, axis=2)[:, :height, :width]
    pixels[:, size.content[0] :] = 0
    pixels[:, :, size.content[1] :] = 0
    return pixels.astype(np.float32)


def batch() -> np.ndarray:
    """(2, 3, 320, 416): both images, zeros below and to the right."""
    images = [image(index) for index in range(len(SIZES))]
    height, width = (max(size.padded[axis] for size in SIZES) for axis in range(2))
    return np.stack([np.pad(x, ((0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]))) for x in images])


def masks(index: int, boxes: np.ndarray) -> np.ndarray:
    """(G, padded height, padded width) uint8: in turn a rectangle, an ellipse and a triangle inside each box (G, 4)."""
    height, width = SIZES[index].padded
    bitmaps = []
    for number, (x1, y1, x2, y2) in enumerate(boxes.astype(np.float64)):
        u = ((np.arange(width) + 0.5 - x1) / (x2 - x1))[None, :]
        v = ((np.arange(height) + 0.5 - y1) / (y2 - y1))[:, None]
        inside = (u >= 0) & (u < 1) & (v >= 0) & (v < 1)
        shape = (True, (2 * u - 1) ** 2 + (2 * v - 1) ** 2 <= 1, u + v <= 1)[number % 3]
        bitmaps.append((inside & shape).astype(np.uint8))
    return np.stack(bitmaps)


def memory(label: int) -> tuple[np.ndarray, np.ndarray]:
    """What is stored of a class before iteration 0: features (n, 256, 7, 7), box targets (n, 4); n from 0 to 80."""
    count = label * 37 % (CAPACITY + 1)
    features = 3 * _source(f"mem/feat/{label}").standard_normal((count, 256, 7, 7))
    targets = 0.5 * _source(f"mem/reg/{label}").standard_normal((count, 4))
    return features.astype(np.float32), targets.astype(np.float32)


def jitter(iteration: int, index: int) -> np.ndarray:
    """(4, 16) uniforms of the box generator, one set for an image."""
    return _source(f"draw/rand/{iteration}/{index}").random_sample((4, 16)).astype(np.float32)


def class_draw(iteration: int) -> np.ndarray:
    """(8,) uniforms of the class draw, as they come: the official code sorts them."""
    return _source(f"draw/cls/{iteration}").random_sample(8)


def slot_draw(iteration: int, turn: int) -> np.ndarray:
    """(4,) uniforms of the slots, for the `turn`-th drawn class that has something stored."""
    return _source(f"draw/feat/{iteration}/{turn}").random_sample(4)
