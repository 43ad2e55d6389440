"""A training that diverges: nothing is learned from a bad step, all ranks end with 3, a report names the cause."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from loce.engine.divergence import watch
from tests.tiny_runs import LOCE, main_file, metrics, run, weights

DIVERGES = ("train.lr=1e10", "train.warmup_iterations=0", "train.clip_norm=0", "train.evaluate=false")


class Net(nn.Module):
    """Two layers and a function between them that no layer is."""

    def __init__(self, function) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(2, 3), nn.Linear(3, 1), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.function(self.first(x)))


def test_the_first_bad_layer_of_the_forward_pass() -> None:
    net = Net(lambda x: x)
    with torch.no_grad():
        net.first.bias[1] = float("inf")
    with watch(net) as (forward, _):
        net(torch.ones(4, 2))
    assert forward[0] == "first (Linear): 4 of 12 values are not finite; its input is finite; its bias has some, too"
    assert [text.split()[0] for text in forward] == ["first", "second"]
    with watch(net) as (forward, _):
        pass
    net(torch.ones(4, 2))
    assert forward == []  # nothing watches any more


def test_the_first_bad_layer_of_the_backward_pass() -> None:
    """sqrt has an infinite slope at 0: its value is finite, the gradient that it passes to `first` is not."""
    net = Net(lambda x: (x * 0).sqrt())
    with watch(net) as (forward, backward):
        net(torch.ones(4, 2)).sum().backward()
    assert forward == [] and backward == ["first (Linear)"]


def test_a_diverged_run_ends_with_a_report(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    text = run("train.py", config, f"output={folder}", *DIVERGES, code=3)
    assert "Traceback" not in text
    report = json.loads((folder / "nan_report/report.json").read_text())
    bad = report["iteration"]
    assert f"training diverged at iteration {bad}: not finite: " in text
    assert [line["iteration"] for line in metrics(folder)] == list(range(1, bad))
    (rank,) = report["ranks"]
    (images,) = rank["images"]
    assert len(images) == 4 and all(len(image["boxes"]) == len(image["classes"]) > 0 for image in images)
    assert rank["first_bad_layer"] and set(rank["losses"][0]) == set(rank["losses_again"][0])
    assert set(report["gradient_norms"]) >= {"backbone", "rpn", "roi_heads.classifier"}
    assert any(norm in ("nan", "inf") for norm in report["gradient_norms"].values())


@pytest.mark.slow
def test_ranks_diverge_together_and_the_last_checkpoint_is_good(config: Path, stage1: Path) -> None:
    folder = stage1.with_name("diverged")
    words = (config, *LOCE, f"train.init={stage1}", f"output={folder}", *DIVERGES, "train.checkpoint_every=1")
    text = run("finetune.py", *words, processes=2, code=1)
    assert text.count("exitcode  : 3 ") >= 1  # torchrun may end the second rank before it comes to its own
    report = json.loads((folder / "nan_report/report.json").read_text())
    assert len(report["ranks"]) == 2
    assert int(main_file(folder).parent.name) == report["iteration"] - 1
    assert all(values.isfinite().all() for values in weights(folder).values())
