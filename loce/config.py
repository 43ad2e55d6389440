"""Every option of loce: frozen dataclasses whose defaults are the paper's main setting (LVIS v1, R-50-FPN, stage 1).

A YAML file states differences only; `key.sub=value` on the command line overrides it (Sec. 4.1 for the values).
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Annotation files, image folders, and what is done to an image before the model sees it."""

    train_annotations: str = "data/lvis_v1/annotations/lvis_v1_train.json"
    train_images: str = "data/coco"  # folder that holds train2017/ and val2017/, or the images themselves
    val_annotations: str = "data/lvis_v1/annotations/lvis_v1_val.json"
    val_images: str = "data/coco"
    rare_max: int = 10  # images; LVIS's bounds, used where the file has no `frequency`
    common_max: int = 100
    short_edges: tuple[int, ...] = (640, 672, 704, 736, 768, 800)  # one is drawn per image
    long_edge: int = 1333
    test_short_edge: int = 800
    flip: float = 0.5
    group_by_aspect: bool = True
    workers: int = 4


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Image sampler: which images an epoch shows."""

    name: str = "uniform"  # uniform | repeat_factor | class_balanced
    repeat_threshold: float = 1e-3  # t of repeat-factor sampling (LVIS paper)


@dataclass(frozen=True, kw_only=True)
class RPNConfig:
    """Region proposal network; MMDetection's numbers."""

    anchor_scale: float = 8.0  # anchor side = scale x stride
    pre_nms_train: int = 2000  # per level
    pre_nms_test: int = 1000
    post_nms: int = 1000  # over all levels
    nms: float = 0.7
    positive_iou: float = 0.7
    negative_iou: float = 0.3
    batch_per_image: int = 256
    positive_fraction: float = 0.5


@dataclass(frozen=True, kw_only=True)
class RoIConfig:
    """Second stage: matching, sampling and pooling of regions of interest."""

    positive_iou: float = 0.5
    batch_per_image: int = 512
    positive_fraction: float = 0.25
    finest_scale: float = 56.0  # boxes up to twice this side (px) are pooled from the finest level


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Mask R-CNN with FPN."""

    backbone: str = "resnet50"  # tiny | resnet50 | resnet101
    weights: str = "imagenet"  # imagenet | none
    norm: str = "frozen"  # frozen: BN statistics fixed, affine trained | batch | group
    frozen_stages: int = 1  # 1 = stem and layer1 never train
    fpn_channels: int = 256
    fc_features: int = 1024
    mask_channels: int = 256
    mask_convs: int = 4
    mask_predictor: str = "normalised"  # normalised | linear
    mask_temperature: float = 20.0
    rpn: RPNConfig = field(default_factory=RPNConfig)
    roi: RoIConfig = field(default_factory=RoIConfig)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Classification head: the loss and how scores are read from logits."""

    name: str = "softmax"  # softmax | equilibrium


@dataclass(frozen=True, kw_only=True)
class IndicatorConfig:
    """What tells weak classes from strong ones, for the equilibrium loss and the feature memory (Sec. 3.1)."""

    kind: str = "score"  # score: the mean score, Eq. 2 | prior: training instance counts (supplement, Sec. 1)
    momentum: float = 0.9  # alpha
    initial_score: float = 0.01
    background_score: float = 0.01  # the paper's s^_{C+1}
    background_count: float = 1.0  # the supplement's n^_{C+1}, for kind: prior


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory-augmented feature sampling (Sec. 3.3)."""

    enabled: bool = False
    capacity: int = 80  # M, features per class
    instances_per_class: int = 5  # stored per class and image, chosen at random
    fill_instances: int = 5  # per class, before the first iteration
    level: str = "fc"  # fc: the vector after the shared FCs | roi: the pooled RoI features
    dtype: str = "float32"  # float32 | bfloat16 | float16
    shared: bool = False  # true: every rank holds the rows of all ranks
    classes_per_draw: int = 8  # k, per 2 images on a rank
    features_per_class: int = 4  # m


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation. `batch_size` counts images over all ranks and accumulation steps."""

    freeze: str = "none"  # none | backbone: backbone and FPN | trunk: those and the shared FCs
    init: str = ""  # checkpoint or run folder that training starts from
    batch_size: int = 16
    accumulate: int = 1
    epochs: int = 24
    lr: float = 0.02  # at a batch of `lr_batch_size`; scaled linearly with batch_size
    lr_batch_size: int = 16
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_iterations: int = 500
    warmup_factor: float = 1e-3
    drops: tuple[int, ...] = (16, 22)  # epochs after which the learning rate falls
    drop_factor: float = 0.1
    clip_norm: float = 0.0  # 0: off
    precision: str = "fp32"  # fp32 | bf16 | fp16
    log_every: int = 50  # iterations
    checkpoint_every: int = 1000  # iterations, besides every epoch's end
    keep_checkpoints: int = 2
    evaluate: bool = True  # after the last epoch


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Inference and evaluation."""

    score_threshold: float = 1e-4
    nms: float = 0.5
    detections: int = 300  # per image
    protocol: str = "lvis"  # lvis | coco
    batch_size: int = 1  # images per rank


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    output: str = ""  # run folder; empty: runs/<name of the YAML file>
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    data: DataConfig = field(default_factory=DataConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    indicator: IndicatorConfig = field(default_factory=IndicatorConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
