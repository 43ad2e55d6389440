"""From 28 x 28 mask probabilities to run-length codes or masks at the image's size; codes need no full-size masks.

MMDetection's paste: the mask is sampled bilinearly at pixel centres inside its box and cut at 0.5 (>=); nothing is
rounded. Masks of similar size are pasted together, large ones some columns at a time, so that no image is too large.
Shapes: N detections, Q pieces of columns of their windows, S = 28 the mask side, W, H columns and rows of pixels, E
pixels where a run starts or ends.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

BUDGET = 1 << 26  # bytes of working memory
PIXEL = 32  # bytes: interpolation's weights, what is sampled there, the pixels where runs start and end

SMALL = 16  # pixels a side, below which masks are pasted together whatever their size


def bilinear_weights(low_Q: Tensor, high_Q: Tensor, first_Q: Tensor, count_Q: Tensor, most: int, side: int) -> Tensor:
    """(Q, most, S): how much each of S cells over [low, high] counts at the centres of pixels first, first + 1, ...

    Pixels from count on get zeros, and so does what lies outside of the mask.
    """
    pixel_M = torch.arange(most, dtype=torch.float32, device=low_Q.device)
    centre_QM = first_Q[:, None] + pixel_M + 0.5
    place_QM = (centre_QM - low_Q[:, None]) / (high_Q - low_Q)[:, None] * side - 0.5
    place_QM = torch.where((low_Q < high_Q)[:, None], place_QM, (side - 1) / 2)  # a box without width or height
    cells_S = torch.arange(side, dtype=torch.float32, device=low_Q.device)
    near_QMS = (1 - (place_QM[..., None] - cells_S).abs_()).clamp_(min=0)
    return near_QMS.mul_((pixel_M < count_Q[:, None])[..., None])


def paste(masks_QSS: Tensor, boxes_Q4: Tensor, windows_Q4: Tensor) -> Tensor:
    """Bool (Q, W, H): masks (S, S) of probabilities spread over their boxes, at the pixels of windows x0, y0, x1, y1.

    Column by column, as COCO counts; W and H are those of the largest window, others have False beyond their own.
    """
    side = masks_QSS.shape[-1]
    sizes_Q2 = windows_Q4[:, 2:] - windows_Q4[:, :2]
    weights = []
    for axis, most in enumerate(sizes_Q2.amax(dim=0).tolist()):
        low_Q, high_Q = boxes_Q4[:, axis], boxes_Q4[:, 2 + axis]
        weights.append(bilinear_weights(low_Q, high_Q, windows_Q4[:, axis], sizes_Q2[:, axis], most, side))
    x_QWS, y_QHS = weights
    return x_QWS @ masks_QSS.mT @ y_QHS.mT >= 0.5


def run_edges(inside_QWH: Tensor, windows_Q4: Tensor, height: int) -> tuple[Tensor, Tensor]:
    """Starts and ends of runs, column by column: piece (E,), number of the pixel in an image of `height` rows (E,)."""
    columns_QWH = F.pad(inside_QWH, (1, 1))
    changes_QWH = columns_QWH[..., 1:] != columns_QWH[..., :-1]
    piece_E, column_E, row_E = changes_QWH.nonzero(as_tuple=True)
    x0_E, y0_E = windows_Q4[piece_E, :2].unbind(dim=1)
    return piece_E, (x0_E + column_E) * height + y0_E + row_E


def encode_runs(mask_E: np.ndarray, position_E: np.ndarray, masks: int, size: tuple[int, int]) -> list[bytes]:
    """COCO's compressed run-length codes of masks of an image (height, width); edges, see `run_edges`, in any order."""
    height, width = size
    last = height * width
    edge_E = np.sort(mask_E * (last + 1) + position_E)
    # A run that ends at the bottom of a column and one that starts at the top of the next are one run.
    meets = np.flatnonzero(edge_E[1:] == edge_E[:-1])
    edge_E = np.delete(edge_E, np.concatenate([meets, meets + 1]))
    # Every mask's last run ends with the image.
    ends_N = np.arange(masks) * (last + 1) + last
    edge_E = np.sort(np.concatenate([edge_E, ends_N]))
    edge_E = edge_E[np.diff(edge_E, prepend=-1) > 0]
    mask_E, position_E = np.divmod(edge_E, last + 1)
    first_E = np.diff(mask_E, prepend=-1) > 0
    counts_E = np.where(first_E, position_E, np.diff(position_E, prepend=0))
    parts = np.split(counts_E, np.flatnonzero(first_E)[1:])
    codes = coco_mask.frPyObjects([{"counts": part, "size": [height, width]} for part in parts], height, width)
    return [code["counts"] for code in codes]


