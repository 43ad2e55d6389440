"""The models that the parity tests share."""

from collections.abc import Iterator

import pytest
import torch

from loce.models.mask_rcnn import MaskRCNN
from tests.deviations import TABLES, Deviations
from tests.parity import official


@pytest.fixture(scope="session")
def deviations() -> Deviations:
    return TABLES["official LOCE"]


@pytest.fixture(scope="module", autouse=True)
def _strided() -> Iterator[None]:
    """RoIs and anchors are chosen evenly strided, as where the official numbers were made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loce.models.boxes.choose_random", official.strided)
        yield


@pytest.fixture(scope="session")
def detector() -> MaskRCNN:
    """The plain model in evaluation mode."""
    torch.manual_seed(0)
    return official.model().eval()
