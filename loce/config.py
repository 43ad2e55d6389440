"""Every option of loce: frozen dataclasses whose defaults are the paper's main setting (LVIS v1, R-50-FPN, stage 1).

A YAML file states differences only; `key.sub=value` on the command line overrides it (Sec. 4.1 for the values).
What a field may hold is its type; what cannot stand together is in conflicts.py. Imports no torch.
"""

import dataclasses
import difflib
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from loce.conflicts import CONFLICTS
from loce.method_options import HeadConfig
from loce.utils.errors import UserError, raise_problems, run_script
from loce.utils.files import inside
from loce.utils.options import (
    Count,
    Decay,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    Range,
    Share,
    build,
    flatten,
    help_text,
    print_help,
    read_options,
    split_words,
    to_dict,
)
from loce.utils.yaml_text import dump_yaml, load_yaml

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

    train_annotations: str = "data/lvis_v1/annotations/lvis_v1_train.json"
    train_images: str = "data/coco"  # folder that holds train2017/ and val2017/, or the images themselves
    val_annotations: str = "data/lvis_v1/annotations/lvis_v1_val.json"
    val_images: str = "data/coco"
    rare_max: Natural = 10  # images; LVIS's bounds, used where the file has no `frequency`
    common_max: Natural = 100
    short_edges: tuple[Count, ...] = (640, 672, 704, 736, 768, 800)  # one is drawn per image
    long_edge: Count = 1333
    test_short_edge: Count = 800
    flip: Fraction = 0.5
    group_by_aspect: bool = True
    workers: Natural = 4
    exif: Literal["ignore", "apply"] = "ignore"  # orientation an image file asks for; COCO's and LVIS's boxes ignore it
    allow_missing: bool = False  # go on without images that are not there; results are marked as partial
    keep_empty: bool = False  # train on images without objects, too: all of them is background
    without_mask: Literal["drop", "box"] = "drop"  # annotations whose mask cannot be used; box: the filled box
    max_instances: Count = 500  # of a training image; of more a sample is taken, rare classes first


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Image sampler: which images an epoch shows."""

    name: Literal["uniform", "repeat_factor", "class_balanced", "bilevel"] = "uniform"  # bilevel: SimCal's first level
    repeat_threshold: Share = 1e-3  # t of repeat-factor sampling (LVIS paper)
    repeat_rounding: Literal["stochastic", "up"] = "stochastic"  # stochastic: detectron2's; up: MMDetection's, static
    bilevel_tau: Fraction = 0.0  # classes are drawn with probability ~ min(instances, 100)^tau


@dataclass(frozen=True, kw_only=True)
class RPNConfig:
    """Region proposal network; MMDetection's numbers."""

    anchor_scale: Positive = 8.0  # anchor side = scale x stride
    pre_nms_train: Count = 2000  # per level
    pre_nms_test: Count = 1000
    post_nms: Count = 1000  # over all levels
    nms: Share = 0.7
    positive_iou: Share = 0.7
    negative_iou: Fraction = 0.3
    batch_per_image: Count = 256
    positive_fraction: Share = 0.5
    nms_resampling: Literal["none", "discrete", "linear"] = "none"  # Forest R-CNN: rarer classes, higher nms; training


