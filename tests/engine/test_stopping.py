"""Being stopped and losing a rank: whole runs on a tiny Glyph-LVIS, started and killed as users and clusters do."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from loce.utils.distributed import require_torchrun
from loce.utils.errors import RankLostError
from tests.tiny_runs import LOCE, ROOT, command, environment, main_file, same_run

LONG = ("train.epochs=40", "train.drops=[30]", "train.log_every=7", "train.checkpoint_every=1000")


class Running:
    """A script of ours in the background; its processes are gone when the test ends."""

    def __init__(self, script: str, words: tuple, processes: int = 1, options: tuple[str, ...] = ()) -> None:
        line = command(script, *words, processes=processes)
        self.output, self.mark = "", uuid.uuid4().hex
        self.process = subprocess.Popen(
            [*line[:3], *options, *line[3:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**environment(), "STARTED_BY": self.mark},
        )

    def family(self) -> dict[int, int]:
        """Process id -> parent of every living process that this one started, also of those that have left it."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z" and self.mark in (folder / "environ").read_text(errors="replace"):
                    found[int(folder.name)] = int(parent)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                pass
        return found

    def ranks(self) -> list[int]:
        """Process ids of torchrun's children, by rank."""
        found = {}
        for pid, parent in self.family().items():
            words = Path(f"/proc/{pid}/environ").read_text().split("\0")
            rank = next((int(word[5:]) for word in words if word.startswith("RANK=")), None)
            if parent == self.process.pid and rank is not None:
                found[rank] = pid
        return [found[rank] for rank in sorted(found)]

    def children(self, rank: int) -> list[int]:
        """Process ids of the data workers of a rank."""
        return [pid for pid, parent in self.family().items() if parent == rank]

    def until(self, text: str) -> None:
        """Read output until a line has `text`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"{text!r} never came:\n{self.output}")

    def end(self, code: int, seconds: float = 60) -> str:
        """Wait for the end, which must come in time, with `code`, and leave no process; all output."""
        rest, _ = self.process.communicate(timeout=seconds)
        self.output += rest
        assert self.process.returncode == code, self.output
        deadline = time.monotonic() + 10
        while self.family() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not self.family(), "processes are left"
        return self.output

    def kill(self) -> None:
        """End whatever is left."""
        for pid in [*self.family(), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def begin(*args, **options) -> Running:
        started.append(Running(*args, **options))
        return started[-1]

    yield begin
    for running in started:
        running.kill()


def iterations(folder: Path) -> int:
    return torch.load(main_file(folder), weights_only=True)["iteration"]


@pytest.fixture(scope="module")
def straight(config: Path, stage1: Path) -> Path:
    """A second stage of two ranks that nothing stopped."""
    folder = stage1.with_name("straight")
    running = Running("finetune.py", stage2_words(config, stage1, folder), processes=2)
    try:
        running.end(0, 280)
    finally:
        running.kill()
    return folder


def stage2_words(config: Path, stage1: Path, folder: Path, every: int = 1000) -> tuple:
    short = ("train.epochs=8", "train.drops=[6]", "train.log_every=7", f"train.checkpoint_every={every}")
    return (config, *LOCE, *short, f"train.init={stage1}", f"output={folder}", "train.evaluate=false")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_stopped_process_saves_and_goes_on_bit_for_bit(config: Path, tmp_path: Path, start, name: str) -> None:
    short = ("train.epochs=8", "train.drops=[6]", "train.log_every=7", "train.evaluate=false", "data.workers=2")
    start("train.py", (config, *short, f"output={tmp_path}/whole")).end(0, 280)
    words = (config, *short, f"output={tmp_path}/stopped")
    running = start("train.py", words)
    running.until("iter 1/3")  # iteration 7 of 24: the next line is written at 9, the end of an epoch
    os.kill(running.process.pid, getattr(signal, name))
    text = running.end(75)
    assert f"stopped by {name}; the same command goes on" in text and "Traceback" not in text
    done = iterations(tmp_path / "stopped")
    assert 7 < done < 24
    assert name in (tmp_path / "stopped/stopped.txt").read_text()
    text = start("train.py", words).end(0, 280)
    assert f"{done} of 24 iterations are done" in text
    assert not (tmp_path / "stopped/stopped.txt").exists()
    same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_ranks_stop_at_the_same_step_and_go_on_bit_for_bit(
    config: Path, stage1: Path, straight: Path, start: Callable[..., Running]
) -> None:
    """torchrun passes SIGTERM on to its ranks; it ends with 1 whatever theirs was."""
    words = stage2_words(config, stage1, stage1.with_name("ranks"))
    running = start("finetune.py", words, processes=2)
    running.until("iter 1/3")
    os.kill(running.process.pid, signal.SIGTERM)
    text = running.end(1)
    assert "stopped by SIGTERM; the same command goes on" in text
    assert 7 < iterations(stage1.with_name("ranks")) < 24
    start("finetune.py", words, processes=2).end(0, 280)
    same_run(straight, stage1.with_name("ranks"))


@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_one_rank_that_is_asked_stops_all(config: Path, tmp_path: Path, start, asked: int) -> None:
    running = start("train.py", (config, *LONG, f"output={tmp_path}/run"), processes=2)
    running.until("iter 1/3")
    os.kill(running.ranks()[asked], signal.SIGUSR1)
    text = running.end(1)
    # torchrun may end the second rank, which has saved too, before it comes to its own exit code.
    assert text.count("exitcode  : 75") >= 1 and "stopped by " in text
    assert iterations(tmp_path / "run") > 7


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_is_named(config: Path, tmp_path: Path, start) -> None:
    running = start("train.py", (config, *LONG, f"output={tmp_path}/run", "data.workers=1"), processes=2)
    running.until("iter 1/3")
    victim = running.ranks()[1]
    os.kill(victim, signal.SIGKILL)
    text = running.end(1)
    assert f"error: rank 1 ended: its process {victim} was killed from outside" in text


@pytest.mark.slow
def test_a_killed_data_worker_is_named(config: Path, tmp_path: Path, start) -> None:
    running = start("train.py", (config, *LONG, f"output={tmp_path}/run", "data.workers=1"), processes=2)
    running.until("iter 1/3")
    os.kill(running.children(running.ranks()[1])[0], signal.SIGKILL)
    text = running.end(1)
    assert re.search("error: rank 1 ended: RuntimeError: (DataLoader worker|a data worker) .*killed", text)


@pytest.mark.slow
def test_when_torchrun_is_killed_its_ranks_save_and_end(config: Path, tmp_path: Path, start) -> None:
    running = start("train.py", (config, *LONG, f"output={tmp_path}/run", "data.workers=1"), processes=2)
    running.until("iter 1/3")
    os.kill(running.process.pid, signal.SIGKILL)
    running.end(-9)
    assert iterations(tmp_path / "run") > 7


@pytest.mark.slow
def test_when_torchrun_is_killed_before_its_ranks_have_met_they_end(config: Path, tmp_path: Path, start) -> None:
    running = start("train.py", (config, *LONG, f"output={tmp_path}/run"), processes=2)
    while len(running.ranks()) < 2:
        time.sleep(0.01)
    os.kill(running.process.pid, signal.SIGKILL)
    text = running.end(-9)
    assert "has ended" in text and "iter 1/" not in text


def test_who_listens_nowhere_has_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        require_torchrun("127.0.0.1", port)
    with pytest.raises(RankLostError, match=f"torchrun at 127.0.0.1:{port} has ended"):
        require_torchrun("127.0.0.1", port)


AT_ONCE = """
import os, signal
from loce.utils import signals
from loce.utils.errors import Stopped
signals.listen()
with signals.deferred():
    if {0}:
        os.kill(os.getpid(), signal.SIGTERM)
    print("step", *signals.asked)
    try:
        with signals.at_once():
            print("evaluation")
            os.kill(os.getpid(), signal.SIGINT)
            print("goes on")
    except Stopped as request:
        os._exit(print("stopped by", request, flush=True) or 0)
