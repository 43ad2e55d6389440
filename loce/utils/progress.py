"""Progress display: a bar on a terminal; elsewhere plain lines with count, speed, time left and memory.

Imports no torch: results of any model are evaluated without it.
"""

import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
SILENCE = 10.0  # seconds without a line that a phase may last
_PAUSE = 1.0  # seconds between two phases after which the silence counts anew
_clock = {"last_line": time.monotonic(), "phase_end": 0.0}  # when the last line was printed, and the last phase ended


class Progress:
    """Shows `done` of `total`. Rank 0 only; other ranks show nothing."""

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "batches") -> None:
        self.label, self.total, self.done, self.unit = label, total, done, unit
        self.first, self.started = done, time.monotonic()
        self.printed = self.started
        self.bar = bar(label, total, done, unit)
        self.lines = _is_main() and self.bar.disable
        if self.lines:
            print_line(f"{label}: {done}/{total} {unit}")

    def advance(self, amount: int = 1) -> None:
        """`amount` more is done."""
        self.done += amount
        self.bar.update(amount)
        if self.lines and time.monotonic() - self.printed >= SILENCE:
            self.printed = time.monotonic()
            left = eta(self.started, self.done - self.first, self.total - self.done)
            print_line(f"{self._count()}, eta {left}, {peak_memory():.1f} GiB")

    def close(self) -> None:
        """The last line: how much in how long."""
        self.bar.close()
        if self.lines:
            took = clock(time.monotonic() - self.started)
            print_line(f"{self._count()} in {took}, {peak_memory():.1f} GiB")

    def _count(self) -> str:
        """What is done and, once that is known, how fast."""
        done, seconds = self.done - self.first, time.monotonic() - self.started
        speed = f" ({done / seconds:.3g}/s)" if done and seconds > 0 else ""
        return f"{self.label}: {self.done}/{self.total} {self.unit}{speed}"


def bar(label: str, total: int, done: int, unit: str, shown: bool = True) -> "tqdm[Any]":
    """A tqdm bar on rank 0 of a terminal; elsewhere one that shows nothing (`disable` is true)."""
    if not (shown and _is_main() and sys.stderr.isatty()):
        return tqdm(total=total, initial=done, disable=True)
    columns, _ = os.get_terminal_size(sys.stderr.fileno())
    # Some terminals say that they are 0 x 0.
    size: dict[str, Any] = {"dynamic_ncols": True} if columns else {"ncols": 80, "nrows": 24}
    return tqdm(desc=label, total=total, initial=done, unit=f" {unit}", **size)


def progress(
    items: Iterable[T],
    total: int,
    label: str,
    unit: str = "batches",
    size: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:
    """The items, shown as they go by: a bar, or a line at the start, at the end and at most every 10 s between.

    size: units of an item, of which there are `total`.
    """
    display = Progress(label, total, unit=unit)
    try:
        for item in items:
            yield item
            display.advance(size(item))
    finally:
        display.close()


class Phase:
    """Work that may take long: `done` of `total` units, counted up by the code that does it."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self.started = time.monotonic()

    def __str__(self) -> str:
        if self.total is None:
            return f"{self.label}: for {clock(time.monotonic() - self.started)}, {peak_memory():.1f} GiB"
        left = eta(self.started, self.done, self.total - self.done)
        return f"{self.label}: {self.done:,}/{self.total:,} {self.unit}, eta {left}, {peak_memory():.1f} GiB"


_phases: list[Phase] = []  # from the outermost to the innermost, which lines are about


@contextmanager
def phase(label: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
    """A line on standard error from rank 0 every ten seconds while the block runs; none for a quick block.

    A thread of the outermost phase prints them. Short phases in a row share their ten seconds, so that a long row of
    them is not silent either. Not for blocks that fork: a child could inherit a lock.
    """
    work, over = Phase(label, total, unit), threading.Event()
    printer = threading.Thread(target=_print_until, args=(over,), daemon=True)
    alone = not _phases and _is_main()
    _phases.append(work)
    if alone:
        if work.started - _clock["phase_end"] > _PAUSE:
            _clock["last_line"] = work.started
        printer.start()
    try:
        yield work
    finally:
        if alone:
            over.set()
            printer.join()
            _clock["phase_end"] = time.monotonic()
        _phases.remove(work)


def _print_until(over: threading.Event) -> None:
    while not over.wait(max(0.01, _clock["last_line"] + SILENCE - time.monotonic())):
        if time.monotonic() - _clock["last_line"] >= SILENCE:
            print_line(str(_phases[-1]), sys.stderr)


def watched(items: Iterable[T], total: int | None, label: str, unit: str) -> Iterator[T]:
    """The items, counted by a `phase`: silent unless they take long."""
    with phase(label, total, unit) as work:
        for item in items:
            yield item
            work.done += 1


def print_line(text: str, file: TextIO | None = None) -> None:
    """A line on standard output (or `file`), at once and above any bar."""
    _clock["last_line"] = time.monotonic()
    tqdm.write(text, file=file)
    (file or sys.stdout).flush()


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"  # torchrun's; `distributed` would import torch


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def eta(started: float, done: int, left: int) -> str:
    """h:mm:ss until `left` more are done, at the speed since `started` (time.monotonic); "?" before the first."""
    return clock((time.monotonic() - started) / done * left) if done > 0 else "?"


def peak_memory() -> float:
    """GiB this process has held at most: on its CUDA device where it uses one, else in host memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
