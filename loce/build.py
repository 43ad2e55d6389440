"""From a Config to what trains: data sets, model, optimiser. The only reader of all sections."""

import dataclasses
from pathlib import Path

import torch

from loce.classes import ClassStats
from loce.config import Config, TrainConfig
from loce.data.loader import EvalDataset, TrainDataset
from loce.data.lvis import LVISAnnotations
from loce.models.mask_rcnn import MaskRCNN, build_roi_heads


def build_model(config: Config, stats: ClassStats, pretrained: bool = True) -> MaskRCNN:
    """The detector for the classes of `stats`; pretrained: fetch ImageNet weights where the config asks for them."""
    section = config.model if pretrained else dataclasses.replace(config.model, weights="none")
    roi_heads = build_roi_heads(section, config.head, config.indicator, config.memory, stats)
    edges = (config.data.test_short_edge, config.data.long_edge)
    model = MaskRCNN(section, roi_heads, config.eval, edges)
    model.stats = stats
    model.freeze(config.train.freeze)
    return model


def train_annotations(config: Config) -> LVISAnnotations:
    """The training annotations; UserError where file or images are missing."""
    return _annotations(config, config.data.train_annotations, config.data.train_images)


def val_annotations(config: Config) -> LVISAnnotations:
    """The validation annotations; UserError where file or images are missing."""
    return _annotations(config, config.data.val_annotations, config.data.val_images)


def _annotations(config: Config, path: str, images: str) -> LVISAnnotations:
    annotations = LVISAnnotations.open(path, config.data.rare_max, config.data.common_max)
    annotations.require_images(images)
    return annotations


def train_dataset(config: Config, annotations: LVISAnnotations) -> TrainDataset:
    """Augmented training samples."""
    return TrainDataset(annotations, Path(config.data.train_images), config.data, config.seed)


def val_dataset(config: Config, annotations: LVISAnnotations) -> EvalDataset:
    """Validation images at test size."""
    return EvalDataset(annotations, Path(config.data.val_images), config.data)


def build_optimizer(model: torch.nn.Module, train: TrainConfig) -> torch.optim.SGD:
    """SGD over everything that is not frozen, biases and norms included in the weight decay (MMDetection's default)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
