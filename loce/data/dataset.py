"""Data sets of training and evaluation: an image with its boxes, labels and masks, ready for the model.

A training image that cannot be read is replaced by another one, chosen at random but repeatably, and the sample has
"replaced", a list of messages. An evaluation image that cannot be read becomes black: its objects count as missed.
Of an image with more instances than `data.max_instances` some are used, rare classes first, so that it cannot exhaust
the memory; the others' regions are neither objects nor background. The sample of a 16-bit image that is nearly black in
8 bits has "few_levels", a message.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from loce.config import DataConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.masks import CroppedMasks, cut_runs, nearest_source, resize_crop
from loce.data.transforms import (
    Geometry,
    ImageError,
    image_generator,
    random_geometry,
    read_levels,
    resized,
    sample_seed,
)

Sample = dict[str, Any]
_TRIES = 20  # images tried in place of one that cannot be read


class ShownImage(NamedTuple):
    """Index of a training sample: an image, its epoch and its position in the batch."""

    image: int  # index into the annotation file's list of images
    epoch: int
    repeat: int = 0  # how often this epoch has shown the image before
    sampled_class: int = -1  # what the image was drawn for, see `TrainingPlan.epoch`
    batch_index: int = 0  # position in the batch over all ranks


class TrainDataset:
    """Augmented training samples.

    A sample: "image" uint8 (3, H, W) RGB (stored row by row with the channels last); "boxes" float32 (N, 4) xyxy in its
    pixels; "labels" int64 (N,); "masks" CroppedMasks; "ignored" float32 (M, 4) boxes of regions that are neither
    objects nor background; "rows" int64 (N,) indices of the annotations; "image_id" int; "size" the file's (height,
    width); "scale" (x, y) resized / file; "sampled_class" and "batch_index" as in `ShownImage`; "seed" int, see
    `sample_seed`. Instances are the annotations `annotations.rows(index)`, in that order, or some of them, and then
    "limited" is a message that says so; N may be 0 only with `data.keep_empty`.
    """

    def __init__(self, annotations: LVISAnnotations, folder: str | Path, config: DataConfig, seed: int) -> None:
        self.annotations, self.folder, self.config, self.seed = annotations, Path(folder), config, seed

    def __len__(self) -> int:
        return len(self.annotations.train_images)

    def __getitem__(self, shown: tuple[int, ...]) -> Sample:
        """The sample of a `ShownImage`, or of a tuple of its first fields."""
        index, epoch, repeat, sampled_class, batch_index = ShownImage(*shown)
        seed = sample_seed(self.seed, epoch, int(self.annotations.image_ids[index]), repeat)
        try:
            sample = self.sample(index, epoch, repeat)
        except ImageError as error:
            sample = self._substitute(index, epoch, repeat, self._bad(index, error))
        return {**sample, "sampled_class": sampled_class, "seed": seed, "batch_index": batch_index}

    def sample(self, index: int, epoch: int, repeat: int = 0) -> Sample:
        """One sample; ImageError where the image cannot be used. Depends on (seed, epoch, image id, repeat) only."""
        annotations, config = self.annotations, self.config
        height, width = (int(side) for side in annotations.image_sizes[index])
        # Scale jitter and flip come before the choice of instances: both draw from the image's own random numbers.
        generator = image_generator(self.seed, epoch, int(annotations.image_ids[index]), repeat)
        geometry = random_geometry((height, width), config.short_edges, config.long_edge, config.flip, generator)
        path = annotations.image_path(index, self.folder)
        image, few_levels = read_levels(path, (height, width), config.exif, config.scale_16bit)
        # Instances above the limit become regions to ignore, beside those that the file marks so.
        every = annotations.rows(index)
        rarity = annotations.stats.image_counts[annotations.labels[every]]
        rows = limit_instances(every, rarity, config.max_instances, generator)
        ignored = np.concatenate([annotations.ignored(index), np.setdiff1d(every, rows)])
        sample = {
            "image": _to_tensor(geometry.image(image)),
            "boxes": torch.from_numpy(geometry.boxes(annotations.clipped_boxes(rows))),
            "labels": torch.from_numpy(annotations.labels[rows].astype(np.int64)),
            "masks": instance_masks(annotations, rows, geometry),
            "ignored": torch.from_numpy(geometry.boxes(annotations.clipped_boxes(ignored))),
            "rows": torch.from_numpy(rows),
            "image_id": int(annotations.image_ids[index]),
            "size": (height, width),
            "scale": geometry.scale,
        }
        if few_levels:
            sample["few_levels"] = few_levels
        if len(rows) < len(every):
            sample["limited"] = (
                f"image {annotations.image_ids[index]}: {len(rows)} of its {len(every)} instances are used at a time, "
                "rare classes first (data.max_instances)"
            )
        return sample

    def _substitute(self, index: int, epoch: int, repeat: int, message: str) -> Sample:
        messages = [message]
        generator = image_generator(self.seed, epoch, int(self.annotations.image_ids[index]), repeat)
        for other in generator.choice(self.annotations.train_images, _TRIES):
            try:
                return {**self.sample(int(other), epoch, repeat), "replaced": messages}
            except ImageError as error:
                messages.append(self._bad(int(other), error))
        return {**self._black(index), "replaced": messages}  # no rank stops alone: the loader ends all of them

    def _bad(self, index: int, error: ImageError) -> str:
        return f"image {self.annotations.image_ids[index]}: {error}"

    def _black(self, index: int) -> Sample:
        """A small black image without objects, where no image can be read."""
        side = min(self.config.short_edges)
        geometry = Geometry((side, side), (side, side))
        none = np.zeros(0, dtype=np.int64)
        return {
            "image": torch.zeros((3, side, side), dtype=torch.uint8),
            "boxes": torch.zeros((0, 4)),
            "labels": torch.zeros(0, dtype=torch.int64),
            "masks": instance_masks(self.annotations, none, geometry),
            "ignored": torch.zeros((0, 4)),
            "rows": torch.from_numpy(none),
            "image_id": int(self.annotations.image_ids[index]),
            "size": (side, side),
            "scale": geometry.scale,
        }


class EvalDataset:
    """Test images: "image" uint8 (3, H, W) RGB, "image_id", "size" the file's (height, width), "scale" (x, y)."""

    def __init__(self, annotations: LVISAnnotations, folder: str | Path, config: DataConfig) -> None:
        self.annotations, self.folder, self.config = annotations, Path(folder), config

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> Sample:
        """The image of an index into the annotation file's list of images."""
        height, width = (int(side) for side in self.annotations.image_sizes[index])
        new = resized((height, width), self.config.test_short_edge, self.config.long_edge)
        geometry = Geometry((height, width), new)
        sample: Sample = {
            "image_id": int(self.annotations.image_ids[index]),
            "size": (height, width),
            "scale": geometry.scale,
        }
        try:
            path = self.annotations.image_path(index, self.folder)
            image, few_levels = read_levels(path, (height, width), self.config.exif, self.config.scale_16bit)
        except ImageError as error:
            message = f"image {sample['image_id']}: {error}"
            return {**sample, "image": torch.zeros((3, *new), dtype=torch.uint8), "replaced": [message]}
        if few_levels:
            sample["few_levels"] = few_levels
        return {**sample, "image": _to_tensor(geometry.image(image))}


