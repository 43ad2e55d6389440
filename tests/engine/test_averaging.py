"""Moving average of the weights: its float64 twin, exact resume, passes, and what takes it from a checkpoint."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loce.checkpoint.load import Checkpoint
from loce.config import Config, UserError, from_dict, load_config
from loce.engine.arm import Arm
from loce.engine.averaging import averaged_tensors
from loce.engine.inference import evaluate_checkpoints, weights_hash
from loce.engine.preflight import preflight
from loce.engine.train import train
from loce.models.build import build_model
from loce.utils import distributed
from tests.conftest import stats_of
from tests.engine.test_stopping import Running
from tests.tiny_runs import main_file, same_run, train_here
from tests.tiny_runs import run as script

CPU = torch.device("cpu")
EMA = 0.6
KEEP = ("train.checkpoint_every=1", "train.keep_checkpoints=9", "train.evaluate=false", f"train.ema={EMA}")
TODAY = (
    *("train.optimizer=adamw", "train.lr=1e-3", "train.schedule=cosine", "train.decay_norms=false"),
    *("data.resize=lsj", "data.canvas=64", "data.copy_paste=0.7", "data.paste_from=rare"),
)
SECOND = ("train.freeze=trunk", "train.clip_norm=0", "memory.enabled=true", "memory.capacity=20")


@pytest.fixture(scope="module")
def averaged(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run that keeps all of its checkpoints, and the weights that it began with."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    words = [str(config), *KEEP, *TODAY, "train.layer_decay=0.7", f"output={folder}"]
    with preflight(load_config(words)) as found:
        arm = Arm(load_config(words), CPU, found.annotations)
    start = {name: weight.double() for name, weight in arm.model.state_dict().items()}
    train_here([load_config(words)])
    return folder, start


def test_the_average_equals_a_float64_twin(averaged: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, twin = averaged
    for step in range(1, 7):
        found = Checkpoint.open(folder / f"checkpoints/{step:09d}")
        decay = min(EMA, (1 + step) / (10 + step))
        twin = {name: decay * twin[name] + (1 - decay) * found.model[name].double() for name in found.averages}
        for name, value in found.averages.items():
            torch.testing.assert_close(value.double(), twin[name], rtol=1e-5, atol=1e-7)
    assert min((1 + 6) / (10 + 6), EMA) < EMA  # steps of the ramp
    assert any(not torch.equal(value, found.model[name]) for name, value in found.averages.items())


def test_stopped_and_gone_on_is_the_same_run(config: Path, averaged: tuple[Path, object], tmp_path: Path) -> None:
    """AdamW's moments, the cosine and the average, and in the middle of an epoch the pasted images, from a worker."""
    words = [str(config), *KEEP, *TODAY, "train.layer_decay=0.7", "data.workers=1", f"output={tmp_path / 'run'}"]
    train_here([load_config(words)], 2)
    train_here([load_config(words)])
    same_run(tmp_path / "run", averaged[0])
    state = Checkpoint.open(averaged[0]).state["optimizer"]["state"]
    assert all(float(moments["step"]) == 6 and moments["exp_avg_sq"].abs().sum() for moments in state.values())


