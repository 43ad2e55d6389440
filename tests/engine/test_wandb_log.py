"""What is sent to Weights & Biases: a small package of the same name stands in for theirs."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loce.engine.boards import WandbLog, require_wandb
from loce.utils.errors import UserError


class Run:
    """Theirs: takes what is logged, or fails."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []
        self.finished = self.failing = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        if self.failing:
            raise OSError("service is gone")
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True
        if self.failing:
            raise OSError("service is gone")


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`wandb` as far as we use it; `network` says whether it can be reached."""
    fake = SimpleNamespace(begun=[], runs=[], network=True)

    def init(**options: Any) -> Run:
        fake.begun.append(options)
        if not fake.network and options.get("mode") != "offline":
            raise TimeoutError("no network")
        fake.runs.append(Run())
        return fake.runs[-1]

    module = ModuleType("wandb")
    parts = {"init": init, "Settings": dict, "Histogram": lambda x: ("histogram", x), "Image": lambda x: ("image", x)}
    vars(module).update(parts)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return fake


def test_what_is_sent(package: SimpleNamespace, tmp_path: Path) -> None:
    log = WandbLog(tmp_path, {"seed": 3})
    picture, scores = np.zeros((2, 2, 3), np.uint8), torch.tensor([0.5, 0.25])
    values = {"loss": 2, "mean_score/classes": scores, "first": picture, "run/config": "text"}
    assert log.show(7, values) == ""
    log.close()
    (begun,), (run,) = package.begun, package.runs
    assert begun["config"] == {"seed": 3} and begun["resume"] == "allow" and begun["dir"] == str(tmp_path)
    assert 0 < begun["settings"]["init_timeout"] <= 60 and 0 < begun["settings"]["finish_timeout"] <= 60
    assert run.metrics == [("*", "iteration")] and run.finished
    (sent,) = run.logged
    assert (
        sent["iteration"] == 7
        and sent["loss/all"] == 2.0
        and set(sent)
        == {
            *("iteration", "loss/all", "mean_score/classes", "loss/first"),
        }
    )
    assert sent["mean_score/classes"][0] == "histogram" and np.array_equal(sent["mean_score/classes"][1], [0.5, 0.25])
    assert sent["loss/first"] == ("image", picture)


def test_a_run_that_goes_on_has_the_same_page(package: SimpleNamespace, tmp_path: Path) -> None:
    for _ in range(2):
        WandbLog(tmp_path, {})
    WandbLog(tmp_path / "other", {})
    one, again, other = (begun["id"] for begun in package.begun)
    assert one == again != other


def test_without_network_it_is_kept_for_later(
    package: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package.network = False
    log = WandbLog(tmp_path, {})
    assert "mode" not in package.begun[0] and package.begun[1]["mode"] == "offline"  # WANDB_MODE decides the first
    assert "no network" in capsys.readouterr().out
    package.runs[0].failing = True
    assert log.show(1, {"loss": 1.0}) == "Weights & Biases: service is gone"
    log.close()
    assert "service is gone" in capsys.readouterr().out


def test_a_missing_package_is_the_users_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"train.wandb = true: .* pip install 'loce\[wandb\]'"):
        require_wandb()