def paste_and_encode(masks_NSS: Tensor, boxes_N4: Tensor, size: tuple[int, int], budget: int = BUDGET) -> list[bytes]:
    """Run-length codes of N masks (probabilities) pasted into an image of (height, width); boxes in its pixels.

    budget: bytes of working memory, at least one column of pixels; the codes themselves come on top.
    """
    found = [np.zeros((2, 0), np.int64)]
    for rows_Q, windows_Q4, inside_QWH in _pasted(masks_NSS, boxes_N4, size, budget):
        piece_E, position_E = run_edges(inside_QWH, windows_Q4, size[0])
        found.append(torch.stack([rows_Q[piece_E], position_E]).cpu().numpy())
    mask_E, position_E = np.concatenate(found, axis=1)
    return encode_runs(mask_E, position_E, len(boxes_N4), size) if len(boxes_N4) else []


def paste_full(masks_NSS: Tensor, boxes_N4: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, height, width) bool on the host: the masks whose codes `paste_and_encode` gives."""
    full_NWH = np.zeros((len(boxes_N4), *size[::-1]), dtype=bool)
    for rows_Q, windows_Q4, inside_QWH in _pasted(masks_NSS, boxes_N4, size, BUDGET):
        pieces = zip(rows_Q.tolist(), windows_Q4.tolist(), inside_QWH.cpu().numpy(), strict=True)
        for row, (x0, y0, x1, y1), inside_WH in pieces:
            full_NWH[row, x0:x1, y0:y1] = inside_WH[: x1 - x0, : y1 - y0]
    return torch.from_numpy(full_NWH).mT


def _pasted(
    masks_NSS: Tensor, boxes_N4: Tensor, size: tuple[int, int], budget: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The masks in pieces, some at a time: detections (Q,), windows in the image (Q, 4), `paste` of them."""
    if len(boxes_N4) == 0:
        return
    masks_NSS, boxes_N4 = masks_NSS.float(), boxes_N4.float()
    low = (boxes_N4[:, :2].floor() - 1).clamp(min=0)
    high = torch.minimum(boxes_N4[:, 2:].ceil() + 1, boxes_N4.new_tensor(size[::-1]))
    windows = torch.cat([low, torch.maximum(high, low)], dim=1).long().cpu().numpy()
    for rows_Q, windows_Q4 in _groups(windows, budget):
        rows, pieces = (torch.from_numpy(x).to(boxes_N4.device) for x in (rows_Q, windows_Q4))
        yield rows, pieces, paste(masks_NSS[rows], boxes_N4[rows], pieces)


def _groups(windows_N4: np.ndarray, budget: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Windows, cut into pieces that fit into the budget, in groups that fit as well: detections (Q,), pieces (Q, 4).

    Widths and heights in a group differ by less than a factor of 2, or are small.
    """
    pixels = max(1, budget // PIXEL)
    w_N, h_N = (windows_N4[:, 2:] - windows_N4[:, :2]).T
    strip_N = np.maximum(1, pixels // np.maximum(1, h_N))
    pieces_N = np.where(h_N > 0, -(-w_N // strip_N), 0)
    row_Q = np.repeat(np.arange(len(windows_N4)), pieces_N)
    number_Q = np.arange(len(row_Q)) - np.repeat(np.cumsum(pieces_N) - pieces_N, pieces_N)
    windows_Q4 = windows_N4[row_Q]
    windows_Q4[:, 0] += number_Q * strip_N[row_Q]
    windows_Q4[:, 2] = np.minimum(windows_Q4[:, 0] + strip_N[row_Q], windows_Q4[:, 2])
    # 2 ** exponent is the longest side in a class of sizes.
    sides_Q2 = np.maximum(SMALL, windows_Q4[:, 2:] - windows_Q4[:, :2])
    exponent_Q2 = np.ceil(np.log2(sides_Q2)).astype(np.int64)
    groups = []
    for exponents in np.unique(exponent_Q2, axis=0):
        members = np.flatnonzero((exponent_Q2 == exponents).all(axis=1))
        each = max(1, pixels >> int(exponents.sum()))
        for start in range(0, len(members), each):
            some = members[start : start + each]
            groups.append((row_Q[some], windows_Q4[some]))
    return groups
