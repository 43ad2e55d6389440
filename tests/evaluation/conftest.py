"""Fixtures for the evaluation tests."""

from typing import Any

import numpy as np
import pytest


@pytest.fixture
def numpy_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name that the released `lvis` asks numpy for; gone since numpy 1.24."""
    monkeypatch.setattr(np, "float", float, raising=False)


@pytest.fixture
def small() -> dict[str, Any]:
    """Two images of 100 x 100 px and three categories (one without objects); category ids have gaps."""
    box = [10.0, 10.0, 40.0, 40.0]
    shape = [[10.0, 10.0, 50.0, 10.0, 50.0, 50.0, 10.0, 50.0]]
    entry = {"bbox": box, "area": 1600.0, "segmentation": shape}
    return {
        "images": [
            {"id": 7, "height": 100, "width": 100, "neg_category_ids": [9], "not_exhaustive_category_ids": []},
            {"id": 3, "height": 100, "width": 100, "neg_category_ids": [], "not_exhaustive_category_ids": [5]},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 2, **entry},
            {"id": 2, "image_id": 3, "category_id": 5, **entry},
            {"id": 3, "image_id": 3, "category_id": 2, **entry},
        ],
        "categories": [
            {"id": 9, "name": "none", "frequency": "r"},
            {"id": 2, "name": "often", "frequency": "f"},
            {"id": 5, "name": "loose", "frequency": "c"},
        ],
    }
