"""Files of a checkpoint: killed anywhere in a save, on a full disk, damaged later: one good checkpoint remains."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loce.checkpoint import files
from tests.tiny_runs import ROOT

# Saves checkpoints 1, 2 and 3 of two ranks and keeps one. Stage n is killed at the n-th thing it does to a file; the
# last stage does all. Prints, for each stage, how many checkpoints were whole before, and which is found after.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from loce.checkpoint import files

run = Path(sys.argv[1])
os.fsync = lambda descriptor: None  # slow, and it matters to crashes of the machine only
DOES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")

def save(number):
    folder = run / "checkpoints" / f"{number:09d}"
    files.start(folder)
    parts = [files.write(folder / f"rank{r}.pt", {"r": torch.full((50,), float(r))}) for r in range(2)]
    assert "problem" not in files.finish(folder, parts, {"number": number})
    files.tidy(run, folder, 1)

def die_at(last):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in DOES and str(run) in str(arguments[0]):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

stage = 0
while True:
    stage += 1
    child = os.fork()
    if not child:
        die_at(stage)
        for number in (1, 2, 3):
            save(number)
            (run / "whole").write_text(str(number))
        os._exit(0)
    killed = os.waitpid(child, 0)[1] != 0
    whole = run / "whole"
    found = files.finished(run)
    bad = [files.damage(f) for f in found]
    content = torch.load(found[0] / "main.pt", weights_only=True)["number"] if found else 0
    print(whole.read_text() or 0 if whole.exists() else 0, content, "".join(bad) or "good", flush=True)
    save(9)  # whatever is left stands in nobody's way, and is cleaned up
    assert [f.name for f in (run / "checkpoints").iterdir()] == ["000000009"], os.listdir(run / "checkpoints")
    assert len(os.listdir(run / "checkpoints/000000009")) == 4
    files.discard(run / "checkpoints/000000009")
    whole.unlink(missing_ok=True)
    if not killed:
        break
"""


def test_killed_at_every_step_of_saving_and_deleting(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    line = [sys.executable, "-c", KILLED, str(tmp_path / "run")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    stages = [row.split(maxsplit=2) for row in done.stdout.splitlines()]
    assert len(stages) > 60 and stages[-1] == ["3", "3", "good"]
    for whole, found, state in stages:
        assert int(found) in (int(whole), int(whole) + 1) and state == "good"
    assert {found for _, found, _ in stages} == {"0", "1", "2", "3"}


def checkpoint(run: Path, number: int) -> Path:
    """A checkpoint of two ranks."""
    folder = run / "checkpoints" / f"{number:09d}"
    files.start(folder)
    parts = [files.write(folder / f"rank{rank}.pt", {"x": torch.rand(100)}) for rank in range(2)]
    assert "problem" not in files.finish(folder, parts, {"weights": torch.rand(1000)})
    return folder


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "main.pt is cut": (lambda f: os.truncate(f / "main.pt", 2000), "main.pt has 2000 bytes"),
    "main.pt is empty": (lambda f: os.truncate(f / "main.pt", 0), "main.pt has 0 bytes"),
    "a bit of main.pt": (lambda f: flip(f / "main.pt", 2500), "main.pt has another checksum"),
    "a bit of rank1.pt": (lambda f: flip(f / "rank1.pt", 700), "rank1.pt has another checksum"),
    "no rank0.pt": (lambda f: (f / "rank0.pt").unlink(), "rank0.pt is missing"),
    "no checksums": (lambda f: (f / "checksums.json").unlink(), "checksums.json cannot be read"),
    "half the checksums": (lambda f: os.truncate(f / "checksums.json", 50), "checksums.json cannot be read"),
    "other checksums": (lambda f: (f / "checksums.json").write_text("[1, 2]"), "checksums.json cannot be read"),
    "no facts": (lambda f: (f / "checksums.json").write_text('{"main.pt": 3}'), "checksums.json cannot be read"),
    "nothing known": (lambda f: (f / "checksums.json").write_text("{}"), "checksums.json does not name main.pt"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(tmp_path: Path, kind: str) -> None:
    folder = checkpoint(tmp_path, 1)
    assert files.damage(folder) == ""
    harm, message = DAMAGE[kind]
    harm(folder)
    assert message in files.damage(folder)
    assert files.finished(tmp_path) == [folder]


def test_what_is_kept(tmp_path: Path) -> None:
    folders = [checkpoint(tmp_path, number) for number in (1, 2, 3, 4, 5, 6)]
    (folders[4] / "main.pt").unlink()  # never finished
    unfinished_later = tmp_path / "checkpoints" / "000000009"
    unfinished_later.mkdir()
    assert files.tidy(tmp_path, folders[5], keep=2, best=folders[1])
    left = {folder.name for folder in (tmp_path / "checkpoints").iterdir()}
    assert left == {"000000002", "000000004", "000000006", "000000009"}
    assert not files.tidy(tmp_path, folders[5], keep=2, best=folders[1])


def test_a_write_that_finds_no_room(tmp_path: Path) -> None:
    """The limit on a file's size is the one full disk that every machine has."""
    path = tmp_path / "x" / "main.pt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    content = {"weights": torch.zeros(100_000)}
    size = files.write(path, content)["bytes"]
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        found = files.write(path, content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    missing = files.megabytes(size - 150_000)
    assert found["full"]
    assert found["problem"] == (
        f"{path}: File too large; it takes {files.megabytes(size)}, {missing} of them found no place"
    )
    assert path.read_bytes() == before and os.listdir(path.parent) == ["main.pt"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    files.start(tmp_path / "checkpoints" / "000000001")
    found = files.write(tmp_path / "checkpoints" / "000000001" / "rank0.pt", {})
    assert "problem" in found and not found["full"]
