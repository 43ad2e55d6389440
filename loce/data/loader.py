"""Data loader: micro-batches of samples, on any number of ranks and workers.

samplers.py decides which image is shown when; workers only carry it out, so their number changes nothing.
"""

import json
import os
import shutil
import signal
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from loce.config import DataConfig, SamplerConfig
from loce.data.dataset import EvalDataset, Sample, ShownImage, TrainDataset
from loce.data.samplers import TrainingPlan, image_labels, memory_fill_images, rank_slice
from loce.utils import distributed, signals
from loce.utils.errors import UserError
from loce.utils.progress import print_line

__all__ = ["EvalDataset", "TrainDataset", "eval_batches", "fill_batches", "train_batches", "training_plan"]
SHARED = Path("/dev/shm")  # where Linux keeps what a worker hands over
PREFETCH = 3  # micro-batches each worker prepares ahead
OPEN_FILES = 65536
BAD_SHARE = 1e-3  # of all images; more bad ones than this end the run
AGREE_EVERY = 20  # micro-batches between two exchanges of bad images among the ranks
FILL_EPOCH = 1 << 31  # the augmentation of filling is that of no epoch
Fill = tuple[int, np.ndarray]  # image index, annotations to store


class Batches:
    """Micro-batches (lists of samples) with a length; may be gone through once.

    Messages of samples ("replaced": the image cannot be used; "limited": it has too many instances) are printed once
    each, "few_levels" (16-bit images that are nearly black in 8 bits) for the first such image. UserError, with a list,
    when more than 0.1 % of the data set cannot be used (but one image at least is forgiven): on all ranks at the same
    micro-batch. together: all ranks go through equally many micro-batches.
    """

    def __init__(
        self,
        dataset: Any,
        batches: Iterable[list[Any]],
        length: int,
        workers: int,
        together: bool = False,
    ) -> None:
        self.length, self.images = length, len(dataset)
        self.allowed = max(1, int(BAD_SHARE * self.images))
        self.together = together
        self.warned: dict[str, bool] = {}  # key of a message (`_tell`) -> is the image bad?
        if workers:
            allow_open_files()
        self.loader: DataLoader[Sample] = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=list,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=partial(_start_worker, os.getpid()),
            prefetch_factor=PREFETCH if workers else None,
            multiprocessing_context="fork" if workers else None,  # workers share the annotation arrays
            generator=torch.Generator(),  # else the loader would draw from, and so change, the global one
        )

    def __len__(self) -> int:
        return self.length

    @property
    def bad(self) -> list[str]:
        """A message for each image that could not be used so far; of all ranks where they go together."""
        return [message for message, is_bad in self.warned.items() if is_bad]

    def __iter__(self) -> Iterator[list[Sample]]:
        every = AGREE_EVERY if self.together and distributed.world_size() > 1 else 1
        waiting: list[tuple[str, str, bool]] = []
        try:
            for number, samples in enumerate(self.loader, 1):
                for sample in samples:
                    waiting += [(message, message, True) for message in sample.get("replaced", ())]
                    if "limited" in sample:
                        waiting.append((sample["limited"], sample["limited"], False))
                    if "few_levels" in sample:
                        waiting.append(("few levels", sample["few_levels"], False))
                if number % every == 0 or number == self.length:
                    own = json.dumps(waiting)
                    self._tell(distributed.gather_texts(own) if self.together else [own])
                    waiting = []
                yield samples
        except (ConnectionError, EOFError) as error:  # PyTorch says so itself, unless it was fetching from that worker
            raise RuntimeError("a data worker was killed, perhaps by the system for lack of host memory") from error

    def _tell(self, parts: list[str]) -> None:
        """Print messages of all ranks, one of each key. parts: JSON lists of (key, message, is the image bad?)."""
        for once, message, is_bad in chain.from_iterable(map(json.loads, parts)):
            if once not in self.warned:
                self.warned[once] = is_bad
                if distributed.is_main() or not self.together:
                    used = "; another image (in evaluation: a black one) is used instead" if is_bad else ""
                    print_line(f"warning: {message}{used}")
        if len(self.bad) > self.allowed:
            raise UserError(
                f"more than {self.allowed} of {self.images} images cannot be used, too many to go on:\n  "
                + "\n  ".join(self.bad)
                + "\n`make check-data` finds all of them; mend them, and the same command goes on where it stopped"
            )


