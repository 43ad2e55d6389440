"""A shared memory holds the rows of all ranks, in the same order on each, whatever number of rows a rank gives."""

import socket
from pathlib import Path

import torch
from torch import distributed as dist

from loce.config import MemoryConfig
from loce.models.memory_sampling import MemorySampling

CLASSES, WIDTH, STEPS = 5, 3, 4


def rows(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a rank stores in a step: rank 0 many rows, rank 1 few, and once none."""
    count = (6, 2)[rank] if (rank, step) != (1, 2) else 0
    generator = torch.Generator().manual_seed(10 * step + rank)
    features, targets = torch.rand(count, WIDTH, generator=generator), torch.rand(count, 4, generator=generator)
    return features, torch.randint(0, CLASSES, (count,), generator=generator), targets


def share(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    sampling = MemorySampling(CLASSES, (WIDTH,), MemoryConfig(enabled=True, shared=True, capacity=7))
    for step in range(STEPS):
        sampling.store(*rows(rank, step))
    torch.save(sampling.state_dict(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_both_ranks_hold_what_one_bank_with_all_rows_holds(tmp_path: Path) -> None:
    with socket.socket() as probe:  # finds a free port
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(share, args=(port, str(tmp_path)), nprocs=2)
    alone = MemorySampling(CLASSES, (WIDTH,), MemoryConfig(enabled=True, capacity=7))
    for step in range(STEPS):
        joined = [torch.cat(parts) for parts in zip(rows(0, step), rows(1, step), strict=True)]
        alone.bank.enqueue(*joined)
    for rank in range(2):
        state = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for name, expected in alone.state_dict().items():
            assert torch.equal(state[name], expected), (rank, name)
    assert alone.bank.written.sum() > CLASSES * 3
