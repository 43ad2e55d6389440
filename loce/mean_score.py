"""LOCE, Sec. 3.1, Eq. 2: the mean classification score of each class, an indicator of how well it is learned.

Shape suffixes: N rows (RoIs and memory features), E entries, K rows from the
memory, L = C + 1 classes with background last, G groups of rows.
"""

import torch
from torch import Tensor, nn

from loce.utils.classes import IGNORED
from loce.utils.distributed import all_reduce_sum


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
        self.initial_score = initial_score
        self.background_score = background_score
        self.register_buffer("scores", torch.empty(num_classes + 1))
        self.restart()

    def restart(self) -> None:
        """Every class at `initial_score`, whatever was tracked before."""
        self.scores = torch.full_like(self.scores, self.initial_score)
        self.scores[-1:].fill_(self.background_score)

    @torch.no_grad()
    def update(self, labels: Tensor, probabilities: Tensor, memory: tuple[Tensor, Tensor] | None = None) -> None:
        """Apply Eq. 2 once for each entry, the entries of all ranks together.

        labels: (E,) long; probabilities: (E,) float, the predicted probability of that label; memory: the same for rows
        drawn from it, (K,) each: those of one class, of all ranks, make one entry with their mean. What has a
        negative label (padding) or label C (background) counts for nothing. The q entries of a class are applied in
        closed form with their mean, s <- alpha^q s + (1 - alpha^q) mean, so that neither their order nor the number of
        ranks matters. E and K may differ between ranks; every rank must call. Nothing here waits for the device.
        """
        self.apply_sums(all_reduce_sum(self.sums(labels, probabilities, memory)))

    @torch.no_grad()
    def sums(self, labels: Tensor, probabilities: Tensor, memory: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(2, 2, C+1) what `update` needs of this rank, of entries and of rows from the memory: sums, and numbers."""
        memory_2L = torch.zeros_like(self.scores).expand(2, -1) if memory is None else self._sums(*memory)
        return torch.stack([self._sums(labels, probabilities), memory_2L])

    @torch.no_grad()
    def apply_sums(self, sums: Tensor) -> None:
        """The rest of `update`, with the `sums` of all ranks added up.

        `scores` becomes a new tensor: what a loss was computed with stays as it was until its backward pass.
        """
        entries_2L, memory_2L = sums
        sum_L = entries_2L[0] + memory_2L[0] / memory_2L[1].clamp(min=1)
        count_L = entries_2L[1] + (memory_2L[1] > 0)
        kept_L = self.momentum**count_L
        scores_L = kept_L * self.scores + (1 - kept_L) * sum_L / count_L.clamp(min=1)
        scores_L[-1:].fill_(self.background_score)
        self.scores = scores_L

    def _sums(self, labels_N: Tensor, probabilities_N: Tensor) -> Tensor:
        """(2, L) sum of the probabilities of each class, and how many there are."""
        index_N = torch.where(labels_N < 0, self.num_classes, labels_N)  # the background's column is not used
        rows_2N = torch.stack([probabilities_N.float(), torch.ones_like(probabilities_N, dtype=torch.float32)])
        return self.scores.new_zeros(2, self.num_classes + 1).index_add_(1, index_N, rows_2N)


@torch.no_grad()
def instance_scores(
    probabilities: Tensor,
    labels: Tensor,
    instances: Tensor,
    num_instances: int,
) -> tuple[Tensor, Tensor]:
    """The entries that the ground truth of one batch gives to `MeanScoreTracker.update`.

    One for each instance with a sampled positive RoI, the mean over its positive RoIs; in a shape that does not depend
    on the data.

    probabilities: (N,) float, p_y of each row; labels: (N,) long; instances: (N,) long, the ground-truth instance over
    the whole batch, -1 for none (background, rows from the memory); num_instances: how many there are. Rows with a
    negative label are left out. Returns labels (num_instances,) long and scores (num_instances,) fp32; label IGNORED
    and score 0 where there is no such row.
    """
    own_N = (instances >= 0) & (labels >= 0)
    group_N = torch.where(own_N, instances, num_instances)  # the last group takes what is left out
    rows_2N = torch.stack([probabilities.float(), torch.ones_like(probabilities, dtype=torch.float32)])
    sum_G, count_G = rows_2N.new_zeros(2, num_instances + 1).index_add_(1, group_N, rows_2N)
    labels_G = labels.new_full((num_instances + 1,), IGNORED).scatter_(0, group_N, labels)  # a group shares its label
    scores_G = sum_G / count_G.clamp(min=1)
    return labels_G[:num_instances], scores_G[:num_instances]
