"""Sheets of pictures: the samples are those of training, colours tell the groups, and making them changes nothing."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from loce import build
from loce.config import load_config
from loce.contact_sheet import CAPTION, CELL, GAP, TITLE, examples, first_samples, sheet
from loce.data.dataset import TrainDataset
from loce.data.loader import train_batches, training_plan
from loce.drawing import GROUP_RGB


def test_the_first_samples_are_those_of_training(config: Path) -> None:
    options = load_config([str(config), "train.batch_size=2"])
    dataset = build.train_dataset(options, build.train_annotations(options))
    plan = training_plan(dataset, options.sampler, options.data, 2, options.seed)
    shown: list[tuple[int, float]] = []

    class Watched(TrainDataset):
        def __getitem__(self, key: tuple[int, ...]) -> dict:
            sample = super().__getitem__(key)
            shown.append((sample["image_id"], float(sample["image"].double().mean())))
            return sample

    watched = Watched(dataset.annotations, dataset.folder, options.data, options.seed)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    picture = first_samples(watched, plan)
    assert torch.equal(torch.get_rng_state(), before)
    batches = train_batches(dataset, plan, epochs=1)
    trained = [(s["image_id"], float(s["image"].double().mean())) for batch in batches for s in batch]
    assert shown == trained[:16] and len(shown) == 12  # all there are
    rows = 3
    assert picture.shape == (TITLE + rows * (CELL + GAP + CAPTION), 4 * (CELL + GAP) + GAP, 3)
    group = str(dataset.annotations.stats.groups[0])
    assert (np.abs(picture[TITLE:].astype(int) - GROUP_RGB[group]).max(axis=2) == 0).sum() > 1000


def test_examples_show_each_group(config: Path) -> None:
    options = load_config([str(config)])
    dataset = build.train_dataset(options, build.train_annotations(options))
    annotations = dataset.annotations
    groups = np.array(["r", "c", "f", "f", "f", "f"])
    stats = dataclasses.replace(annotations.stats, groups=groups)
    chosen = examples(dataset, stats, 6)
    assert len(set(chosen)) == 6 and chosen == examples(dataset, stats, 6)
    for place, image in enumerate(chosen[:3]):
        assert groups[place] in groups[annotations.labels[annotations.rows(image)]]
    assert len(examples(dataset, stats, 1000)) == len(annotations.train_images)


def test_a_sheet_of_few_pictures() -> None:
    page = sheet([np.full((30, 60, 3), 7, np.uint8)], ["é"], "title")
    tile = page[TITLE : TITLE + CELL // 2, GAP : GAP + CELL]
    assert (tile == 7).all() and (page[TITLE + CELL // 2 + CAPTION :] == 255).all()
