"""Post-hoc calibration: scores of a trained detector from its logits and facts of the classes; nothing trains.

FRACAL (CVPR 2025, arXiv 2410.11774), LogN (IJCV 2024, arXiv 2203.17020), IIF (IEEE TIP 2023, arXiv 2209.04861), logit
adjustment (ICLR 2021, arXiv 2007.07314, Eq. 9), NorCal (NeurIPS 2021, arXiv 2107.02170), tau-normalisation (ICLR 2020,
arXiv 1910.09217, Sec. 4.3) and temperature. Softmax logits are (N, C+1), background last; scores are (N, C), fp32.

Shape suffixes: N rows, C classes, L = C + 1, A annotations, D features.
"""

import math
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

GRIDS = 64  # finest grid of the box-counting dimension
FEWEST = 4  # instances of a class whose dimension is fitted
LEAST_VARIANCE = 1e-11


def inverse_frequency(counts_C: np.ndarray, total: int, variant: str = "base10") -> np.ndarray:
    """(C,) float64: how rare a class is, by its count of `total` (IIF, Sec. III; FRACAL's w before its offset).

    raw log(I/n) | smooth log((I+1)/(n+1)) + 1 | prob log((I-n)/n) | base2, base10 log(I/n) | normit -Phi^-1(n/I) |
    gombit -log(-log(1 - n/I)). A class without a count is taken as counted once (the formulae give infinity).
    """
    n_C = np.maximum(counts_C, 1).astype(np.float64)
    share_C = n_C / total
    if variant == "smooth":
        return np.log((total + 1) / (n_C + 1)) + 1
    if variant == "prob":
        return np.log((total - n_C) / n_C)
    if variant == "normit":
        return np.array([-NormalDist().inv_cdf(share) for share in share_C])
    if variant == "gombit":
        return -np.log(-np.log1p(-share_C))
    return -np.log(share_C) / {"raw": 1.0, "base2": math.log(2), "base10": math.log(10)}[variant]


def fracal_weights(counts_C: np.ndarray, total: int, variant: str = "base10", smoothing: int = 300) -> np.ndarray:
    """(C,) float64: w_c of FRACAL, the rarity of a class less that of one with a C-th part of all counts.

    Variant smooth subtracts log((s C + 1) / (s + 1)) - 1 as released, with s = 300 for images, 1000 for instances.
    """
    classes = len(counts_C)
    if variant == "smooth":
        return inverse_frequency(counts_C, total, variant) + 1 - math.log((smoothing * classes + 1) / (smoothing + 1))
    return inverse_frequency(counts_C, total, variant) - inverse_frequency(np.ones(1), classes, variant)


def box_counting_dimension(centres_A2: np.ndarray, labels_A: np.ndarray, num_classes: int) -> np.ndarray:
    """(C,) float64: FRACAL's Phi, the box-counting dimension of where a class's boxes lie; at least 1.

    centres: x and y of each box's centre, as shares of its image's width and height. B(g) cells of a g x g grid hold a
    centre; Phi is the slope of the least-squares line of log B(g) on log g over all g = 1..64 with g^2 <= instances.
    1 for a class with less than 4 instances. A centre at or beyond 1 lies in no cell.
    """
    dimension_C = np.ones(num_classes)
    for label in range(num_classes):
        own_A2 = centres_A2[labels_A == label]
        if len(own_A2) < FEWEST:
            continue
        sides = np.arange(1, min(GRIDS, math.isqrt(len(own_A2))) + 1)
        own_A2 = own_A2[((own_A2 >= 0) & (own_A2 < 1)).all(axis=1)]
        cells = [len(np.unique(np.floor(own_A2 * side) @ (1, side))) for side in sides]
        slope = np.polyfit(np.log(sides), np.log(np.maximum(cells, 1)), 1)[0]
        dimension_C[label] = max(1.0, slope)
    return dimension_C


def fracal(logits_NL: Tensor, weight_C: Tensor, dimension_C: Tensor, exponent: float = 2.0) -> Tensor:
    """(N, C) FRACAL's scores of softmax logits: p = softmax(z + w), q = p / Phi^exponent, over its sum.

    weight_C: `fracal_weights`; dimension_C: `box_counting_dimension`. Background has w = 0 and Phi = 1.
    """
    log_q_NL = logits_NL.float().clone()
    log_q_NL[:, :-1] += weight_C - exponent * dimension_C.log()  # the softmax takes care of both sums
    return log_q_NL.softmax(dim=1)[:, :-1]


def fracal_sigmoid(logits_NC: Tensor, weight_C: Tensor, dimension_C: Tensor, exponent: float = 2.0) -> Tensor:
    """(N, C) FRACAL's scores of C sigmoid logits: sigma(z) sigma(z + w + r), r = -log10(C Phi^e / sum_k Phi_k^e)."""
    z_NC = logits_NC.float()
    share_C = dimension_C**exponent
    spread_C = -(share_C / share_C.mean()).log10()
    return z_NC.sigmoid() * (z_NC + weight_C + spread_C).sigmoid()


def logn(logits_NL: Tensor, mean_C: Tensor, variance_C: Tensor) -> Tensor:
    """(N, L) LogN's logits: foreground z_c becomes (z_c - mean_c + min_k mean_k) / sd_c; background stays.

    mean_C, variance_C: moments of each foreground logit over training rows, foreground and background alike.
    """
    z_NL = logits_NL.float().clone()
    z_NL[:, :-1] = (z_NL[:, :-1] - mean_C + mean_C.min()) / variance_C.clamp(min=LEAST_VARIANCE).sqrt()
    return z_NL


class LogitMoments:
    """Mean and unbiased variance (C,) float64 of the foreground logits over training rows, batch by batch, for `logn`.

    momentum: 0 for those of all rows together (Welford, Chan et al.); else the released running ones, which start at
    mean 0 and variance 1: moment <- (1 - momentum) moment + momentum * moment of the batch.
    """

    def __init__(self, num_classes: int, momentum: float = 0.0) -> None:
        self.momentum, self.rows = momentum, 0
        self.mean = torch.zeros(num_classes, dtype=torch.float64)
        self.variance = torch.ones(num_classes, dtype=torch.float64)

    def update(self, logits_NL: Tensor) -> None:
        """Take up one batch of at least two rows, softmax logits (N, C+1)."""
        z_NC = logits_NL[:, :-1].double().cpu()  # sync: a pass of its own, not a training step
        mean_C, variance_C, rows = z_NC.mean(dim=0), z_NC.var(dim=0), len(z_NC)
        if self.momentum:
            self.mean = (1 - self.momentum) * self.mean + self.momentum * mean_C
            self.variance = (1 - self.momentum) * self.variance + self.momentum * variance_C
        else:
            total, shift_C = self.rows + rows, mean_C - self.mean
            spread_C = (rows - 1) * variance_C + max(self.rows - 1, 0) * self.variance
            spread_C += shift_C**2 * self.rows * rows / total
            self.mean, self.variance = self.mean + shift_C * rows / total, spread_C / (total - 1)
        self.rows += rows


def iif(logits_NL: Tensor, weight_C: Tensor) -> Tensor:
    """(N, L) IIF's logits: foreground z_c times weight_c (`inverse_frequency`); background stays."""
    z_NL = logits_NL.float().clone()
    z_NL[:, :-1] *= weight_C
    return z_NL