def _start_worker(parent: int, _: int) -> None:
    """One thread per worker; signals are ignored: the main process decides when to stop, and ends its workers."""
    signals.die_with_parent(signal.SIGKILL, parent)
    cv2.setNumThreads(0)
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def training_plan(
    dataset: TrainDataset,
    sampler: SamplerConfig,
    data: DataConfig,
    batch_size: int,
    seed: int,
    meta: bool = False,
) -> TrainingPlan:
    """Every batch of a training on this data set; `batch_size` counts images over all ranks and micro-steps.

    meta: with as many images of a meta batch, which `batch_size` does not count.
    """
    annotations = dataset.annotations
    if not len(annotations.train_rows) or not len(annotations.train_images):
        reasons = "".join(f"\n  {count} {reason}" for reason, count in annotations.dropped.items())
        raise UserError(f"{annotations.path}: no image is left to train on; left out were:{reasons or ' none'}")
    wide = annotations.wide if data.group_by_aspect else np.zeros(len(annotations), dtype=bool)
    labels = image_labels(annotations)
    return TrainingPlan(labels=labels, wide=wide, sampler=sampler, batch_size=batch_size, seed=seed, meta=meta)


def train_batches(
    dataset: TrainDataset,
    plan: TrainingPlan,
    *,
    epochs: int,
    accumulate: int = 1,
    start_iteration: int = 0,
    workers: int = 0,
    rank: int | None = None,
    world: int | None = None,
) -> Batches:
    """This rank's micro-batches, `accumulate` an iteration, from one set of workers for all epochs that are left.

    start_iteration: over the whole training; how many are done.
    """
    place = (*_place(rank, world), accumulate)
    lengths = plan.iterations(epochs)

    def micro_batches() -> Iterator[list[ShownImage]]:
        skip = start_iteration
        # Images of the meta batch have the index of the training image beside them.
        positions = rank_slice(np.arange(plan.rows) // (1 + plan.meta), *place)
        for epoch, length in enumerate(lengths):
            if skip < length:
                for batch in plan.epoch(epoch)[skip:]:
                    for images, own in zip(rank_slice(batch, *place), positions.tolist(), strict=True):
                        yield [
                            ShownImage(index, epoch, repeat, sampled_class, batch_index)
                            for (index, repeat, sampled_class), batch_index in zip(images.tolist(), own, strict=True)
                        ]
            skip = max(0, skip - length)

    left = max(0, sum(lengths) - start_iteration)
    return Batches(dataset, micro_batches(), left * accumulate, workers, together=True)


def eval_batches(
    dataset: EvalDataset,
    batch_size: int,
    workers: int = 0,
    skip: Collection[int] = (),
    *,
    rank: int | None = None,
    world: int | None = None,
) -> Batches:
    """This rank's share of all images, each image on exactly one rank, without those whose id is in `skip`."""
    place, ranks = _place(rank, world)
    total = len(dataset)
    done = set(skip)
    ids = dataset.annotations.image_ids
    indices = [i for i in range(total * place // ranks, total * (place + 1) // ranks) if int(ids[i]) not in done]
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    return Batches(dataset, batches, len(batches), workers)


def fill_batches(
    dataset: TrainDataset,
    per_class: int,
    shared: bool,
    seed: int,
    images: int,
    workers: int = 0,
    *,
    rank: int | None = None,
    world: int | None = None,
) -> Batches:
    """Samples that fill the feature memory before stage 2, each with "store_rows" (n,) long: the instances to store.

    images: on a rank at once. shared: one choice of images, shared out batch by batch as in training; else every rank
    makes its own. All ranks get the same number of batches, and all of them are full: places that are left are filled
    with images shown again, of which nothing is stored.
    """
    place, ranks = _place(rank, world)
    fills = [
        memory_fill_images(dataset.annotations, per_class, np.random.default_rng([FILL_EPOCH, seed, stream]))
        for stream in range(1 if shared else ranks)
    ]
    return _dealt_out(dataset, fills, shared, images, workers, place, ranks)


def held_out_batches(
    dataset: TrainDataset,
    images: int,
    workers: int = 0,
    *,
    rank: int | None = None,
    world: int | None = None,
) -> Batches:
    """All images of a data set, dealt out to the ranks and augmented in the same way every time.

    images: on a rank at once. As in filling, batches are full: images that are shown again have no "store_rows".
    """
    place, ranks = _place(rank, world)
    annotations = dataset.annotations
    shown = [(int(index), annotations.rows(index)) for index in annotations.train_images]
    return _dealt_out(dataset, [shown], True, images, workers, place, ranks)


def _dealt_out(
    dataset: TrainDataset,
    fills: list[list[Fill]],
    shared: bool,
    images: int,
    workers: int,
    place: int,
    ranks: int,
) -> Batches:
    """Batches of images with "store_rows": of each rank's own list, or of one that is shared out."""
    # Wide images first, so that those on a rank at once need little padding.
    fills = [sorted(fill, key=lambda each: not dataset.annotations.wide[each[0]]) for fill in fills]
    together, first = (images * ranks, images * place) if shared else (images, 0)
    length = -(-max(map(len, fills)) // together) * together
    own = fills[0 if shared else place]
    nothing = np.zeros(0, dtype=np.int64)
    own = own + [(own[i % len(own)][0], nothing) for i in range(length - len(own))]
    batches = [list(range(start, start + images)) for start in range(first, length, together)]
    return Batches(_FillDataset(dataset, own, together), batches, length // together, workers, together=True)


class _FillDataset:
    """Training samples, augmented as in an epoch of their own, with "store_rows".

    Of large-scale jitter the whole image is left, and nothing is pasted, so that all that is to be stored is there.
    """

    def __init__(self, dataset: TrainDataset, fills: list[Fill], together: int) -> None:
        config = replace(dataset.config, lsj_scale=(1.0, 1.0), copy_paste=0.0)
        self.dataset = TrainDataset(dataset.annotations, dataset.folder, config, dataset.seed)
        self.fills, self.together = fills, together

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Sample:
        index, rows = self.fills[number]
        sample = self.dataset[ShownImage(index, FILL_EPOCH, batch_index=number % self.together)]
        stored = np.isin(sample["rows"].numpy(), rows)  # none of another image, shown in place of a bad one
        return {**sample, "store_rows": torch.from_numpy(np.flatnonzero(stored))}


def _place(rank: int | None, world: int | None) -> tuple[int, int]:
    """(rank, number of ranks), as given or as this process runs."""
    return (
        distributed.rank() if rank is None else rank,
        distributed.world_size() if world is None else world,
    )


# Resources of workers: shared memory for images on their way, and open files.


def bytes_ahead(data: DataConfig, images: int, ranks: int = 1) -> int:
    """Most bytes of training images on their way at once, of `ranks` with micro-batches of `images` on one machine.

    Images are uint8, of the largest size that resizing gives. What else a sample has is small.
    """
    pixels = data.canvas**2 if data.resize == "lsj" else max(data.short_edges) * data.long_edge
    return ranks * data.workers * PREFETCH * images * 3 * pixels


def require_shared_memory(data: DataConfig, images: int, ranks: int = 1, folder: Path = SHARED) -> None:
    """UserError where the images on their way do not fit into `folder`: a worker would die of a bus error.

    images: of a micro-batch; ranks: on this machine.
    """
    if not data.workers or not folder.is_dir():
        return
    needed, free = bytes_ahead(data, images, ranks), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"data.workers = {data.workers}: {ranks} processes with micro-batches of {images} images need up to "
            f"{needed / 10**6:,.0f} MB in {folder}, which has {free / 10**6:,.0f} MB free; in Docker start the "
            f"container with --shm-size={2 * needed // 10**6 + 1}m (or --ipc=host), else fewer workers; "
            "data.workers=0 needs none"
        )


def allow_open_files() -> None:
    """Raise this process's limit of open files where it may: every tensor that a worker hands over is an open file."""
    if os.name == "posix":
        import resource  # there is none on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
