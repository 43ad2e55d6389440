"""Runs whose memory draws by adaptive rates: held-out images, epochs, stops, arms of a pass."""

from pathlib import Path

import numpy as np
import pytest
import torch

from loce.adaptive_rates import AdaptiveRates, groups
from loce.checkpoint.load import load_model
from loce.config import UserError, load_config
from loce.engine.passes import require_one_pass
from loce.engine.summary import run_summary
from tests.engine.test_together import SECOND_STAGE, recipe
from tests.tiny_runs import same_run, train_here

FASA = (
    *("memory.enabled=true", "memory.kind=gaussian", "memory.source=regions", "memory.draw=adaptive"),
    *("memory.features_per_class=1", "memory.loss_weight=0.1", "memory.adaptive.scale=3", "train.epochs=3"),
)
ONE_STAGE = ("memory.fill_instances=0", "memory.start=0.3")


def test_a_training_in_one_stage_goes_on_exactly_from_the_end_of_an_epoch(config: Path, tmp_path: Path) -> None:
    """And from within one; the images that adapt the rates are trained on in none."""
    words = [*FASA, *ONE_STAGE, "train.evaluate=false"]
    once, stopped = (load_config([str(config), f"output={tmp_path / name}", *words]) for name in ("once", "stopped"))
    trainer = train_here([once])
    held = set(trainer.held_out.train_images.tolist())
    shown = {int(i) for epoch in range(3) for batch in trainer.plan.epoch(epoch) for i in batch[..., 0].flatten()}
    assert held and not held & shown and held | shown == set(trainer.annotations.train_images.tolist())
    rates = trainer.arms[0].model.roi_heads.memory.rates
    assert int(rates.epochs) == 2 and (rates.losses > 0).any()
    lines = [line for line in (tmp_path / "once/log.txt").read_text().splitlines() if "sampling rates:" in line]
    assert len(lines) == 2 and "of 0 classes up, of 0 down" in lines[0] and "of 0 classes up, of 0 down" not in lines[1]
    assert f"{len(held)} training images are held out" in "".join(run_summary(trainer, trainer.arms[0]))

    end = trainer.ends[0]
    for last in (end, end + 1, None):
        train_here([stopped], last)
    same_run(tmp_path / "stopped", tmp_path / "once")
    load_model(tmp_path / "once")  # needs no rates
    load_model(tmp_path / "once", config=load_config([str(config), f"output={tmp_path / 'x'}"]))


def test_arms_with_the_same_images_held_out(config: Path, stage1: Path, tmp_path: Path) -> None:
    arms = {"softmax": FASA, "ebl": ("head.name=equilibrium", *FASA, "memory.adaptive.power=0.5")}
    trainer = train_here([recipe(config, stage1, tmp_path / name, words) for name, words in arms.items()])
    memories = [arm.model.roi_heads.memory for arm in trainer.arms]
    assert memories[0].bank is memories[1].bank and memories[0].rates is not memories[1].rates
    train_here([recipe(config, stage1, tmp_path / "alone", arms["ebl"])])
    same_run(tmp_path / "ebl", tmp_path / "alone")


def test_runs_that_hold_other_images_out_cannot_share_a_pass(config: Path) -> None:
    given = [["train.epochs=3"], FASA, [*FASA, "memory.adaptive.held_out=1"]]
    common = [str(config), "train.init=x", *SECOND_STAGE]
    configs = [load_config([*common, f"output={number}", *words]) for number, words in enumerate(given)]
    with pytest.raises(UserError, match=r"memory.adaptive.held_out = 0 in 0, 2 in 1"):
        require_one_pass(configs[:2])
    with pytest.raises(UserError, match=r"memory.adaptive.held_out = 2 in 1, 1 in 2"):
        require_one_pass(configs[1:])


@pytest.mark.slow
def test_rates_at_1203_classes() -> None:
    """Groups of so many classes are found in seconds, and losses move their rates."""
    means = np.random.default_rng(0).normal(size=(1203, 64))
    group, rates = groups(means), AdaptiveRates(np.arange(1, 1204))
    assert 1 < len(set(group.tolist())) < 1203
    rates.adapt(np.ones(1203), group, 1)
    rates.adapt(np.full(1203, 0.5), group, 2)
    assert torch.allclose(rates.rates, 1.1 * AdaptiveRates(np.arange(1, 1204)).rates)
