"""CPU time of the post-hoc bench, all of it, against as many evaluations with eval.posthoc=... as it has settings.

python benchmarks/posthoc_sweep.py RUN, on a copy of RUN's checkpoints in a temporary folder. The bench is timed from an
empty store: two inferences, class facts, 41 settings on training images, 9 on validation images by three protocols with
intervals. The evaluation, of one setting: inference with masks and its numbers, without intervals and lost objects.
Seconds go to benchmarks/results/posthoc_sweep.json.
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from evaluation import hardware

from loce.config import UserError, run_script
from loce.engine.inference import evaluate_checkpoints
from loce.engine.posthoc_bench import GRIDS, bench
from loce.utils.files import write_text

RESULTS = Path(__file__).with_name("results") / "posthoc_sweep.json"
SETTINGS = sum(len(grid.values) for grid in GRIDS.values())


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: python benchmarks/posthoc_sweep.py RUN")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        shutil.copytree(Path(sys.argv[1], "checkpoints"), run / "checkpoints")
        start = time.process_time()
        print(bench(run))
        swept = time.process_time() - start
        start = time.process_time()
        words = ["eval.posthoc=norcal", "eval.errors=false"]
        evaluate_checkpoints([run], None, words, "auto", resamples=0)
        once = time.process_time() - start
    found = {"settings": SETTINGS, "bench_cpu_seconds": swept, "evaluation_cpu_seconds": once}
    write_text(RESULTS, json.dumps({**hardware(), **found}, indent=1) + "\n")
    print(
        f"bench: {swept:.0f} s of CPU; one evaluation: {once:.0f} s, {SETTINGS} of them {SETTINGS * once:.0f} s: "
        f"{SETTINGS * once / swept:.1f} times the bench"
    )


if __name__ == "__main__":
    run_script(main)
