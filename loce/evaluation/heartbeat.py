"""A line every ten seconds from loops that may take long, so that nobody takes them for dead. Imports no torch."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
SILENCE = 10.0  # seconds


def watched(items: Iterable[T], total: int | None, label: str) -> Iterator[T]:
    """The items; a line on stderr with count, time left and memory whenever ten seconds passed without one."""
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= SILENCE:
            last = now
            left = f", about {(now - start) / done * (total - done):.0f} s left" if total and done else ""
            count = f"{done}/{total}" if total else f"{done}"
            print(f"{label}: {count}{left}, {peak_memory():.1f} GiB", file=sys.stderr, flush=True)
        yield item


def peak_memory() -> float:
    """Most memory this process has held, GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
