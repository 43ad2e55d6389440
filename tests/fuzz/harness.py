"""One damaged data set through all that reads it: it trains with counted drops, or a message says what is wrong."""

import json
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loce.config import (
    DataConfig,
    EvalConfig,
    HeadConfig,
    IndicatorConfig,
    MemoryConfig,
    ModelConfig,
    RoIConfig,
    RPNConfig,
    SamplerConfig,
)
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.check import Report, check_set, long_tail_lines
from loce.data.loader import TrainDataset, train_batches, training_plan
from loce.data.transforms import ImageError
from loce.evaluation import load_annotations
from loce.models.mask_rcnn import MaskRCNN, build_roi_heads
from loce.utils.errors import UserError

DATA = DataConfig(short_edges=(48, 64), long_edge=100, test_short_edge=64, workers=0)
MODEL = ModelConfig(
    backbone="tiny",
    weights="none",
    norm="group",
    frozen_stages=0,
    fpn_channels=8,
    fc_features=8,
    mask_channels=8,
    mask_convs=1,
    rpn=RPNConfig(anchor_scale=4, pre_nms_train=50, post_nms=30, batch_per_image=16),
    roi=RoIConfig(batch_per_image=16, finest_scale=14),
)
LONGEST = 120  # seconds a case may take


class HangError(Exception):
    """A case took too long."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises HangError in the block after so many seconds."""

    def stop(*_: object) -> None:
        raise HangError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_case(path: Path, images: Path, options: dict[str, bool], step: bool) -> str:
    """How it ended: "trained" or "refused". Anything but a UserError comes out as it is.

    options: of `LVISAnnotations.open`; step: train the tiny model on one batch, too.
    """
    with time_limit(LONGEST):
        report = Report()
        check_set(str(path), str(images), report, sample=100, workers=1)
        assert report.lines
        try:
            annotations = LVISAnnotations.open(path, **options)
            check_against_json(annotations, json.loads(path.read_bytes().decode("utf-8-sig")))
            assert long_tail_lines(annotations, DATA, SamplerConfig(), MemoryConfig())
            annotations.require_images(images)
            train(annotations, images, step)
        except UserError as error:
            assert len(str(error)) > 20
            # What the doctor calls good trains, but for images that are hidden in ways only an epoch shows.
            assert report.problems or isinstance(error, ImageError), f"check-data found nothing wrong: {error}"
            return "refused"
        finally:
            try:
                load_annotations(path)
            except UserError as error:
                assert len(str(error)) > 20
        return "trained"


def check_against_json(annotations: LVISAnnotations, made: dict[str, Any]) -> None:
    """No class comes or goes in silence, and every annotation is used or counted."""
    assert annotations.stats.names == tuple(str(category["name"]) for category in made["categories"])
    assert annotations.stats.category_ids.tolist() == [category["id"] for category in made["categories"]]
    assert len(annotations.labels) == len(made["annotations"]) and len(annotations) == len(made["images"])
    parts = ("polygon parts", "segmentation missing", "run-length code", "masks that", "images")
    lost = sum(number for reason, number in annotations.dropped.items() if not reason.startswith(parts))
    assert len(annotations.train_rows) + lost == len(annotations.labels), annotations.dropped


def train(annotations: LVISAnnotations, images: Path, step: bool) -> None:
    """An epoch of samples that are as promised, and a step of training."""
    dataset = TrainDataset(annotations, images, DATA, seed=0)
    plan = training_plan(dataset, SamplerConfig(), DATA, 2, seed=0)
    for samples in train_batches(dataset, plan, epochs=1):
        for sample in samples:
            check_sample(sample, len(annotations.stats))
        if step:
            torch.manual_seed(0)
            heads = build_roi_heads(
                MODEL, HeadConfig(name="equilibrium"), IndicatorConfig(), MemoryConfig(enabled=True), annotations.stats
            )
            model = MaskRCNN(MODEL, heads, EvalConfig(), (64, 100))
            loss = sum(model.train()(samples).values())
            assert math.isfinite(loss.item())
            loss.backward()
            step = False


def check_sample(sample: dict[str, Any], classes: int) -> None:
    """Finite boxes inside the image, labels of the file, a mask for each."""
    boxes, (_, height, width) = sample["boxes"], sample["image"].shape
    assert len(boxes) == len(sample["labels"]) == len(sample["masks"]) == len(sample["rows"])
    assert torch.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
    assert (boxes <= torch.tensor([width, height, width, height])).all()
    assert ((sample["labels"] >= 0) & (sample["labels"] < classes)).all()
    assert torch.isfinite(sample["ignored"]).all()
