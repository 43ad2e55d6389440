"""Post-hoc calibration: scores of a trained detector from its logits and facts of the classes; nothing trains.

FRACAL (CVPR 2025, arXiv 2410.11774), LogN (IJCV 2024, arXiv 2203.17020), IIF (IEEE TIP 2023, arXiv 2209.04861), logit
adjustment (ICLR 2021, arXiv 2007.07314, Eq. 9), NorCal (NeurIPS 2021, arXiv 2107.02170), tau-normalisation (ICLR 2020,
arXiv 1910.09217, Sec. 4.3) and temperature (ICML 2017, arXiv 1706.04599, Eq. 9). Softmax logits are (N, C+1),
background last; what a method makes of them is in at least fp32. `calibration` is the method that options choose.

Shape suffixes: N rows, C classes, L = C + 1, A annotations, D features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from loce.config import EvalConfig

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


def norcal_shift(counts_C: np.ndarray, gamma: float) -> np.ndarray:
    """(C,) float64: gamma log n of NorCal; a class without a count is taken as counted once."""
    return gamma * np.log(np.maximum(counts_C, 1))


def norcal(logits_NL: Tensor, shift_C: Tensor) -> Tensor:
    """(N, L) NorCal's logits (NeurIPS 2021, exponential form): foreground z_c - gamma log n_c; background stays.

    shift_C: `norcal_shift`. Their softmax is (e^{z_c} / n_c^gamma) / (e^{z_bg} + sum_j e^{z_j} / n_j^gamma).
    """
    return _of_foreground(logits_NL, lambda z_NC: z_NC - shift_C)


def log_prior(counts_C: np.ndarray) -> np.ndarray:
    """(C,) float64: log pi of logit adjustment, pi = n over the geometric mean of all n, each at least 1; sums to 0."""
    log_count_C = np.log(np.maximum(counts_C, 1))
    centred_C: np.ndarray = log_count_C - log_count_C.mean()
    return centred_C


def logit_adjustment(logits_NL: Tensor, log_prior_C: Tensor, tau: float = 1.0) -> Tensor:
    """(N, L) logits adjusted post hoc (ICLR 2021, Eq. 9): foreground z_c - tau log pi_c; background stays.

    For a model that was trained without the adjusted loss (Eq. 10, the head `logit_adjustment`): one or the other.
    """
    return _of_foreground(logits_NL, lambda z_NC: z_NC - tau * log_prior_C)


def tau_norm(logits_NL: Tensor, norm_C: Tensor, bias_C: Tensor, tau: float = 1.0) -> Tensor:
    """(N, L) logits of tau-normalised weights (ICLR 2020, Sec. 4.3): w_c / |w_c|^tau; background stays.

    norm_C, bias_C: of the linear classifier's foreground rows. The paper has no background: so that tau moves classes
    against each other and not all of them against it, lengths are relative to their geometric mean; and the bias,
    which the paper leaves out, stays: z_c = (w_c . x) / (|w_c| / geometric mean)^tau + b_c.
    """
    log_C = norm_C.log()
    factor_C = (-tau * (log_C - log_C.mean())).exp()
    return _of_foreground(logits_NL, lambda z_NC: (z_NC - bias_C) * factor_C + bias_C)


def temperature(logits: Tensor, t: float) -> Tensor:
    """Logits of any shape over a temperature (ICML 2017, Eq. 9): background, too."""
    return _at_least_fp32(logits) / t


def fracal(logits_NL: Tensor, weight_C: Tensor, dimension_C: Tensor, exponent: float = 2.0) -> Tensor:
    """(N, C) FRACAL's scores of softmax logits: p = softmax(z + w), q = p / Phi^exponent, over its sum.

    weight_C: `fracal_weights`; dimension_C: `box_counting_dimension`. Background has w = 0 and Phi = 1.
    """
    shift_C = weight_C - exponent * dimension_C.log()  # the softmax takes care of both sums
    return _of_foreground(logits_NL, lambda z_NC: z_NC + shift_C).softmax(dim=1)[:, :-1]


def fracal_sigmoid(logits_NC: Tensor, weight_C: Tensor, dimension_C: Tensor, exponent: float = 2.0) -> Tensor:
    """(N, C) FRACAL's scores of C sigmoid logits: sigma(z) sigma(z + w + r), r = -log10(C Phi^e / sum_k Phi_k^e)."""
    z_NC = _at_least_fp32(logits_NC)
    share_C = dimension_C**exponent
    spread_C = -(share_C / share_C.mean()).log10()
    return z_NC.sigmoid() * (z_NC + weight_C + spread_C).sigmoid()


