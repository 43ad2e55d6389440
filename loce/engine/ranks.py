"""Process group and failure reporting: when a rank fails, the others learn the reason and end, too.

Reasons go through the store of torchrun, which outlives any rank. A killed rank leaves no reason; the ranks on the same
machine see that its process is gone.
"""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from loce.utils import distributed, signals
from loce.utils.errors import DivergedError, RankLostError, Stopped

PATIENCE = 10.0  # seconds that a rank waits for the reason of another one's end
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Gloo", "gloo")


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """The device of this process, in a group of all of them that ends with the block.

    Signals are requests to stop (signals.py). When the block raises, the other ranks learn why; a rank that fails only
    because another one did raises RankLostError with the cause, or Stopped where that one was asked to stop.
    """
    signals.listen()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signals.die_with_parent(signal.SIGTERM)  # torchrun dies of signals that it does not know, such as SIGUSR1
    chosen = distributed.setup(device)
    reports = FailureReports() if distributed.world_size() > 1 else None
    try:
        yield chosen
    except BaseException as error:
        signals.only_note()
        # Data workers that are left ignore SIGTERM, so Python would wait for them at its end for ever; their end is no
        # error of PyTorch's loader.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
        if reports is not None and not isinstance(error, DivergedError):  # all ranks diverge together
            reports.report(error)
        raise
    distributed.teardown()


class FailureReports:
    """Why each rank ends, in the store of torchrun. Every rank must make one."""

    def __init__(self) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE))
        attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.store = dist.PrefixStore(f"loce/{attempt}", store)
        self.store.set(f"process/{distributed.rank()}", f"{socket.gethostname()} {os.getpid()}")
        distributed.barrier()

    def report(self, error: BaseException) -> None:
        """Leave the reason why this rank ends; raises RankLostError or Stopped where another rank caused it."""
        lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)
        stopped = isinstance(error, Stopped)  # by torchrun, perhaps, because a rank died
        causes = self._causes(PATIENCE if lost else 1.0) if lost or stopped else {}
        others_stopped = all(text.startswith(Stopped.__name__) for text in causes.values())
        own = ""  # this rank ends because another one did, which is no cause
        if not lost and others_stopped:
            own = f"{type(error).__name__}: {error}"
        elif causes and others_stopped:
            own = f"{Stopped.__name__}: "
        with suppress(RuntimeError):  # torchrun is gone: nobody is left to read it
            self.store.set(f"reason/{distributed.rank()}", own)
        if not own:
            raise RankLostError(_message(causes, str(error))) from None
        if lost:
            raise Stopped("a signal to another rank") from None

    def _causes(self, seconds: float) -> dict[int, str]:
        """Rank -> its reason, of those that did not end because of another; waits up to `seconds` for the first."""
        end = time.monotonic() + seconds
        others = [r for r in range(distributed.world_size()) if r != distributed.rank()]
        while time.monotonic() < end:
            time.sleep(0.5)  # that a rank ends is known before its report is there
            try:
                found = {r: text for r in others if (text := self._reason(r))}
            except RuntimeError:
                return {}
            if found:
                return found
        return {}

    def _reason(self, rank: int) -> str:
        """Why a rank ended; "" where it did not, or because of another."""
        if self.store.check([f"reason/{rank}"]):
            return self.store.get(f"reason/{rank}").decode()
        host, pid = self.store.get(f"process/{rank}").decode().split()
        if host != socket.gethostname() or _is_alive(int(pid)):
            return ""
        return (
            f"its process {pid} was killed from outside (kill -9, or by the system for lack of host memory: "
            "see dmesg; fewer data.workers need less)"
        )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"  # Z: dead, not yet buried
    except (ProcessLookupError, FileNotFoundError):
        return False


def _message(causes: dict[int, str], symptom: str) -> str:
    """The message on the ranks that ended; only the first of the remaining ranks prints one."""
    if distributed.rank() != min(r for r in range(distributed.world_size()) if r not in causes):
        return ""
    lines = [f"error: rank {rank} ended: {text}" for rank, text in causes.items()]
    lines = lines or [f"error: another rank ended, without a word and on another machine: see its output ({symptom})"]
    return "\n".join([*lines, "The other ranks end, too. The same command goes on from the last checkpoint."])
