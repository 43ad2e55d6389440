"""Every option of loce: frozen dataclasses whose defaults are the paper's main setting (LVIS v1, R-50-FPN, stage 1).

A YAML file states differences only, from these defaults or from its `base`; `key.sub=value` on the command line wins
(Sec. 4.1 for the values).
What a field may hold is its type; OPTION_OF and CONFLICTS say what options exclude. Imports no torch.
"""

import dataclasses
import difflib
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from loce.utils.errors import UserError, raise_problems, run_script
from loce.utils.files import inside
from loce.utils.options import (
    Choice,
    Conflict,
    Count,
    Decay,
    Fraction,
    Given,
    Natural,
    NotNegative,
    Positive,
    Range,
    Share,
    build,
    flatten,
    help_text,
    is_section,
    print_help,
    read_options,
    split_words,
    to_dict,
)
from loce.utils.yaml_text import dump_yaml, load_yaml, show

__all__ = [
    "Config",
    "HeadConfig",
    "UserError",
    "diff",
    "dump",
    "from_dict",
    "images_per_rank",
    "load_config",
    "raise_problems",
    "read_options",
    "run_script",
    "to_dict",
]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Annotation files, image folders, and what is done to an image before the model sees it."""

    train_annotations: str = "data/lvis_v1/annotations/lvis_v1_train.json"  # LVIS or COCO JSON
    train_images: str = "data/coco"  # folder that holds train2017/ and val2017/, or the images themselves
    val_annotations: str = "data/lvis_v1/annotations/lvis_v1_val.json"  # the same categories in the same order
    val_images: str = "data/coco"  # as train_images
    rare_max: Natural = 10  # images; LVIS's bounds, used where the file has no `frequency`
    common_max: Natural = 100  # images; classes with more are frequent
    short_edges: tuple[Count, ...] = (640, 672, 704, 736, 768, 800)  # one is drawn per image
    long_edge: Count = 1333  # px; the longer side is at most so long
    resize: Literal["short_edge", "lsj"] = "short_edge"  # in training; lsj: large-scale jitter, on a canvas of one size
    canvas: Count = 1024  # px, side of lsj's canvas: larger images are cut, smaller ones padded
    lsj_scale: tuple[Positive, ...] = (0.1, 2.0)  # lowest and highest size of an image; 1: it just fits the canvas
    test_short_edge: Count = 800  # px, in evaluation and prediction
    flip: Fraction = 0.5  # probability that an image is mirrored
    copy_paste: Fraction = 0.0  # probability that objects of another image are pasted into an image
    paste_from: Literal["any", "rare"] = "any"  # any image; rare: one of a class, all classes alike, rare objects first
    group_by_aspect: bool = True  # batches of wide or of high images: less padding
    workers: Natural = 4  # processes that read images, on every rank
    exif: Literal["ignore", "apply"] = "ignore"  # orientation an image file asks for; COCO's and LVIS's boxes ignore it
    scale_16bit: Literal["high_byte", "range"] = "high_byte"  # 16-bit files; range: an image's lowest to highest value
    allow_missing: bool = False  # go on without images that are not there; results are marked as partial
    keep_empty: bool = False  # train on images without objects, too: all of them is background
    drop_empty: bool = False  # classes without a training instance get no output: placeholders; val objects are missed
    without_mask: Literal["drop", "box"] = "drop"  # annotations whose mask cannot be used; box: the filled box
    allow_misplaced: bool = False  # go on although many masks are empty, or lie elsewhere than their boxes
    max_instances: Count = 500  # of a training image; of more a sample is taken, rare classes first


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Image sampler: which images an epoch shows."""

    name: Literal["uniform", "repeat_factor", "class_balanced", "bilevel"] = "uniform"  # bilevel: SimCal's first level
    repeat_threshold: Share = 1e-3  # t of repeat-factor sampling (LVIS paper)
    repeat_by: Literal["images", "linear", "both", "exponential"] = "images"  # linear: no root; both: IRFS; E-IRFS
    repeat_alpha: Positive = 2.0  # of E-IRFS
    repeat_rounding: Literal["stochastic", "up", "drawn"] = "stochastic"  # detectron2's; MMDetection's; E-IRFS's
    bilevel_tau: Fraction = 0.0  # classes are drawn with probability ~ min(instances, 100)^tau


@dataclass(frozen=True, kw_only=True)
class RPNConfig:
    """Region proposal network; MMDetection's numbers."""

    anchor_scale: Positive = 8.0  # anchor side = scale x stride
    pre_nms_train: Count = 2000  # per level
    pre_nms_test: Count = 1000  # per level
    post_nms: Count = 1000  # over all levels
    nms: Share = 0.7  # IoU; boxes above it are one
    positive_iou: Share = 0.7  # anchors from here on are objects
    negative_iou: Fraction = 0.3  # anchors below are background
    batch_per_image: Count = 256  # anchors in the loss
    positive_fraction: Share = 0.5  # of them, at most
    nms_resampling: Literal["none", "discrete", "linear"] = "none"  # Forest R-CNN: rarer classes, higher nms; training


@dataclass(frozen=True, kw_only=True)
class RoIConfig:
    """Second stage: matching, sampling and pooling of regions of interest."""

    positive_iou: Share = 0.5  # regions from here on are of the object's class, others background
    batch_per_image: Count = 512  # regions in the loss
    positive_fraction: Share = 0.25  # of them, at most
    finest_scale: Positive = 56.0  # boxes up to twice this side (px) are pooled from the finest level
    aligned: bool = True  # false: torchvision's pooling, half a pixel off, 2 samples a bin; for weights trained so


