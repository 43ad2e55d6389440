"""Small checkpoints of MMDetection, and annotation files that name classes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.parity import official, rule

CLASSES = 5
NARROW = {"256": 16, "1024": 12}  # widths of everything behind the backbone


def narrow(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of MMDetection's R-50 with thin heads."""
    if key.startswith("neck.lateral_convs"):
        return (16, *shape[1:])
    if key == "roi_head.bbox_head.shared_fcs.0.weight":
        return (12, 16 * 49)
    return tuple(NARROW.get(str(size), size) for size in shape)


@pytest.fixture(scope="module")
def theirs() -> dict[str, torch.Tensor]:
    """Weights of an MMDetection R-50 for 5 classes: each tensor of the backbone a number, thin heads by the rule."""
    state: dict[str, torch.Tensor] = {}
    for key, shape in official.key_shapes("ResNet-50", CLASSES).items():
        if key.startswith("backbone."):  # a number in the file, whatever the shape
            whole = key.endswith("num_batches_tracked")
            state[key] = torch.tensor(len(state), dtype=torch.int64 if whole else torch.float32).expand(shape)
        else:
            state[key] = torch.from_numpy(rule.weight(key, narrow(key, shape)))
    return state


@pytest.fixture
def written(tmp_path, theirs):
    """Write a variant of MMDetection's checkpoint: keys changed or (None) left out, and what stands beside them."""

    def write(changes: dict | None = None, wrap: str = "state_dict", meta: dict | None = None) -> Path:
        state = {k: v for k, v in {**theirs, **(changes or {})}.items() if v is not None}
        content = {wrap: state, "meta": meta or {}, "optimizer": {"lr": 0.1}} if wrap else state
        path = tmp_path / "source.pth"
        torch.save(content, path)
        return path

    return write


@pytest.fixture
def annotation_file(tmp_path) -> Callable[..., str]:
    """Write an annotation file with one image and one object: name of the file, names and ids of the classes."""

    def write(name: str, names: list[str], ids: list[int] | None = None) -> str:
        ids = ids or list(range(1, len(names) + 1))
        content = {
            "images": [{"id": 1, "file_name": "1.jpg", "width": 20, "height": 20}],
            "categories": [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)],
            "annotations": [
                {
                    "id": 1,
                    "image_id": 1,
                    "category_id": ids[0],
                    "bbox": [2, 2, 9, 9],
                    "area": 81,
                    "iscrowd": 0,
                    "segmentation": [[2, 2, 11, 2, 11, 11, 2, 11]],
                }
            ],
        }
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return str(path)

    return write
