"""Adaptive sampling rates of FASA (ICCV 2021, arXiv 2102.12867): which classes get a vector from the memory in a step.

    p_c at the start = clip(scale ((1/m_c) / sum_k (1/m_k))^power, 0, 1)        m_c: training instances of class c
    a step draws class c with probability p_c, each by itself, if the memory holds something of it
    l_c = sum over held-out rows of class c of -log p(c) / all held-out rows, background rows included
    groups: affinity propagation of the classes' mean features; the similarity of two is minus their squared distance
    after an epoch, by the change of a group's sum of l_c: p_c <- 1.1 p_c where it fell, 0.9 p_c where it rose; p_c <= 1

State: `rates` p, `losses` l of the epoch before, `epochs` that were adapted to; the same on every rank.

Differences from the paper / the released code:
- The losses are those of training images that are held out, and not trained on; the released code takes the validation
  set, whose results it reports.
- The released code gives affinity propagation squared distances where it expects similarities, which groups classes
  that are far apart (2 or 3 groups); here they are negative. `groups(..., released=True)` gives the released groups.
- -log p(c) is of the head's scores, so that every head has one; of a softmax it is the cross-entropy.
- A step draws once for every 2 images of the whole batch, as the released code does on each of its GPUs.
"""

import numpy as np
import torch
from torch import Tensor, nn

MORE, LESS = 1.1, 0.9
DAMPING, ROUNDS, STEADY = 0.5, 200, 15  # of affinity propagation: of a message, at most, without a change


class AdaptiveRates(nn.Module):
    """Sampling rates of C classes; buffers `rates`, `losses` (C,) fp32 and `epochs` () long."""

    rates: Tensor
    losses: Tensor
    epochs: Tensor

    def __init__(self, instance_counts: np.ndarray, power: float = 1.0, scale: float = 1.0) -> None:
        super().__init__()
        initial = initial_rates(instance_counts, power, scale)
        self.register_buffer("rates", torch.from_numpy(initial).float())
        self.register_buffer("losses", torch.zeros(len(initial)))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.long))

    def draw(self, uniform_C: Tensor, counts_C: Tensor) -> Tensor:
        """(K,) long: the classes with u < p_c, u in [0, 1), of which something is stored (counts_C > 0), ascending."""
        return ((uniform_C < self.rates) & (counts_C > 0)).nonzero()[:, 0]  # sync: how many are drawn, mostly one

    def adapt(self, losses: np.ndarray, group: np.ndarray, epoch: int) -> None:
        """Move the rates by held-out losses l (C,) of groups (C,); the first losses move nothing.

        epoch: that begins, from 0; noted, so that a run that goes on does not adapt to it again.
        """
        now, before = losses.astype(np.float32), self.losses.cpu().numpy()
        change = np.bincount(group, weights=now.astype(np.float64) - before)[group]
        factor = np.select([change < 0, change > 0], [MORE, LESS], 1.0) if int(self.epochs) else np.ones(len(now))
        self.rates.mul_(torch.from_numpy(factor).to(self.rates)).clamp_(max=1)
        self.losses.copy_(torch.from_numpy(now))
        self.epochs.fill_(epoch)


def initial_rates(instance_counts: np.ndarray, power: float = 1.0, scale: float = 1.0) -> np.ndarray:
    """(C,) float64: the p_c that training starts with; 0 for a class without instances."""
    inverse = np.where(instance_counts > 0, 1 / np.maximum(instance_counts, 1), 0.0)
    return np.clip(scale * (inverse / max(inverse.sum(), 1e-300)) ** power, 0, 1)


def groups(means: np.ndarray, released: bool = False) -> np.ndarray:
    """(C,) int64: the group of each class, 0, 1, ..., by affinity propagation of mean features (C, D).

    A class's preference to be the centre of a group is the median similarity. released: the sign of the released code.
    """
    flat = means.reshape(len(means), -1).astype(np.float64)
    square = (flat**2).sum(axis=1)
    distance = np.maximum(square[:, None] + square[None, :] - 2 * flat @ flat.T, 0)
    np.fill_diagonal(distance, 0)
    return affinity_propagation(distance if released else -distance)


def affinity_propagation(similarity: np.ndarray) -> np.ndarray:
    """(C,) int64 groups by passing messages between points (Frey and Dueck, Science 2007); similarity (C, C).

    As scikit-learn's, with its defaults: damping 0.5, at most 200 rounds, steady for 15, and noise in the last digits
    (from seed 1), since equal similarities would oscillate. Where there is no centre, all points are one group.
    """
    points = len(similarity)
    everyone = np.arange(points)
    preference = np.median(similarity)
    others = similarity[~np.eye(points, dtype=bool)]
    if points == 1 or np.ptp(others) == 0:  # all alike: each alone, or all together
        return everyone if points == 1 or preference >= others[0] else np.zeros(points, np.int64)
    s = similarity.copy()
    np.fill_diagonal(s, preference)
    tiny, eps = np.finfo(s.dtype).tiny, np.finfo(s.dtype).eps
    s += (eps * s + 100 * tiny) * np.random.RandomState(1).standard_normal(s.shape)

    # Responsibilities r: how well k serves i as its centre, against others; availabilities a: how many agree on k.
    r, a = np.zeros_like(s), np.zeros_like(s)
    history: list[np.ndarray] = []
    for round_ in range(ROUNDS):
        total = a + s
        best = total.argmax(axis=1)
        first = total[everyone, best].copy()
        total[everyone, best] = -np.inf
        news = s - first[:, None]
        news[everyone, best] = s[everyone, best] - total.max(axis=1)
        r = DAMPING * r + (1 - DAMPING) * news

        support = np.maximum(r, 0)
        support[everyone, everyone] = r[everyone, everyone]
        column = support.sum(axis=0)
        news = column - support
        own = news[everyone, everyone].copy()
        news = np.minimum(news, 0)
        news[everyone, everyone] = own
        a = DAMPING * a + (1 - DAMPING) * news

        history = [*history[-(STEADY - 1) :], (a + r).diagonal() > 0]
        if round_ >= STEADY and history[-1].any() and all((is_centre == history[-1]).all() for is_centre in history):
            break

    # Each point joins its most similar centre; then the best member of a group becomes its centre.
    centres = np.flatnonzero(history[-1])
    if not len(centres):
        return np.zeros(points, np.int64)
    member = s[:, centres].argmax(axis=1)
    member[centres] = np.arange(len(centres))
    for k in range(len(centres)):
        inside = np.flatnonzero(member == k)
        centres[k] = inside[s[np.ix_(inside, inside)].sum(axis=0).argmax()]
    member = s[:, centres].argmax(axis=1)
    member[centres] = np.arange(len(centres))
    return np.unique(centres[member], return_inverse=True)[1].reshape(-1)
