"""Trunks with a feature pyramid: torchvision's ResNet, ResNeXt, ConvNeXt and Swin, and a small one for CPUs.

All give P2..P6 (strides 4..64); P6 is P5 subsampled and serves the RPN only. docs/trunks.md says how to add your own.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryFile
from typing import Any, Literal, NamedTuple
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from torchvision.models import WeightsEnum
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork, StochasticDepth
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from loce.config import ModelConfig, UserError
from loce.models.boxes import BRANCHES, generator_for

TINY_CHANNELS = (16, 32, 64, 96, 128)
GLYPH_WEIGHTS = Path(__file__).with_name("tiny_glyphs.pt")  # docs/trunks.md says how they were made


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(8, channels // 4), channels)


class TinyStage(nn.Module):
    """A strided convolution and one residual convolution, group-normalised: halves the resolution."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=2, padding=1, bias=False)
        self.norm1 = _group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = _group_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(x)))


def _tiny(_: bool) -> nn.Module:
    names = ("stem", *LAYERS)
    channels_in = (3, *TINY_CHANNELS[:-1])
    stages = zip(names, channels_in, TINY_CHANNELS, strict=True)
    model = nn.Sequential(OrderedDict((name, TinyStage(c_in, c_out)) for name, c_in, c_out in stages))
    return IntermediateLayerGetter(model, {name: name for name in LAYERS})


class Trunk(NamedTuple):
    """A row of TRUNKS. layers: the children that give the pyramid its four maps, of strides 4, 8, 16 and 32; a stage
    ends with each, the stem belongs to the first. channels: of these maps. norm: "batch" can be frozen or exchanged;
    "layer" normalises each map, too, as the detectors of Swin's and ConvNeXt's authors do; "own": `build` gives the
    module itself, which returns its four maps (N, C, H, W) as a list or a dictionary.
    """

    build: Callable[..., nn.Module]
    weights: WeightsEnum | None
    layers: tuple[str, ...]
    channels: tuple[int, ...]
    norm: Literal["batch", "layer", "own"]
    channels_last: bool = False  # its maps are (N, H, W, C)


LAYERS = ("layer1", "layer2", "layer3", "layer4")
FEATURES = ("1", "3", "5", "7")  # of ConvNeXt's and Swin's `features`; 0 is the stem, 2, 4 and 6 halve the resolution
NARROW, WIDE = (64, 128, 256, 512), (256, 512, 1024, 2048)
C96, C128 = (96, 192, 384, 768), (128, 256, 512, 1024)
TRUNKS: dict[str, Trunk] = {
    "tiny": Trunk(_tiny, None, LAYERS, TINY_CHANNELS[1:], "own"),
    "resnet18": Trunk(models.resnet18, models.ResNet18_Weights.IMAGENET1K_V1, LAYERS, NARROW, "batch"),
    "resnet50": Trunk(models.resnet50, models.ResNet50_Weights.IMAGENET1K_V1, LAYERS, WIDE, "batch"),
    "resnet101": Trunk(models.resnet101, models.ResNet101_Weights.IMAGENET1K_V1, LAYERS, WIDE, "batch"),
    "resnext101_64x4d": Trunk(
        models.resnext101_64x4d, models.ResNeXt101_64X4D_Weights.IMAGENET1K_V1, LAYERS, WIDE, "batch"
    ),
    "convnext_tiny": Trunk(models.convnext_tiny, models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1, FEATURES, C96, "layer"),
    "convnext_small": Trunk(models.convnext_small, models.ConvNeXt_Small_Weights.IMAGENET1K_V1, FEATURES, C96, "layer"),
    "convnext_base": Trunk(models.convnext_base, models.ConvNeXt_Base_Weights.IMAGENET1K_V1, FEATURES, C128, "layer"),
    "swin_t": Trunk(models.swin_t, models.Swin_T_Weights.IMAGENET1K_V1, FEATURES, C96, "layer", True),
    "swin_s": Trunk(models.swin_s, models.Swin_S_Weights.IMAGENET1K_V1, FEATURES, C96, "layer", True),
    "swin_b": Trunk(models.swin_b, models.Swin_B_Weights.IMAGENET1K_V1, FEATURES, C128, "layer", True),
    "swin_v2_t": Trunk(models.swin_v2_t, models.Swin_V2_T_Weights.IMAGENET1K_V1, FEATURES, C96, "layer", True),
    "swin_v2_s": Trunk(models.swin_v2_s, models.Swin_V2_S_Weights.IMAGENET1K_V1, FEATURES, C96, "layer", True),
    "swin_v2_b": Trunk(models.swin_v2_b, models.Swin_V2_B_Weights.IMAGENET1K_V1, FEATURES, C128, "layer", True),
}


