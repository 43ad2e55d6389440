"""Classification heads: one file for each method, chosen by name from a literal dict."""

from loce.heads.base import Head, RoIs
from loce.heads.eql import EQLHead
from loce.heads.equilibrium import EquilibriumHead
from loce.heads.softmax import SoftmaxHead

HEADS: dict[str, type[Head]] = {
    "softmax": SoftmaxHead,
    "equilibrium": EquilibriumHead,
    "eql": EQLHead,
}

__all__ = ["HEADS", "EquilibriumHead", "Head", "RoIs", "SoftmaxHead"]
