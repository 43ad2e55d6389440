"""Collectives and devices: the same calls work under `python` and under `torchrun` (gloo on CPU, nccl on CUDA).

A collective is entered by every rank, whatever its data holds; with one process it does nothing.
"""

import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from loce.utils.environment import available_cores
from loce.utils.errors import RankLostError, UserError

TIMEOUT = timedelta(minutes=30)  # the longest wait in a healthy run: the others while rank 0 merges an evaluation


def setup(device: str = "auto") -> torch.device:
    """Join the other processes, if `torchrun` started any, and give the device of this one.

    device: "auto" (CUDA where there is one) | "cpu" | "cuda". UserError where that cannot be.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world = local_world_size()
    chosen = _choose_device(device, local_rank, local_world)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // local_world))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        _join("nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def local_world_size() -> int:
    """Number of processes on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _choose_device(device: str, local_rank: int, local_world: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device = {device}: no CUDA device was found; use device=cpu, or check the driver and torch")
    if local_world > torch.cuda.device_count():
        raise UserError(
            f"{local_world} processes on this machine, but {torch.cuda.device_count()} CUDA devices; "
            f"use --nproc_per_node={torch.cuda.device_count()}, or device=cpu"
        )
    return torch.device("cuda", local_rank)


def _join(backend: str) -> None:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is set, but {', '.join(missing)} not: start several processes with torchrun")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        require_torchrun(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the processes cannot meet at {address}; use another --master_port ({error})") from error


def require_torchrun(address: str, port: int) -> None:
    """RankLostError where nobody listens there: torchrun was killed while this process started.

    The meeting itself would wait for it as long as for the slowest rank.
    """
    try:
        socket.create_connection((address, port), timeout=60).close()
    except OSError as error:
        raise RankLostError(f"error: torchrun at {address}:{port} has ended ({error}); nothing was begun") from None


def teardown() -> None:
    """Leave the group of processes; may be called at any time, also twice."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, 0..world_size-1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, no gradient; `tensor` has the same shape and dtype on all ranks and is not changed."""
    if not dist.is_initialized():
        return tensor.detach()
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def all_reduce_sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over ranks of several tensors by one collective, no gradient; the same shapes and dtypes on all ranks.

    With several ranks the sums have the dtype that all of them are promoted to: of counts and fp32 it is fp32.
    """
    if not dist.is_initialized():
        return [x.detach() for x in tensors]
    total = all_reduce_sum(torch.cat([x.flatten() for x in tensors]))
    parts = total.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def divisor(total: Tensor) -> Tensor:
    """What losses are divided by: the mean over ranks of counts with the sum `total` (less than 1 counts as 1); fp32.

    Data-parallel training averages the gradients of the ranks. With this as divisor on every rank, and not each rank's
    own count, their average is the gradient of all ranks' images as one batch.
    """
    return total.clamp(min=1) / world_size()


def mean_count(counts: Tensor) -> Tensor:
    """The `divisor` of a loss from this rank's own counts, no gradient; the same shape on all ranks."""
    return divisor(all_reduce_sum(counts))


def all_gather_rows(tensor: Tensor) -> Tensor:
    """(W, *shape): the tensors of all W ranks in order of rank, no gradient; same shape and dtype on all ranks."""
    if not dist.is_initialized():
        return tensor.detach()[None]
    own = tensor.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.stack(parts)


def broadcast_text(text: str) -> str:
    """Rank 0's `text` on every rank."""
    box = [text]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_texts(text: str) -> list[str]:
    """The texts of all ranks, in order of rank, on every rank."""
    texts = [text] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(texts, text)
    return texts


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        devices = [torch.cuda.current_device()] if dist.get_backend() == "nccl" else None
        arrival = dist.barrier(device_ids=devices, async_op=True)
        while not arrival.is_completed():  # not one long wait, so that signals are handled in between
            time.sleep(0.002)
        arrival.wait()
