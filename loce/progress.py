"""What a waiting person sees: a bar on a terminal; elsewhere plain lines with count, time left and memory."""

import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from loce import distributed

T = TypeVar("T")
SILENCE = 10.0  # seconds without a line that a phase may last


class Progress:
    """Shows `done` of `total`. Rank 0 only; other ranks show nothing."""

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "batches") -> None:
        self.label, self.total, self.done, self.unit = label, total, done, unit
        self.first, self.started = done, time.monotonic()
        self.printed = self.started
        self.bar = bar(label, total, done, unit)
        self.lines = distributed.is_main() and self.bar.disable
        if self.lines:
            say(f"{label}: {done}/{total} {unit}")

    def advance(self, amount: int = 1) -> None:
        """`amount` more is done."""
        self.done += amount
        self.bar.update(amount)
        if self.lines and time.monotonic() - self.printed >= SILENCE:
            self.printed = time.monotonic()
            left = eta(self.started, self.done - self.first, self.total - self.done)
            say(f"{self.label}: {self.done}/{self.total} {self.unit}, eta {left}, {peak_memory():.1f} GiB")

    def close(self) -> None:
        """The last line: how much in how long."""
        self.bar.close()
        if self.lines:
            took = clock(time.monotonic() - self.started)
            say(f"{self.label}: {self.done}/{self.total} {self.unit} in {took}, {peak_memory():.1f} GiB")


def bar(label: str, total: int, done: int, unit: str) -> "tqdm[Any]":
    """A tqdm bar on rank 0 of a terminal; elsewhere one that shows nothing (`disable` is true)."""
    if not (distributed.is_main() and sys.stderr.isatty()):
        return tqdm(total=total, initial=done, disable=True)
    columns, _ = os.get_terminal_size(sys.stderr.fileno())
    # Some terminals say that they are 0 x 0.
    size: dict[str, Any] = {"dynamic_ncols": True} if columns else {"ncols": 80, "nrows": 24}
    return tqdm(desc=label, total=total, initial=done, unit=f" {unit}", **size)


def progress(items: Iterable[T], total: int, label: str, unit: str = "batches") -> Iterator[T]:
    """The items, shown as they go by: a bar, or a line at the start, at the end and at most every 10 s between."""
    display = Progress(label, total, unit=unit)
    try:
        for item in items:
            yield item
            display.advance()
    finally:
        display.close()


def say(text: str) -> None:
    """A line on standard output, at once and above any bar."""
    tqdm.write(text)
    sys.stdout.flush()


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def eta(started: float, done: int, left: int) -> str:
    """h:mm:ss until `left` more are done, at the speed since `started` (time.monotonic); "?" before the first."""
    return clock((time.monotonic() - started) / done * left) if done > 0 else "?"


def peak_memory() -> float:
    """GiB this process has held at most: on its CUDA device where it uses one, else in host memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
