"""See one iteration of a training again: python (or torchrun) scripts/replay.py RUN iteration=N [output=DIR].

Start it with as many processes as the run had. It trains from the last checkpoint before and draws the batch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loce.config import Count, UserError, read_options, run_script


@dataclass(frozen=True, kw_only=True)
class Options:
    """Rebuild a batch of a run folder and run it: images with boxes and regions, memory rows, losses."""

    iteration: Count  # 1, 2, ..., as in metrics.jsonl
    output: str = ""  # folder for what is found; empty: RUN/replay/ITERATION
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main() -> None:
    words = sys.argv[1:]
    runs = [word for word in words if "=" not in word and not word.startswith("-")]
    options = read_options(Options, [word for word in words if word not in runs])
    if len(runs) != 1:
        raise UserError("give one run folder: python scripts/replay.py RUN iteration=N")
    from loce.engine.replay import replay  # torch is imported after the options are known to be right

    replay(Path(runs[0]), options.iteration, Path(options.output) if options.output else None, options.device)


if __name__ == "__main__":
    run_script(main)
