"""The smallest trunk of each kind, at its real size: from random weights to AP, killed, on two ranks, loaded again."""

import json
from pathlib import Path

import pytest
import torch

import loce
from loce.checkpoint.load import Checkpoint
from loce.config import load_config
from loce.engine.train import train
from tests.tiny_runs import metrics, run, same_run, train_here

SHORT = ("train.epochs=1", "train.drops=[]", "train.warmup_iterations=1", "train.checkpoint_every=2")
LAYER = ("model.norm=layer", "train.optimizer=adamw", "train.lr=1e-4", "train.decay_norms=false")
KINDS = {
    "resnet18": ("model.norm=batch",),
    "convnext_tiny": LAYER,
    "swin_t": LAYER,
    "swin_v2_t": LAYER,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_run_with_each_kind_of_trunk(config: Path, tmp_path: Path, name: str) -> None:
    words = [str(config), f"model.backbone={name}", *SHORT, *KINDS[name]]
    straight, killed, two = (tmp_path / part for part in ("straight", "killed", "two"))
    train(load_config([*words, f"output={straight}"]))
    assert {"bbox", "segm"} <= set(json.loads((straight / "eval/metrics.json").read_text()))

    # Gone on from the checkpoint of step 2 of 3, it is the same run.
    words += ["train.evaluate=false"]
    train_here([load_config([*words, f"output={killed}"])], 2)
    train_here([load_config([*words, f"output={killed}"])])
    same_run(killed, straight)

    # What is loaded is what was saved, with nothing left out.
    saved, model = Checkpoint.open(straight), loce.load_model(straight)
    assert set(saved.model) == set(model.state_dict())
    assert all(torch.equal(value, saved.model[key]) for key, value in model.state_dict().items())
    assert len(model([torch.zeros(3, 60, 70, dtype=torch.uint8)])) == 1

    # Two ranks train the same steps; batch norms see the images of their own rank, so theirs are others.
    if "model.norm=batch" not in words:
        run("train.py", *words, f"output={two}", processes=2)
        for line, expected in zip(metrics(two), metrics(straight), strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)