"""


@pytest.mark.parametrize(
    ("before", "expected"),
    [(True, "step SIGTERM\nstopped by SIGTERM\n"), (False, "step\nevaluation\nstopped by SIGINT\n")],
)
def test_an_evaluation_between_epochs_ends_at_once(before: bool, expected: str) -> None:
    """Within the loop, which only notes signals; also where one was noted before it began."""
    done = subprocess.run([sys.executable, "-c", AT_ONCE.format(before)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == expected, done.stderr


def test_a_process_whose_parent_is_gone_already_ends() -> None:
    code = "from loce.utils.signals import die_with_parent; die_with_parent(9, {}); print('lives')"
    for parent, expected in ((os.getpid(), "lives\n"), (os.getppid(), "")):
        words = [sys.executable, "-c", code.format(parent)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert done.stdout == expected and done.returncode == (0 if expected else -9)


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again(config: Path, stage1: Path, straight: Path, start) -> None:
    words = stage2_words(config, stage1, stage1.with_name("again"), every=5)
    running = start("finetune.py", words, processes=2, options=("--max-restarts=1",))
    running.until("iter 1/3")
    os.kill(running.ranks()[1], signal.SIGKILL)
    text = running.end(0, 280)
    assert "of 24 iterations are done" in text


@pytest.mark.slow
def test_a_second_signal_ends_at_once(config: Path, tmp_path: Path, start) -> None:
    """Also where the main thread hears of nothing: here it waits for a rank that is stopped."""
    running = start("train.py", (config, *LONG, f"output={tmp_path}/run"), processes=2)
    running.until("iter 1/3")
    waiting, frozen = running.ranks()
    os.kill(frozen, signal.SIGSTOP)
    time.sleep(1)
    os.kill(waiting, signal.SIGTERM)
    time.sleep(2.5)
    assert waiting in running.family()
    os.kill(waiting, signal.SIGTERM)
    time.sleep(1)
    assert waiting not in running.family()
    os.kill(frozen, signal.SIGCONT)
    assert "rank 0 ended" in running.end(1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_while_the_memory_is_filled(
    config: Path, stage1: Path, straight: Path, start: Callable[..., Running], processes: int
) -> None:
    """Nothing is there to be saved; the run begins again and is the same."""
    folder = stage1.with_name(f"filled{processes}")
    words = stage2_words(config, stage1, folder)
    running = start("finetune.py", words, processes=processes)
    running.until("filling the feature memory")
    os.kill(running.process.pid, signal.SIGTERM)
    text = running.end(75 if processes == 1 else 1)
    assert "stopped by SIGTERM" in text and "Traceback" not in text.split("stopped by SIGTERM")[0]
    assert not list(folder.glob("checkpoints/*/main.pt"))
    if processes == 2:
        start("finetune.py", words, processes=2).end(0, 280)
        same_run(straight, folder)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_in_evaluation_goes_on_with_what_is_left(config: Path, tmp_path: Path, start, processes: int) -> None:
    words = (config, f"output={tmp_path}/run", "train.epochs=1", "train.drops=[]")
    running = start("train.py", words, processes=processes)
    running.until("inference: 0/")
    os.kill(running.process.pid, signal.SIGINT)
    text = running.end(75 if processes == 1 else 1)
    assert "stopped by SIGINT" in text
    assert (tmp_path / "run/stopped.txt").exists() and not (tmp_path / "run/eval/metrics.json").exists()
    text = start("train.py", words, processes=processes).end(0, 280)
    assert "training is finished already" in text
    assert (tmp_path / "run/eval/metrics.json").exists() and not (tmp_path / "run/stopped.txt").exists()


@pytest.mark.slow
def test_a_rank_that_meets_too_many_bad_images_is_named(config: Path, glyphs: Path, tmp_path: Path, start) -> None:
    shutil.copytree(glyphs / "train2017", tmp_path / "images/train2017")
    for image in sorted((tmp_path / "images/train2017").iterdir())[::2]:
        image.write_bytes(image.read_bytes()[:100])
    words = (config, *LONG, f"output={tmp_path}/run", f"data.train_images={tmp_path}/images")
    text = start("train.py", words, processes=2).end(1)
    assert re.search(r"error( on rank 1)?: (rank 1 ended: UserError: )?more than 1 of \d+ images cannot be used", text)


ENDS = """
import os, time
from functools import partial
from torch.utils.data import DataLoader
from loce.data.loader import _start_worker
from loce.engine.ranks import process_group

class Slow:
    def __len__(self): return 1000
    def __getitem__(self, i): return time.sleep(0.02) or i

with process_group("cpu"):
    init = partial(_start_worker, os.getpid())
    batches = iter(DataLoader(Slow(), num_workers=2, multiprocessing_context="fork", worker_init_fn=init))
    next(batches)
    raise ValueError("an error of ours")
"""


def test_an_error_ends_a_process_that_has_workers() -> None:
    """Python waits for its children at its end, and these are deaf to the signal that it sends them."""
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 1 and "ValueError: an error of ours" in done.stderr
