"""How fast a run goes, for two lines of its log: when it will end, and a warning where it waits for its images."""

import time
from datetime import datetime, timedelta

START_UP = 20  # iterations in which workers start and memory is claimed: they say nothing of the speed
ENOUGH = 50  # iterations after them
MOST_WAITING = 0.3  # share of the time; more is worth a warning


def first_word(start: int, total: int, log_every: int) -> int:
    """The iteration whose line is followed by the expected end; 0 where the run is over before."""
    first = -(-(start + START_UP) // log_every) * log_every  # the line that counting begins with
    word = -(-(first + ENOUGH) // log_every) * log_every
    return word if word < total else 0


class Pace:
    """Counts iterations, seconds and waiting after the start-up of this process; each message comes once.

    start, total: iterations of the whole training, done and to do; cure: what helps where the images come too slowly.
    """

    def __init__(self, start: int, total: int, cure: str) -> None:
        self.start, self.total, self.cure = start, total, cure
        self.told_end = self.told_waiting = False
        self._count_anew()

    def _count_anew(self) -> None:
        self.iterations, self.seconds, self.waited = 0, 0.0, 0.0

    def add(self, before: int, done: int, seconds: float, waited: float) -> list[str]:
        """Take up the iterations `before` to `done`; lines for the log, mostly none."""
        if before < self.start + START_UP:
            return []
        self.iterations, self.seconds = self.iterations + done - before, self.seconds + seconds
        self.waited += waited
        if self.iterations < ENOUGH:
            return []
        lines, left = [], self.seconds / self.iterations * (self.total - done)
        if not self.told_end and done < self.total:
            lines.append(f"expected end {_when(left)}, without evaluations")
            self.told_end = True
        share = min(self.waited / max(self.seconds, 1e-9), 1.0)
        if not self.told_waiting and share > MOST_WAITING:
            lines.append(f"WARNING: {share:.0%} of the time is waiting for images. {self.cure}")
            self.told_waiting = True
        self._count_anew()  # a disk may become slow later
        return lines


def _when(seconds: float) -> str:
    """2026-11-24 03:10, 14:22 h from now."""
    minutes = round(seconds / 60)
    end = datetime.fromtimestamp(time.time()) + timedelta(seconds=seconds)
    return f"{end:%Y-%m-%d %H:%M}, {minutes // 60}:{minutes % 60:02} h from now"


def more_workers(workers: int, cores: int, processes: int) -> str:
    """What helps where the data workers are too slow, on a machine with `cores` for `processes` of this run."""
    best = max(1, cores // processes)
    if workers < best:
        return f"Set data.workers={best} (now {workers}; {cores} cores for {processes} processes on this machine)"
    return (
        f"data.workers={workers} keeps all {cores} cores busy: put the images on a faster disk, or store them smaller "
        "than the camera's (short side of data.short_edges' largest)"
    )
