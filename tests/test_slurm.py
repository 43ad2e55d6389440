"""scripts/slurm.sh, with stand-ins for SLURM's programs: when a job goes back into the queue, and what is started."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts/slurm.sh"
PROGRAMS = {
    "scontrol": 'echo "$@" >> scontrol.txt; [ "$1" = show ] && printf "node1\\nnode2\\n"; true',
    # A training that ends as MODE says: at once with that code, or when it is asked to stop, as torchrun does.
    "srun": 'echo "$@" > srun.txt\n'
    '[ "$MODE" = stop ] || exit "$MODE"\n'
    "trap 'mkdir -p run; touch run/stopped.txt; exit 1' TERM\n"
    "touch started; while true; do sleep 0.05; done",
}


@pytest.fixture
def job(tmp_path: Path):
    """Start the script as SLURM would; MODE as above."""
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    facts = {
        "SLURM_JOB_ID": "123456",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }

    def start(mode: str) -> subprocess.Popen:
        environment = {**os.environ, **facts, "MODE": mode, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        words = ["scripts/train.py", "stage1.yaml", "run", "seed=1"]
        return subprocess.Popen(["bash", str(SCRIPT), *words], cwd=tmp_path, env=environment)

    return start


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_stopped_saves_and_is_queued_again(job, tmp_path: Path, sent: signal.Signals) -> None:
    process = job("stop")
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(sent)
    assert process.wait(timeout=60) == 0
    assert "requeue 123456" in (tmp_path / "scontrol.txt").read_text()


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_a_job_that_ends_is_not(job, tmp_path: Path, code: int) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stopped.txt").touch()  # of the time before
    assert job(str(code)).wait(timeout=60) == code
    assert "requeue" not in (tmp_path / "scontrol.txt").read_text()


def test_exit_code_75_is_enough(job, tmp_path: Path) -> None:
    assert job("75").wait(timeout=60) == 0
    assert "requeue 123456" in (tmp_path / "scontrol.txt").read_text()


def test_one_torchrun_a_node_meets_at_the_first(job, tmp_path: Path) -> None:
    job("0").wait(timeout=60)
    words = (tmp_path / "srun.txt").read_text().split()
    assert words[:3] == ["torchrun", "--nnodes=2", "--nproc_per_node=8"]
    assert "--rdzv_endpoint=node1:23456" in words
    assert words[-4:] == ["scripts/train.py", "stage1.yaml", "output=run", "seed=1"]