def _body(trunk: Trunk, config: ModelConfig) -> nn.Module:
    """The module that gives the four maps, with the weights that are asked for."""
    pretrained = config.weights == "imagenet"
    if trunk.norm == "own":
        body = trunk.build(pretrained)
        if config.weights == "glyphs":
            body.load_state_dict(torch.load(GLYPH_WEIGHTS, weights_only=True))  # of half precision, as they are stored
        return body
    norm = _group_norm if config.norm == "group" else partial(nn.BatchNorm2d, eps=1e-5)
    model = trunk.build(norm_layer=norm) if trunk.norm == "batch" else trunk.build()
    if pretrained:
        model.load_state_dict(_imagenet(trunk.weights, config), strict=config.norm != "group")
    stages = model if trunk.norm == "batch" else model.get_submodule("features")
    return IntermediateLayerGetter(stages, {name: str(level) for level, name in enumerate(trunk.layers)})


def _imagenet(weights: WeightsEnum, config: ModelConfig) -> Mapping[str, Tensor]:
    """The weights from the cache or, once, from the net; UserError where there are none or the file is damaged."""
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError, HTTPException, RuntimeError, EOFError, UnpicklingError) as error:
        cached = _cached(weights)
        what = f"{type(error).__name__}: {error}"
        instead = "model.frozen_stages=0" if config.norm == "layer" else "model.norm=batch or group"
        if cached.exists():
            raise UserError(
                f"model.weights: imagenet: {cached} cannot be read ({what}).\n  Delete it, and it is downloaded again."
            ) from error
        raise UserError(
            f"model.weights: imagenet: {cached.name} is not in the cache and cannot be downloaded ({what}).\n"
            f"  Put the file into ~/.cache/torch/hub/checkpoints/ (or $TORCH_HOME/hub/checkpoints/) by hand, "
            f"or set model.weights=none (then {instead}). A small trunk's weights come with loce: model.backbone=tiny "
            f"model.norm=group model.weights=glyphs."
        ) from error


