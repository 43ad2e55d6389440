"""The example of docs/plugin.md does what the page says: written, named in two places, trained."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```(?:python)?\n(.*?)```", re.DOTALL)
USE = """
import torch
from loce.config import load_config
from loce.heads import HEADS
from loce.heads.base import RoIs
from tests.conftest import stats_of

assert load_config(["glyphs/softmax.yaml", "head.name=focal"]).head.name == "focal"
torch.manual_seed(0)
head = HEADS["focal"](4, stats_of(3))
labels = torch.tensor([0, 1, 3, -100])
x = torch.randn(4, 4)
loss = head.losses(head(x), RoIs(labels, labels, labels > 9))["loss_cls"]
loss.backward()
p = head(x).softmax(1)[:3].gather(1, labels[:3, None])
assert torch.allclose(loss, (-((1 - p) ** 2) * p.log()).mean())
assert head.scores(head(x)).shape == (4, 3)
"""


def insert(file: Path, after: str, line: str) -> None:
    text = file.read_text()
    assert text.count(after) == 1
    file.write_text(text.replace(after, after + line))


def test_the_worked_example(tmp_path: Path) -> None:
    head, entry, name, *_ = BLOCK.findall((ROOT / "docs/plugin.md").read_text())
    statements = [line for line in head.partition('"""\n\nfrom')[2].splitlines() if line.strip()]
    assert len(statements) <= 20, "the page promises 20 lines"
    shutil.copytree(ROOT / "loce", tmp_path / "loce", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "loce/heads/focal.py").write_text(head)
    heads = tmp_path / "loce/heads/__init__.py"
    insert(heads, "from loce.heads.equilibrium import EquilibriumHead\n", "from loce.heads.focal import FocalHead\n")
    insert(heads, '    "equilibrium": EquilibriumHead,\n', entry)
    insert(tmp_path / "loce/config.py", '    "equilibrium",\n', name)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", USE]
    subprocess.run(run, cwd=tmp_path, env=environment, check=True, timeout=120)
    contract = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/heads/test_contract.py",
        "-k",
        "focal",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(contract, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout


def test_a_head_in_another_detector() -> None:
    code, memory = BLOCK.findall((ROOT / "docs/plugin.md").read_text())[-2:]
    assert len([line for line in memory.splitlines() if line and " import " not in line]) <= 10
    check = "loss.backward()\nassert loss > 0 and scores.shape == (8, 3) and head.fc_cls.weight.grad.any()"
    drawn = (
        "assert loce[0].shape == (32, 1024) and bacl[0].shape == (96, 1024) and vectors.shape == (len(own), 1024)\n"
        "assert set(loce[1].tolist()) <= {0, 1, 2} and (bacl[1] >= 0).all() and own.tolist() == drawn.tolist()\n"
        "assert memory.used.all()"
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([code, check, memory, drawn])], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
