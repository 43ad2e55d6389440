"""The long-tail view against plain Python on the file's own content."""

from typing import Any

import numpy as np
import pytest

from loce.config import DataConfig, MemoryConfig, SamplerConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.check import expected_views, long_tail_lines
from tests.data.made_annotations import CATEGORY_IDS, as_format, content

MEMORY = MemoryConfig(classes_per_draw=6, features_per_class=3)


def long_tailed() -> dict[str, Any]:
    """40 images; the first category is everywhere, the last in two; one has instances that training leaves out only."""
    made = content(images=40)
    images = [image["id"] for image in made["images"]]
    for row in made["annotations"]:
        row["category_id"] = 7 if row["image_id"] not in images[:6] else 3
        if row["image_id"] in images[:2]:
            row["category_id"] = 1
    crowd = made["annotations"][0]
    crowd |= {"iscrowd": 1, "category_id": 20}
    return made


@pytest.mark.parametrize("threshold", [0.001, 0.2, 1.0])
def test_expected_views_by_counting(write, threshold):
    made = long_tailed()
    rows = [row for row in made["annotations"] if not row["iscrowd"]]
    images = sorted({row["image_id"] for row in rows})
    shows = {c: {row["image_id"] for row in rows if row["category_id"] == c} for c in CATEGORY_IDS}
    own = {c: sum(row["category_id"] == c for row in rows) for c in CATEGORY_IDS}
    factor = {
        i: max(max(1, (threshold / (len(shows[c]) / len(images))) ** 0.5) for c in CATEGORY_IDS if i in shows[c])
        for i in images
    }
    draws = len(images) / 2 * 6 * 3
    stored = [c for c in CATEGORY_IDS if own[c]]
    total = sum(1 / own[c] for c in stored)
    seen = expected_views(LVISAnnotations.open(write(made)), SamplerConfig(repeat_threshold=threshold), MEMORY)
    assert own[20] == 0 and len(stored) == 3
    for label, c in enumerate(CATEGORY_IDS):
        assert seen.uniform[label] == own[c]
        repeated = sum(factor[row["image_id"]] for row in rows if row["category_id"] == c)
        assert seen.repeat_factor[label] == pytest.approx(repeated)
        assert seen.memory_equal[label] == pytest.approx(draws / 3 if own[c] else 0)
        assert seen.memory_counts[label] == pytest.approx(draws / own[c] / total if own[c] else 0)


def test_expected_repeats_are_what_the_sampler_does(write):
    from loce.data.samplers import epoch_images, image_labels

    annotations = LVISAnnotations.open(write(long_tailed()))
    sampler = SamplerConfig(name="repeat_factor", repeat_threshold=0.8)
    labels, generator = image_labels(annotations), np.random.default_rng(0)
    per_image = np.zeros((len(annotations), len(annotations.stats)))
    np.add.at(per_image, (annotations.image_of[annotations.train_rows], annotations.labels[annotations.train_rows]), 1)
    epochs = [per_image[epoch_images(labels, sampler, generator)[0]].sum(axis=0) for _ in range(400)]
    expected = expected_views(annotations, sampler, MEMORY).repeat_factor
    np.testing.assert_allclose(np.mean(epochs, axis=0), expected, rtol=0.05)
    assert (expected[[1, 3]] > 1.2 * annotations.stats.instance_counts[[1, 3]]).all()


def test_the_text_names_groups_and_the_worst_images(write):
    made = as_format(long_tailed(), "coco")
    crowded = made["images"][9]["id"]
    row = next(row for row in made["annotations"] if row["image_id"] == crowded)
    made["annotations"] += [{**row, "id": 5000 + n} for n in range(30)]
    annotations = LVISAnnotations.open(write(made), rare_max=3, common_max=8)
    text = "\n".join(long_tail_lines(annotations, DataConfig(max_instances=20), SamplerConfig(), MEMORY))
    assert "6 x 3 for every 2 images" in text
    assert "(1 have more than data.max_instances = 20 instances)" in text
    first = text.split("instances)\n")[1].splitlines()[0]
    assert first.strip().startswith(f"image {crowded}: 3")
    bars = {line.split()[0]: int(line.split()[1]) for line in text.splitlines()[1:10]}
    counts = annotations.stats.image_counts.tolist()
    assert sum(bars.values()) == 4 and bars["0"] == counts.count(0) == 1 and bars["31-100"] == 1
    empty = LVISAnnotations.open(write(content() | {"annotations": []}))
    assert len(long_tail_lines(empty, DataConfig(), SamplerConfig(), MEMORY)) == 10
