"""Batches on a GPU, the next one copied there while one is trained on."""

from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any

import torch

from loce.data.dataset import Sample

MOVED = ("image", "boxes", "labels", "masks", "ignored", "store_rows")  # what the model reads, where a sample has it


def prefetched(batches: Iterator[list[Sample]], device: torch.device) -> Iterator[list[Sample]]:
    """The batches; on CUDA moved to the device by a stream of its own, one batch ahead, and no host waits for it.

    batches: in page-locked memory. Moved samples keep their labels on the host, too, as "host_labels".
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def copies() -> Iterator[Any]:
        for samples in batches:
            with torch.cuda.stream(stream):
                moved = [_moved(sample, device) for sample in samples]
            yield moved, stream.record_event()

    # By pairs: the copy of the next batch is asked for before the step of one is.
    for (samples, copied), _ in pairwise(chain(copies(), [None])):
        training = torch.cuda.current_stream(device)
        training.wait_event(copied)
        for sample in samples:
            for name in sample.keys() & MOVED:
                sample[name].record_stream(training)  # else the copy after the next could take its memory too early
        yield samples


def _moved(sample: Sample, device: torch.device) -> Sample:
    there = {name: sample[name].to(device, non_blocking=True) for name in MOVED if name in sample}
    return {**sample, **there, "host_labels": sample["labels"]}
