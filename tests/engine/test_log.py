"""The run folder: nothing lost, nothing doubled, nobody else's run touched."""

import dataclasses
import json
import math
import os
import pty
import re
import resource
import select
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loce.config import Config, UserError, dump, from_dict, to_dict
from loce.engine.log import RunLog, cut_metrics
from loce.engine.preflight import check_run_folder
from loce.engine.trainer import snapshot_due
from loce.utils import progress as progress_module
from loce.utils.files import PatientFile, atomic_write, write_text
from loce.utils.progress import clock, eta, phase, progress, watched


def open_log(folder: Path, start: int = 0, config: Config | None = None) -> RunLog:
    """Of two epochs of four iterations of two images."""
    if start:  # TensorBoard reads a folder's files in the order of their names, which have whole seconds
        time.sleep(1)
    return RunLog(dataclasses.replace(config or Config(), output=str(folder)), [4, 8], 2, start)


def losses(a: float, b: float) -> list[dict[str, torch.Tensor]]:
    """Of one micro-batch."""
    return [{"b": torch.tensor(b), "a": torch.tensor(a)}]


def train(log: RunLog, iterations: range) -> None:
    """Losses a = i and b = 2 i at iteration i, a line every two iterations."""
    for i in iterations:
        log.step(losses(float(i), 2.0 * i))
        if i % 2:
            log.write(0.1, {"mean_score/r": 0.25})
        log.snapshot(i + 1, {"mean_score": [math.nan, i / 8]})


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = open_log(tmp_path / "run")
    train(log, range(8))
    log.line("all done")
    log.close()
    log.close()
    log.line("after the end: not written")
    assert (tmp_path / "run" / "config.yaml").read_text() == dump(Config(output=str(tmp_path / "run")))
    assert (tmp_path / "run" / "env.txt").read_text().startswith("started: ")
    lines = records(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [2, 4, 6, 8]
    assert [line["epoch"] for line in lines] == [0.5, 1.0, 1.5, 2.0]
    for line in lines:
        a = line["iteration"] - 1.5  # mean over the iterations since the last line
        assert (line["a"], line["b"], line["loss"], line["lr"], line["mean_score/r"]) == (a, 2 * a, 3 * a, 0.1, 0.25)
        assert line["images_per_second"] > 0 and line["peak_memory_gib"] > 0 and 0 <= line["data_share"] <= 1
    assert points(tmp_path / "run", "loss/all") == [(2, 1.5), (4, 7.5), (6, 13.5), (8, 19.5)]
    assert points(tmp_path / "run", "mean_score/rare")[-1] == (8, 0.25)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("epoch 1/2 iter 2/4 loss 1.5 a 0.5 b 1 lr 0.1 ") and "images/s data 0%" in printed[0]
    assert printed[2].startswith("epoch 2/2 iter 2/4 loss 13.5 a 4.5 b 9 lr 0.1 ") and " eta 0:00:00" in printed[2]
    assert printed[4] == "all done" and printed[5].startswith("8/8 iterations done, ") and len(printed) == 6
    assert (tmp_path / "run" / "log.txt").read_text().splitlines() == printed


def test_evaluations_are_no_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Eight images in 2 s of training, with a pause of 1000 s before the first of two lines."""
    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = open_log(tmp_path)
    now[0] += 0.5
    with log.paused():
        now[0] += 1000
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def images(done: int):
        now[0] += 0.25
        yield
        now[0] += 1.25 - done / 4

    for done in (2, 4):
        for _ in log.waiting(images(done)):
            log.step(losses(1.0, 1.0))
            log.step(losses(1.0, 1.0))
        log.write(0.1, {})
    log.close()
    assert [line["images_per_second"] for line in records(tmp_path)] == [4 / 1.5, 4 / 0.5]
    assert [line["data_share"] for line in records(tmp_path)] == [0.25 / 1.5, 0.5]
    assert "eta 0:00:02" in (tmp_path / "log.txt").read_text().splitlines()[1]  # 2 s for 4 iterations, 4 are left


def test_means_since_the_last_line(tmp_path: Path):
    log = open_log(tmp_path)
    log.step([{"a": torch.tensor(1.0), "b": torch.tensor(5.0, dtype=torch.bfloat16)}, *losses(3.0, 6.0)])
    assert log.write(0.1, {}) == {"loss": 7.5, "a": 2.0, "b": 5.5}
    log.step(losses(math.nan, 0.0))
    means = log.write(0.1, {})
    log.close()
    assert math.isnan(means["a"]) and math.isnan(means["loss"])
    assert records(tmp_path)[1]["a"] is None and records(tmp_path)[1]["b"] == 0.0


def test_losses_without_a_line_go_on(tmp_path: Path):
    log = open_log(tmp_path)
    log.step(losses(1.0, 5.0))
    pending = log.unwritten()
    log.close()
    again = RunLog(Config(output=str(tmp_path)), [4, 8], 2, 1, pending)
    again.step(losses(3.0, 6.0))
    assert again.write(0.1, {}) == {"loss": 7.5, "a": 2.0, "b": 5.5}
    assert again.unwritten() == {}
    again.close()


def test_epochs_may_differ_in_length(tmp_path: Path):
    log = RunLog(Config(output=str(tmp_path)), [3, 4, 8], 2)
    assert [log.place(i) for i in (1, 3, 4, 5, 8)] == [(1, 1, 3), (1, 3, 3), (2, 1, 1), (3, 1, 4), (3, 4, 4)]
    log.close()


@pytest.mark.parametrize("killed_at", [5, 6, 8])
def test_a_resumed_run_has_each_line_once(tmp_path: Path, killed_at: int):
    """Checkpoint at 4, killed later: whatever was written after 4 is written again, once."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    log = open_log(whole)
    train(log, range(8))
    log.close()
    log = open_log(parts)
    train(log, range(killed_at))
    log._metrics.write('{"iteration": 7, "lo')  # torn by the kill
    log.close()
    log = open_log(parts, start=4)
    train(log, range(4, 8))
    log.close()

    def keys(folder: Path) -> list[tuple]:
        return [(line["iteration"], line["loss"], line["lr"]) for line in records(folder)]

    assert keys(parts) == keys(whole)
    assert points(parts, "loss/all") == points(whole, "loss/all")
    snapshots = [(folder / "equilibrium.jsonl").read_text() for folder in (parts, whole)]
    assert snapshots[0] == snapshots[1] and snapshots[0].count("\n") == 8
    assert snapshots[0].splitlines()[2] == '{"iteration":3,"mean_score":[null,0.25]}'
    assert (parts / "env.txt").read_text().count("started: ") == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_full_disk_loses_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The limit on a file's size stands for the full disk: lines and points wait for room."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    log = open_log(whole)
    train(log, range(8))
    log.close()
    log = open_log(parts)
    train(log, range(2))
    capsys.readouterr()
    sizes = [path.stat().st_size for path in parts.rglob("*") if path.is_file()]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(size for size in sizes if size > 50) + 30, limits[1]))
    try:
        train(log, range(2, 6))
        log.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().out
    for name in ("metrics.jsonl", "log.txt", "tensorboard"):
        assert (
            told.count(f"WARNING: {parts / name}: File too large. Training goes on; what is to be written is kept") == 1
        )
    assert len((parts / "metrics.jsonl").read_bytes().splitlines()) < 4
    train(log, range(6, 8))
    log.close()
    assert [(line["iteration"], line["loss"]) for line in records(parts)] == [
        (line["iteration"], line["loss"]) for line in records(whole)
    ]
    assert points(parts, "loss/all") == points(whole, "loss/all")
    assert len((parts / "log.txt").read_text().splitlines()) == len((whole / "log.txt").read_text().splitlines())


