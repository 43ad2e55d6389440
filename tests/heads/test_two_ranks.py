"""Heads with state: two processes with half a batch each do what one process does with all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from loce.config import HeadConfig, SeesawOptions
from loce.heads import HEADS
from loce.utils import distributed
from loce.utils.classes import IGNORED, META
from tests.conftest import stats_of
from tests.heads.cases import random_case, rois_of

ROOT = Path(__file__).resolve().parents[2]
CLASSES, FEATURES, STEPS = 5, 6, 4
STATEFUL = ("eqlv2", "seesaw", "balms", "pcb", "fcbl", "disalign")


def train(name: str, config: HeadConfig) -> dict[str, list]:
    """Losses and final state of a head after gradient descent on this rank's rows, gradients averaged over ranks."""
    world = distributed.world_size()
    torch.manual_seed(0)
    head = HEADS[name](FEATURES, stats_of(CLASSES), config).double()
    optimiser = torch.optim.SGD(head.parameters(), lr=0.5)
    history = []
    for step in range(STEPS):
        features, labels = random_case(28, CLASSES, FEATURES, step)
        labels[:6:2] = IGNORED  # more of the training rows in the first half than in the second
        own = slice(distributed.rank() * 28 // world, (distributed.rank() + 1) * 28 // world)
        meta = torch.where(torch.arange(28) % 2 == 1, META, -1)  # every other row
        rois = rois_of(labels[own], features_ND=features[own], sampled_class_N=meta[own])
        rois.count = distributed.mean_count(rois.count)  # as the model does
        loss = sum(head.losses(head(features[own]), rois).values())
        optimiser.zero_grad()
        loss.backward()
        for parameter in head.parameters():
            parameter.grad = distributed.all_reduce_sum(parameter.grad) / world
        optimiser.step()
        history.append((distributed.all_reduce_sum(loss) / world).item())
    return {"losses": history, **{key: value.tolist() for key, value in head.state_dict().items()}}


def results() -> dict[str, dict[str, list]]:
    found = {name: train(name, HeadConfig(name=name)) for name in STATEFUL}
    alone = HeadConfig(name="seesaw", seesaw=SeesawOptions(synchronise=False))
    return {**found, "seesaw, ranks apart": train("seesaw", alone)}


def test_two_ranks_equal_one(tmp_path: Path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*torchrun, "-m", "tests.heads.test_two_ranks", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    one, two = results(), [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for name in STATEFUL:
        for rank in (0, 1):
            assert set(two[rank][name]) == set(one[name])
            for key, values in one[name].items():
                torch.testing.assert_close(torch.tensor(two[rank][name][key]), torch.tensor(values))
    apart = [torch.tensor(two[rank]["seesaw, ranks apart"]["counts"]) for rank in (0, 1)]
    assert not torch.equal(apart[0], apart[1])
    assert (apart[0] + apart[1]).tolist() == one["seesaw, ranks apart"]["counts"] == one["seesaw"]["counts"]


if __name__ == "__main__":
    distributed.setup("cpu")
    found_here = results()
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(found_here))
    distributed.barrier()  # a rank that leaves early would break the other's last collective
    distributed.teardown()