BackboneName = Literal[
    "tiny",
    "resnet18",
    "resnet50",
    "resnet101",
    "resnext101_64x4d",
    "convnext_tiny",
    "convnext_small",
    "convnext_base",
    "swin_t",
    "swin_s",
    "swin_b",
    "swin_v2_t",
    "swin_v2_s",
    "swin_v2_b",
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Mask R-CNN with FPN, or Faster R-CNN."""

    masks: bool = True  # false: Faster R-CNN, boxes only; segmentations are neither needed nor read
    backbone: BackboneName = "resnet50"  # tiny: for tests and the demo
    weights: Literal["imagenet", "glyphs", "none"] = "imagenet"  # what the trunk starts from; glyphs: ours, for tiny
    norm: Literal["frozen", "batch", "group", "layer"] = "frozen"  # frozen: BN statistics fixed, affine trained
    frozen_stages: Annotated[int, Range(0, 4)] = 1  # 1 = stem and first stage never train
    stochastic_depth: Annotated[float, Range(0, 2, below=True)] = 1.0  # times ConvNeXt's and Swin's rates for ImageNet
    fpn_channels: Count = 256  # of every level
    fc_features: Count = 1024  # of the two shared FCs
    mask_channels: Count = 256  # of the mask head's convolutions
    mask_convs: Natural = 4  # 3 x 3 convolutions before the mask head's upsampling
    mask_predictor: Literal["normalised", "linear"] = "normalised"  # normalised: cosine, as the paper's; linear: plain
    mask_temperature: Positive = 20.0  # tau of the normalised mask predictor
    rpn: RPNConfig = field(default_factory=RPNConfig)
    roi: RoIConfig = field(default_factory=RoIConfig)


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
    "disalign",
    "acsl",
    "fedloss",
    "pcb",
    "gol",
    "gumbel",
    "ecm",
    "fcbl",
    "iif",
]


@dataclass(frozen=True, kw_only=True)
class ReweightedOptions:
    """Softmax whose rows are weighted by class."""

    by: Literal["inverse_frequency", "effective_number"] = "effective_number"  # weights of the classes
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

    meta_lr: NotNegative = 0.01  # Adam's, of the class weights; 0: all weights 1, no meta batch
    inner_lr: Positive = 0.02  # of the trial step of the classifier; it follows neither batch size nor drops


@dataclass(frozen=True, kw_only=True)
class LDAMOptions:
    """Label-distribution-aware margins with deferred re-weighting."""

    max_margin: Positive = 0.5  # of the rarest class
    scale: Positive = 30.0  # s of the cosine logits
    reweight_from: Fraction = 0.8  # share of the training after which rows are weighted by class; 1: never
    beta: Decay = 0.9999  # of the late weights' effective number


@dataclass(frozen=True, kw_only=True)
class LogitAdjustmentOptions:
    """Logit-adjusted softmax loss."""

    tau: Positive = 1.0  # factor of the log prior


@dataclass(frozen=True, kw_only=True)
class NorCalOptions:
    """Normalised calibration of a trained softmax head; nothing changes in training."""

    gamma: NotNegative = 0.6  # power of the counts
    counts: Literal["images", "instances"] = "images"  # of training images with the class, or of its instances


@dataclass(frozen=True, kw_only=True)
class ForestOptions:
    """Forest R-CNN: parent classes of several trees. scripts/build_forest.py writes the trees."""

    trees: str = ""  # file of the trees, read when training starts; a checkpoint holds them
    visual: Natural = 25  # parents of each tree; 0: a tree that is not used
    geometrical: Natural = 50  # by the shape of masks
    lexical: Natural = 0  # 108 with LVIS v0.5 and WordNet, for which the user brings a file


@dataclass(frozen=True, kw_only=True)
class SimCalOptions:
    """Calibrated second classifier."""

    threshold: Count = 100  # instances; classes with fewer take the calibrated score
    layers: Literal["3fc_ft", "3fc_rand", "2fc_rand"] = "3fc_ft"  # 3fc_ft starts from the detector's own FCs


@dataclass(frozen=True, kw_only=True)
class DisAlignOptions:
    """Distribution alignment of a frozen classifier."""

    rho: NotNegative = 0.8  # exponent of the class weights of the loss


@dataclass(frozen=True, kw_only=True)
class ACSLOptions:
    """Adaptive class suppression loss."""

    threshold: Fraction = 0.7  # score from which a class is a negative of another class's object
    common_share: Fraction = 0.1  # of the background rows, negatives of common classes
    rare_share: Fraction = 0.01  # of the background rows, negatives of rare classes


@dataclass(frozen=True, kw_only=True)
class FedLossOptions:
    """Federated loss."""

    classes: Count = 50  # K, that a step trains: those of the batch, background included, and drawn ones
    prior: Share = 0.01  # sigmoid that every logit starts from


@dataclass(frozen=True, kw_only=True)
class PCBOptions:
    """Pairwise class balance loss."""

    alpha: Fraction = 0.4  # share of the pairwise term
    momentum: Decay = 0.99  # of the confusion matrix
    start: Fraction = 2 / 3  # share of the training after which the term is on; published: epoch 17 of 24
    wait_for_all: bool = True  # until every class has been seen, too


@dataclass(frozen=True, kw_only=True)
class GOLOptions:
    """Gumbel optimised loss, or DropLoss."""

    activation: Literal["gumbel", "sigmoid"] = "gumbel"  # sigmoid: DropLoss
    threshold: Fraction = 1.1e-3  # lambda: classes in a smaller share of the images are spared; v0.5: 1.77e-3


@dataclass(frozen=True, kw_only=True)
class ECMOptions:
    """Effective class-margin loss."""

    normalised: bool = True  # the classifier compares directions, as the mask predictor does
    temperature: Positive = 20.0  # of a normalised classifier
    background_ratio: Positive = 6.3313  # background rows for each foreground row, as the authors measured


@dataclass(frozen=True, kw_only=True)
class FCBLOptions:
    """Foreground classification balance loss of BACL."""

    alpha: NotNegative = 0.85  # strength of the margins
    threshold: Fraction = 0.7  # score from which a class is a negative even where it is weaker than the own class
    reweight: bool = True  # false: all classes are negatives


RarityFormula = Literal["raw", "smooth", "prob", "base2", "base10", "normit", "gombit"]


@dataclass(frozen=True, kw_only=True)
class IIFOptions:
    """Inverse image frequency."""

    variant: RarityFormula = "base10"  # formula of the weight
    counts: Literal["images", "instances"] = "images"  # that a class is rare by
    normalised: bool = False  # the classifier compares directions, as the mask predictor does
    temperature: Positive = 8.0  # of a normalised classifier


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Classification head: the loss and how scores are read from logits. A section is of the head of its name."""

    name: HeadName = "softmax"  # loss and scores of the classifier; docs/methods.md explains each
    reset: bool = False  # start the classifier anew, whatever train.init holds of it
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
    disalign: DisAlignOptions = field(default_factory=DisAlignOptions)
    acsl: ACSLOptions = field(default_factory=ACSLOptions)
    fedloss: FedLossOptions = field(default_factory=FedLossOptions)
    pcb: PCBOptions = field(default_factory=PCBOptions)
    gol: GOLOptions = field(default_factory=GOLOptions)
    ecm: ECMOptions = field(default_factory=ECMOptions)
    fcbl: FCBLOptions = field(default_factory=FCBLOptions)
    iif: IIFOptions = field(default_factory=IIFOptions)


@dataclass(frozen=True, kw_only=True)
class IndicatorConfig:
    """What tells weak classes from strong ones, for the equilibrium loss and the feature memory (Sec. 3.1)."""

    kind: Literal["score", "prior"] = "score"  # score: mean score, Eq. 2; prior: instance counts (supplement)
    momentum: Decay = 0.9  # alpha
    initial_score: Share = 0.01  # of every class, before the memory is filled
    background_score: Share = 0.01  # the paper's s^_{C+1}
    background_count: Positive = 1.0  # the supplement's n^_{C+1}, for kind: prior


@dataclass(frozen=True, kw_only=True)
class AdaptiveOptions:
    """Adaptive sampling rates of FASA."""

    power: Positive = 1.0  # of the share that a class has in the sum of inverse instance counts
    scale: Positive = 1.0  # of the rates that training starts with; 1: one vector a draw, over all classes
    held_out: Count = 2  # training images of a class, a quarter of its own at most, whose losses adapt the rates


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Feature memory: memory-augmented feature sampling (Sec. 3.3), or Gaussians of the features (BACL, FASA)."""

    enabled: bool = False  # features of weak classes are stored and drawn again
    kind: Literal["ring", "gaussian"] = "ring"  # ring: the newest features (LOCE); gaussian: their mean and variance
    source: Literal["boxes", "regions"] = "boxes"  # boxes: jittered ones around objects; regions: the batch's positives
    draw: Literal["score", "confusion", "adaptive"] = "score"  # classes by 1 / indicator; 1 - K_cc (BACL); FASA's rates
    capacity: Count = 80  # M, features per class
    momentum: Decay = 0.9  # of the running mean and variance
    instances_per_class: Count = 5  # stored per class and image, chosen at random
    fill_instances: Natural = 5  # per class, before the first iteration
    level: Literal["fc", "roi"] = "fc"  # fc: the vector after the shared FCs; roi: the pooled RoI features
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of what is stored
    shared: bool = False  # true: every rank holds the rows of all ranks
    classes_per_draw: Count = 8  # k, per 2 images on a rank
    features_per_class: Count = 4  # m
    start: Fraction = 0.0  # share of the training before which nothing is drawn
    loss_weight: NotNegative = 0.0  # of the mean loss of drawn rows, apart from the rest; 0: they are rows like others
    adaptive: AdaptiveOptions = field(default_factory=AdaptiveOptions)

    @property
    def holds_out(self) -> int:
        """Training images of a class that are held out; 0: none."""
        return self.adaptive.held_out if self.enabled and self.draw == "adaptive" else 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation. `batch_size` counts images over all ranks and accumulation steps."""

    freeze: Literal["none", "backbone", "trunk", "detector"] = "none"  # trunk: to the shared FCs; detector: to the head
    init: str = ""  # checkpoint or run folder that training starts from
    resume: Literal["auto", "never", "must"] = "auto"  # auto: go on from a checkpoint where the run folder has one
    batch_size: Count = 16  # images a step, over all ranks and accumulation steps
    accumulate: Count = 1  # passes for one step; saves memory
    epochs: Count = 24  # over the training images
    lr: Positive = 0.02  # at a batch of `lr_batch_size`; scaled linearly with batch_size
    lr_batch_size: Count = 16  # images that `lr` is meant for
    optimizer: Literal["sgd", "adamw"] = "sgd"  # adamw: weight decay apart from the gradient (decoupled)
    momentum: Decay = 0.9  # of SGD; AdamW's beta1, its beta2 is 0.999
    weight_decay: NotNegative = 1e-4  # of every weight that trains
    decay_norms: bool = True  # false: norms and biases have no weight decay
    layer_decay: Share = 1.0  # learning rate of a stage of the trunk, as a share of the next deeper one's
    warmup_iterations: Natural = 500  # with a linearly rising learning rate
    warmup_factor: Share = 1e-3  # of the learning rate, where the warm-up begins
    schedule: Literal["step", "cosine"] = "step"  # cosine: after the warm-up, half a cosine down to 0
    drops: tuple[Count, ...] = (16, 22)  # epochs after which the learning rate falls
    drop_factor: Share = 0.1  # of the learning rate, at every drop
    clip_norm: NotNegative = 0.0  # 0: off
    ema: Decay = 0.0  # of the moving average of the weights, which is evaluated in their place; 0: none
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the forward pass; weights and losses stay fp32
    log_every: Count = 50  # iterations
    checkpoint_every: Count = 1000  # iterations, besides every epoch's end
    keep_checkpoints: Count = 2  # newest ones, the best one besides
    evaluate: bool = True  # after the last epoch
    evaluate_every: Natural = 0  # epochs; 0: after the last only; the best checkpoint by AP is kept, too
    dry_run: bool = False  # two steps, save, resume and evaluation of a few images, in RUN/dry_run, instead of the run
    overfit: Natural = 0  # images to learn by heart, in RUN/overfit, instead of the run; 0: off
    wandb: bool = False  # curves and pictures on Weights & Biases, too; needs pip install loce[wandb]


ProtocolName = Literal["auto", "lvis", "fixed", "pool", "coco"]
Protocols = ProtocolName | tuple[ProtocolName, ...]
UNCAPPED = ("fixed", "pool")  # protocols without a cap on the detections of an image


@dataclass(frozen=True, kw_only=True)
class FRACALOptions:
    """Fractal calibration."""

    exponent: NotNegative = 2.0  # lambda, of the box-counting dimension
    variant: RarityFormula = "base10"  # of the class weight
    counts: Literal["images", "instances"] = "images"  # that a class is rare by


@dataclass(frozen=True, kw_only=True)
class LogNOptions:
    """Logit normalisation."""

    strength: NotNegative = 1.0  # 1: as published; 0 changes nothing
    images: Natural = 2000  # of the training pass that the moments are of; 0: a whole epoch
    momentum: Decay = 0.0  # 0: moments of all rows; released: running ones, 5e-5


@dataclass(frozen=True, kw_only=True)
class PosthocIIFOptions:
    """Inverse image frequency of a trained softmax head."""

    variant: RarityFormula = "base10"  # formula of the weight
    counts: Literal["images", "instances"] = "images"  # that a class is rare by


@dataclass(frozen=True, kw_only=True)
class TauNormOptions:
    """Classifier weights over a power of their lengths."""

    tau: NotNegative = 1.0  # the power; 0 changes nothing


@dataclass(frozen=True, kw_only=True)
class TemperatureOptions:
    """Temperature scaling."""

    t: Positive = 1.0  # logits are divided by it; 1 changes nothing


PosthocName = Literal["none", "norcal", "logit_adjustment", "tau_norm", "temperature", "iif", "logn", "fracal"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Inference and evaluation."""

    score_threshold: Decay = 1e-4  # detections below are left out
    nms: Share = 0.5  # IoU; boxes of a class above it are one
    detections: Count = 300  # per image
    protocol: Protocols = "auto"  # one, or [lvis, fixed, pool]; auto: lvis if the file has LVIS's fields, else coco
    batch_size: Count = 1  # images per rank
    errors: bool = True  # what became of lost objects (errors.csv); inference keeps near misses for it
    boundary: bool = False  # boundary AP of masks, too
    images: str = ""  # file with ids or names of images, one a line: these alone are evaluated; empty: all
    slices: str = ""  # CSV file, first column an image, further ones attributes: numbers for each value (slices.csv)
    posthoc: PosthocName = "none"  # calibration of a trained head's scores (docs/posthoc.md)
    norcal: NorCalOptions = field(default_factory=NorCalOptions)
    logit_adjustment: LogitAdjustmentOptions = field(default_factory=LogitAdjustmentOptions)
    tau_norm: TauNormOptions = field(default_factory=TauNormOptions)
    temperature: TemperatureOptions = field(default_factory=TemperatureOptions)
    iif: PosthocIIFOptions = field(default_factory=PosthocIIFOptions)
    logn: LogNOptions = field(default_factory=LogNOptions)
    fracal: FRACALOptions = field(default_factory=FRACALOptions)

    @property
    def protocols(self) -> tuple[str, ...]:
        """All of `protocol`, the first one first."""
        return (self.protocol,) if isinstance(self.protocol, str) else self.protocol

    @property
    def uncapped(self) -> bool:
        """Whether a protocol wants more of an image than its best detections."""
        return any(name in UNCAPPED for name in self.protocols)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    output: str = ""  # run folder; empty: runs/ and the path of the YAML file below configs/
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # of all that is random: new weights, order of images, flips, draws
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    data: DataConfig = field(default_factory=DataConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    indicator: IndicatorConfig = field(default_factory=IndicatorConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


# Heads whose scores are the softmax of their C + 1 logits, or sigmoids of the first C: post-hoc methods are of logits.
SOFTMAX_HEADS = (
    *("softmax", "equilibrium", "reweighted", "balanced_softmax"),
    *("ldam", "logit_adjustment", "disalign", "pcb"),
)
SIGMOID_HEADS = ("eql", "balms", "acsl", "fedloss")
SIGMOID_POSTHOC = ("none", "fracal", "temperature")  # defined for sigmoids, too


def has_sigmoids(head: HeadConfig) -> bool:
    """Whether the scores of a head are sigmoids of its first C logits."""
    return head.name in SIGMOID_HEADS or (head.name == "gol" and head.gol.activation == "sigmoid")


# Option or section -> the choice that it belongs to. Where another choice is made it does nothing, and is refused.
OPTION_OF: dict[str, Choice] = {
    **{f"head.{f.name}": ("head.name", (f.name,)) for f in dataclasses.fields(HeadConfig) if is_section(f.type)},
    **{f"eval.{f.name}": ("eval.posthoc", (f.name,)) for f in dataclasses.fields(EvalConfig) if is_section(f.type)},
    "head.reweighted.beta": ("head.reweighted.by", ("effective_number",)),
    "head.balms.inner_lr": ("head.balms.meta_lr", Range(0, above=True)),
    "head.ldam.beta": ("head.ldam.reweight_from", Range(0, 1, below=True)),
    "sampler.repeat_threshold": ("sampler.name", ("repeat_factor",)),
    "sampler.repeat_rounding": ("sampler.name", ("repeat_factor",)),
    "sampler.repeat_by": ("sampler.name", ("repeat_factor",)),
    "sampler.repeat_alpha": ("sampler.repeat_by", ("exponential",)),
    "sampler.bilevel_tau": ("sampler.name", ("bilevel",)),
    "indicator.momentum": ("indicator.kind", ("score",)),
    "indicator.initial_score": ("indicator.kind", ("score",)),
    "indicator.background_score": ("indicator.kind", ("score",)),
    "indicator.background_count": ("indicator.kind", ("prior",)),
    "memory": ("memory.enabled", (True,)),
    **{f"model.mask_{part}": ("model.masks", (True,)) for part in ("channels", "convs", "predictor")},
    "memory.capacity": ("memory.kind", ("ring",)),
    "memory.dtype": ("memory.kind", ("ring",)),
    "memory.momentum": ("memory.kind", ("gaussian",)),
    "memory.instances_per_class": ("memory.source", ("boxes",)),
    "memory.classes_per_draw": ("memory.draw", ("score", "confusion")),
    "memory.adaptive": ("memory.draw", ("adaptive",)),
    "model.mask_temperature": ("model.mask_predictor", ("normalised",)),
    "data.without_mask": ("model.masks", (True,)),
    "data.allow_misplaced": ("model.masks", (True,)),
    "head.ecm.temperature": ("head.ecm.normalised", (True,)),
    "head.fcbl.threshold": ("head.fcbl.reweight", (True,)),
    "head.iif.temperature": ("head.iif.normalised", (True,)),
    "data.short_edges": ("data.resize", ("short_edge",)),
    "data.canvas": ("data.resize", ("lsj",)),
    "data.lsj_scale": ("data.resize", ("lsj",)),
    "data.copy_paste": ("model.masks", (True,)),
    "data.paste_from": ("data.copy_paste", Range(0, above=True)),
    "train.drops": ("train.schedule", ("step",)),
    "train.drop_factor": ("train.schedule", ("step",)),
    "train.decay_norms": ("train.weight_decay", Range(0, above=True)),
    "train.layer_decay": ("train.freeze", ("none",)),
}

# Options that went, each with its default of then, which old run folders and checkpoints state and which is done now.
LAST_WITH_GONE = "558207e"
GONE = {
    "head.equilibrium": {"background": "fixed"},
    "head.equilibrium.background": "fixed",
    "indicator.warm_start": True,
    "memory.allow_stale": False,
    "memory.eta": "box",
    "memory.transform": "inverse",
}

CONFUSION_HEADS = ("fcbl", "pcb")  # have `own_share`, which memory.draw=confusion goes by

# What cannot stand together: the keys, when it is wrong, and why (or what is right).
CONFLICTS: tuple[Conflict, ...] = (
    (("data.train_annotations",), lambda c: not c.data.train_annotations, "must name a file"),
    (("data.val_annotations",), lambda c: not c.data.val_annotations, "must name a file"),
    (("data.train_images",), lambda c: not c.data.train_images, "must name a folder"),
    (("data.val_images",), lambda c: not c.data.val_images, "must name a folder"),
    (
        ("data.common_max", "data.rare_max"),
        lambda c: c.data.common_max < c.data.rare_max,
        "common_max must not be below rare_max",
    ),
    (("data.short_edges",), lambda c: not c.data.short_edges, "must hold at least one length"),
    (
        ("data.lsj_scale",),
        lambda c: c.data.resize == "lsj" and (len(c.data.lsj_scale) != 2 or c.data.lsj_scale[0] > c.data.lsj_scale[1]),
        "must be the lowest and the highest scale, such as [0.1, 2]",
    ),
    (
        ("data.long_edge", "data.short_edges"),
        lambda c: c.data.long_edge < max(c.data.short_edges, default=0),
        "long_edge must not be below a short edge",
    ),
    (
        ("data.long_edge", "data.test_short_edge"),
        lambda c: c.data.long_edge < c.data.test_short_edge,
        "long_edge must not be below test_short_edge",
    ),
    (
        ("model.rpn.negative_iou", "model.rpn.positive_iou"),
        lambda c: c.model.rpn.negative_iou > c.model.rpn.positive_iou,
        "negative_iou must not be above positive_iou",
    ),
    (
        ("model.rpn.batch_per_image", "model.rpn.positive_fraction"),
        lambda c: c.model.rpn.batch_per_image * c.model.rpn.positive_fraction < 1,
        "their product, the positive anchors of an image, must be at least 1",
    ),
    (
        ("model.roi.batch_per_image", "model.roi.positive_fraction"),
        lambda c: c.model.roi.batch_per_image * c.model.roi.positive_fraction < 1,
        "their product, the positive RoIs of an image, must be at least 1",
    ),
    (
        ("model.backbone", "model.weights"),
        lambda c: c.model.backbone == "tiny" and c.model.weights == "imagenet",
        "the tiny backbone has no ImageNet weights; set model.weights=glyphs or none",
    ),
    (
        ("model.backbone", "model.weights"),
        lambda c: c.model.backbone != "tiny" and c.model.weights == "glyphs",
        "these weights are of the tiny backbone; set model.weights=imagenet or none",
    ),
    (
        ("model.backbone", "model.norm"),
        lambda c: c.model.backbone == "tiny" and c.model.norm != "group",
        "the tiny backbone has group norm only; set model.norm=group",
    ),
    (
        ("model.backbone", "model.norm"),
        lambda c: c.model.backbone.startswith(("convnext", "swin")) and c.model.norm != "layer",
        "ConvNeXt and Swin have layer norms only; set model.norm=layer",
    ),
    (
        ("model.backbone", "model.norm"),
        lambda c: c.model.backbone.startswith("res") and c.model.norm == "layer",
        "layer norms are ConvNeXt's and Swin's; set model.norm=frozen, batch or group",
    ),
    (
        ("model.backbone", "model.stochastic_depth"),
        lambda c: c.model.norm != "layer" and c.model.stochastic_depth != 1,
        "ConvNeXt and Swin alone have stochastic depth",
    ),
    (
        ("model.norm", "model.weights", "train.init"),
        lambda c: (
            c.model.norm == "frozen" and c.model.weights == "none" and not c.train.init and c.model.backbone != "tiny"
        ),
        "without weights there are no statistics to freeze; set model.norm=batch or group, or train.init",
    ),
    (
        ("model.frozen_stages", "model.weights", "train.init"),
        lambda c: c.model.frozen_stages > 0 and c.model.weights == "none" and not c.train.init,
        "stages of random weights would never train; set model.frozen_stages=0, or train.init",
    ),
    (
        ("memory.enabled", "train.freeze"),
        lambda c: c.memory.enabled and c.memory.kind == "ring" and c.train.freeze == "none",
        "the stored features would be stale; set train.freeze=trunk (or backbone, with memory.level=roi)",
    ),
    (
        ("memory.enabled", "memory.level", "train.freeze"),
        lambda c: (
            c.memory.enabled and c.memory.kind == "ring" and c.memory.level == "fc" and c.train.freeze == "backbone"
        ),
        "the shared FCs train, so vectors stored after them would be stale; set train.freeze=trunk or memory.level=roi",
    ),
    (
        ("memory.fill_instances", "train.init"),
        lambda c: (
            c.memory.enabled
            and c.memory.kind == "gaussian"
            and c.memory.fill_instances > 0
            and c.train.freeze == "none"
            and not c.train.init
        ),
        "a detector that has learned nothing has no features to fill it with; set memory.fill_instances=0",
    ),
    (
        ("memory.draw", "memory.kind"),
        lambda c: c.memory.enabled and c.memory.draw == "adaptive" and c.memory.kind == "ring",
        "classes are grouped by their running means; set memory.kind=gaussian",
    ),
    (
        ("memory.draw", "head.name"),
        lambda c: c.memory.enabled and c.memory.draw == "confusion" and c.head.name not in CONFUSION_HEADS,
        f"this head keeps no confusion matrix; set head.name={' or '.join(CONFUSION_HEADS)}, or memory.draw=score",
    ),
    (
        ("train.freeze", "train.init"),
        lambda c: c.train.freeze != "none" and not c.train.init,
        "what is frozen must come from somewhere; set train.init to a checkpoint or a run folder",
    ),
    (
        ("model.norm", "train.freeze"),
        lambda c: c.model.norm == "batch" and c.train.freeze != "none",
        "batch norms would go on changing their statistics in what is frozen; set model.norm=frozen, same weights",
    ),
    (
        ("train.batch_size", "train.accumulate"),
        lambda c: c.train.batch_size % c.train.accumulate != 0,
        "batch_size must be divisible by accumulate",
    ),
    (
        ("train.evaluate_every", "train.evaluate"),
        lambda c: c.train.evaluate_every > 0 and not c.train.evaluate,
        "there is nothing to do every few epochs where nothing is evaluated",
    ),
    (
        ("train.evaluate_every", "train.epochs"),
        lambda c: c.train.evaluate_every >= c.train.epochs,
        "evaluate_every must be below epochs; the last epoch is evaluated without it",
    ),
    (
        ("train.overfit", "train.dry_run"),
        lambda c: c.train.overfit > 0 and c.train.dry_run,
        "these are two different trials; give one of them",
    ),
    (
        ("train.overfit", "head.name"),
        lambda c: c.train.overfit > 0 and c.head.name == "simcal",
        "this head draws images by class and cannot learn fixed ones; try the recipe of the stage before",
    ),
    (
        ("train.drops", "train.epochs"),
        lambda c: (
            c.train.schedule == "step"
            and (list(c.train.drops) != sorted(set(c.train.drops)) or any(d >= c.train.epochs for d in c.train.drops))
        ),
        "drops must increase and stay below epochs",
    ),
    (
        ("train.optimizer", "train.lr"),
        lambda c: c.train.optimizer == "adamw" and c.train.lr >= 0.01,
        "a learning rate for SGD, with which AdamW diverges; set train.lr to 1e-4 or near it",
    ),
    (
        ("head.reset", "train.init"),
        lambda c: c.head.reset and not c.train.init,
        "there is nothing to start anew; set train.init, or leave head.reset out",
    ),
    (
        ("head.reset", "head.name"),
        lambda c: c.head.reset and c.head.name == "simcal",
        "the detector's own classifier is one of the two; set head.simcal.layers=3fc_rand to start the other anew",
    ),
    (
        ("memory.level", "head.name"),
        lambda c: c.memory.enabled and c.memory.level == "fc" and c.head.name == "simcal",
        "this head reads pooled features, not vectors; set memory.level=roi",
    ),
    (
        ("train.freeze", "head.name"),
        lambda c: c.head.name in ("simcal", "balms") and c.train.freeze != "detector",
        "this head is a second stage of its own; set train.freeze=detector and train.init",
    ),
    (
        ("train.freeze", "head.name"),
        lambda c: c.head.name == "disalign" and c.train.freeze not in ("trunk", "detector"),
        "this head rescales a frozen classifier; set train.freeze=detector (or trunk) and train.init",
    ),
    (
        ("head.reset", "head.name"),
        lambda c: c.head.reset and c.head.name == "disalign",
        "this head rescales the classifier of train.init; leave head.reset out",
    ),
    (
        ("head.name", "sampler.name"),
        lambda c: c.head.name == "simcal" and c.sampler.name != "bilevel",
        "this head learns from the class that an image was drawn for; set sampler.name=bilevel",
    ),
    (
        ("head.forest.trees", "head.name"),
        lambda c: c.head.name == "forest" and not c.head.forest.trees,
        "must name a file of parent trees; scripts/build_forest.py writes one",
    ),
    (
        ("head.forest.visual", "head.forest.geometrical", "head.forest.lexical", "head.name"),
        lambda c: (
            c.head.name == "forest" and not (c.head.forest.visual + c.head.forest.geometrical + c.head.forest.lexical)
        ),
        "at least one tree must have parents",
    ),
    (("eval.protocol",), lambda c: not c.eval.protocols, "must name a protocol"),
    (
        ("eval.protocol",),
        lambda c: "coco" in c.eval.protocols and c.eval.uncapped,
        "coco wants all categories of an image, fixed and pool all that is found of the verified ones: evaluate twice",
    ),
    (
        ("eval.posthoc", "head.name"),
        lambda c: c.eval.posthoc != "none" and c.head.name not in SOFTMAX_HEADS and not has_sigmoids(c.head),
        "post-hoc methods change logits whose softmax or sigmoid is the score; this head reads scores in its own way",
    ),
    (
        ("eval.posthoc", "head.name"),
        lambda c: has_sigmoids(c.head) and c.eval.posthoc not in SIGMOID_POSTHOC,
        "this method is defined for a softmax, and this head has sigmoids; fracal and temperature are defined for both",
    ),
    (
        ("eval.posthoc", "head.name"),
        lambda c: c.eval.posthoc == "logit_adjustment" and c.head.name in ("logit_adjustment", "balanced_softmax"),
        "this head's loss makes the same adjustment; use one of the two",
    ),
    (
        ("eval.posthoc", "head.name"),
        lambda c: c.eval.posthoc == "tau_norm" and c.head.name in ("ldam", "disalign"),
        "this head's logits are not those of one linear layer, whose lengths the method is about",
    ),
    (
        ("head.bags.bounds",),
        lambda c: list(c.head.bags.bounds) != sorted(set(c.head.bags.bounds)),
        "must increase",
    ),
)

# What may differ when a run goes on: it changes how fast a run goes and what it writes, not what it learns; so, but for
# rounding and the random draws, does `accumulate`, as the number of processes does.
MAY_CHANGE = {"output", "device", "data.workers", "data.train_images", "data.val_images"} | {
    *("eval.batch_size", "eval.errors", "eval.boundary", "eval.images", "eval.slices"),
    *("train.resume", "train.accumulate", "train.evaluate", "train.evaluate_every"),
    *("train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.wandb"),
}
LENGTHENED = ("train.epochs", "train.drops")  # a run may get more epochs, and drops after those that it had
LIST = "--help lists the recipes"


def load_config(argv: Sequence[str]) -> Config:
    """The run that `[CONFIG.yaml, "key.sub=value", ...]` describes, its `output` filled in; `-h` prints every option.

    CONFIG may be several recipes with commas between: methods/seesaw.yaml,glyph100/one_stage.yaml. A later one wins.
    UserError with everything that is wrong at once: unknown keys, wrong types, values out of range, conflicts.
    """
    if "-h" in argv or "--help" in argv:
        there = ", ".join(_config_names())
        what = "CONFIG: a YAML file, which may stand on others (base: loce.yaml), or several with commas between, of "
        what += f"which a later one wins; configs there are: {there}"
        recipes = textwrap.fill(what, 110, break_on_hyphens=False)
        print_help(recipes, help_text(Config))
    if not argv or ("=" in argv[0] and not Path(argv[0]).is_file()):
        raise UserError(f"command line: no CONFIG given; usage: {sys.argv[0]} CONFIG [key=value ...]; {LIST}")
    paths = [find_config(name) for name in ([argv[0]] if Path(argv[0]).is_file() else argv[0].split(","))]
    words, problems = split_words(Config, argv[1:])
    config = _build([*chain.from_iterable(_read_recipes(paths).values()), *words], problems)
    return config if config.output else dataclasses.replace(config, output=str(run_folder(*paths)))


def find_config(name: str) -> Path:
    """The file that `name`, with or without .yaml, means: here, in configs/ here, or in the repository's configs/."""
    return _find(name, [Path(), *_config_folders()], f"command line: CONFIG {name} not found here or in configs/")


def _find(name: str, places: Sequence[Path], missing: str, but: Path | None = None) -> Path:
    """The first file of this name that is not `but`; UserError beginning with `missing` where there is none."""
    for place in places:
        for path in (place / name, place / f"{name}.yaml"):
            if path.is_file() and path.resolve() != but:
                return path
    near = difflib.get_close_matches(name.removesuffix(".yaml") + ".yaml", _config_names(), n=1)
    raise UserError(f"{missing}; {f'did you mean {near[0]}? ' if near else ''}{LIST}")


def _read_recipe(file: Path, above: tuple[Path, ...] = ()) -> dict[Path, list[Given]]:
    """What `file` and its bases state, by file; a later one wins, and `file` is the last.

    base: a recipe, or a list of them, by their paths below configs/ (here, then the repository's), else beside `file`;
    ./x.yaml and ../x.yaml are beside it always. A recipe of the same name as its base may stand in configs/ here.
    """
    own = file.resolve()
    if own in above:
        raise UserError(f"{file}: base: a recipe stands on itself: {' on '.join(p.name for p in (*above, own))}")
    try:
        values = load_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    base = values.pop("base", [])
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{file}: base = {show(base)}: must be a recipe, or a list of recipes, such as [loce.yaml]")
    bases = []
    for name in names:
        places = [file.parent] if name.startswith(("./", "../")) else [*_config_folders(), file.parent]
        bases.append(_find(name, places, f"{file}: base = {name}: not found in configs/ or beside this file", own))
    return {**_read_recipes(bases, (*above, own)), own: flatten(Config, values, str(file))}


def _read_recipes(files: Sequence[Path], above: tuple[Path, ...] = ()) -> dict[Path, list[Given]]:
    """What `files` and their bases state; a common base of two counts where it stands last."""
    found: dict[Path, list[Given]] = {}
    for file in files:
        for path, stated in _read_recipe(file, above).items():
            found.pop(path, None)
            found[path] = stated
    return found


def run_folder(config_path: Path, *others: Path) -> Path:
    """Where a run goes that does not say: configs/glyphs/loce.yaml -> runs/glyphs/loce; elsewhere/x.yaml -> runs/x.

    Of several recipes, the first one's folder in that of the last: methods/seesaw.yaml,glyph100/one_stage.yaml ->
    runs/glyph100/methods/seesaw. UserError where the file's name would lead out of runs/, as that of ...yaml would.
    """
    *folder, _ = _below_configs(others[-1]) if others else [""]
    return inside("runs", "/".join([*folder, *_below_configs(config_path)]))


def _below_configs(file: Path) -> list[str]:
    path = file.resolve()
    parts = [*path.parts[:-1], path.name.removesuffix(path.suffix)]
    below = max((i + 1 for i, part in enumerate(parts[:-1]) if part == "configs"), default=len(parts) - 1)
    return parts[below:]


def _config_folders() -> list[Path]:
    here, ours = Path("configs"), Path(__file__).resolve().parent.parent / "configs"
    return [here] if here.resolve() == ours else [here, ours]


def _config_names() -> list[str]:
    names = {str(path.relative_to(folder)) for folder in _config_folders() for path in folder.rglob("*.yaml")}
    return sorted(names - {"tables.yaml"})  # which lists runs, and is none


def from_dict(values: Mapping[str, Any], source: str = "checkpoint", words: Sequence[str] = ()) -> Config:
    """Inverse of `to_dict`; what `values` does not say is default; `words`, as on the command line, win.

    UserError naming `source`, as for a file.
    """
    stated = {key: value for part in (to_dict(Config()), values) for key, value, _ in flatten(Config, part, source)}
    given, problems = split_words(Config, words)
    return _build([*((key, value, source) for key, value in stated.items()), *given], problems)


def _build(given: Sequence[Given], problems: Sequence[str]) -> Config:
    went = [
        f"{source}: {key} = {show(value)}: this option went (docs/log.md); commit {LAST_WITH_GONE} is the last with it"
        for key, value, source in given
        if GONE.get(key, value) != value
    ]
    known = [entry for entry in given if entry[0] not in GONE]
    return build(Config, known, CONFLICTS, [*problems, *went], OPTION_OF)


def diff(old: Any, new: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value in `new` of every option in which two configs, or two equal sections, differ."""
    found: dict[str, Any] = {}
    for option in dataclasses.fields(new):
        there, here, key = getattr(old, option.name), getattr(new, option.name), prefix + option.name
        if dataclasses.is_dataclass(here):
            found |= diff(there, here, f"{key}.")
        elif here != there:
            found[key] = here
    return found


def dump(config: Config) -> str:
    """Full YAML of `config`; loading it gives an equal one."""
    return dump_yaml(to_dict(config))


def images_per_rank(train: TrainConfig, world_size: int) -> int:
    """Images of one forward pass on a rank: batch_size / (world_size * accumulate); UserError where not whole."""
    parts = world_size * train.accumulate
    if train.batch_size % parts:
        below = train.batch_size // parts * parts
        raise UserError(
            f"train.batch_size = {train.batch_size}: must be divisible by processes x train.accumulate = "
            f"{world_size} x {train.accumulate}; set train.batch_size={below or parts} or another multiple, "
            "or start another number of processes"
        )
    return train.batch_size // parts
