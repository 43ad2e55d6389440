"""Fixtures for the tests of the heads."""

from collections.abc import Callable

import numpy as np
import pytest

from loce.classes import ClassStats, frequency_groups


@pytest.fixture
def make_stats() -> Callable[[int], ClassStats]:
    """Class facts of a long tail of so many classes: the first is in 200 images, the last in 1."""

    def make(classes: int) -> ClassStats:
        images = np.geomspace(200, 1, classes).round().astype(np.int64)
        return ClassStats(
            names=tuple(f"class {label}" for label in range(classes)),
            category_ids=np.arange(classes, dtype=np.int64) * 2 + 1,
            image_counts=images,
            instance_counts=images * 3,
            groups=frequency_groups(images),
            image_total=300,
        )

    return make
