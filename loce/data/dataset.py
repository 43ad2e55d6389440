"""Data sets of training and evaluation: an image with its boxes, labels and masks, ready for the model.

A training image that cannot be read is replaced by another one, chosen at random but repeatably, and the sample has
"replaced", a list of messages. An evaluation image that cannot be read becomes black: its objects count as missed.
Of an image with more instances than `data.max_instances` some are used, rare classes first, so that it cannot exhaust
the memory; the others' regions are neither objects nor background. The sample of a 16-bit image that is nearly black in
8 bits has "few_levels", a message.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from loce.config import DataConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.copy_paste import Scene, box_of, paste
from loce.data.masks import Crop, CroppedMasks, cut_runs, nearest_source, resize_crop
from loce.data.transforms import (
    Geometry,
    ImageError,
    image_generator,
    large_scale_jitter,
    on_canvas,
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
    pixels; "labels" int64 (N,); "masks" CroppedMasks, where segmentations were read; "ignored" float32 (M, 4) boxes of
    regions that are neither objects nor background; "rows" int64 (N,) indices of the annotations; "image_id" int;
    "size" the file's (height, width); "scale" (x, y) resized / file; "sampled_class" and "batch_index" as in
    `ShownImage`; "seed" int, see `sample_seed`. Instances are the annotations `annotations.rows(index)`, in that order,
    or some of them, and then "limited" is a message that says so; N may be 0 only with `data.keep_empty`, and where a
    canvas shows no object. With `data.copy_paste` the last "pasted" instances are of another image: neither its crowds
    nor what is known of its classes (negative, not annotated everywhere) come along, since training reads nothing of
    the latter.
    """

    def __init__(self, annotations: LVISAnnotations, folder: str | Path, config: DataConfig, seed: int) -> None:
        self.annotations, self.folder, self.config, self.seed = annotations, Path(folder), config, seed
        self.by_class = rows_by_class(annotations) if config.copy_paste and config.paste_from == "rare" else None

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
        # Scale jitter and flip come before the choice of instances: both draw from the image's own random numbers.
        generator = image_generator(self.seed, epoch, int(annotations.image_ids[index]), repeat)
        geometry = self._geometry(index, generator)
        image, few_levels = self._read(index)
        # Instances above the limit become regions to ignore, beside those that the file marks so.
        every = annotations.rows(index)
        rows = limit_instances(every, self._rarity(every), config.max_instances, generator)
        ignored = np.concatenate([annotations.ignored(index), np.setdiff1d(every, rows)])
        scene = self._scene(image, rows, ignored, geometry)
        extra: dict[str, Any] = {"few_levels": few_levels} if few_levels else {}
        if len(rows) < len(every):
            extra["limited"] = (
                f"image {annotations.image_ids[index]}: {len(rows)} of its {len(every)} instances are used at a time, "
                "rare classes first (data.max_instances)"
            )
        # Objects of another image, on top.
        if config.copy_paste and generator.random() < config.copy_paste:
            source, problems = self._paste_source(index, config.max_instances - len(rows), geometry.size, generator)
            scene, extra["pasted"] = (scene, 0) if source is None else (paste(scene, source), len(source.rows))
            extra |= {"replaced": problems} if problems else {}
        return {
            "image": _to_tensor(scene.image),
            "boxes": torch.from_numpy(scene.boxes),
            "labels": torch.from_numpy(annotations.labels[scene.rows].astype(np.int64)),
            **self._masks(scene.crops, geometry.size),
            "ignored": torch.from_numpy(scene.ignored),
            "rows": torch.from_numpy(scene.rows),
            "image_id": int(annotations.image_ids[index]),
            "size": geometry.old,
            "scale": geometry.scale,
            **extra,
        }

    def _geometry(self, index: int, generator: np.random.Generator) -> Geometry:
        config, (height, width) = self.config, self.annotations.image_sizes[index].tolist()
        size = (height, width)
        if config.resize == "lsj":
            return large_scale_jitter(size, config.canvas, config.lsj_scale, config.flip, generator)
        return random_geometry(size, config.short_edges, config.long_edge, config.flip, generator)

    def _read(self, index: int) -> tuple[np.ndarray, str]:
        path, size = self.annotations.image_path(index, self.folder), self.annotations.image_sizes[index].tolist()
        return read_levels(path, (size[0], size[1]), self.config.exif, self.config.scale_16bit)

    def _rarity(self, rows: np.ndarray) -> np.ndarray:
        return self.annotations.stats.image_counts[self.annotations.labels[rows]]

    def _scene(self, image: np.ndarray, rows: np.ndarray, ignored: np.ndarray, geometry: Geometry) -> Scene:
        """An image with its objects. On a canvas those without a pixel are gone, and the box of one that its border
        cuts is that of the pixels that are left.
        """
        annotations = self.annotations
        corners = annotations.clipped_boxes(rows)
        # Without masks boxes are all that is needed; on a canvas filled ones are cut as masks are.
        needed = annotations.with_masks or geometry.canvas is not None
        crops = instance_crops(annotations, rows, geometry) if needed else []
        boxes, regions = geometry.boxes(corners), geometry.boxes(annotations.clipped_boxes(ignored))
        if geometry.canvas is not None:
            seen = np.array([bits.any() for bits, _ in crops], bool)
            for row in np.flatnonzero(geometry.cuts(corners) & seen):
                boxes[row] = box_of(crops[row])
            crops = [crop for crop, is_seen in zip(crops, seen, strict=True) if is_seen]
            boxes, rows = boxes[seen], rows[seen]
            regions = regions[(regions[:, 2:] > regions[:, :2]).all(axis=1)]
        return Scene(geometry.image(image), boxes, crops, rows, regions)

    def _paste_source(
        self,
        index: int,
        most: int,
        size: tuple[int, int],
        generator: np.random.Generator,
    ) -> tuple[Scene | None, list[str]]:
        """Some objects, at most `most`, of another image than `index`, on a canvas of `size`; None where there is none.

        Also messages on images that could not be read. As many objects as drawn from 1 to all of them, at random or
        rare classes first.
        """
        annotations = self.annotations
        problems: list[str] = []
        for _ in range(_TRIES if most > 0 else 0):
            other = self._paste_image(generator)
            rows = annotations.rows(other)
            rows = rows[annotations.has_mask[rows]]
            if other == index or not len(rows):
                continue
            rarity = self._rarity(rows) if self.config.paste_from == "rare" else np.zeros(len(rows))
            rows = limit_instances(rows, rarity, min(most, int(generator.integers(len(rows))) + 1), generator)
            geometry = self._geometry(other, generator)
            geometry = geometry if geometry.canvas else on_canvas(geometry, size, generator)
            try:
                return self._scene(self._read(other)[0], rows, rows[:0], geometry), problems
            except ImageError as error:
                problems.append(self._bad(other, error))
        return None, problems

    def _paste_image(self, generator: np.random.Generator) -> int:
        """Any training image or, for `paste_from: rare`, that of any object of any class that has some."""
        if self.by_class is None:
            return int(generator.choice(self.annotations.train_images))
        rows, first = self.by_class
        label = int(generator.integers(len(first) - 1))
        return int(self.annotations.image_of[rows[generator.integers(first[label], first[label + 1])]])

    def _masks(self, crops: list[Crop], size: tuple[int, int]) -> Sample:
        return {"masks": CroppedMasks.pack(crops, size)} if self.annotations.with_masks else {}

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
            **self._masks([], geometry.size),
            "ignored": torch.zeros((0, 4)),
            "rows": torch.from_numpy(none),
            "image_id": int(self.annotations.image_ids[index]),
            "size": (side, side),
            "scale": geometry.scale,
        }


