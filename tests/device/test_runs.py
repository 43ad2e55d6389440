"""Whole runs on the pretended device, evaluation included: the same as on the CPU, and they go on on either."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.pretend_device import CUDA, PretendDevice, reason
from loce.checkpoint.load import load_model
from loce.config import load_config
from loce.engine import loop
from loce.engine.inference import evaluate_checkpoints
from loce.engine.train import train
from loce.utils.errors import Stopped
from tests.tiny_runs import LOCE, main_file, metrics, same

TIMING = ("images_per_second", "data_share", "peak_memory_gib")
SIMCAL = (
    "head.name=simcal",
    "sampler.name=bilevel",
    "head.simcal.layers=3fc_rand",
    "memory.enabled=true",
    "memory.level=roi",
)


def run(config: Path, output: Path, device: str, *words: str) -> Path:
    """A training in this process; on the pretended device where it is asked for."""
    options = load_config([str(config), f"output={output}", f"device={device}", *words])
    if device == "cpu":
        train(options)
        return output
    with PretendDevice() as gpu:
        train(options)
    # What waits on the way says why; only saving, logs and evaluation copy much.
    steps = [
        place for _, place in gpu.waits if place.startswith(("loce/engine/loop", "loce/heads", "loce/memory_bank"))
    ]
    assert all(map(reason, steps))
    return output


def same_training(one: Path, other: Path) -> None:
    """Weights, optimiser, memory, losses and detections' numbers, to the last bit."""
    for folder in (one, other):
        assert (folder / "eval" / "metrics.json").is_file()
    for found, expected in zip(metrics(one), metrics(other), strict=True):
        same(
            {k: v for k, v in found.items() if k not in TIMING},
            {k: v for k, v in expected.items() if k not in TIMING},
            "line",
        )
    names = sorted(file.name for file in main_file(one).parent.glob("*.pt"))
    assert {"main.pt", "rank0.pt"} <= set(names)
    for name in names:
        found, expected = (
            torch.load(main_file(f).with_name(name), weights_only=True, map_location="cpu") for f in (one, other)
        )
        keys = {"main.pt": ("model", "optimizer", "iteration"), "rank0.pt": ("head", "window")}.get(name, found)
        for key in keys:
            same(found[key], expected[key], f"{name}/{key}")
    assert (one / "eval/metrics.json").read_text() == (other / "eval/metrics.json").read_text()


@pytest.mark.slow
def test_both_stages_are_those_of_the_cpu(config: Path, stage1: Path, tmp_path: Path):
    """Stage 1, and LOCE from it: filling, training, checkpoints, evaluation with masks and lost objects."""
    there = run(config, tmp_path / "stage1", "cuda")
    same_training(there, stage1)
    loce = [run(config, tmp_path / f"loce_{d}", d, *LOCE, f"train.init={there}") for d in ("cuda", "cpu")]
    same_training(*loce)


@pytest.mark.slow
def test_a_run_goes_on_exactly(config: Path, stage1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped after two iterations, with a head that draws rows; the device's random state is in the checkpoint."""
    words = (*SIMCAL, "train.freeze=detector", f"train.init={stage1}", "train.checkpoint_every=2")
    whole = run(config, tmp_path / "whole", "cuda", *words)
    plain, steps = loop._agree, [0]

    def stopping(*arguments: Any) -> tuple[bool, bool]:
        steps[0] += 1
        return plain(*arguments)[0], steps[0] == 2

    monkeypatch.setattr(loop, "_agree", stopping)
    with pytest.raises(Stopped):
        run(config, tmp_path / "parts", "cuda", *words)
    monkeypatch.undo()
    same_training(run(config, tmp_path / "parts", "cuda", *words), whole)
    rng = [
        torch.load(main_file(f).with_name("rank0.pt"), weights_only=True)["rng"] for f in (whole, tmp_path / "parts")
    ]
    assert torch.equal(rng[0]["cuda"], rng[1]["cuda"]) and torch.equal(rng[0]["cpu"], rng[1]["cpu"])


@pytest.mark.slow
def test_checkpoints_change_devices(config: Path, stage1: Path, tmp_path: Path):
    """What one device saved, the other evaluates, predicts with, and trains on."""
    there = run(config, tmp_path / "stage1", "cuda", "train.evaluate=false", "train.checkpoint_every=3")
    evaluate_checkpoints([there], tmp_path / "eval_cpu", (), "cpu")
    assert (tmp_path / "eval_cpu/metrics.json").read_text() == (stage1 / "eval/metrics.json").read_text()
    with PretendDevice():
        evaluate_checkpoints([stage1], tmp_path / "eval_cuda", (), "cuda")
        assert load_model(there, CUDA).pixel_mean.device == CUDA
    assert (tmp_path / "eval_cuda/metrics.json").read_text() == (stage1 / "eval/metrics.json").read_text()

    # A run of the CPU goes on over there from its middle, and ends as it would have.
    half = tmp_path / "half"
    run(config, half, "cpu", "train.checkpoint_every=3", "train.keep_checkpoints=9")
    newest = main_file(half).parent
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    same_training(run(config, half, "cuda", "train.checkpoint_every=3", "train.keep_checkpoints=9"), stage1)
