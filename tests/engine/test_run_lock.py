"""Two jobs in one run folder, folders that cannot be written: found at the start, all at once, nothing left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loce.config import UserError
from loce.engine.preflight import RunLock
from tests.tiny_runs import ROOT, command, in_namespace, run

# Holds the lock of a folder, forks a child that outlives it, and waits to be killed.
HOLDER = """
import os, sys, time
from pathlib import Path
from loce.engine.preflight import RunLock
lock = RunLock(Path(sys.argv[1]))
if not os.fork():
    os.setsid()
os.write(1, b"%d\\n" % os.getpid())  # one write: the lines of two processes never mix
time.sleep(60)
"""


def test_a_second_job_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    """Killed with -9, and while a forked worker of it lives on."""
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    pids = [int(holder.stdout.readline()) for _ in range(2)]
    child = next(pid for pid in pids if pid != holder.pid)
    try:
        with pytest.raises(UserError, match="another job writes into it") as caught:
            RunLock(folder)
        host = os.uname().nodename
        assert f"(process {holder.pid} on {host}, since 2" in str(caught.value)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)  # lives
        RunLock(folder).undo()
    finally:
        os.kill(child, signal.SIGKILL)
    assert (folder / "lock").exists()  # it was not ours to remove


def test_undone_as_if_it_had_never_been(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "runs" / "a" / "b")
    assert (tmp_path / "runs/a/b/lock").read_text().startswith(f"process {os.getpid()} on ")
    lock.undo()
    assert os.listdir(tmp_path) == []
    kept = RunLock(tmp_path / "runs" / "a")
    (tmp_path / "runs/a/mine").write_text("")
    kept.undo()
    assert os.listdir(tmp_path / "runs/a") == ["mine"]


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", Path("/proc/loce/run")):
        with pytest.raises(UserError, match=r"cannot be written \(.+\); choose another with output="):
            RunLock(folder)


READ_ONLY = "mount -t tmpfs tmpfs {0} && mkdir {0}/run && mount -o remount,ro {0} && exec {1}"


def test_a_read_only_run_folder(config: Path, tmp_path: Path) -> None:
    words = command("train.py", config, f"output={tmp_path}/run", "data.val_images=nowhere", "train.batch_size=3")
    done = in_namespace(READ_ONLY.format(tmp_path, " ".join(words)))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "2 problems" in done.stderr and f"output = {tmp_path}/run: cannot be written (Read-only file" in done.stderr
    assert "6 of 6 images are missing" in done.stderr


def test_all_that_is_wrong_is_told_at_once(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ("train.accumulate=2", "train.batch_size=6", "train.resume=must", "data.train_images=nowhere")
    text = run("train.py", config, f"output={tmp_path}/file/run", *words, processes=2, code=1)
    assert text.count("error: ") == 1
    for message in ("divisible by", "cannot be written", "train.resume = must", "12 of 12"):
        assert message in text, message
