"""With a shared memory the same whole batch on 1, 2 or 4 ranks is the same step, up to rounding."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .joint_steps import CASES, follow

ROOT = Path(__file__).resolve().parents[2]
ROUNDING = 1e-4  # of a tensor's largest entry
Steps = list[dict[str, Tensor]]


@cache
def alone() -> dict[str, Steps]:
    """What one rank with the whole batch sees, by case."""
    return {name: follow(case) for name, case in CASES.items()}


def together(ranks: int, folder: Path) -> list[dict[str, Steps]]:
    """What each rank saw."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "tests.models.joint_steps", str(folder)]
    subprocess.run(command, check=True, timeout=280, env=environment, cwd=ROOT)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_same_batch_on_several_ranks_is_the_same_step(ranks: int, tmp_path: Path) -> None:
    found = together(ranks, tmp_path)
    for name, expected in alone().items():
        for rank, own in enumerate(found):
            for step, values in enumerate(expected):
                assert own[name][step].keys() == values.keys()
                for key, value in values.items():
                    message = f"{name}, rank {rank} of {ranks}, step {step}, {key}: "
                    rounding = ROUNDING * float(value.double().abs().max())
                    torch.testing.assert_close(
                        own[name][step][key], value, rtol=ROUNDING, atol=rounding, msg=lambda text, m=message: m + text
                    )


def test_the_cases_are_what_they_say() -> None:
    seen = alone()
    for step in seen["LOCE"] + seen["stage 1"]:
        assert all(step[f"loss_{name}"] > 0 for name in ("rpn_cls", "rpn_box", "cls", "box", "mask"))
    for steps in seen.values():  # parameters move, so that no later step is the first one again
        assert len({float(step["loss_rpn_cls"]) for step in steps}) == len(steps)
    stored = [step["memory.bank.written"].sum() for step in seen["empty ranks"]]
    assert stored[0] == 0 and stored[1] < stored[2] < stored[3]
    assert seen["LOCE"][-1]["memory.bank.written"].max() > 30  # rings go round
    assert (seen["never an object"][-1]["tracker.scores"] == 0.01).all()