@dataclass(frozen=True, kw_only=True)
class RoIConfig:
    """Second stage: matching, sampling and pooling of regions of interest."""

    positive_iou: Share = 0.5
    batch_per_image: Count = 512
    positive_fraction: Share = 0.25
    finest_scale: Positive = 56.0  # boxes up to twice this side (px) are pooled from the finest level
    aligned: bool = True  # false: torchvision's pooling, half a pixel off, 2 samples a bin; for weights trained so


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Mask R-CNN with FPN."""

    backbone: Literal["tiny", "resnet18", "resnet50", "resnet101"] = "resnet50"
    weights: Literal["imagenet", "none"] = "imagenet"
    norm: Literal["frozen", "batch", "group"] = "frozen"  # frozen: BN statistics fixed, affine trained
    frozen_stages: Annotated[int, Range(0, 4)] = 1  # 1 = stem and layer1 never train
    fpn_channels: Count = 256
    fc_features: Count = 1024
    mask_channels: Count = 256
    mask_convs: Natural = 4
    mask_predictor: Literal["normalised", "linear"] = "normalised"
    mask_temperature: Positive = 20.0
    rpn: RPNConfig = field(default_factory=RPNConfig)
    roi: RoIConfig = field(default_factory=RoIConfig)


@dataclass(frozen=True, kw_only=True)
class IndicatorConfig:
    """What tells weak classes from strong ones, for the equilibrium loss and the feature memory (Sec. 3.1)."""

    kind: Literal["score", "prior"] = "score"  # score: mean score, Eq. 2; prior: instance counts (supplement)
    momentum: Decay = 0.9  # alpha
    initial_score: Share = 0.01
    warm_start: bool = True  # the images that fill the memory update the mean score, too
    background_score: Share = 0.01  # the paper's s^_{C+1}
    background_count: Positive = 1.0  # the supplement's n^_{C+1}, for kind: prior


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory-augmented feature sampling (Sec. 3.3)."""

    enabled: bool = False
    capacity: Count = 80  # M, features per class
    instances_per_class: Count = 5  # stored per class and image, chosen at random
    fill_instances: Count = 5  # per class, before the first iteration
    level: Literal["fc", "roi"] = "fc"  # fc: the vector after the shared FCs; roi: the pooled RoI features
    allow_stale: bool = False  # level: fc although the shared FCs train, and so change what is stored
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    shared: bool = False  # true: every rank holds the rows of all ranks
    classes_per_draw: Count = 8  # k, per 2 images on a rank
    features_per_class: Count = 4  # m
    transform: Literal["inverse", "inverse_root", "log_inverse"] = "inverse"  # f of Eq. 7: 1 / s, 1 / sqrt(s), -log(s)
    eta: Literal["box", "image"] = "box"  # Eq. 5's random numbers: of each box, or (released code) 16 x 4 an image


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation. `batch_size` counts images over all ranks and accumulation steps."""

    freeze: Literal["none", "backbone", "trunk", "detector"] = "none"  # trunk: to the shared FCs; detector: to the head
    init: str = ""  # checkpoint or run folder that training starts from
    resume: Literal["auto", "never", "must"] = "auto"  # auto: go on from a checkpoint where the run folder has one
    batch_size: Count = 16
    accumulate: Count = 1
    epochs: Count = 24
    lr: Positive = 0.02  # at a batch of `lr_batch_size`; scaled linearly with batch_size
    lr_batch_size: Count = 16
    momentum: Decay = 0.9
    weight_decay: NotNegative = 1e-4
    warmup_iterations: Natural = 500
    warmup_factor: Share = 1e-3
    drops: tuple[Count, ...] = (16, 22)  # epochs after which the learning rate falls
    drop_factor: Share = 0.1
    clip_norm: NotNegative = 0.0  # 0: off
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    log_every: Count = 50  # iterations
    checkpoint_every: Count = 1000  # iterations, besides every epoch's end
    keep_checkpoints: Count = 2
    evaluate: bool = True  # after the last epoch
    evaluate_every: Natural = 0  # epochs; 0: after the last only; the best checkpoint by mask AP is kept, too
    dry_run: bool = False  # two steps, save, resume and evaluation of a few images, in RUN/dry_run, instead of the run
    overfit: Natural = 0  # images to learn by heart, in RUN/overfit, instead of the run; 0: off
    wandb: bool = False  # curves and pictures on Weights & Biases, too; needs pip install loce[wandb]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Inference and evaluation."""

    score_threshold: Decay = 1e-4
    nms: Share = 0.5
    detections: Count = 300  # per image
    protocol: Literal["auto", "lvis", "fixed", "coco"] = (
        "auto"  # auto: lvis where the file has LVIS's fields, else coco
    )
    batch_size: Count = 1  # images per rank
    errors: bool = True  # what became of lost objects (errors.csv); inference leaves clues for it


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    output: str = ""  # run folder; empty: runs/ and the path of the YAML file below configs/
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    indicator: IndicatorConfig = field(default_factory=IndicatorConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


# What may differ when a run goes on: it changes how fast a run goes and what it writes, not what it learns; so, but for
# rounding and the random draws, does `accumulate`, as the number of processes does.
MAY_CHANGE = {"output", "device", "data.workers", "data.train_images", "data.val_images"} | {
    *("eval.batch_size", "eval.errors"),
    *("train.resume", "train.accumulate", "train.evaluate", "train.evaluate_every"),
    *("train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.wandb"),
}


def load_config(argv: Sequence[str]) -> Config:
    """The run that `[CONFIG.yaml, "key.sub=value", ...]` describes, its `output` filled in; `-h` prints every option.

    UserError with everything that is wrong at once: unknown keys, wrong types, values out of range, conflicts.
    """
    if "-h" in argv or "--help" in argv:
        recipes = textwrap.fill(f"CONFIG: a YAML file; {_known_configs()}", 110, break_on_hyphens=False)
        print_help(recipes, help_text(Config))
    if not argv or ("=" in argv[0] and not Path(argv[0]).is_file()):
        raise UserError(
            f"command line: no CONFIG given; usage: {sys.argv[0]} CONFIG [key=value ...]; {_known_configs()}"
        )
    path = find_config(argv[0])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    words, problems = split_words(Config, argv[1:])
    file_values = flatten(Config, load_yaml(text, str(path)), str(path))
    config = build(Config, [*file_values, *words], CONFLICTS, problems)
    if config.output:
        return config
    return build(Config, [*file_values, *words, ("output", str(run_folder(path)), "default")], CONFLICTS)


def find_config(name: str) -> Path:
    """The file that `name`, with or without .yaml, means: here, in configs/ here, or in the repository's configs/."""
    places = [Path(), *_config_folders()]
    for place in places:
        for path in (place / name, place / f"{name}.yaml"):
            if path.is_file():
                return path
    near = difflib.get_close_matches(name.removesuffix(".yaml") + ".yaml", _config_names(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"command line: CONFIG {name} not found here or in configs/; {hint}{_known_configs()}")


def run_folder(config_path: Path) -> Path:
    """Where a run goes that does not say: configs/glyphs/loce.yaml -> runs/glyphs/loce; elsewhere/x.yaml -> runs/x.

    UserError where the file's name would lead out of runs/, as that of a file ...yaml would.
    """
    path = config_path.resolve()
    parts = (*path.parts[:-1], path.name.removesuffix(path.suffix))
    below = max((i + 1 for i, part in enumerate(parts[:-1]) if part == "configs"), default=len(parts) - 1)
    return inside("runs", "/".join(parts[below:]))


def _config_folders() -> list[Path]:
    here, ours = Path("configs"), Path(__file__).resolve().parent.parent / "configs"
    return [here] if here.resolve() == ours else [here, ours]


def _config_names() -> list[str]:
    names = {str(path.relative_to(folder)) for folder in _config_folders() for path in folder.rglob("*.yaml")}
    return sorted(names - {"tables.yaml"})  # which lists runs, and is none


def _known_configs() -> str:
    return f"configs there are: {', '.join(_config_names()) or 'none'}"


def from_dict(values: Mapping[str, Any], source: str = "checkpoint", words: Sequence[str] = ()) -> Config:
    """Inverse of `to_dict`; what `values` does not say is default; `words`, as on the command line, win.

    UserError naming `source`, as for a file.
    """
    given, problems = split_words(Config, words)
    return build(Config, [*flatten(Config, values, source), *given], CONFLICTS, problems)


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
