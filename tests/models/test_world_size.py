"""With a shared memory the same whole batch on 1, 2 or 4 ranks is the same step, up to rounding; and how often the
ranks of a step wait for each other."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    return together(2, tmp_path_factory.mktemp("two_ranks"))


def together(ranks: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank saw."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "tests.models.joint_steps", str(folder)]
    subprocess.run(command, check=True, timeout=280, env=environment, cwd=ROOT)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def test_the_same_batch_on_two_ranks_is_the_same_step(two_ranks: list[dict[str, Any]]) -> None:
    compare(two_ranks)


@pytest.mark.slow
def test_the_same_batch_on_four_ranks_is_the_same_step(tmp_path: Path) -> None:
    compare(together(4, tmp_path))


@pytest.mark.parametrize(("case", "buckets"), [("stage 1", 2), ("LOCE", 1)])
def test_a_step_has_two_collectives_and_its_gradients(two_ranks: list[dict[str, Any]], case: str, buckets: int) -> None:
    """Divisors and mean score before the losses; gradients in DDP's buckets; whether the step is good."""
    for own in two_ranks:
        assert own["collectives"][case] == ["c10d::allreduce_"] * (1 + buckets + 1)


def compare(found: list[dict[str, Steps]]) -> None:
    """Fail where a rank saw another step than one with the whole batch."""
    for name, expected in alone().items():
        for rank, own in enumerate(found):
            for step, values in enumerate(expected):
                assert own[name][step].keys() == values.keys()
                for key, value in values.items():
                    message = f"{name}, rank {rank} of {len(found)}, step {step}, {key}: "
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