def test_what_takes_a_checkpoint_takes_the_average(
    config: Path, averaged: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    start = Checkpoint.open(averaged[0])
    detector, last = start.detector(), start.detector(start.config_with(["train.ema=0"]))
    for name, value in start.averages.items():
        assert torch.equal(detector.state_dict()[name], value)
        assert torch.equal(last.state_dict()[name], start.model[name])
    with pytest.raises(UserError, match=r"train.ema = 0.5: its weights were averaged with 0.6 in training; 0 takes"):
        start.detector(start.config_with(["train.ema=0.5"]))
    # A second stage starts from it, and says so.
    words = [str(config), f"train.init={averaged[0]}", f"output={tmp_path / 'next'}"]
    with preflight(load_config(words)) as found:
        arm = Arm(load_config(words), CPU, found.annotations)
    assert "averages over its training (train.ema=0.6)" in arm.notes[0]
    for name, weight in arm.model.rpn.named_parameters("rpn"):
        assert torch.equal(weight, detector.get_parameter(name))


def test_a_run_is_evaluated_with_the_average(config: Path, tmp_path: Path) -> None:
    """`evaluate` on the checkpoint finds the same detections."""
    folder = tmp_path / "run"
    words = [str(config), f"train.ema={EMA}", "train.epochs=1", "train.drops=[]", f"output={folder}"]
    train(load_config(words))
    text = (folder / "eval/origin.txt").read_text()
    start = Checkpoint.open(folder)
    averages, weights = start.detector(), start.detector(start.config_with(["train.ema=0"]))
    assert weights_hash(averages) in text and weights_hash(weights) not in text
    written = (folder / "eval/metrics.json").read_text()
    before = (folder / "eval/detections").stat().st_mtime
    evaluate_checkpoints([folder], None, [], "cpu", resamples=0)
    assert (folder / "eval/metrics.json").read_text() == written
    assert (folder / "eval/detections").stat().st_mtime == before
    assert "train.ema=0.6" in (folder / "log.txt").read_text()
    (other,) = evaluate_checkpoints([folder], None, ["train.ema=0"], "cpu", resamples=0)
    assert other.name == "eval_train.ema=0.0" and weights_hash(weights) in (other / "origin.txt").read_text()


@pytest.mark.slow
def test_evaluation_between_epochs_changes_nothing(config: Path, tmp_path: Path) -> None:
    for name, every in (("some", 1), ("none", 0)):
        words = [f"train.evaluate_every={every}", f"train.evaluate={str(bool(every)).lower()}"]
        train(load_config([str(config), f"train.ema={EMA}", *words, f"output={tmp_path / name}"]))
    some, none = (torch.load(main_file(tmp_path / name), weights_only=True) for name in ("some", "none"))
    for part in ("model", "ema"):
        assert all(torch.equal(value, none[part][name]) for name, value in some[part].items())
    assert (tmp_path / "some/eval_epoch_01/metrics.json").exists()


@pytest.mark.slow
def test_arms_of_a_pass_have_the_average_of_their_own_runs(config: Path, stage1: Path, tmp_path: Path) -> None:
    def recipe(name: str, *words: str) -> Config:
        folder = tmp_path / name
        return load_config([str(config), *KEEP, *TODAY, *SECOND, f"train.init={stage1}", f"output={folder}", *words])

    heads = {"ebl": "head.name=equilibrium", "softmax": "head.name=softmax"}
    trainer = train_here([recipe(name, head) for name, head in heads.items()])
    models = [arm.model for arm in trainer.arms]
    before = [weights_hash(model) for model in models]
    with trainer.arms[0].averaged(), trainer.arms[1].averaged():
        assert models[0].rpn is models[1].rpn and all(weights_hash(m) != b for m, b in zip(models, before, strict=True))
    assert [weights_hash(model) for model in models] == before
    for name, head in heads.items():
        train_here([recipe(f"{name} alone", head)])
        same_run(tmp_path / name, tmp_path / f"{name} alone")


@pytest.mark.slow
def test_two_ranks_have_the_average_of_one(config: Path, tmp_path: Path) -> None:
    """Up to rounding, with AdamW, jitter and pasted objects; evaluated by both ranks."""
    for ranks in (1, 2):
        words = (*TODAY, f"train.ema={EMA}", f"output={tmp_path / str(ranks)}")
        script("train.py", config, *words, processes=ranks)
    one, two = (Checkpoint.open(tmp_path / str(ranks)) for ranks in (1, 2))
    assert list(one.averages) == list(two.averages) != []
    for name, value in one.averages.items():
        torch.testing.assert_close(two.averages[name], value, rtol=1e-3, atol=1e-4)
    assert weights_hash(two.detector()) in (tmp_path / "2/eval/origin.txt").read_text()


@pytest.mark.slow
def test_a_killed_run_of_two_ranks_has_the_average_of_one_in_peace(config: Path, tmp_path: Path) -> None:
    words = (config, *KEEP, *TODAY)
    script("train.py", *words, f"output={tmp_path / 'peace'}", processes=2)
    killed = Running("train.py", (*words, f"output={tmp_path / 'killed'}"), processes=2)
    try:
        killed.until("iter 3/3")
        os.kill(killed.ranks()[1], signal.SIGKILL)
        killed.process.communicate(timeout=280)
    finally:
        killed.kill()
    assert 2 <= Checkpoint.open(tmp_path / "killed").state["iteration"] < 6
    assert "of 6 iterations are done" in script("train.py", *words, f"output={tmp_path / 'killed'}", processes=2)
    same_run(tmp_path / "killed", tmp_path / "peace")


def test_what_is_averaged() -> None:
    """Parameters that train; statistics of batch norms where they change; no other buffer."""
    words = {"backbone": "resnet18", "weights": "none", "frozen_stages": 0}
    batch = build_model(from_dict({"model": {**words, "norm": "batch"}}), stats_of(3), pretrained=False)
    buffers = set(averaged_tensors(batch)) - {name for name, _ in batch.named_parameters()}
    assert buffers and {name.rpartition(".")[2] for name in buffers} == {"running_mean", "running_var"}
    assert set(averaged_tensors(batch)) <= set(batch.state_dict())
    frozen = from_dict({"model": words, "train": {"freeze": "trunk", "init": "x"}})
    names = set(averaged_tensors(build_model(frozen, stats_of(3), pretrained=False)))
    assert names and not any(name.startswith(("backbone", "roi_heads.tracker")) for name in names)


def test_statistics_of_batch_norms_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their means over ranks, also of the averages, before they are evaluated or saved; frozen ones stay."""
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    model.config = SimpleNamespace(norm="batch")
    norm = model[0].state_dict()
    norm["running_mean"].copy_(torch.tensor([1.0, 2.0, 3.0]))
    norm["running_var"].fill_(2.0)
    values = {name: 10 + x.detach() for name, x in averaged_tensors(model).items()}
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda own: own + 3 * own)  # the other rank has thrice as much
    arm = object.__new__(Arm)
    arm.model, arm.average = model, SimpleNamespace(values=values, in_place=lambda: None)
    arm.averaged()
    assert norm["running_mean"].tolist() == [2.0, 4.0, 6.0] and norm["running_var"].tolist() == [4.0] * 3
    assert values["0.running_mean"].tolist() == [22.0, 24.0, 26.0] and values["0.weight"].tolist() == [11.0] * 3
    model.config.norm = "frozen"
    arm.averaged()
    assert norm["running_var"].tolist() == [4.0] * 3
