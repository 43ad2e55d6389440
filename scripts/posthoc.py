"""Which post-hoc calibration helps a run, and with which parameter? One inference, then all of them from its regions.

python (or torchrun --nproc_per_node=N) scripts/posthoc.py RUN [methods=[norcal,fracal]] [key=value ...]
Grids: eval.norcal.gamma=[0.5,0.7]. Other options eval.* take the place of the run's. docs/posthoc.md explains.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loce.config import UserError, read_options, run_script
from loce.report.tables.steps import folders_of
from loce.utils.options import Count

CONFIG_WORDS = ("head.", "eval.", "data.")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare post-hoc methods on a run folder or checkpoint; without one, on the newest run below runs/."""

    methods: tuple[str, ...] = ()  # none: all
    tune: Count = 10  # training images of each class that parameters are chosen on
    regions: Count = 300  # of an image that are stored, the best
    classes: Count = 60  # of a region that are stored, the best
    resamples: Count = 1000  # of the bootstrap for the intervals
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main() -> None:
    overrides = [word for word in sys.argv[1:] if word.startswith(CONFIG_WORDS)]
    runs, words = folders_of([word for word in sys.argv[1:] if word not in overrides])
    options = read_options(Options, words)
    if len(runs) != 1:
        raise UserError(f"one run is needed, {len(runs)} were given: python scripts/posthoc.py RUN [key=value ...]")
    from loce.engine.posthoc_bench import bench  # torch is not needed to refuse a word

    most = (options.regions, options.classes)
    print(bench(Path(runs[0]), options.methods, overrides, options.tune, most, options.resamples, options.device))


if __name__ == "__main__":
    run_script(main)
