"""The models that the parity tests share, and the table of deviations after the tests' own summary."""

import pytest
import torch

from loce.models.mask_rcnn import MaskRCNN
from tests.parity import official
from tests.parity.deviations import TABLE, Deviations


@pytest.fixture(scope="session")
def deviations() -> Deviations:
    return TABLE


@pytest.fixture(scope="session")
def detector() -> MaskRCNN:
    """The plain model in evaluation mode."""
    torch.manual_seed(0)
    return official.model().eval()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TABLE.rows:
        terminalreporter.section("largest deviations from the official numbers")
        terminalreporter.write_line(TABLE.table())
