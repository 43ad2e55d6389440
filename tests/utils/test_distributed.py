"""The same calls in one process and in two, started as users start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loce.config import UserError
from loce.utils import distributed

ROOT = Path(__file__).resolve().parents[2]
# Each rank writes what it saw to <rank>.json.
TWO_RANKS = """
import json, sys
from pathlib import Path
import torch
from loce.utils import distributed as d

device = d.setup("cpu")
d.setup("cpu")  # again: nothing happens
r = d.rank()
own = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t() * (r + 1)  # not contiguous
total = d.all_reduce_sum(own.requires_grad_())
seen = {
    "device": str(device), "rank": r, "world": d.world_size(), "main": d.is_main(), "threads": torch.get_num_threads(),
    "sum": total.tolist(), "own": own.tolist(), "grad": total.requires_grad,
    "rows": d.all_gather_rows(own).tolist(),
    "half": d.all_gather_rows(torch.tensor([r + 0.5], dtype=torch.bfloat16)).tolist(),
    "bool": d.all_gather_rows(torch.tensor([r == 1])).tolist(),
    "long": d.all_reduce_sum(torch.tensor(2**40 + r)).item(),
    "empty": list(d.all_gather_rows(torch.zeros(0, 4)).shape),
    "text": d.broadcast_text(f"from {r}"),
}
d.barrier()
d.teardown()
d.teardown()
seen["after"] = d.world_size()
Path(sys.argv[1], f"{r}.json").write_text(json.dumps(seen))
"""


def test_two_processes(tmp_path: Path):
    (tmp_path / "ranks.py").write_text(TWO_RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, str(tmp_path / "ranks.py"), str(tmp_path)], check=True, timeout=120, env=environment)
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen == {
            "device": "cpu",
            "rank": rank,
            "world": 2,
            "main": rank == 0,
            "threads": 1,
            "sum": [[3.0, 9.0], [6.0, 12.0]],
            "own": [[1.0 * (rank + 1), 3.0 * (rank + 1)], [2.0 * (rank + 1), 4.0 * (rank + 1)]],
            "grad": False,
            "rows": [[[1.0, 3.0], [2.0, 4.0]], [[2.0, 6.0], [4.0, 8.0]]],
            "half": [[0.5], [1.5]],
            "bool": [[False], [True]],
            "long": 2**41 + 1,
            "empty": [2, 0, 4],
            "text": "from 0",
            "after": 1,
        }


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    rows = torch.arange(6.0).view(2, 3).requires_grad_()
    assert torch.equal(distributed.all_reduce_sum(rows), rows) and not distributed.all_reduce_sum(rows).requires_grad
    assert torch.equal(distributed.all_gather_rows(rows), rows[None])
    assert distributed.broadcast_text("x") == "x"
    distributed.barrier()
    distributed.teardown()


def test_cpu_threads_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(distributed, "available_cores", lambda: 8)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert distributed.setup("cpu") == torch.device("cpu")
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the user's choice stands
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        distributed.setup("cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_cuda_asked_for_but_absent():
    with pytest.raises(UserError, match="device = cuda: no CUDA device was found; use device=cpu"):
        distributed.setup("cuda")
    assert distributed.setup("auto").type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_processes_than_cuda_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(torch.cuda.device_count() + 1))
    with pytest.raises(UserError, match="use --nproc_per_node="):
        distributed.setup("auto")


def test_a_half_set_environment_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="RANK, MASTER_ADDR, MASTER_PORT not: start several processes with torchrun"):
        distributed.setup("cpu")


def test_two_processes_say_a_mistake_once(tmp_path: Path):
    (tmp_path / "mistake.py").write_text(
        "from loce.config import load_config, run_script\nrun_script(lambda: load_config(['stage1', 'train.lr=0']))"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, str(tmp_path / "mistake.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("train.lr = 0: must be a number > 0") == 1
