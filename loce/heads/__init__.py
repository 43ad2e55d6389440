"""Classification heads: one file for each method, chosen by name from a literal dict."""

from loce.heads.acsl import ACSLHead
from loce.heads.bags import BAGSHead
from loce.heads.balanced_softmax import BalancedSoftmaxHead
from loce.heads.balms import BALMSHead
from loce.heads.base import Head, RoIs
from loce.heads.disalign import DisAlignHead
from loce.heads.ecm import ECMHead
from loce.heads.eql import EQLHead
from loce.heads.eqlv2 import EQLv2Head
from loce.heads.equilibrium import EquilibriumHead
from loce.heads.fcbl import FCBLHead
from loce.heads.fedloss import FedLossHead
from loce.heads.forest import ForestHead
from loce.heads.gol import GOLHead
from loce.heads.gumbel import GumbelHead
from loce.heads.iif import IIFHead
from loce.heads.ldam import LDAMHead
from loce.heads.logit_adjustment import LogitAdjustmentHead
from loce.heads.norcal import NorCalHead
from loce.heads.pcb import PCBHead
from loce.heads.reweighted import ReweightedHead
from loce.heads.seesaw import SeesawHead
from loce.heads.simcal import SimCalHead
from loce.heads.softmax import SoftmaxHead

HEADS: dict[str, type[Head]] = {
    "softmax": SoftmaxHead,
    "equilibrium": EquilibriumHead,
    "reweighted": ReweightedHead,
    "eql": EQLHead,
    "eqlv2": EQLv2Head,
    "seesaw": SeesawHead,
    "bags": BAGSHead,
    "balanced_softmax": BalancedSoftmaxHead,
    "balms": BALMSHead,
    "ldam": LDAMHead,
    "logit_adjustment": LogitAdjustmentHead,
    "norcal": NorCalHead,
    "forest": ForestHead,
    "simcal": SimCalHead,
    "disalign": DisAlignHead,
    "acsl": ACSLHead,
    "fedloss": FedLossHead,
    "pcb": PCBHead,
    "gol": GOLHead,
    "gumbel": GumbelHead,
    "ecm": ECMHead,
    "fcbl": FCBLHead,
    "iif": IIFHead,
}

__all__ = ["HEADS", "EquilibriumHead", "Head", "RoIs", "SoftmaxHead"]
