"""Class-Balanced Loss (CVPR 2019, arXiv 1901.05555): softmax cross-entropy, re-weighted by class.

L = 1/R sum_r w_{y_r} (-log softmax(z_r)_{y_r})                                  R rows that take part
w_c is proportional to 1 / n_c                       (head.reweighted.by = inverse_frequency)
or to (1 - beta) / (1 - beta^{n_c}), the inverse of the effective number         (= effective_number)
n_c training instances. Scale: sum_c n_c w_c = sum_c n_c, an average training instance weighs 1. Background: w_C = 1.
Inference: softmax over C + 1. Initialisation: weights N(0, 0.01), bias 0. Rows from the memory are rows like others.

State: none that training changes; `weights` is a buffer.

Differences from the paper / the released code:
- The paper has no background, and scales the weights to a mean of 1 over the classes. With that scale an average object
  of LVIS v1 would weigh 0.01 beside a background of 1, and nothing but background would be found. Here objects and
  background keep the balance that they have without weights.
- So a class with one instance weighs much: on LVIS v1 1056 (inverse frequency) or about 1000 (effective number). The
  recipes clip the gradient.
- The loss is divided by the number of rows, as released, and not by the sum of their weights.
- The release has the effective number only (the inverse frequency is beta -> 1 of it), and a sigmoid and a focal form.
- A class that was never seen counts as one with a single instance.
"""

import numpy as np
import torch
from torch import Tensor

from loce.config import HeadConfig, ReweightedOptions
from loce.heads.base import RoIs, cross_entropy
from loce.heads.softmax import SoftmaxHead
from loce.utils.classes import ClassStats


class ReweightedHead(SoftmaxHead):
    """The layer, parameter names and scores of the softmax head.

    `weights`: buffer (C+1,) fp32, of the rows of each class.
    """

    weights: Tensor

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        weights_C = class_weights(stats.instance_counts, self.options.reweighted)
        self.register_buffer("weights", torch.tensor([*weights_C, 1.0], dtype=torch.float32))

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: weighted cross-entropy, summed over the rows that take part and divided by their number."""
        return {"loss_cls": cross_entropy(logits_NL, rois.labels_N, rois.count, self.weights)}


def class_weights(instance_counts: np.ndarray, options: ReweightedOptions) -> np.ndarray:
    """(C,) float64: w_c of each class from its training instances (C,), with a mean of 1 over the instances."""
    n_C = np.maximum(instance_counts, 1).astype(np.float64)
    if options.by == "inverse_frequency":
        weights_C = 1 / n_C
    else:
        weights_C = (1 - options.beta) / (1 - options.beta**n_C)
    return weights_C * (n_C.sum() / (n_C * weights_C).sum())
