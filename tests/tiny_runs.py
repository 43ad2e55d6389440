"""Runs of our scripts on a tiny Glyph-LVIS, in processes of their own, and what they leave. For tests."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from loce.config import Config
from loce.engine.preflight import preflight
from loce.engine.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
data: {{train_annotations: {0}/annotations/train.json, train_images: {0}, val_annotations: {0}/annotations/val.json,
  val_images: {0}, short_edges: [64], test_short_edge: 64, workers: 0}}
model: {{backbone: tiny, weights: none, norm: group, frozen_stages: 0, fpn_channels: 16, fc_features: 32,
  mask_channels: 8, mask_convs: 1, rpn: {{anchor_scale: 4, pre_nms_train: 100, pre_nms_test: 50, post_nms: 50,
  batch_per_image: 32}}, roi: {{batch_per_image: 32, finest_scale: 14}}}}
train: {{batch_size: 4, lr: 0.01, warmup_iterations: 2, epochs: 2, drops: [1], log_every: 1, clip_norm: 10}}
"""
LOCE = ("head.name=equilibrium", "memory.enabled=true", "train.freeze=trunk")
TIMING = ("images_per_second", "data_share", "peak_memory_gib")  # what of a line of metrics.jsonl no seed decides


def command(script: str, *words: str | Path, processes: int = 1) -> list[str]:
    """The command line of a script of ours."""
    launch = [sys.executable]
    if processes > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    return [*launch, str(ROOT / "scripts" / script), *map(str, words)]


def environment() -> dict[str, str]:
    """The environment that scripts run in."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(script: str, *words: str | Path, processes: int = 1, code: int = 0) -> str:
    """Output of a script of ours, which must end with `code`."""
    line = command(script, *words, processes=processes)
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def train_here(configs: Sequence[Config], last: int | None = None) -> Trainer:
    """What `loce.engine.train` does, in this process: to the end, or until `last` iterations are done."""
    with preflight(*configs) as found:
        trainer = Trainer(configs, torch.device("cpu"), found.annotations, found.checkpoints)
    trainer.open_log()
    trainer.fill_memory()
    trainer.fit(last)
    trainer.close_log()
    return trainer


def in_namespace(script: str) -> subprocess.CompletedProcess[str]:
    """A shell script as root of a user namespace, where it may mount; skips the test where there are none."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    line = ["unshare", "-rm", "bash", "-c", script]
    return subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=300)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main_file(folder: Path) -> Path:
    return max(folder.glob("checkpoints/*/main.pt"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(main_file(folder), weights_only=True)["model"]
    return {**state, **(memory(folder) if main_file(folder).with_name("memory0.pt").exists() else {})}


def memory(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(main_file(folder).with_name(f"memory{rank}.pt"), weights_only=True)


def same_run(one: Path, other: Path) -> None:
    """Fail where two runs differ in the weights or memory of their last checkpoint, in a line of their metrics, or in
    what became of a class."""
    assert (one / "equilibrium.jsonl").read_text() == (other / "equilibrium.jsonl").read_text() != ""
    for line, expected in zip(metrics(one), metrics(other), strict=True):
        assert {k: v for k, v in line.items() if k not in TIMING} == {
            k: v for k, v in expected.items() if k not in TIMING
        }
    assert main_file(one).parent.name == main_file(other).parent.name
    for file in sorted(main_file(other).parent.glob("*.pt")):
        found, expected = (torch.load(f, weights_only=True) for f in (main_file(one).with_name(file.name), file))
        same(found, expected, file.name)


def same(found: object, expected: object, place: str) -> None:
    """Fail, naming the place, where two nested containers differ in anything but the run folder's name."""
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert isinstance(found, dict) and list(found) == list(expected), place
        for key, value in expected.items():
            if place != "main.pt/config":
                same(found[key], value, f"{place}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert isinstance(found, (list, tuple)) and len(found) == len(expected), place
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            same(a, b, f"{place}/{number}")
    elif isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor) and found.dtype == expected.dtype, place
        assert torch.equal(found, expected), place
    else:
        assert found == expected, place
