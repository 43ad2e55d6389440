"""Samples: an image with its boxes, labels and masks, ready for the model.

A training image that cannot be read is replaced by another one, chosen at random but repeatably, and the sample says so
("replaced": list of messages). An evaluation image that cannot be read is shown black: its objects count as missed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from loce.config import DataConfig
from loce.data.lvis import LVISAnnotations
from loce.data.masks import CroppedMasks, cut_runs, nearest_source, resize_crop
from loce.data.transforms import Geometry, ImageError, image_generator, random_geometry, read_image, resized, sample_key

Sample = dict[str, Any]
_TRIES = 20  # images tried in place of one that cannot be read


class TrainDataset:
    """Augmented training samples.

    A sample: "image" uint8 (3, H, W) RGB (stored row by row with the channels last); "boxes" float32 (N, 4) xyxy in its
    pixels; "labels" int64 (N,); "masks" CroppedMasks; "image_id" int; "size" the file's (height, width); "scale" (x, y)
    resized / file; "drawn" int, what the image was drawn for (`TrainingPlan.epoch`); "key" int, see `sample_key`;
    "place" int, the image's position in the batch over all ranks. Instances are the annotations
    `annotations.rows(index)`, in that order; N is at least 1.
    """

    def __init__(self, annotations: LVISAnnotations, folder: str | Path, config: DataConfig, seed: int) -> None:
        self.annotations, self.folder, self.config, self.seed = annotations, Path(folder), config, seed

    def __len__(self) -> int:
        return len(self.annotations.train_images)

    def __getitem__(self, shown: tuple[int, ...]) -> Sample:
        """The sample of (image index, epoch[, how often this epoch has shown it before[, drawn[, place]]])."""
        index, epoch, draw, drawn, place = (*shown, *(0, -1, 0)[len(shown) - 2 :])
        key = sample_key(self.seed, epoch, int(self.annotations.image_ids[index]), draw)
        try:
            sample = self.sample(index, epoch, draw)
        except ImageError as error:
            sample = self._substitute(index, epoch, draw, str(error))
        return {**sample, "drawn": drawn, "key": key, "place": place}

    def sample(self, index: int, epoch: int, draw: int = 0) -> Sample:
        """One sample; ImageError where the image cannot be used. Depends on (seed, epoch, image id, draw) only."""
        annotations, config = self.annotations, self.config
        height, width = (int(side) for side in annotations.image_sizes[index])
        generator = image_generator(self.seed, epoch, int(annotations.image_ids[index]), draw)
        geometry = random_geometry((height, width), config.short_edges, config.long_edge, config.flip, generator)
        image = read_image(annotations.image_path(index, self.folder), (height, width))
        rows = annotations.rows(index)
        return {
            "image": _to_tensor(geometry.image(image)),
            "boxes": torch.from_numpy(geometry.boxes(annotations.clipped_boxes(rows))),
            "labels": torch.from_numpy(annotations.labels[rows].astype(np.int64)),
            "masks": instance_masks(annotations, rows, geometry),
            "image_id": int(annotations.image_ids[index]),
            "size": (height, width),
            "scale": geometry.scale,
        }

    def _substitute(self, index: int, epoch: int, draw: int, message: str) -> Sample:
        messages = [message]
        generator = image_generator(self.seed, epoch, int(self.annotations.image_ids[index]), draw)
        for other in generator.choice(self.annotations.train_images, _TRIES):
            try:
                return {**self.sample(int(other), epoch, draw), "replaced": messages}
            except ImageError as error:
                messages.append(str(error))
        raise ImageError("no image could be read in place of one that is bad:\n" + "\n".join(messages))


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
            image = read_image(self.annotations.image_path(index, self.folder), (height, width))
        except ImageError as error:
            return {**sample, "image": torch.zeros((3, *new), dtype=torch.uint8), "replaced": [str(error)]}
        return {**sample, "image": _to_tensor(geometry.image(image))}


def instance_masks(annotations: LVISAnnotations, rows: np.ndarray, geometry: Geometry) -> CroppedMasks:
    """Masks of annotations of one image: filled at the file's size, resized (nearest), flipped."""
    (old_height, old_width), (height, width) = geometry.old, geometry.new
    source_x, source_y = nearest_source(old_width, width), nearest_source(old_height, height)
    crops = [
        resize_crop(*cut_runs(runs, old_height), source_x, source_y, geometry.flip)
        for runs in annotations.segmentations.runs(rows, old_height, old_width)
    ]
    return CroppedMasks.pack(crops, geometry.new)


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) as a (3, H, W) view: no copy, and the memory order that convolutions like best."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
