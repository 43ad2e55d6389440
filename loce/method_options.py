"""Options of the classification heads: each method's published defaults, one section a method. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from loce.utils.options import Count, Decay, Fraction, Natural, NotNegative, Positive

HeadName = Literal[
    "softmax",
    "equilibrium",
    "reweighted",
    "eql",
    "eqlv2",
    "seesaw",
    "bags",
    "balanced_softmax",
    "balms",
    "ldam",
    "logit_adjustment",
    "norcal",
    "forest",
    "simcal",
]


@dataclass(frozen=True, kw_only=True)
class EquilibriumOptions:
    """Equilibrium loss."""

    background: Literal["fixed", "learned"] = "fixed"  # s^_{C+1}: as indicator says, or a parameter that starts there


@dataclass(frozen=True, kw_only=True)
class ReweightedOptions:
    """Softmax whose rows are weighted by class."""

    by: Literal["inverse_frequency", "effective_number"] = "effective_number"
    beta: Decay = 0.9999  # of the effective number (1 - beta^n) / (1 - beta)


@dataclass(frozen=True, kw_only=True)
class EQLOptions:
    """Equalization loss."""

    threshold: Fraction = 1.1e-3  # lambda: classes in a smaller share of the images are spared; v0.5: 1.77e-3


@dataclass(frozen=True, kw_only=True)
class EQLv2Options:
    """Equalization loss v2."""

    gamma: Positive = 12.0  # steepness of the map from gradient ratio to weight
    mu: NotNegative = 0.8  # its centre
    alpha: NotNegative = 4.0  # positives weigh 1 to 1 + alpha


@dataclass(frozen=True, kw_only=True)
class SeesawOptions:
    """Seesaw loss."""

    p: NotNegative = 0.8  # exponent of the mitigation factor
    q: NotNegative = 2.0  # exponent of the compensation factor
    temperature: Positive = 20.0  # of the normalised classifier
    synchronise: bool = True  # false: every rank counts its own samples only, as the released code does


@dataclass(frozen=True, kw_only=True)
class BAGSOptions:
    """Balanced group softmax."""

    bounds: tuple[Count, ...] = (10, 100, 1000)  # instances at which the next group begins
    others_ratio: Positive = 8.0  # beta: at most so many "others" per row of the group


@dataclass(frozen=True, kw_only=True)
class BALMSOptions:
    """Balanced meta-softmax, sigmoid form with a learned re-weighting."""

    meta_lr: Positive = 0.01  # Adam's, of the class weights
    inner_lr: Positive = 0.02  # of the trial step of the classifier; it follows neither batch size nor drops


@dataclass(frozen=True, kw_only=True)
class LDAMOptions:
    """Label-distribution-aware margins with deferred re-weighting."""

    max_margin: Positive = 0.5
    scale: Positive = 30.0
    reweight_from: Fraction = 0.8  # share of the training after which rows are weighted by class; 1: never
    beta: Decay = 0.9999


@dataclass(frozen=True, kw_only=True)
class LogitAdjustmentOptions:
    """Logit-adjusted softmax loss."""

    tau: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class NorCalOptions:
    """Normalised calibration of a trained softmax head; nothing changes in training."""

    gamma: NotNegative = 0.6
    counts: Literal["images", "instances"] = "images"


@dataclass(frozen=True, kw_only=True)
class ForestOptions:
    """Forest R-CNN: parent classes of several trees. scripts/build_forest.py writes the trees."""

    trees: str = ""  # file of the trees, read when training starts; a checkpoint holds them
    visual: Natural = 25  # parents of each tree; 0: a tree that is not used
    geometrical: Natural = 50
    lexical: Natural = 0  # 108 with LVIS v0.5 and WordNet, for which the user brings a file


@dataclass(frozen=True, kw_only=True)
class SimCalOptions:
    """Calibrated second classifier."""

    threshold: Count = 100  # instances; classes with fewer take the calibrated score
    layers: Literal["3fc_ft", "3fc_rand", "2fc_rand"] = "3fc_ft"  # 3fc_ft starts from the detector's own FCs


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Classification head: the loss and how scores are read from logits. A section is of the head of its name."""

    name: HeadName = "softmax"
    reset: bool = False  # start the classifier anew, whatever train.init holds of it
    equilibrium: EquilibriumOptions = field(default_factory=EquilibriumOptions)
    reweighted: ReweightedOptions = field(default_factory=ReweightedOptions)
    eql: EQLOptions = field(default_factory=EQLOptions)
    eqlv2: EQLv2Options = field(default_factory=EQLv2Options)
    seesaw: SeesawOptions = field(default_factory=SeesawOptions)
    bags: BAGSOptions = field(default_factory=BAGSOptions)
    balms: BALMSOptions = field(default_factory=BALMSOptions)
    ldam: LDAMOptions = field(default_factory=LDAMOptions)
    logit_adjustment: LogitAdjustmentOptions = field(default_factory=LogitAdjustmentOptions)
    norcal: NorCalOptions = field(default_factory=NorCalOptions)
    forest: ForestOptions = field(default_factory=ForestOptions)
    simcal: SimCalOptions = field(default_factory=SimCalOptions)
