"""The guide's recipes against the one that they stand on, on three drawn sets: box AP, and what it cost.

python benchmarks/guide.py out=runs/guide_bench      (about 15 minutes of a core; finished rows are kept)

An eighth of the images that the guide would show, so that it takes minutes; boxes only. Rows of a set: `base`, the
small detector of glyphs/stage1.yaml with the data's paths; `guide`; `no weights`, the same from a random trunk; `as
long`, `base` for as many epochs as `guide`.
"""

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from loce.config import load_config, read_options, run_script
from loce.engine import guide
from loce.utils.environment import code
from loce.utils.files import write_text

SETS = {  # options of scripts/make_glyphs.py
    "letters": "classes=20 train_images=250 val_images=80 size=160",
    "many classes": "classes=100 train_images=200 val_images=100 size=128",
    "tiny objects": "classes=10 train_images=60 val_images=40 size=288 smallest=0.056 largest=0.08",
}
SHARE = 8
COMMON = "data.workers=0 train.evaluate=true eval.errors=false device=cpu model.masks=false"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the comparison."""

    out: str = "runs/guide_bench"  # folder of sets, runs and results.json


def run(*words: str) -> float:
    """Run a script of ours; the CPU seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, *words]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    folder = Path(read_options(Options, sys.argv[1:]).out)
    results = folder / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {"rows": {}}
    guide.SEEN[guide.CPU_BASE] //= SHARE
    guide.CORE_PIXELS /= SHARE
    arms: dict[str, list[str]] = {}
    for name, drawn in SETS.items():
        place = folder / name.replace(" ", "_")
        run("scripts/make_glyphs.py", f"out={place}", "workers=1", *drawn.split())
        pairs = [(f"{place}/annotations/{split}.json", str(place)) for split in ("train", "val")]
        recipe = place / "guide.yaml"
        if not recipe.exists():
            guide.write_recipes(recipe, pairs[0], pairs[1], {})
        epochs = load_config([str(recipe)]).train.epochs
        paths = [
            f"data.{split}_{part}={pair[n]}"
            for split, pair in zip(("train", "val"), pairs, strict=True)
            for n, part in enumerate(("annotations", "images"))
        ]
        as_long = [f"train.epochs={epochs}", f"train.drops=[{round(0.8 * epochs)}]"]
        arms[f"{name}, base"] = [guide.CPU_BASE, *paths]
        arms[f"{name}, guide"] = [str(recipe)]
        arms[f"{name}, no weights"] = [str(recipe), "model.weights=none"]
        arms[f"{name}, as long"] = [guide.CPU_BASE, *paths, *as_long]
    for kind in ("base", "guide", "no weights", "as long"):
        for row in (f"{name}, {kind}" for name in SETS):
            if row in found["rows"]:
                continue
            output = folder / row.replace(", ", "_").replace(" ", "_")
            seconds = run("scripts/train.py", *arms[row], *COMMON.split(), f"output={output}")
            metrics = json.loads((output / "eval/metrics.json").read_text())["bbox"]
            config = load_config([str(output / "config.yaml")])
            found["rows"][row] = {
                "AP": metrics["AP"],
                "AP50": metrics["AP50"],
                "cpu_seconds": round(seconds, 1),
                "epochs": config.train.epochs,
                "edge": config.data.test_short_edge,
                "anchor_scale": config.model.rpn.anchor_scale,
                "commit": code(),
            }
            write_text(results, json.dumps(found, indent=1) + "\n")
            print(row, found["rows"][row], flush=True)


if __name__ == "__main__":
    run_script(main)
