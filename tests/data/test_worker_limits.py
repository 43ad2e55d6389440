"""What data workers need of the system is asked for before they start."""

import resource
import shlex
from pathlib import Path

import pytest
import torch

from loce.config import DataConfig
from loce.data.loader import PREFETCH, allow_open_files, bytes_ahead, require_shared_memory
from loce.utils.errors import UserError
from tests.tiny_runs import command, in_namespace

DATA = DataConfig(workers=4)


def test_bytes_on_their_way_are_those_of_the_tensors():
    image = torch.zeros(3, max(DATA.short_edges), DATA.long_edge, dtype=torch.uint8)
    assert bytes_ahead(DATA, images=2, ranks=8) == 8 * 4 * PREFETCH * 2 * image.nbytes


def test_enough_room_and_no_workers_pass(tmp_path: Path):
    require_shared_memory(DATA, 2, folder=tmp_path)
    require_shared_memory(DataConfig(workers=0), 10**9, folder=tmp_path)
    require_shared_memory(DATA, 10**9, folder=tmp_path / "none")  # a system that hands tensors over otherwise


def test_too_little_room_is_said_with_the_fix(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"data.workers = 4: 2 processes .* need up to .* --shm-size=\d+m .*data.workers=0"
    ):
        require_shared_memory(DATA, 10**9, ranks=2, folder=tmp_path)


def test_a_run_with_docker_s_64_mb_is_refused_before_it_starts(tmp_path: Path):
    line = shlex.join(command("train.py", "stage1.yaml", f"output={tmp_path}/run", "device=cpu"))
    done = in_namespace(f"mount -t tmpfs -o size=64m none /dev/shm && exec {line}")
    assert done.returncode == 2 and "MB in /dev/shm, which has 67 MB free" in done.stdout + done.stderr
    assert "train.json: there is no such annotation file" in done.stdout + done.stderr  # told at once


def test_open_files_are_raised_to_what_is_allowed():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        allow_open_files()
        raised, same = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert raised == (65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)) and same == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
