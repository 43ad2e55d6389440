"""Detector and optimiser from a Config."""

import dataclasses

import numpy as np
import torch

from loce.config import Config, TrainConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.heads import HEADS
from loce.models.mask_rcnn import MaskRCNN, build_roi_heads
from loce.models.nms_resampling import NMSResampling
from loce.utils.classes import ClassStats


def build_model(config: Config, stats: ClassStats, pretrained: bool = True) -> MaskRCNN:
    """The detector for the classes of `stats`; pretrained: fetch ImageNet weights where the config asks for them."""
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


def build_optimizer(model: torch.nn.Module, train: TrainConfig) -> torch.optim.SGD:
    """SGD over everything that is not frozen, biases and norms included in the weight decay (MMDetection's default).

    fused: one pass over a weight, its gradient and its momentum, instead of one for each operation.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr, momentum, decay = train.lr, train.momentum, train.weight_decay
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=decay, fused=True)
