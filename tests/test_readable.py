"""What keeps the code readable: a short loop, a step that goes through few files, waits for the device that say why."""

import ast
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import loce
from loce.config import EvalConfig, HeadConfig, IndicatorConfig, MemoryConfig, ModelConfig, RPNConfig, TrainConfig
from loce.data.masks import CroppedMasks
from loce.engine import loop as engine
from loce.engine.log import RunLog
from loce.models.mask_rcnn import MaskRCNN, build_roi_heads

PACKAGE = Path(loce.__file__).parent
MOST_FILES = 15
MODEL = ModelConfig(
    weights="none", fpn_channels=8, fc_features=8, mask_channels=4, rpn=RPNConfig(pre_nms_train=50, post_nms=20)
)


def samples() -> list[dict]:
    square = np.ones((20, 20), np.uint8)
    boxes = torch.tensor([[10.0, 10.0, 30.0, 30.0], [40.0, 20.0, 60.0, 40.0]])
    masks = CroppedMasks.pack([(square, (10, 10)), (square, (40, 20))], (64, 64))
    image = torch.zeros((3, 64, 64), dtype=torch.uint8)
    return [{"image": image, "boxes": boxes, "labels": torch.tensor([0, 1]), "masks": masks, "image_id": 1}] * 2


@pytest.fixture(scope="module")
def step_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Files of ours that run in one optimiser step of LOCE on the paper's architecture (ResNet-50), small in width."""
    from tests.conftest import stats_of

    stats = stats_of(3)
    roi_heads = build_roi_heads(
        MODEL, HeadConfig(name="equilibrium"), IndicatorConfig(), MemoryConfig(enabled=True), stats
    )
    model = MaskRCNN(MODEL, roi_heads, EvalConfig(), (64, 64))
    model.freeze("trunk")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001)
    train = TrainConfig(batch_size=2, log_every=100)
    log = RunLog(tmp_path_factory.mktemp("run"), "seed: 0\n", epoch_lengths=[2], batch_size=2)
    files: set[str] = set()

    def watch(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            files.add(str(Path(frame.f_code.co_filename).relative_to(PACKAGE)))

    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def one_step(iteration: int, stop: bool) -> None:
        assert not stop
        if iteration == 1:
            sys.setprofile(None)

    def go(iterations: range) -> None:
        batches = iter([samples()] * len(iterations))
        engine.train_one_epoch(model, batches, optimizer, scaler, train, 0, iterations, log, one_step)

    sys.setprofile(watch)
    try:
        go(range(2))
    finally:
        sys.setprofile(None)
        log.close()
    return files


def test_a_step_goes_through_few_files(step_files: set[str]) -> None:
    assert {"engine.py", "models/roi_heads.py", "equilibrium_loss.py", "memory_bank.py"} <= step_files
    assert len(step_files) <= MOST_FILES, sorted(step_files)


def test_the_design_page_shows_the_step(step_files: set[str]) -> None:
    page = (PACKAGE.parent / "docs/design.md").read_text(encoding="utf-8")
    assert [name for name in sorted(step_files) if name not in page] == []


def test_the_loop_fits_a_screen() -> None:
    assert len(inspect.getsource(engine.train_one_epoch).splitlines()) <= 50


WAITS = re.compile(
    r"\.item\(\)|\.cpu\(\)|\.tolist\(\)|\.numpy\(\)|\.nonzero\(|\bnms\(|\bint\([a-z_]+\.max\(\)\)"
    r"|\b(as_|new_)?tensor\(|from_numpy\("  # copies from the host
)
STEP = {
    *(
        "losses",
        "forward",
        "forward_rows",
        "proposals",
        "anchors",
        "level_anchors",
        "level_validity",
        "match",
    ),
    *("encode", "decode", "clip", "finite", "constants", "box_iou", "choose_random", "sample", "select", "pool"),
    *("pyramid_level", "sheets", "mask_targets", "mask_loss", "boxes", "store", "draw", "rows_to_store"),
    *("dense_boxes", "valid", "enqueue"),
    *("update", "instance_scores", "sampling_probability", "equilibrium_loss", "scores", "features"),
}


def test_every_wait_for_the_device_in_a_step_says_why(step_files: set[str]) -> None:
    checked: set[str] = set()
    for name in step_files:
        source = (PACKAGE / name).read_text()
        tree = ast.parse(source)
        lines = source.splitlines()
        for node in ast.walk(tree):
            private = isinstance(node, ast.FunctionDef) and node.name.startswith("_") and node.name != "__init__"
            if isinstance(node, ast.FunctionDef) and (private or node.name in STEP):
                for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                    line = lines[number - 1]
                    if WAITS.search(line) and "_detect_one" not in node.name:
                        assert "# sync:" in line, f"{name}:{number}: {line.strip()}"
                checked.add(node.name)
    assert checked >= STEP, sorted(STEP - checked)  # no name here that the code no longer has
