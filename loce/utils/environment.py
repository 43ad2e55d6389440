"""Code, versions, machine and command of a run, and the facts of a bug report: python -m loce.utils.environment.

It works where torch is broken or missing, too: a fact that cannot be found out says why.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "torchvision", "numpy", "lvis", "pycocotools", "opencv-python", "opencv-python-headless", "pillow"),
    *("matplotlib", "pyyaml", "tqdm", "tensorboard"),
)
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCH_HOME", "NCCL_DEBUG", "SLURM_JOB_ID")
_GIB = 2**30


def environment(device: Any, processes: int = 1) -> str:
    """`name: value` lines for the folder of a run; `device` is the one that it uses."""
    import torch
    import torchvision

    on_gpu = str(device).startswith("cuda")
    facts = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "code": code(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": package("numpy"),
        "CUDA": torch.version.cuda or "none",
        "device": f"{device} ({tell(lambda: torch.cuda.get_device_name(device)) if on_gpu else processor()})",
        "processes": processes,
        "host": f"{platform.system()} {platform.release()}, {available_cores()} cores",
    }
    return "\n".join(f"{key}: {value}" for key, value in facts.items())


def report() -> str:
    """`name: value` lines for a bug report."""
    facts = {
        "code": code(),
        "python": f"{platform.python_version()}, {sys.executable}",
        "system": f"{platform.platform()}",
        "processor": f"{processor()}, {available_cores()} cores for this process of {os.cpu_count()}",
        "memory": tell(_memory),
        "shared memory": tell(lambda: f"/dev/shm {_space('/dev/shm')}"),
        "disk here": tell(lambda: _space(".")),
        **{name: package(name) for name in PACKAGES if package(name) != "not installed" or name in PACKAGES[:3]},
        "import torch": tell(_torch),
        "import torchvision": tell(_torchvision),
        "CUDA": tell(_cuda),
        "GPUs": tell(_gpus),
        "driver": tell(_driver),
        "threads of torch": tell(_threads),
        "variables": ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "none",
    }
    return "\n".join(f"{key}: {value}" for key, value in facts.items())


def tell(find: Callable[[], object]) -> str:
    """What `find` finds, or why it does not."""
    try:
        return str(find())
    except Exception as error:  # whatever a broken installation comes up with
        return f"unknown ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''})"


def code() -> str:
    """Version and commit of loce."""
    return f"loce {version('loce')}, {_git_state()}"


def package(name: str) -> str:
    """The version of a package, from what pip knows; nothing is imported."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The model of the CPU, and its architecture where the system does not say."""
    names = ("model name", "Model", "cpu model")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        found = [line.split(":", 1)[1] for line in lines if line.startswith(names)]
    except OSError:
        found = []
    return " ".join((found or [platform.processor() or platform.machine()])[0].split())


def available_cores() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    total, free = (int(facts[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    return f"{total:.1f} GiB, {free:.1f} GiB free"


def _space(folder: str) -> str:
    usage = shutil.disk_usage(folder)
    return f"{usage.total / _GIB:.1f} GiB, {usage.free / _GIB:.1f} GiB free"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, from {Path(torch.__file__).parent}"


def _torchvision() -> str:
    import torch
    import torchvision

    torchvision.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)  # fails where the two do not fit together
    return f"{torchvision.__version__}, its operators load"


def _cuda() -> str:
    import torch

    return f"{torch.version.cuda or 'none'}{'' if torch.cuda.is_available() else ', no device'}"


def _gpus() -> str:
    import torch

    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} ({gpu.total_memory / _GIB:.0f} GiB)" for gpu in found) or "none"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return "no nvidia-smi"
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return (done.stdout or done.stderr).strip().splitlines()[0]


def _threads() -> str:
    import torch

    return f"{torch.get_num_threads()} for one operation, {torch.get_num_interop_threads()} operations at once"


def _git_state() -> str:
    """Commit of the source tree this package lies in, and whether tracked files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "no git checkout"
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return "git not available"
        if done.returncode:
            return "git not available"
        answers.append(done.stdout.strip())
    return f"commit {answers[0]}{' with changes' if answers[1] else ''}"


if __name__ == "__main__":
    print(report())
