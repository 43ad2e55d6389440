"""The device that is not there."""

from collections.abc import Iterator

import pytest

from benchmarks.pretend_device import PretendDevice


@pytest.fixture
def gpu() -> Iterator[PretendDevice]:
    """All of the test runs with it."""
    with PretendDevice() as device:
        yield device