def require_cache(config: ModelConfig) -> None:
    """UserError where ImageNet weights have to be downloaded first, and cannot be written where they belong."""
    if config.weights != "imagenet":
        return
    weights = TRUNKS[config.backbone].weights
    if weights is None or (file := _cached(weights)).exists():
        return
    if str(file).startswith("~"):
        raise UserError(
            "model.weights: imagenet: there is no home directory to keep them in; set TORCH_HOME to a folder"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(
            f"model.weights = imagenet: {file.name} is not in the cache, and nothing can be written into {file.parent} "
            f"({error.strerror}); set TORCH_HOME to a folder that can be written, or put the file there by hand"
        ) from error


def _cached(weights: WeightsEnum) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/", 1)[-1])


class DroppedBranch(nn.Module):
    """Stochastic depth (arXiv 1603.09382) of a residual branch: of an image it is there, 1 / (1 - p) times, or not.

    kept: (B,) bool, which images have it; None: all, as it is. `Backbone.draw_branches` sets it.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            return x
        scale_B = self.kept.to(x.dtype) / (1 - self.p)
        return x * scale_B.view(-1, *[1] * (x.dim() - 1))


class LevelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map (N, C, H, W), or of (N, H, W, C), which becomes (N, C, H, W)."""

    def __init__(self, channels: int, channels_last: bool) -> None:
        super().__init__(channels)
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.channels_last else x.permute(0, 2, 3, 1)
        return super().forward(x).permute(0, 3, 1, 2)


class Levels(nn.ModuleList):
    """A trunk's maps, a list or a dictionary, by level: "0" to "3"; each through its norm, where there are norms."""

    def forward(self, maps: Mapping[str, Tensor] | Sequence[Tensor]) -> dict[str, Tensor]:
        maps = list(maps.values()) if isinstance(maps, Mapping) else list(maps)
        if len(self):
            maps = [norm(level) for norm, level in zip(self, maps, strict=True)]
        return {str(level): each for level, each in enumerate(maps)}


class Backbone(nn.Sequential):
    """`body`, a trunk that gives four maps, and `fpn`, the pyramid on them: images (B, 3, H, W) -> P2..P6 by name.

    stochastic_depth: whether there are branches to draw before each pass, see `draw_branches`.
    """

    body: nn.Module
    fpn: FeaturePyramidNetwork
    folded: Any = None  # what `fold_norms` makes of it, kept by MaskRCNN; None: it runs layer by layer

    def __init__(
        self,
        trunk: Trunk,
        body: nn.Module,
        width: int,
        norm: Callable[..., nn.Module] | None,
        stochastic_depth: float = 1.0,
    ) -> None:
        """width: channels of the pyramid; norm: of its convolutions; stochastic_depth: times the trunk's rates."""
        parts = OrderedDict(body=body)
        if trunk.norm != "batch":
            of_levels = [LevelNorm(c, trunk.channels_last) for c in trunk.channels] if trunk.norm == "layer" else []
            parts["level_norms"] = Levels(of_levels)
        parts["fpn"] = FeaturePyramidNetwork(list(trunk.channels), width, LastLevelMaxPool(), norm)
        super().__init__(parts)
        # Stochastic depth whose random numbers are keyed by image, as all others are.
        self.layers, self.stochastic_depth = trunk.layers, False
        for parent in list(body.modules()):
            for name, child in parent.named_children():
                if isinstance(child, StochasticDepth):
                    setattr(parent, name, DroppedBranch(child.p * stochastic_depth))
                    self.stochastic_depth = stochastic_depth > 0

    def draw_branches(self, seeds: Sequence[int | None], device: torch.device) -> None:
        """Draw which images have which branch; in evaluation, and in stages that do not train, all have all.

        seeds: of the images' random numbers; needed in training.
        """
        branches = [
            (module, self.training and any(p.requires_grad for p in stage.parameters()))
            for stage in self.body.children()
            for module in stage.modules()
            if isinstance(module, DroppedBranch)
        ]
        for branch, _ in branches:
            branch.kept = None
        if any(trains for _, trains in branches):
            rows = [
                torch.rand(len(branches), generator=generator_for(s, BRANCHES, device), device=device) for s in seeds
            ]
            for (branch, trains), draws_B in zip(branches, torch.stack(rows, dim=1), strict=True):
                branch.kept = draws_B >= branch.p if trains else None


@torch.no_grad()
@torch.inference_mode(False)
def fold_norms(backbone: Backbone) -> Backbone:
    """The backbone, as it computes while its trunk, frozen as a whole, stays what it is.

    A copy of the trunk stands in its place, in which batch norms in evaluation mode are folded into the convolutions
    before them, and which runs channels last on a CPU. The pyramid is the same module.
    """
    found, body = copy.copy(backbone), copy.deepcopy(backbone.body)
    _fold(body)
    if next(body.parameters()).device.type == "cpu":
        body.to(memory_format=torch.channels_last)
    found.folded, found._modules = None, {**backbone._modules, "body": body}
    return found


def _fold(module: nn.Module) -> None:
    """Fold norms into convolutions among the children, and in what they hold."""
    before, conv = "", None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and conv is not None:
            dtype = conv.weight.dtype
            setattr(module, before, fuse_conv_bn_eval(conv.eval().double(), child.double()).to(dtype))  # rounded once
            setattr(module, name, nn.Identity())
        before, conv = name, child if isinstance(child, nn.Conv2d) else None
        _fold(child)


def build_backbone(config: ModelConfig) -> Backbone:
    """Trunk and pyramid, named as torchvision names them; the pyramid starts Xavier-uniform.

    UserError where the weights cannot be had; ValueError where a trunk of one's own lacks its `layers`.
    """
    trunk = TRUNKS[config.backbone]
    body = _body(trunk, config)
    # Trained from scratch, the pyramid is normalised too (arXiv 1803.08494, Sec. 4.2.1).
    norm = _group_norm if config.norm == "group" else None
    backbone = Backbone(trunk, body, config.fpn_channels, norm, config.stochastic_depth)
    for layer in backbone.fpn.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    # Frozen stages: all children up to the one that ends the last of them.
    names = [name for name, _ in body.named_children()]
    if missing := [name for name in trunk.layers if name not in names]:
        raise ValueError(f"trunk {config.backbone}: has no children {', '.join(missing)}; it has {', '.join(names)}")
    last = names.index(trunk.layers[config.frozen_stages - 1]) if config.frozen_stages else -1
    for name in names[: last + 1]:
        body.get_submodule(name).requires_grad_(False)
    return backbone
