"""Fixtures for all tests."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from loce.classes import ClassStats, frequency_groups

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that a test must give the same results on."""
    return torch.device(request.param)


def stats_of(classes: int) -> ClassStats:
    """Class facts of a long tail of so many classes: the first is in 200 images, the last in 1."""
    images = np.geomspace(200, 1, classes).round().astype(np.int64)
    return ClassStats(
        names=tuple(f"class {label}" for label in range(classes)),
        category_ids=np.arange(classes, dtype=np.int64) * 2 + 1,
        image_counts=images,
        instance_counts=images * 3,
        groups=frequency_groups(images),
        image_total=300,
    )


@pytest.fixture
def make_stats() -> Callable[[int], ClassStats]:
    """`stats_of`."""
    return stats_of
