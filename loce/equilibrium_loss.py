"""LOCE, Sec. 3.2, Eq. 3-4: the Equilibrium Loss (EBL).

Shape suffixes: N rows (RoIs), L = C + 1 logits, background last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from loce.utils.classes import IGNORED


def equilibrium_loss(
    logits: Tensor,
    labels: Tensor,
    mean_score: Tensor,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy with the margins of Eq. 4 between any two classes.

    Eq. 3 with delta_{yy'} = log(s_y' / s_y) is log sum_j exp(z_j + log s_j) - (z_y + log s_y), that is the plain
    cross-entropy of the logits z + log s; so no (L, L) margins are ever formed.

    logits: (N, C+1) float of any precision; labels: (N,) long in 0..C, or IGNORED for a row that counts for nothing;
    mean_score: (C+1,) positive, or training instance counts (supplement, Eq. 1), which gives no gradient.
    reduction: "mean" over the rows that count (divided by at least 1, so no row gives 0), "sum", or "none" for (N,)
    with 0 in ignored rows. Returns fp32, also under autocast (float64 for float64 logits), finite for all logits whose
    differences fit the fp32 range.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is {reduction!r}, expected "mean", "sum" or "none"')
    adjusted_NL = logits + _log_score(mean_score, logits)  # at least fp32, which log s is
    loss = F.cross_entropy(
        adjusted_NL, labels, ignore_index=IGNORED, reduction="none" if reduction == "none" else "sum"
    )
    if reduction == "mean":
        return loss / (labels != IGNORED).sum().clamp(min=1)
    return loss


def loss_margin(mean_score: Tensor) -> Tensor:
    """Eq. 4: (C+1, C+1), margin[y, y'] = delta_{yy'} = log(s_y' / s_y), for a mean score (C+1,).

    For tables and figures: what class y' is given on top of its logit when the right answer is y.
    """
    log_score_L = _log_score(mean_score, mean_score)
    return log_score_L[None, :] - log_score_L[:, None]


def _log_score(mean_score: Tensor, like: Tensor) -> Tensor:
    """log s in at least fp32, without gradient. A score that has decayed to 0 would give infinite margins: it is taken
    as the smallest normal number (log = -87)."""
    score_L = mean_score.detach().to(torch.promote_types(like.dtype, torch.float32))
    return score_L.clamp(min=torch.finfo(torch.float32).tiny).log()
