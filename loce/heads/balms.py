"""BALMS for detection (NeurIPS 2020, arXiv 2007.10740): prior-shifted sigmoids and the Meta Re-weighter.

    z'_rc    = z_rc + log(f_c / (1 - f_c)) for foreground rows r, z_rc for background
    loss_cls = 1/R sum_r w_r sum_c BCE(z'_rc, [y_r = c])          R training rows, c over the C classes
    w_r      = v_{y_r} over its mean over the foreground training rows, v_c = sigmoid(a_c); background: 1
    scores   = sigmoid(z)                                         no shift

The Meta Re-weighter learns a, which starts at 0. Half of the images are a meta batch, drawn with probability
~ max_c 1/f_c: their rows count in the meta loss only. On every batch, before the loss:

    W'       = W - eta dloss_cls/dW                               one step of SGD, a function of a
    meta     = 1/R_m sum_r sum_c BCE(x_r W'_c, [y_r = c])         R_m meta rows, no shift and no weights
    a        = Adam(a, dmeta/da)                                  learning rate meta_lr

The classifier is linear (W holds its bias), so with E = sigmoid(z') - t, rows x and M = dmeta/dW' this is exact:

    dmeta/dw_r = -eta/R sum_c E_rc (x_r M_c)

f_c: share of training images that show class c, between 1/images and 1 - 1/images. Initialisation: weights N(0, 0.01),
bias -log(999). Second stage after a sigmoid detector: only the classifier trains. Rows from the memory are training
rows; the memory stores objects of meta images, too, and draws for the others only. All of the meta step is fp32.

head.balms.meta_lr = 0 is the loss alone: all w_r are 1, and there is no meta batch.

State: `a` and its Adam (first and second moment, number of steps) are buffers; the meta step is that of all ranks' rows
together, so they are the same on every rank (four sums over ranks, two of them as large as the classifier).

Differences from the paper / the released code:
- The release keeps a and its Adam out of the checkpoint; and each rank makes its inner step from its own rows.
- The release changes logits in place, so that its meta loss sees shifted logits in foreground rows; here it does not.
- eta is `inner_lr`, constant, and plain SGD: Adam takes out most of the size of dmeta/da, and eta is little else.
- With accumulation every micro-batch makes a meta step. A batch without meta rows makes none.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loce.config import BALMSOptions, HeadConfig
from loce.heads.base import META, Head, RoIs, at_least_fp32, linear, one_hot
from loce.utils.classes import IGNORED, ClassStats
from loce.utils.distributed import all_reduce_sum, mean_count

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam


class BALMSHead(Head):
    """One linear layer to C logits, each class a yes-or-no question; `shift_C` (C,) is log(f / (1 - f))."""

    shift_C: Tensor  # noqa: N815

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        self.fc_cls = linear(in_features, self.num_classes, prior=0.001)
        images = max(stats.image_total, 2)
        shown_C = np.clip(stats.image_counts, 1, images - 1)
        shift_C = torch.tensor(np.log(shown_C / (images - shown_C)), dtype=torch.float32)
        self.register_buffer("shift_C", shift_C, persistent=False)
        self.reweighter = MetaReweighter(self.num_classes, self.options.balms)
        self.meta_batch = self.options.balms.meta_lr > 0

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: the weighted loss of the training rows, after the weights have learned from the meta rows."""
        labels_N, z_NC = rois.labels_N, at_least_fp32(logits_NL)
        classes_N = rois.sampled_class_N
        meta_N = torch.zeros_like(labels_N, dtype=torch.bool) if classes_N is None else classes_N == META
        training = dataclasses.replace(rois, labels_N=torch.where(meta_N, IGNORED, labels_N))
        own_NC = one_hot(training.labels_N, self.num_classes)
        shifted_NC = z_NC + own_NC.any(dim=1, keepdim=True) * self.shift_C
        weights_N = (training.labels_N != IGNORED).to(z_NC)
        rows = mean_count(weights_N.sum())  # `rois.count` has the meta rows, too
        if self.meta_batch:
            if rois.features_ND is None:
                raise ValueError("the balms head needs rois.features_ND, what the logits were computed from")
            meta_labels_N = torch.where(meta_N, labels_N, IGNORED)
            weights_N = self.reweighter(z_NC.detach(), shifted_NC.detach(), rois.features_ND, training, meta_labels_N)
        bce_NC = F.binary_cross_entropy_with_logits(shifted_NC, own_NC.to(z_NC), reduction="none")
        return {"loss_cls": (weights_N * bce_NC.sum(dim=1)).sum() / rows}

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, C) -> sigmoids (N, C), fp32; they add up to anything."""
        return logits_NL.float().sigmoid()


class MetaReweighter(nn.Module):
    """Class weights v = sigmoid(a), learned by Adam so that a step of SGD on the weighted loss helps the meta batch.

    Buffers: `a`, `first` and `second` (C,), `steps` (). Shapes: E = D + 1 features, the last one 1 for the bias.
    """

    a: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor

    def __init__(self, num_classes: int, options: BALMSOptions) -> None:
        super().__init__()
        self.num_classes, self.options = num_classes, options
        for name in ("a", "first", "second"):
            self.register_buffer(name, torch.zeros(num_classes))
        self.register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def forward(
        self,
        z_NC: Tensor,
        shifted_NC: Tensor,
        x_ND: Tensor,
        training: RoIs,
        meta_labels_N: Tensor,
    ) -> Tensor:
        """One meta step; then the weights (N,) of the rows, 0 where a row is not of the training batch.

        z_NC, shifted_NC: logits and z', without gradient; x_ND: features; training: labels IGNORED in meta rows;
        meta_labels_N: labels IGNORED in all others. Every rank must call.
        """
        labels_N = training.labels_N
        own_NC, meta_NC = (one_hot(labels, self.num_classes).to(z_NC) for labels in (labels_N, meta_labels_N))
        takes_part_2N = torch.stack([labels_N, meta_labels_N]) != IGNORED
        totals = all_reduce_sum(torch.cat([own_NC.sum(dim=0), takes_part_2N.sum(dim=1).to(z_NC)]))
        count_C, (rows, meta_rows) = totals[:-2], totals[-2:]
        with torch.autocast(z_NC.device.type, enabled=False):
            x_NE = F.pad(at_least_fp32(x_ND), (0, 1), value=1.0).to(z_NC)
            error_NC = (shifted_NC.sigmoid() - own_NC) * takes_part_2N[0][:, None] / rows.clamp(min=1)
            weighted_NC = self._row_weights(own_NC, count_C)[:, None] * error_NC
            step_CE = all_reduce_sum(weighted_NC.T @ x_NE)
            moved_NC = z_NC - self.options.inner_lr * x_NE @ step_CE.T
            meta_error_NC = (moved_NC.sigmoid() - meta_NC) * takes_part_2N[1][:, None] / meta_rows.clamp(min=1)
            meta_CE = all_reduce_sum(meta_error_NC.T @ x_NE)
            slope_N = -self.options.inner_lr * (error_NC * (x_NE @ meta_CE.T)).sum(dim=1)
            slope_C = all_reduce_sum(own_NC.T @ slope_N)
            self._learn(self._gradient(slope_C, count_C), meta_rows > 0)
            return self._row_weights(own_NC, count_C) * takes_part_2N[0]

    def _row_weights(self, own_NC: Tensor, count_C: Tensor) -> Tensor:
        """(N,): v of the row's class over its mean over all foreground rows; 1 for rows without a class."""
        v_C = self.a.sigmoid()
        return own_NC @ (v_C / self._mean(v_C, count_C)) + (1 - own_NC.sum(dim=1))

    def _mean(self, values_C: Tensor, count_C: Tensor) -> Tensor:
        """(): mean over the foreground rows of all ranks, of which `count_C` are of each class; never 0."""
        mean = (count_C * values_C).sum() / count_C.sum().clamp(min=1)
        return mean.clamp(min=torch.finfo(torch.float32).tiny)

    def _gradient(self, slope_C: Tensor, count_C: Tensor) -> Tensor:
        """(C,) dmeta/da, from the sums over a class's rows (C,) of dmeta/dw_r: through the mean, and the sigmoid."""
        v_C = self.a.sigmoid()
        mean = self._mean(v_C, count_C)
        through_mean = (slope_C * v_C).sum() / mean / count_C.sum().clamp(min=1)
        return (slope_C - count_C * through_mean) / mean * v_C * (1 - v_C)

    def _learn(self, gradient_C: Tensor, there_are_rows: Tensor) -> None:
        """A step of Adam (arXiv 1412.6980), nothing without meta rows. Buffers become new tensors."""
        (beta1, beta2), steps = BETAS, self.steps + 1
        first = beta1 * self.first + (1 - beta1) * gradient_C
        second = beta2 * self.second + (1 - beta2) * gradient_C**2
        size = (second / (1 - beta2**steps)).sqrt() + EPSILON
        a = self.a - self.options.meta_lr * first / (1 - beta1**steps) / size
        changes = ((a, self.a), (first, self.first), (second, self.second), (steps, self.steps))
        self.a, self.first, self.second, self.steps = (torch.where(there_are_rows, *change) for change in changes)
