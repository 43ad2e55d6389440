"""What the numbers of a run depend on besides its config: versions, code, machine, command."""

import platform
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torchvision

import loce
from loce import distributed


def environment(device: torch.device | str) -> str:
    """`name: value` lines; `device` is the one the run uses."""
    name = platform.processor() or platform.machine()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    facts = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "code": f"loce {loce.__version__}, {_git_state()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "CUDA": torch.version.cuda or "none",
        "device": f"{device} ({name})",
        "processes": distributed.world_size(),
        "host": f"{platform.system()} {platform.release()}, {distributed.available_cores()} cores",
    }
    return "\n".join(f"{key}: {value}" for key, value in facts.items())


def _git_state() -> str:
    """Commit of the source tree this package lies in, and whether tracked files differ from it."""
    root = Path(__file__).resolve().parent.parent
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
