"""LOCE, Sec. 3.1, Eq. 2: the mean classification score of each class, an indicator of how well it is learned.

Shape suffixes: N rows (RoIs and memory features), E entries, L = C + 1 classes with background last, G groups of rows.
"""

import torch
from torch import Tensor, nn

from loce.classes import IGNORED
from loce.distributed import all_reduce_sum


class MeanScoreTracker(nn.Module):
    """The mean score vector s, updated by an exponential moving average (Eq. 2).

    `scores`: buffer (C+1,) fp32. Every class starts at `initial_score`; the background, C, is pinned to
    `background_score`, the paper's s^_{C+1} (Sec. 3.2). `momentum` is the paper's alpha.
    """

    scores: Tensor

    def __init__(
        self,
        num_classes: int,
        momentum: float = 0.9,
        initial_score: float = 0.01,
        background_score: float = 0.01,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.momentum = momentum
        self.background_score = background_score
        scores_L = torch.full((num_classes + 1,), initial_score)
        scores_L[-1] = background_score
        self.register_buffer("scores", scores_L)

    @torch.no_grad()
    def update(self, labels: Tensor, probabilities: Tensor) -> None:
        """Apply Eq. 2 once for each entry, the entries of all ranks together.

        labels: (E,) long; probabilities: (E,) float, the predicted probability of that label. Entries with a negative
        label (padding) or with label C (background) count for nothing. The q entries of a class are applied in closed
        form with their mean, s <- alpha^q s + (1 - alpha^q) mean, so that neither their order nor the number of ranks
        matters. E may differ between ranks; every rank must call. Nothing here waits for the device.

        `scores` becomes a new tensor: what a loss was computed with stays as it was until its backward pass.
        """
        index_E = torch.where(labels < 0, self.num_classes, labels)  # the background's column takes what is left out
        entries_2E = torch.stack([probabilities.float(), torch.ones_like(probabilities, dtype=torch.float32)])
        sums_counts_2L = self.scores.new_zeros(2, self.num_classes + 1).index_add_(1, index_E, entries_2E)
        sum_L, count_L = all_reduce_sum(sums_counts_2L)
        kept_L = self.momentum**count_L
        scores_L = kept_L * self.scores + (1 - kept_L) * sum_L / count_L.clamp(min=1)
        scores_L[-1:].fill_(self.background_score)
        self.scores = scores_L


@torch.no_grad()
def instance_scores(
    probabilities: Tensor,
    labels: Tensor,
    instances: Tensor,
    num_instances: int,
    from_memory: Tensor,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """The entries that one batch gives to `MeanScoreTracker.update`, in a shape that does not depend on the data.

    One entry for each ground-truth instance with a sampled positive RoI: the mean over its positive RoIs; and one for
    each class drawn from the memory: the mean over its drawn features.

    probabilities: (N,) float, p_y of each row; labels: (N,) long; instances: (N,) long, the ground-truth instance over
    the whole batch, -1 for none; num_instances: how many there are; from_memory: (N,) bool. Rows with label C
    (background) or a negative label are left out. Returns labels (E,) long and scores (E,) fp32 with
    E = num_instances + num_classes: first the instances, then the classes; label IGNORED and score 0 where there is
    no such row.
    """
    entries = num_instances + num_classes
    group_N = torch.where(from_memory, num_instances + labels, instances)
    foreground_N = (labels >= 0) & (labels < num_classes)
    group_N = torch.where(foreground_N & (group_N >= 0), group_N, entries)  # the last group takes what is left out
    rows_2N = torch.stack([probabilities.float(), torch.ones_like(probabilities, dtype=torch.float32)])
    sum_G, count_G = rows_2N.new_zeros(2, entries + 1).index_add_(1, group_N, rows_2N)
    labels_G = labels.new_full((entries + 1,), IGNORED).scatter_(0, group_N, labels)  # rows of a group share the label
    scores_G = sum_G / count_G.clamp(min=1)
    return labels_G[:entries], scores_G[:entries]