def logn(logits_NL: Tensor, mean_C: Tensor, variance_C: Tensor, strength: float = 1.0) -> Tensor:
    """(N, L) LogN's logits: foreground z_c becomes (z_c - mean_c + min_k mean_k) / sd_c; background stays.

    mean_C, variance_C: moments of each foreground logit over training rows, foreground and background alike.
    strength: 1 is the paper's; s of our own: (z_c - s (mean_c - min_k mean_k)) / sd_c^s, so that 0 changes nothing.
    """
    shift_C = strength * (mean_C - mean_C.min())
    sd_C = variance_C.clamp(min=LEAST_VARIANCE) ** (strength / 2)
    return _of_foreground(logits_NL, lambda z_NC: (z_NC - shift_C) / sd_C)


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
    return _of_foreground(logits_NL, lambda z_NC: z_NC * weight_C)


def _at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, also under autocast; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _of_foreground(logits_NL: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """(N, L) logits of which `change` is applied to all columns but the last, in at least fp32."""
    z_NL = _at_least_fp32(logits_NL)
    return torch.cat([change(z_NL[:, :-1]), z_NL[:, -1:]], dim=1)


@dataclass(frozen=True, kw_only=True)
class ClassFacts:
    """What methods know of C classes: arrays (C,); None where the chosen method does not ask for it.

    image_counts, instance_counts: of the training set; images: all of its file; dimension: `box_counting_dimension`;
    mean, variance: `LogitMoments`; norm, bias: of the rows of a linear classifier.
    """

    image_counts: np.ndarray
    instance_counts: np.ndarray
    images: int
    dimension: np.ndarray | None = None
    mean: np.ndarray | None = None
    variance: np.ndarray | None = None
    norm: np.ndarray | None = None
    bias: np.ndarray | None = None

    def counts(self, by: str) -> tuple[np.ndarray, int]:
        """Counts of the classes and of all, by "images" or "instances"."""
        if by == "images":
            return self.image_counts, self.images
        return self.instance_counts, int(self.instance_counts.sum())


def calibration(
    options: EvalConfig,
    facts: ClassFacts,
    sigmoid: bool = False,
    device: torch.device | str = "cpu",
) -> Callable[[Tensor], Tensor]:
    """Logits -> scores (N, C) in fp32 by the method `options.posthoc` and its section; "none": the plain scores.

    Logits are (N, C+1), background last, and scores their softmax; sigmoid: each of the first C columns has a sigmoid
    of its own (fracal, temperature and none only). facts: what the method needs must be there.
    """
    classes = len(facts.image_counts)

    def tensor(values: np.ndarray | None) -> Tensor:
        assert values is not None, f"eval.posthoc={options.posthoc} needs facts that were not given"
        return torch.tensor(values, dtype=torch.float32, device=device)

    change: Callable[[Tensor], Tensor] = _at_least_fp32
    if options.posthoc == "fracal":
        section, smoothing = options.fracal, 300 if options.fracal.counts == "images" else 1000
        weight_C = tensor(fracal_weights(*facts.counts(section.counts), section.variant, smoothing))
        score = partial(fracal_sigmoid if sigmoid else fracal, weight_C=weight_C, exponent=section.exponent)
        dimension_C = tensor(facts.dimension)
        return lambda z: score(z[:, : classes + (not sigmoid)], dimension_C=dimension_C)
    if options.posthoc == "norcal":
        shift_C = norcal_shift(facts.counts(options.norcal.counts)[0], options.norcal.gamma)
        change = partial(norcal, shift_C=tensor(shift_C))
    elif options.posthoc == "logit_adjustment":
        prior_C = tensor(log_prior(facts.instance_counts))
        change = partial(logit_adjustment, log_prior_C=prior_C, tau=options.logit_adjustment.tau)
    elif options.posthoc == "tau_norm":
        change = partial(tau_norm, norm_C=tensor(facts.norm), bias_C=tensor(facts.bias), tau=options.tau_norm.tau)
    elif options.posthoc == "temperature":
        change = partial(temperature, t=options.temperature.t)
    elif options.posthoc == "iif":
        weight_C = tensor(inverse_frequency(*facts.counts(options.iif.counts), options.iif.variant))
        change = partial(iif, weight_C=weight_C)
    elif options.posthoc == "logn":
        moments = {"mean_C": tensor(facts.mean), "variance_C": tensor(facts.variance)}
        change = partial(logn, **moments, strength=options.logn.strength)
    if sigmoid:
        return lambda z: change(z[:, :classes]).sigmoid()
    return lambda z: change(z).softmax(dim=1)[:, :classes]
