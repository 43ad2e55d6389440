"""Averages over time and over ranks: EMA of the weights, which is evaluated in their place; statistics of batch norms.

    a <- d a + (1 - d) w,    d = min(train.ema, (1 + n) / (10 + n)) after the n-th step

The second term, TensorFlow's (`tf.train.ExponentialMovingAverage`), lets the average follow while there are few steps.
Averaged are the parameters that train and, where they change (`model.norm=batch`), the statistics of the batch norms.
All other buffers (mean score, counts, feature memory) are states of the method and stay what they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from loce.models.mask_rcnn import MaskRCNN
from loce.utils import distributed


class WeightAverage:
    """The average of a model's weights. values: name in the model's state dict -> average, on its device."""

    def __init__(self, model: MaskRCNN, decay: float) -> None:
        self.decay, self.weights = decay, averaged_tensors(model)
        self.values = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def update(self, done: int) -> None:
        """Take in the weights after `done` steps."""
        decay = min(self.decay, (1 + done) / (10 + done))
        get_ema_multi_avg_fn(decay)(list(self.values.values()), list(self.weights.values()), done)

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Go on from the averages of a checkpoint."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block the model has the averages in place of its weights."""
        own = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(values[name])


def averaged_tensors(model: MaskRCNN) -> dict[str, Tensor]:
    """What is averaged, by its name in the state dict."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | batch_statistics(model)


def batch_statistics(model: MaskRCNN) -> dict[str, Tensor]:
    """Running means and variances that change (`model.norm=batch`), by name."""
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    kinds = ("running_mean", "running_var") if model.config.norm == "batch" else ()
    return {f"{name}.{kind}": norm.get_buffer(kind) for name, norm in norms for kind in kinds}


@torch.no_grad()
def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Put their mean over ranks in place of float tensors of the same shapes; every rank must call.

    Batch norms learn from the images of their own rank. Their statistics, and averages of them, are linear in those of
    the batches, so that it makes no difference how often this is done before they are saved or evaluated.
    """
    if distributed.world_size() > 1 and tensors:
        total = distributed.all_reduce_sum(torch.cat([x.flatten() for x in tensors])) / distributed.world_size()
        for x, mean in zip(tensors, total.split([x.numel() for x in tensors]), strict=True):
            x.copy_(mean.view_as(x))
