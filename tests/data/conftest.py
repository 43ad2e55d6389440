"""Annotation and image files in a temporary folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from loce.data.annotations.lvis import LVISAnnotations


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes content (or text, or bytes) as an annotation file and gives its path."""

    def write_file(made: Any, name: str = "annotations.json") -> str:
        path = tmp_path / name
        if not isinstance(made, bytes):
            made = (made if isinstance(made, str) else json.dumps(made)).encode()
        path.write_bytes(made)
        return str(path)

    return write_file


@pytest.fixture
def images(tmp_path: Path) -> Callable[[LVISAnnotations], Path]:
    """Draws an image file for every image of an annotation file and gives the folder."""

    def draw(annotations: LVISAnnotations) -> Path:
        rng = np.random.default_rng(0)
        folder = tmp_path / "images"
        for index, (height, width) in enumerate(annotations.image_sizes.tolist()):
            path = folder / annotations.name(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
            cv2.imwrite(str(path), cv2.resize(coarse, (width, height)))
        return folder

    return draw