class EvalDataset:
    """Test images: "image" uint8 (3, H, W) RGB, "image_id", "size" the file's (height, width), "scale" (x, y); and the
    objects that training would use of them, all of them: "boxes", "labels" and "rows" as of `TrainDataset`, none of an
    image that cannot be read."""

    def __init__(self, annotations: LVISAnnotations, folder: str | Path, config: DataConfig) -> None:
        self.annotations, self.folder, self.config = annotations, Path(folder), config

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> Sample:
        """The image of an index into the annotation file's list of images."""
        height, width = (int(side) for side in self.annotations.image_sizes[index])
        new = resized((height, width), self.config.test_short_edge, self.config.long_edge)
        annotations, geometry = self.annotations, Geometry((height, width), new)
        rows, image_id = annotations.rows(index), int(annotations.image_ids[index])
        try:
            path = annotations.image_path(index, self.folder)
            levels, few_levels = read_levels(path, (height, width), self.config.exif, self.config.scale_16bit)
            image = _to_tensor(geometry.image(levels))
            extra: dict[str, Any] = {"few_levels": few_levels} if few_levels else {}
        except ImageError as error:
            image, rows = torch.zeros((3, *new), dtype=torch.uint8), rows[:0]
            extra = {"replaced": [f"image {image_id}: {error}"]}
        return {
            "image": image,
            "boxes": torch.from_numpy(geometry.boxes(annotations.clipped_boxes(rows))),
            "labels": torch.from_numpy(annotations.labels[rows].astype(np.int64)),
            "rows": torch.from_numpy(rows),
            "image_id": image_id,
            "size": (height, width),
            "scale": geometry.scale,
            **extra,
        }


