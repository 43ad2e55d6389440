"""Dry run and overfitting: a dry run passes and touches nothing else; a few images are learned by heart."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from loce.config import UserError, load_config
from loce.data.build import train_annotations
from loce.engine import dry_run
from loce.engine.trainer import Trainer
from tests.tiny_runs import LOCE, run

CPU = torch.device("cpu")


def test_a_dry_run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    words = [str(config), f"output={folder}", "train.dry_run=true"]
    for _ in range(2):  # the second takes the place of the first
        dry_run.dry_run(load_config(words), CPU)
    assert capsys.readouterr().out.splitlines()[-1].startswith("dry run: passed")
    log = (folder / "dry_run" / "log.txt").read_text()
    assert "step 2, again from that checkpoint: the same, loss " in log
    assert "peak memory of a process: " in log and "dry run: step 2 trained " in log
    facts = json.loads((folder / "dry_run" / "eval" / "evaluation.json").read_text())
    assert any("4 of 6 images, the others are left out" in note for note in facts["notes"])
    assert sorted(path.name for path in folder.iterdir()) == ["dry_run", "notes.txt"]
    left = {path.name for path in (folder / "dry_run").iterdir()}
    assert "first_samples.jpg" in left and not left & {"checkpoints", "tensorboard"}
    (folder / "config.yaml").write_text("seed: 5\n")
    with pytest.raises(UserError, match="holds another run"):  # as the real run would be refused
        dry_run.dry_run(load_config(words), CPU)


def test_a_dry_run_takes_the_images_with_the_most_objects(config: Path) -> None:
    annotations = train_annotations(load_config([str(config)]))
    objects = {int(i): len(annotations.rows(int(i))) for i in annotations.train_images}
    crowded = dry_run._crowded(annotations, 3)
    assert [objects[int(i)] for i in crowded] == sorted(objects.values(), reverse=True)[:3]


def test_overfitting_shows_the_same_images_and_evaluates_them(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "OVERFIT_STEPS", 3)
    monkeypatch.setattr(dry_run, "OVERFIT_EPOCHS", 2)
    seen: list[tuple[int, torch.Tensor]] = []

    class Watched(Trainer):
        def batches(self, last):
            for batches in super().batches(last):
                seen.extend((sample["image_id"], sample["image"]) for samples in batches for sample in samples)
                yield batches

    monkeypatch.setattr(dry_run, "Trainer", Watched)
    words = [str(config), f"output={tmp_path / 'run'}", "train.overfit=3", "train.batch_size=2"]
    dry_run.overfit(load_config(words), CPU)
    assert len(seen) == 2 * 3 * 2 and len({image_id for image_id, _ in seen}) == 3
    for image_id, image in seen:  # no flip, no jitter
        assert all(torch.equal(image, other) for known, other in seen if known == image_id)
    folder = tmp_path / "run" / "overfit"
    facts = json.loads((folder / "eval" / "evaluation.json").read_text())
    assert any("3 of 12 images" in note for note in facts["notes"])
    log = (folder / "log.txt").read_text()
    assert "overfit: loss " in log and "on these 3 images box AP " in log and "WARNING: not learned by heart" in log


def test_overfitting_needs_an_image_for_each_process(config: Path, tmp_path: Path) -> None:
    words = [str(config), f"output={tmp_path}", "train.overfit=1", "train.accumulate=2"]
    with pytest.raises(UserError, match=r"train.overfit = 1: must be at least processes x train.accumulate = 1 x 2"):
        dry_run.overfit(load_config(words), CPU)


@pytest.mark.slow
def test_a_dry_run_of_loce_on_two_ranks(config: Path, tmp_path: Path) -> None:
    """Each rank has a memory of its own, which the checkpoint holds: the resumed step is the same."""
    words = (*LOCE, f"train.init={tmp_path / 'start'}", f"output={tmp_path / 'run'}", "train.dry_run=true")
    run("train.py", config, f"output={tmp_path / 'start'}", "train.epochs=1", "train.drops=[]", "train.evaluate=false")
    text = run("finetune.py", config, *words, processes=2)
    log = (tmp_path / "run/dry_run/log.txt").read_text()
    assert text.count("dry run: passed") == 1  # rank 0 speaks
    assert "batch: 4 = 2 ranks x 2 images" in log and "\nfeature memory: " in log
    assert "step 2, again from that checkpoint: the same, loss " in log
    assert json.loads((tmp_path / "run/dry_run/eval/metrics.json").read_text())["bbox"]["AP"] is not None
    assert not (tmp_path / "run/dry_run/checkpoints").exists()


@pytest.mark.slow
def test_eight_images_are_learned_by_heart(config: Path, tmp_path: Path) -> None:
    wider = ("model.fpn_channels=32", "model.fc_features=64", "model.mask_channels=16", "model.mask_convs=2")
    words = ("train.overfit=8", "train.batch_size=2", "train.lr=0.16", *wider)
    run("train.py", config, f"output={tmp_path / 'run'}", *words)
    lines = [json.loads(x) for x in (tmp_path / "run/overfit/metrics.jsonl").read_text().splitlines()]
    metrics = json.loads((tmp_path / "run/overfit/eval/metrics.json").read_text())
    assert lines[-1]["loss"] < 0.15 * lines[0]["loss"]
    assert np.mean([metrics["bbox"]["AP50"], metrics["segm"]["AP50"]]) > 0.9
