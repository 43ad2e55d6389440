"""Signal handling: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (SLURM) end a run without loss, with exit code 75.

Outside of training a signal raises `Stopped` at once: what is finished is on disk. In training (`deferred`) it is only
noted in `asked`; all ranks agree at the end of a step and save. A second signal ends the process wherever it is; within
two seconds it is the same request, since clusters send it to all processes and torchrun passes it on to its own.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from loce.utils.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST = 2.0  # seconds

asked: list[str] = []  # the name of the signal that asked this process to stop
_deferred = False


def listen() -> None:
    """Take signals as requests from now on; call it in the main thread, once or more often."""
    if signal.getsignal(signal.SIGTERM) is _note:
        return
    arrivals, sender = socket.socketpair()
    sender.setblocking(False)
    for number in SIGNALS:
        signal.signal(number, _note)
    # Python calls `_note` only between two steps of the main thread, which may wait in a collective or on a disk; the
    # number of the signal comes to this other thread at once.
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_at_the_second, args=(arrivals, sender), daemon=True).start()


def _note(number: int, _: FrameType | None) -> None:
    first = not asked
    asked.append(signal.Signals(number).name)
    if first and not _deferred:
        raise stopped()


def _end_at_the_second(arrivals: socket.socket, _: socket.socket) -> None:
    """Files are written to a temporary name and renamed, so that this harms nothing."""
    first = None
    while True:
        for number in arrivals.recv(64):
            if number not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first > SAME_REQUEST:
                os._exit(128 + number)


@contextmanager
def deferred() -> Iterator[None]:
    """Signals are only noted in this block, whose code checks `asked`; `Stopped` is raised after it."""
    only_note()
    yield  # an error on the way out needs no signal on top: what happens next is the end
    _raise_again()


@contextmanager
def at_once() -> Iterator[None]:
    """Within `deferred`, a block that may end anywhere: signals, also one noted before, raise `Stopped`."""
    _raise_again()
    yield
    only_note()


def only_note() -> None:
    """Signals are only noted from now on; the second still ends the process."""
    global _deferred
    _deferred = True


def _raise_again() -> None:
    global _deferred
    _deferred = False
    if asked:
        raise stopped()


def stopped() -> Stopped:
    """Why a rank stops: the signal that it got, or that another one got."""
    return Stopped(asked[0] if asked else "a signal to another rank")


def die_with_parent(number: signal.Signals, parent: int = 0) -> None:
    """Let the system send this signal to this process when its parent dies, however it does (Linux; else nothing).

    parent: the parent's id, where it is known; the signal comes at once where that process is gone already.
    """
    import ctypes  # here, since it is not needed where there are no parents to lose

    if hasattr(os, "sched_getaffinity"):
        ctypes.CDLL(None, use_errno=True).prctl(1, int(number), 0, 0, 0)  # 1: PR_SET_PDEATHSIG
        if parent and os.getppid() != parent:
            os.kill(os.getpid(), number)
