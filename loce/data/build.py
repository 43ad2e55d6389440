"""Annotations and data sets from a Config; images that training and evaluation share."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from loce.config import Config
from loce.data.annotations.cache import open_annotations
from loce.data.annotations.image_files import Listings
from loce.data.annotations.image_lists import listed_images
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.annotations.requirements import training_problems
from loce.data.loader import EvalDataset, TrainDataset
from loce.data.samplers import held_out_images, image_labels
from loce.utils.errors import raise_problems

_HELD_OUT = 0x5A3D  # keeps the choice of these images apart from other random numbers


def train_annotations(config: Config) -> LVISAnnotations:
    """The training annotations, with `data.drop_empty` of the classes alone that have an instance; UserError where file
    or images are missing, or masks are not where boxes are."""
    data = config.data
    annotations = _annotations(config, data.train_annotations, data.train_images, keep_empty=data.keep_empty)
    raise_problems(training_problems(annotations, data.allow_misplaced))
    return annotations.without_empty() if data.drop_empty else annotations


def val_annotations(config: Config, annotated: bool = True) -> LVISAnnotations:
    """The validation annotations, of `eval.images` alone where it is given; UserError where file or images are missing.

    annotated=False takes a file of test images without a list `annotations`, for predictions.
    """
    data, subset = config.data, config.eval.images
    return _annotations(config, data.val_annotations, data.val_images, annotated=annotated, subset=subset)


def _annotations(
    config: Config,
    path: str,
    images: str,
    keep_empty: bool = False,
    annotated: bool = True,
    subset: str = "",
) -> LVISAnnotations:
    data, masks = config.data, config.model.masks
    options = (data.rare_max, data.common_max, keep_empty, data.without_mask == "box")
    annotations = open_annotations(path, *options, masks=masks, annotated=annotated)
    if subset:
        names = map(annotations.name, range(len(annotations)))
        annotations = annotations.only(listed_images(subset, annotations.image_ids, names))
    if data.allow_missing:
        return annotations.without_images(annotations.missing_images(images), images)
    annotations.require_images(images)
    return annotations


def train_dataset(config: Config, annotations: LVISAnnotations) -> TrainDataset:
    """Augmented training samples."""
    return TrainDataset(annotations, Path(config.data.train_images), config.data, config.seed)


def hold_out(
    annotations: LVISAnnotations,
    per_class: int,
    seed: int,
) -> tuple[LVISAnnotations, LVISAnnotations | None]:
    """Training images that stay, and those that are held out (`held_out_images`), None where there are none."""
    held = held_out_images(image_labels(annotations), per_class, np.random.default_rng([_HELD_OUT, seed]))
    if not len(held):
        return annotations, None
    left = np.setdiff1d(annotations.train_images, held)
    return replace(annotations, train_images=left), replace(annotations, train_images=held)


def val_dataset(config: Config, annotations: LVISAnnotations) -> EvalDataset:
    """Validation images at test size."""
    return EvalDataset(annotations, Path(config.data.val_images), config.data)


def images_in_both(train: LVISAnnotations, val: LVISAnnotations, train_images: str, val_images: str) -> list[str]:
    """Paths of the image files that two annotation files share, in order; none where it is one file for both."""
    if Path(train.path).resolve() == Path(val.path).resolve():
        return []
    holds = Listings().holds
    sets = ((train, Path(train_images).resolve()), (val, Path(val_images).resolve()))
    files = [{str(each.image_path(i, folder, holds)) for i in range(len(each))} for each, folder in sets]
    return sorted(set.intersection(*files))
