"""Two sides of a comparison measured in turns, and the table and the file that become of it."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from loce.utils.environment import environment
from loce.utils.files import write_text

Side = Callable[[], Any]
MIB = 1 << 20


@dataclass
class Row:
    """One comparison. ratio: how it is read, "theirs / ours" (a gain) or "ours / theirs" (a share).

    goal: of the ratio; most: of our side, in `unit`. None: nothing is promised, or another row has the goal.
    """

    name: str
    what: str
    against: str
    goal: float | None = None
    most: float | None = None
    ratio: str = "theirs / ours"
    unit: str = "s"
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def ratios(self) -> list[float]:
        """Of each round."""
        pairs = zip(self.ours, self.theirs, strict=True)
        return [b / a if self.ratio == "theirs / ours" else a / b for a, b in pairs]

    @property
    def reached(self) -> bool | None:
        """Whether the medians are on the goal's side; None where nothing was measured, or no goal is set."""
        if not self.ours or (self.goal is None and self.most is None):
            return None
        if self.goal is None:
            return statistics.median(self.ours) <= float(self.most or 0)
        middle = statistics.median(self.ratios())
        return middle >= self.goal if self.ratio == "theirs / ours" else middle <= self.goal

    @property
    def promise(self) -> str:
        """The goal as the table says it."""
        if self.goal is None:
            return "" if self.most is None else f"≤ {self.most:g} {self.unit}"
        return f"{'≥' if self.ratio == 'theirs / ours' else '≤'} {self.goal:g}"


def seconds(work: Side, device: torch.device) -> float:
    """Time of one call: CPU seconds of this process on a CPU, which other programs disturb least; else by the clock."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(row: Row, ours: Side, theirs: Side, device: torch.device, rounds: int, calls: int = 1) -> Row:
    """Fill in a row: after one call of each to warm up, `rounds` times `calls` calls of one side, then of the other."""
    ours()
    theirs()
    for _ in range(rounds):
        for side, times in ((ours, row.ours), (theirs, row.theirs)):
            times.append(statistics.median(seconds(side, device) for _ in range(calls)))
    return row


def in_process(script: str, *words: str) -> dict[str, float]:
    """What `script words` prints last, a JSON object: a process of its own, for its memory."""
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(words)}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def status_mib(key: str, pid: int | str = "self") -> float:
    """VmHWM (most memory ever held) or VmRSS (held now) of a process, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def table(rows: list[Row]) -> str:
    """The rows in Markdown; medians, and the smallest and largest ratio of the rounds."""
    lines = ["| row | what | against | ratio | goal | ours | theirs | ratio, min to max |", "|---" * 8 + "|"]
    for row in rows:
        if not row.ours:
            lines.append(f"| {row.name} | {row.what} | {row.against} | not measured | {row.promise} | | | |")
            continue
        found = row.ratios()
        mark = {True: "", False: " (missed)", None: ""}[row.reached]
        ours, theirs = (f"{_number(statistics.median(x))} {row.unit}" for x in (row.ours, row.theirs))
        spread = f"{min(found):.3g} to {max(found):.3g}"
        middle = f"{statistics.median(found):.3g}{mark}"
        cells = (row.name, row.what, row.against, middle, row.promise, ours, theirs, spread)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def save(rows: list[Row], options: Mapping[str, Any], device: torch.device, path: str) -> None:
    """The rows with commit, hardware and options; rows of another run in the same file stay, each with its own."""
    kept = _content(path)
    facts = dict(line.split(": ", 1) for line in environment(device).splitlines())
    facts["threads"] = str(torch.get_num_threads())
    facts["load"] = f"{os.getloadavg()[0]:.1f} other and own processes on {os.cpu_count()} cores"
    for row in rows:
        if row.ours:
            found = {"ratio": statistics.median(row.ratios()), "reached": row.reached}
            kept[row.name] = {**asdict(row), "found": found, "options": dict(options), "environment": facts}
    write_text(path, json.dumps({"benchmark": "speed", "rows": kept}, indent=1) + "\n")


def saved(path: str, size: str) -> list[Row]:
    """The rows that a file holds of one size, whichever run they are of."""
    names = [field.name for field in fields(Row)]
    content = [row for row in _content(path).values() if row["options"]["size"] == size]
    return [Row(**{name: row[name] for name in names if name in row}) for row in content]


def _content(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8"))["rows"] if Path(path).exists() else {}
