"""What keeps the code readable: a short loop, a step that goes through few files, waits for the device that say why."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import loce
from loce.config import EvalConfig, HeadConfig, IndicatorConfig, MemoryConfig, ModelConfig, RPNConfig, TrainConfig
from loce.data.masks import CroppedMasks
from loce.engine.loop import train_step
from loce.engine.trainer import Trainer
from loce.models.build import build_optimizer
from loce.models.mask_rcnn import MaskRCNN, build_roi_heads
from tests.conftest import stats_of
from tests.tiny_runs import LOCE, ROOT, command, environment

PACKAGE = Path(loce.__file__).parent
MOST_FILES, MOST_FRAMES = 15, 8
INFERENCE = ("_detect_one", "_classify")  # no part of a step
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
def step_files() -> set[str]:
    """Files of ours that run in one optimiser step of LOCE on the paper's architecture (ResNet-50), small in width."""
    stats = stats_of(3)
    roi_heads = build_roi_heads(
        MODEL, HeadConfig(name="equilibrium"), IndicatorConfig(), MemoryConfig(enabled=True), stats
    )
    model = MaskRCNN(MODEL, roi_heads, EvalConfig(), (64, 64))
    model.freeze("trunk")
    model.train()
    optimizer = build_optimizer(model, TrainConfig())
    arm = SimpleNamespace(model=model, optimizer=optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False))
    files: set[str] = set()

    def watch(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            files.add(str(Path(frame.f_code.co_filename).relative_to(PACKAGE)))

    sys.setprofile(watch)
    try:
        train_step(model, [arm], [samples()], TrainConfig(), 0.001)
    finally:
        sys.setprofile(None)
    return files


def test_a_step_goes_through_few_files(step_files: set[str]) -> None:
    assert {"engine/loop.py", "models/roi_heads.py", "equilibrium_loss.py", "memory_bank.py"} <= step_files
    assert len(step_files) <= MOST_FILES, sorted(step_files)


def test_the_design_page_shows_the_step(step_files: set[str]) -> None:
    page = (PACKAGE.parent / "docs/design.md").read_text(encoding="utf-8")
    assert [name for name in sorted(step_files) if name not in page] == []


# Runs a script of ours until the loss of Eq. 3; prints the frames of ours that lead there, from `main` on.
TO_THE_LOSS = """
import runpy, sys
root = sys.argv.pop(1)
def watch(frame, event, _):
    if event == "call" and frame.f_code.co_name == "equilibrium_loss":
        sys.setprofile(None)
        names = []
        while frame.f_code.co_name != "main":
            if frame.f_code.co_filename.startswith((root + "/loce/", root + "/scripts/")):
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        sys.exit(" ".join(["frames: main", *names[::-1]]))
sys.argv = sys.argv[1:]
sys.setprofile(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_few_frames_lead_from_main_to_the_loss(config: Path, stage1: Path, tmp_path: Path) -> None:
    """And they are those that a reader expects."""
    script, *words = command("finetune.py", config, *LOCE, f"train.init={stage1}", f"output={tmp_path}/run")[1:]
    line = [sys.executable, "-c", TO_THE_LOSS, str(ROOT), script, *words]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=300)
    frames = done.stderr.rpartition("frames: ")[2].split()
    assert frames[:5] == ["main", "train", "fit", "train_step", "forward"], done.stderr
    assert frames[-1] == "equilibrium_loss" and len(frames) <= MOST_FRAMES, frames


def test_training_imports_no_report_no_drawing_no_converter() -> None:
    code = "import sys, loce.engine.train; print(*(name for name in sys.modules if name.startswith(('loce', 'matpl'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "loce.engine.trainer" in loaded
    rooms = ("loce.report", "loce.data.glyphs", "loce.checkpoint.convert", "matplotlib")
    others = {"loce.engine.pictures", "loce.engine.profiling", "loce.engine.forest_building"}
    assert not [name for name in loaded if name.startswith(rooms) or name in others]


def test_the_loop_fits_a_screen() -> None:
    for function in (Trainer.fit, train_step):
        assert len(inspect.getsource(function).splitlines()) <= 50


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
    *("pyramid_level", "sheets", "mask_targets", "mask_loss", "boxes", "store", "draw"),
    *("dense_boxes", "valid", "enqueue"),
    *("sums", "apply_sums", "divisor", "instance_scores"),
    *("sampling_probability", "equilibrium_loss", "scores", "features"),
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
                    if WAITS.search(line) and node.name not in INFERENCE:
                        assert "# sync:" in line, f"{name}:{number}: {line.strip()}"
                checked.add(node.name)
    assert checked >= STEP, sorted(STEP - checked)  # no name here that the code no longer has