def test_lines_that_never_found_room_are_counted(tmp_path: Path):
    file = PatientFile("/dev/full")
    assert file.write("12345\n") == file.write("") == "/dev/full: No space left on device"
    assert file.close() == "/dev/full: No space left on device; 6 bytes are lost"


def test_snapshots_are_few_even_and_end_with_the_last():
    assert [i for i in range(1, 8) if snapshot_due(i, 7)] == list(range(1, 8))
    at = [i for i in range(1, 1041) if snapshot_due(i, 1040)]
    assert len(at) == 50 and at[-1] == 1040 and {b - a for a, b in pairwise(at)} == {20, 21}


def test_cut_metrics(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 3)
    assert not path.exists()
    path.write_text('{"iteration": 1}\n{"iteration": 3}\n{"iteration": 5}\n')
    cut_metrics(path, 3)
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 3}\n'
    cut_metrics(path, 0)
    assert path.read_text() == ""


# Whose folder it is


def changed(**sections) -> Config:
    return from_dict({**to_dict(Config()), **sections})


def test_another_run_is_not_overwritten(tmp_path: Path):
    folder = tmp_path / "run"
    open_log(folder).close()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError) as caught:
        check_run_folder(folder, changed(seed=3, train={"lr": 0.01, "log_every": 7, "drops": [1, 2]}))
    assert str(caught.value) == (
        f"output = {folder}: holds another run, which is not overwritten. What differs:\n"
        "  seed: 0 there, 3 now\n  train.lr: 0.02 there, 0.01 now\n  train.drops: [16, 22] there, [1, 2] now\n"
        f"Go on with that run by giving its values, choose another folder with output=..., or delete {folder}."
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_an_option_newer_than_the_run_had_its_default(tmp_path: Path):
    open_log(tmp_path).close()
    lines = (tmp_path / "config.yaml").read_text().splitlines(keepends=True)
    older = [line for line in lines if not line.startswith("  clip_norm:")]
    assert len(older) == len(lines) - 1
    (tmp_path / "config.yaml").write_text("".join(older))
    check_run_folder(tmp_path, Config())
    with pytest.raises(UserError, match=r"differs:\n  train.clip_norm: \S+ there, 7.0 now\n"):
        check_run_folder(tmp_path, changed(train={"clip_norm": 7.0}))


def test_the_same_run_may_log_more_often(tmp_path: Path):
    open_log(tmp_path).close()
    more = changed(train={"log_every": 7, "checkpoint_every": 9}, data={"workers": 1})
    check_run_folder(tmp_path, more)
    open_log(tmp_path, start=2, config=more).close()
    assert "log_every: 7" in (tmp_path / "config.yaml").read_text()


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"is no folder of a run \(no config.yaml\), but holds metrics.jsonl; choose"):
        check_run_folder(tmp_path, Config())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="holds a file"):
        check_run_folder(tmp_path / "file", Config())
    check_run_folder(tmp_path / "new", Config())


