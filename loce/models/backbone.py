"""Backbones with a feature pyramid: ResNet-18/50/101 from torchvision, and a small one for CPUs.

Both give P2..P6 (strides 4..64); P6 is P5 subsampled and serves the RPN only.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryFile
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import (
    ResNet18_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    WeightsEnum,
    resnet18,
    resnet50,
    resnet101,
)
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from loce.config import ModelConfig, UserError

LAYERS = {f"layer{i + 1}": str(i) for i in range(4)}
TINY_CHANNELS = (16, 32, 64, 96, 128)
CHANNELS = {"tiny": TINY_CHANNELS[1:], "resnet18": (64, 128, 256, 512)}  # of the four levels, and of the deeper ones:
DEEP_CHANNELS = (256, 512, 1024, 2048)


_RESNETS: dict[str, tuple[Callable[..., nn.Module], WeightsEnum]] = {
    "resnet18": (resnet18, ResNet18_Weights.IMAGENET1K_V1),
    "resnet50": (resnet50, ResNet50_Weights.IMAGENET1K_V1),
    "resnet101": (resnet101, ResNet101_Weights.IMAGENET1K_V1),
}


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


def _tiny() -> nn.Module:
    names = ("stem", *LAYERS)
    channels_in = (3, *TINY_CHANNELS[:-1])
    stages = zip(names, channels_in, TINY_CHANNELS, strict=True)
    return nn.Sequential(OrderedDict((name, TinyStage(c_in, c_out)) for name, c_in, c_out in stages))


def _resnet(config: ModelConfig) -> nn.Module:
    build, weights = _RESNETS[config.backbone]
    norm = _group_norm if config.norm == "group" else partial(nn.BatchNorm2d, eps=1e-5)
    body = build(norm_layer=norm)
    if config.weights == "imagenet":
        body.load_state_dict(_imagenet(weights), strict=config.norm != "group")
    return body


def _imagenet(weights: WeightsEnum) -> Mapping[str, Tensor]:
    """The weights from the cache or, once, from the net; UserError where there are none or the file is damaged."""
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError, HTTPException, RuntimeError, EOFError, UnpicklingError) as error:
        cached = _cached(weights)
        what = f"{type(error).__name__}: {error}"
        if cached.exists():
            raise UserError(
                f"model.weights: imagenet: {cached} cannot be read ({what}).\n  Delete it, and it is downloaded again."
            ) from error
        raise UserError(
            f"model.weights: imagenet: {cached.name} is not in the cache and cannot be downloaded ({what}).\n"
            f"  Put the file into ~/.cache/torch/hub/checkpoints/ (or $TORCH_HOME/hub/checkpoints/) by hand, "
            f"or set model.weights=none (then model.norm=batch or group)."
        ) from error


def require_cache(config: ModelConfig) -> None:
    """UserError where ImageNet weights have to be downloaded first, and cannot be written where they belong."""
    if config.weights != "imagenet":
        return
    file = _cached(_RESNETS[config.backbone][1])
    if file.exists():
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


def build_backbone(config: ModelConfig) -> BackboneWithFPN:
    """Body and pyramid; `.body` and `.fpn` as torchvision names them. The pyramid starts Xavier-uniform."""
    body = _tiny() if config.backbone == "tiny" else _resnet(config)
    channels = list(CHANNELS.get(config.backbone, DEEP_CHANNELS))
    # Trained from scratch, the pyramid is normalised too (arXiv 1803.08494, Sec. 4.2.1).
    norm = _group_norm if config.norm == "group" else None
    backbone = BackboneWithFPN(body, dict(LAYERS), channels, config.fpn_channels, LastLevelMaxPool(), norm)
    for layer in backbone.fpn.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for name in ("stem", "conv1", "bn1", *LAYERS)[: 3 + config.frozen_stages if config.frozen_stages else 0]:
        for parameter in getattr(backbone.body, name, nn.Identity()).parameters():
            parameter.requires_grad_(False)
    return backbone
