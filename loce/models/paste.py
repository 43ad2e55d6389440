"""From 28 x 28 mask probabilities to run-length codes at the image's size, without ever holding full-size masks.

MMDetection's paste: the mask is sampled bilinearly at pixel centres inside its box and cut at 0.5 (>=); nothing is
rounded. A mask is made some columns at a time, so that no image is too large. Shapes: N detections, 28 the mask side.
"""

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

BUDGET = 1 << 26  # bytes of working memory
PIXEL = 32  # bytes: grid coordinates, what is sampled there, the run lengths' differences


def paste(mask_SS: Tensor, box_4: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    """Bool (h, w): the mask (S, S) of probabilities spread over its box, at the pixels of window x0, y0, x1, y1."""
    x0, y0, x1, y1 = window
    left, top, right, bottom = box_4.unbind()
    x = torch.arange(x0, x1, dtype=torch.float32, device=mask_SS.device) + 0.5
    y = torch.arange(y0, y1, dtype=torch.float32, device=mask_SS.device) + 0.5
    x = (x - left) / (right - left) * 2 - 1
    y = (y - top) / (bottom - top) * 2 - 1
    x, y = (torch.where(v.isfinite(), v, 0) for v in (x, y))  # a box without width or height
    grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)
    return F.grid_sample(mask_SS[None, None], grid[None], align_corners=False)[0, 0] >= 0.5


def encode_crop(crop_hw: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> bytes:
    """COCO's compressed run-length code of a bool crop (h, w) placed at corner (x0, y0) of an image (height, width)."""
    return encode_runs(run_positions(crop_hw, corner, size[0]), size)


def run_positions(crop_hw: np.ndarray, corner: tuple[int, int], height: int) -> np.ndarray:
    """Starts and ends of runs, alternating, column by column: int64 pixel numbers in an image of `height` rows."""
    x0, y0 = corner
    h, w = crop_hw.shape
    columns = np.zeros((w, h + 2), np.int8)
    columns[:, 1:-1] = crop_hw.T
    column, row = np.nonzero(np.diff(columns, axis=1))
    return (x0 + column) * height + y0 + row


def encode_runs(position: np.ndarray, size: tuple[int, int]) -> bytes:
    """COCO's compressed run-length code of all runs of an image (height, width), see `run_positions`."""
    height, width = size
    # A run that ends at the bottom of a column and one that starts at the top of the next are one run.
    meets = np.flatnonzero(position[1:] == position[:-1])
    position = np.delete(position, np.concatenate([meets, meets + 1]))
    ends = position if len(position) and position[-1] == height * width else np.append(position, height * width)
    counts = np.diff(ends, prepend=0).tolist()
    return coco_mask.frPyObjects({"counts": counts, "size": [height, width]}, height, width)["counts"]


def paste_and_encode(masks_NSS: Tensor, boxes_N4: Tensor, size: tuple[int, int], budget: int = BUDGET) -> list[bytes]:
    """Run-length codes of N masks (probabilities) pasted into an image of (height, width); boxes in its pixels.

    budget: bytes of working memory, at least one column of pixels; the codes themselves come on top.
    """
    height, width = size
    low = (boxes_N4[:, :2].floor() - 1).clamp(min=0)
    high = torch.minimum(boxes_N4[:, 2:].ceil() + 1, boxes_N4.new_tensor([width, height]))
    windows = torch.cat([low, torch.maximum(high, low)], dim=1).int().tolist()
    masks_NSS, boxes_N4 = masks_NSS.float().cpu(), boxes_N4.float().cpu()
    codes = []
    for mask, box, (x0, y0, x1, y1) in zip(masks_NSS, boxes_N4, windows, strict=True):
        strip = max(1, budget // (PIXEL * max(1, y1 - y0)))
        edges = [
            run_positions(paste(mask, box, (x, y0, min(x + strip, x1), y1)).numpy(), (x, y0), height)
            for x in range(x0, x1, strip)
        ]
        codes.append(encode_runs(np.concatenate([np.zeros(0, np.int64), *edges]), size))
    return codes