def limit_instances(rows: np.ndarray, rarity: np.ndarray, limit: int, generator: np.random.Generator) -> np.ndarray:
    """At most `limit` of the annotations `rows` (N,), in their order: rare classes first, within a class at random.

    rarity: (N,) images that show the annotation's class, over the training set. Draws nothing where all may stay.
    """
    if len(rows) <= limit:
        return rows
    first = np.lexsort((generator.random(len(rows)), rarity))[:limit]
    return rows[np.sort(first)]


def unaugmented(config: DataConfig) -> DataConfig:
    """The data section for images as evaluation sees them."""
    edges = (config.test_short_edge,)
    return replace(config, resize="short_edge", short_edges=edges, flip=0.0, copy_paste=0.0)


def rows_by_class(annotations: LVISAnnotations) -> tuple[np.ndarray, np.ndarray]:
    """The annotations of training images, class by class; where each class that has some begins, and the end."""
    rows = annotations.train_rows
    rows = rows[np.isin(annotations.image_of[rows], annotations.train_images)]
    rows = rows[np.argsort(annotations.labels[rows], kind="stable")]
    return rows, np.append(np.unique(annotations.labels[rows], return_index=True)[1], len(rows))


def instance_crops(annotations: LVISAnnotations, rows: np.ndarray, geometry: Geometry) -> list[Crop]:
    """Masks of annotations of one image: filled at the file's size, resized (nearest), flipped, cut to the canvas.

    Where an annotation has no usable mask (`data.without_mask: box`), its box is the mask.
    """
    (old_height, old_width), (height, width) = geometry.old, geometry.new
    source_x, source_y = nearest_source(old_width, width), nearest_source(old_height, height)
    if geometry.canvas is not None:  # what is shown of them, from the corner in the flipped image on
        (y, x), (tall, wide) = geometry.corner, geometry.canvas
        source_y = source_y[y : y + tall]
        source_x = source_x[::-1][x : x + wide][::-1] if geometry.flip else source_x[x : x + wide]
    drawn = annotations.has_mask[rows]
    runs = iter(annotations.segmentations.runs(rows[drawn], old_height, old_width))
    boxes = annotations.clipped_boxes(rows).tolist()
    cut = [
        cut_runs(next(runs), old_height) if has_mask else filled_box(*box)
        for has_mask, box in zip(drawn, boxes, strict=True)
    ]
    return [resize_crop(*crop, source_x, source_y, geometry.flip, geometry.size) for crop in cut]


def filled_box(x1: float, y1: float, x2: float, y2: float) -> tuple[np.ndarray, tuple[int, int]]:
    """The pixels whose centres a box covers, and at least one: ones (h, w) uint8 and their corner (x0, y0)."""
    left, top = int(np.ceil(x1 - 0.5)), int(np.ceil(y1 - 0.5))
    right, bottom = max(left + 1, int(np.ceil(x2 - 0.5))), max(top + 1, int(np.ceil(y2 - 0.5)))
    return np.ones((bottom - top, right - left), np.uint8), (left, top)


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) as a (3, H, W) view: no copy, and the memory order that convolutions like best."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
