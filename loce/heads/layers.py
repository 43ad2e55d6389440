"""LOCE, Sec. 4.1: the last layer of a head and its initial values, plain or normalised.

Shape suffixes: N rows, D features, L logits.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(in_features: int, logits: int, prior: float | None = None) -> nn.Linear:
    """A linear layer with weights from N(0, 0.01).

    prior: the sigmoid that every logit starts from, bias = -log((1 - prior) / prior); None: bias 0, for a softmax.
    """
    layer = nn.Linear(in_features, logits)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, 0.0 if prior is None else -math.log((1 - prior) / prior))
    return layer


class NormalisedLinear(nn.Module):
    """z_c = temperature * <x, w_c> / ((|x| + eps) (|w_c| + eps)) + b_c: cosines, weights from N(0, 0.01), b = 0.

    Lengths are taken in fp32, also under autocast; the product runs in autocast's type. bias: whether there is a b.
    """

    eps = 1e-6

    def __init__(self, in_features: int, logits: int, temperature: float, bias: bool = True) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(torch.empty(logits, in_features))
        nn.init.normal_(self.weight, std=0.01)
        self.bias = nn.Parameter(torch.zeros(logits)) if bias else None

    def forward(self, x_ND: Tensor) -> Tensor:
        """Features (N, D) -> logits (N, L)."""
        x_ND = self.temperature * x_ND / (_length(x_ND) + self.eps)
        weight_LD = self.weight / (_length(self.weight) + self.eps)
        return F.linear(x_ND, weight_LD, self.bias)


def _length(rows: Tensor) -> Tensor:
    """(N, 1) length of each row, in at least fp32."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=dtype)