def limit_instances(rows: np.ndarray, rarity: np.ndarray, limit: int, generator: np.random.Generator) -> np.ndarray:
    """At most `limit` of the annotations `rows` (N,), in their order: rare classes first, within a class at random.

    rarity: (N,) images that show the annotation's class, over the training set. Draws nothing where all may stay.
    """
    if len(rows) <= limit:
        return rows
    first = np.lexsort((generator.random(len(rows)), rarity))[:limit]
    return rows[np.sort(first)]


def instance_masks(annotations: LVISAnnotations, rows: np.ndarray, geometry: Geometry) -> CroppedMasks:
    """Masks of annotations of one image: filled at the file's size, resized (nearest), flipped.

    Where an annotation has no usable mask (`data.without_mask: box`), its box is the mask.
    """
    (old_height, old_width), (height, width) = geometry.old, geometry.new
    source_x, source_y = nearest_source(old_width, width), nearest_source(old_height, height)
    drawn = annotations.has_mask[rows]
    runs = iter(annotations.segmentations.runs(rows[drawn], old_height, old_width))
    boxes = annotations.clipped_boxes(rows).tolist()
    cut = [
        cut_runs(next(runs), old_height) if has_mask else filled_box(*box)
        for has_mask, box in zip(drawn, boxes, strict=True)
    ]
    return CroppedMasks.pack([resize_crop(*crop, source_x, source_y, geometry.flip) for crop in cut], geometry.new)


def filled_box(x1: float, y1: float, x2: float, y2: float) -> tuple[np.ndarray, tuple[int, int]]:
    """The pixels whose centres a box covers, and at least one: ones (h, w) uint8 and their corner (x0, y0)."""
    left, top = int(np.ceil(x1 - 0.5)), int(np.ceil(y1 - 0.5))
    right, bottom = max(left + 1, int(np.ceil(x2 - 0.5))), max(top + 1, int(np.ceil(y2 - 0.5)))
    return np.ones((bottom - top, right - left), np.uint8), (left, top)


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) as a (3, H, W) view: no copy, and the memory order that convolutions like best."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
