"""Detector and optimiser from a Config."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loce.config import Config, TrainConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.heads import HEADS
from loce.models.mask_rcnn import MaskRCNN, build_roi_heads
from loce.models.nms_resampling import NMSResampling
from loce.utils.classes import ClassStats

ADAM_BETA2 = 0.999  # PyTorch's, and every published recipe's for detectors


def build_model(config: Config, stats: ClassStats, pretrained: bool = True) -> MaskRCNN:
    """The detector for the classes of `stats`; pretrained: with the trunk's weights that the config names."""
    section = config.model if pretrained else dataclasses.replace(config.model, weights="none")
    roi_heads = build_roi_heads(section, config.head, config.indicator, config.memory, stats)
    edges = (config.data.test_short_edge, config.data.long_edge)
    model = MaskRCNN(section, roi_heads, config.eval, edges)
    model.stats = stats
    if config.model.rpn.nms_resampling != "none":
        model.rpn.resampling = NMSResampling(config.model.rpn.nms_resampling, stats)
    model.freeze(config.train.freeze)
    return model


def head_files(config: Config, annotations: LVISAnnotations) -> dict[str, np.ndarray]:
    """Buffers that the classification head reads from files when a training begins; UserError where they do not fit."""
    return HEADS[config.head.name].from_files(config.head, annotations.path, annotations.stats.names)


def load_head_files(config: Config, annotations: LVISAnnotations, model: MaskRCNN) -> None:
    """Give `head_files` to the classification head; a checkpoint holds them from then on."""
    for name, values in head_files(config, annotations).items():
        model.roi_heads.classifier.get_buffer(name).copy_(torch.from_numpy(values))


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """SGD, or AdamW (Loshchilov and Hutter, arXiv 1711.05101), over everything that is not frozen.

    Its groups differ in weight decay and in "lr_scale", the share of the learning rate that they train with (see
    `lr_scales`); by default there is one. fused: one pass over a weight, its gradient and its state, instead of one for
    each operation.
    """
    scales = lr_scales(model, train.layer_decay)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = train.weight_decay if train.decay_norms or not norm_or_bias(name, p) else 0.0
            scale = scales.get(p, 1.0)
            group = {"params": [], "weight_decay": decay, "lr_scale": scale}
            groups.setdefault((decay, scale), group)["params"].append(p)
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups.values(), lr=train.lr, betas=(train.momentum, ADAM_BETA2), fused=True)
    return torch.optim.SGD(groups.values(), lr=train.lr, momentum=train.momentum, fused=True)


def norm_or_bias(name: str, parameter: Tensor) -> bool:
    """Whether a parameter has one number a channel (of norms and layer scales), or is a bias, that of attention too."""
    return "bias" in name.rpartition(".")[2] or parameter.shape[1:].numel() == 1


def lr_scales(model: nn.Module, decay: float) -> dict[Tensor, float]:
    """Layer-wise learning rates: of the trunk's parameters, the share of the learning rate that they train with.

    decay^(5 - l) in stage l of 1 to 4, its downsampling included, and in the stem, l = 0; the pyramid and all behind it
    train with all of it. The rule of ELECTRA (arXiv 2003.10555) and BEiT (arXiv 2106.08254) in fine-tuning, where every
    layer is one step; a stage is one here, as in MMDetection's "stage_wise" for ConvNeXt.
    """
    if decay == 1:
        return {}
    scales: dict[Tensor, float] = {}
    backbone: Any = model.get_submodule("backbone")
    body, ends, done = backbone.body, backbone.layers, 0  # the children that give the pyramid its maps
    for name, child in body.named_children():
        done += name in ends
        stage = done if name in ends else done + bool(done)  # what comes before the first map is the stem
        scales.update(dict.fromkeys(child.parameters(), decay ** (len(ends) + 1 - stage)))
    return scales
