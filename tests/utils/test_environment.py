"""What a bug report needs, whatever state the installation is in."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from loce.utils.environment import environment, report
from tests.tiny_runs import ROOT


def facts_of(text: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in text.splitlines())


def test_environment_names_what_numbers_depend_on():
    facts = facts_of(environment("cpu", 3))
    assert facts["torch"] == torch.__version__ and facts["processes"] == "3" and facts["device"].startswith("cpu (")
    assert facts["python"].startswith("3.") and "cores" in facts["host"]
    assert facts["code"].startswith("loce ")


def cpu_model() -> str:
    """As the system names it; "" where it does not."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((" ".join(line.split(":")[1].split()) for line in lines if line.startswith("model name")), "")


def test_a_report_has_all_that_is_asked_for():
    facts = facts_of(report())
    for name in ("code", "system", "memory", "disk here", "torchvision", "pycocotools", "GPUs", "driver", "variables"):
        assert facts[name] and "unknown" not in facts[name], name
    assert cpu_model() in facts["processor"] and "cores for this process" in facts["processor"]
    assert cpu_model() in facts_of(environment("cpu"))["device"]
    assert facts["import torch"].startswith(torch.__version__)
    assert f"{torch.get_num_threads()} for one operation" in facts["threads of torch"]


def test_a_broken_torch_is_told(tmp_path: Path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so: cannot open')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    line = [sys.executable, "-m", "loce.utils.environment"]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=60)
    assert done.returncode == 0, done.stderr
    facts = facts_of(done.stdout)
    assert facts["import torch"] == "unknown (OSError: libcudart.so: cannot open)"
    assert facts["GPUs"].startswith("unknown (OSError") and facts["numpy"] and facts["processor"]
