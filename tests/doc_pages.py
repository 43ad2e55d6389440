"""What the pages tell their readers to type. For tests."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.tiny_runs import ROOT, environment

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
STARTS = re.compile(r"(make|python|torchrun|sbatch|source|git|docker|tensorboard) \S")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages, "" where none is named."""
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def fenced_commands(page: Path) -> list[str]:
    """The commands of a page's fenced blocks, each on one line, without comments."""
    lines = "\n".join(body.replace("\\\n", " ") for body in blocks(page, "", "sh")).splitlines()
    return [re.sub(r" +", " ", line.split("  #")[0].strip()) for line in lines if STARTS.match(line.strip())]


def clone(folder: Path) -> Path:
    """A folder that looks like a clone of the repository, to run commands in."""
    for name in ("loce", "scripts", "configs", "benchmarks", "Makefile", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run_command(command: str, folder: Path) -> str:
    """Run a command line of a page in `folder`; what it prints. `make` runs without its set-up, on this Python."""
    program, *words = shlex.split(command)
    if program == "make":
        line = ["make", "-o", "setup", f"PY={sys.executable}", *words]
    else:
        assert program == "python", command
        line = [sys.executable, *words]
    variables = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, env=variables, cwd=folder, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr
