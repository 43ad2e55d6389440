"""Trunks of torchvision's kinds with few weights, for tests of what does not depend on their size."""

from dataclasses import replace
from functools import partial

from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

from loce.config import ModelConfig
from loce.models.backbone import TRUNKS
from tests.models.conftest import SMALL

SWIN = {"patch_size": [4, 4], "embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 2], "num_classes": 3}
SWIN |= {"window_size": [4, 4], "stochastic_depth_prob": 0.6}
V2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
BLOCKS = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, 32, 1), CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 1)]
CONVNEXT = {"stochastic_depth_prob": 0.6, "layer_scale": 0.5, "num_classes": 3}
CHANNELS = (8, 16, 32, 64)
SMALL_TRUNKS = {
    "convnext_tiny": TRUNKS["convnext_tiny"]._replace(build=partial(ConvNeXt, BLOCKS, **CONVNEXT), channels=CHANNELS),
    "swin_t": TRUNKS["swin_t"]._replace(build=partial(SwinTransformer, **SWIN), channels=CHANNELS),
    "swin_v2_t": TRUNKS["swin_v2_t"]._replace(build=partial(SwinTransformer, **SWIN, **V2), channels=CHANNELS),
}


def small(name: str, **options: object) -> ModelConfig:
    """A small detector with a trunk of SMALL_TRUNKS."""
    return replace(SMALL, backbone=name, norm="layer", **options)  # type: ignore[arg-type]