# Files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "sub" / "x.json"
    write_text(path, "old")

    def fail() -> None:
        with atomic_write(path) as temporary:
            assert temporary.parent == path.parent and temporary.suffix == ".json"
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old" and os.listdir(path.parent) == ["x.json"]
    write_text(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é" and os.listdir(path.parent) == ["x.json"]


def test_a_write_that_never_happened_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "x"):
        pass
    assert os.listdir(tmp_path) == []


# What is shown


def test_progress_in_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress_module, "SILENCE", 0.0)
    assert list(progress(iter("abc"), 3, "filling")) == ["a", "b", "c"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "filling: 0/3 batches" and len(lines) == 5
    assert re.fullmatch(r"filling: 1/3 batches \(\S+/s\), eta 0:00:00, \S+ GiB", lines[1])
    assert re.fullmatch(r"filling: 3/3 batches \(\S+/s\) in 0:00:00, \S+ GiB", lines[4])


def test_progress_counts_what_its_items_hold(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "monotonic", iter(range(100)).__next__)
    assert list(progress(["ab", "c"], 3, "inference", "images", len)) == ["ab", "c"]
    assert re.search(r"inference: 3/3 images \((\S+)/s\) in", capsys.readouterr().out)


def test_progress_is_quiet_for_ten_seconds(capsys: pytest.CaptureFixture[str]):
    list(progress(range(1000), 1000, "inference", unit="images"))
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_progress_says_how_far_it_came_when_it_fails(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ZeroDivisionError):
        for item in progress(range(3), 3, "inference"):
            1 / (item - 1)
    assert re.search(r"inference: 1/3 batches \(\S+/s\) in", capsys.readouterr().out)


def test_progress_is_a_bar_on_a_terminal(tmp_path: Path):
    code = "from loce.utils.progress import progress\nfor _ in progress(range(4), 4, 'filling'): pass"
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs, stdout=subprocess.PIPE, text=True, timeout=60)
    shown = b""
    while select.select([ours], [], [], 0.5)[0]:
        shown += os.read(ours, 10_000)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0 and done.stdout == ""
    assert b"filling: 100%|" in shown and b"4/4" in shown


def wait_for_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The first lines on standard error, as soon as there are any."""
    text, deadline = "", time.monotonic() + 20
    while not text and time.monotonic() < deadline:
        text = capsys.readouterr().err
        time.sleep(0.01)
    return text


def test_a_phase_speaks_whatever_it_does(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Also one that counts nothing; within others the innermost is told."""
    monkeypatch.setattr(progress_module, "SILENCE", 0.05)
    with phase("sorting"):
        assert wait_for_line(capsys).startswith("sorting: for 0:00:0")
        for number in watched(range(3), 3, "matching", "rounds"):
            if number == 2:
                capsys.readouterr()
                assert wait_for_line(capsys).startswith("matching: 2/3 rounds, eta 0:00:0")


def test_short_phases_are_silent_and_other_ranks_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert list(watched("abc", 3, "reading", "blocks")) == ["a", "b", "c"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(progress_module, "SILENCE", 0.0)
    assert list(watched("abc", 3, "reading", "blocks")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_clock_and_eta():
    assert [clock(seconds) for seconds in (0, 59.9, 61, 3600 * 30 + 62)] == [
        "0:00:00",
        "0:00:59",
        "0:01:01",
        "30:01:02",
    ]
    assert eta(0.0, 0, 5) == "?"
    assert eta(0.0, 5, 0) == "0:00:00"
