"""Evaluations between epochs: they change nothing in training, stay in the log over kills, and keep the best."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loce.config import TrainConfig, load_config
from loce.engine import validation
from loce.engine.validation import best_checkpoint, due, note_best
from tests.engine.test_resume import run_killed
from tests.tiny_runs import TIMING, main_file, metrics, run, same_run, train_here


def test_when() -> None:
    train = TrainConfig(epochs=6, evaluate_every=2)
    assert [epoch for epoch in range(1, 7) if due(train, epoch)] == [2, 4]  # the last is evaluated into eval/
    assert not any(due(TrainConfig(epochs=6, evaluate_every=0), epoch) for epoch in range(1, 7))


def test_the_best_so_far(tmp_path: Path) -> None:
    assert best_checkpoint(tmp_path) is None
    found = []
    for epoch, score in enumerate((0.1, 0.3, 0.2, 0.3, -1.0), start=1):
        output = tmp_path / f"eval_epoch_{epoch:02d}"
        output.mkdir()
        (output / "metrics.json").write_text(json.dumps({"bbox": {"AP": 0.9}, "segm": {"AP": score}}))
        note_best(output, epoch, 100 * epoch)
        found.append(best_checkpoint(tmp_path))
    names = ["000000100", "000000200", "000000200", "000000200", "000000200"]
    assert found == [tmp_path / "checkpoints" / name for name in names]


def test_a_picture_after_a_long_epoch_changes_nothing(
    config: Path, stage1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "LONG", 0.0)
    train_here([load_config([str(config), f"output={tmp_path / 'run'}"])])
    same_run(tmp_path / "run", stage1)
    height, width = np.array(Image.open(tmp_path / "run/predictions.jpg")).shape[:2]
    assert height > width / 2 > 400
    told = [line for line in (tmp_path / "run/log.txt").read_text().splitlines() if "predictions" in line]
    assert told == [f"predictions after epoch 1: {tmp_path}/run/predictions.jpg"]  # the last epoch has an evaluation
    assert not (stage1 / "predictions.jpg").exists()


@pytest.mark.slow
def test_a_run_with_evaluations(config: Path, stage1: Path, tmp_path: Path) -> None:
    """Killed while it writes an epoch's numbers, it has each line once, and trains as a run without them does."""
    folder, killed = tmp_path / "run", tmp_path / "killed"
    words = ("train.py", config, "train.evaluate_every=1", "train.keep_checkpoints=1", "train.epochs=3")
    run(*words, f"output={folder}")
    run_killed("eval_epoch_02/metrics.json", *words, f"output={killed}", folder=tmp_path)
    text = run(*words, f"output={killed}")
    assert "6 of 9 iterations are done" in text
    same_run(killed, folder)
    lines = metrics(killed)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9]
    evaluations = [line for line in lines if "eval/segm_AP" in line]
    assert [line["epoch"] for line in evaluations] == [1, 2]
    best = json.loads((killed / "best.json").read_text())
    assert best["mask AP"] == max(line["eval/segm_AP"] for line in evaluations)
    kept = {path.name for path in (killed / "checkpoints").iterdir()}
    assert kept == {main_file(killed).parent.name, Path(best["checkpoint"]).name}
    assert not list(killed.glob("eval_epoch_*/detections"))
    # Without evaluations: the same numbers (2 epochs there, and stage1's last drop comes at the same place)
    plain = metrics(stage1)
    trained = [line for line in lines if "loss" in line][: len(plain)]
    for line, expected in zip(trained, plain, strict=True):
        same = {k: v for k, v in expected.items() if k not in TIMING}
        assert {k: v for k, v in line.items() if k not in TIMING} == same
