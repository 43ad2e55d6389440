"""Does the memory of a data-loading worker grow? Measured over many batches of a training on Glyph-LVIS.

    python benchmarks/loader_memory.py [batches=2000] [workers=2] ...

Private memory (USS: pages that no other process has) and proportional memory (Pss: shared pages divided by those who
have them) of every worker, from /proc/PID/smaps_rollup, so Linux only. Workers are forked and share the annotations;
what CPython writes into them (reference counts) turns shared pages private, which is the growth to look for. Images
are damaged on purpose, too: replacing them must not cost memory either. Writes a JSON file and a figure.
"""

import dataclasses
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from loce.config import Count, DataConfig, SamplerConfig, read_options, run_script
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.glyphs.make import GlyphOptions, make_glyphs
from loce.data.loader import TrainDataset, train_batches, training_plan
from loce.utils.environment import environment
from loce.utils.files import write_text
from loce.utils.progress import progress

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """The memory of data-loading workers, measured."""

    batches: Count = 2000
    batch_size: Count = 4  # images
    workers: Count = 2
    every: Count = 100  # batches between two measurements
    images: Count = 1000  # of the training set that is drawn
    size: Count = 160  # pixels a side
    output: str = "benchmarks/results/loader_memory.json"
    figure: str = "docs/images/loader_memory.png"


def children() -> list[int]:
    """Process ids of the workers."""
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def memory(pid: int) -> dict[str, int]:
    """Bytes of a process: "uss" private, "pss" proportional, "rss" resident."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, _ = line.split(maxsplit=2)
        fields[name.rstrip(":")] = int(value) * 1024
    return {"uss": fields["Private_Clean"] + fields["Private_Dirty"], "pss": fields["Pss"], "rss": fields["Rss"]}


def measure(options: Options, folder: Path) -> list[dict[str, object]]:
    """A row each `every` batches: how many batches there were, and the memory of each worker."""
    glyphs = GlyphOptions(out=str(folder), train_images=options.images, val_images=60, size=options.size, workers=1)
    make_glyphs(glyphs)
    annotations = LVISAnnotations.open(folder / "annotations/train.json")
    annotations.image_path(int(annotations.train_images[0]), folder).write_bytes(b"damaged")
    config = DataConfig(short_edges=(options.size,), long_edge=2 * options.size, test_short_edge=options.size)
    dataset = TrainDataset(annotations, folder, config, seed=0)
    plan = training_plan(dataset, SamplerConfig(), config, options.batch_size, seed=0)
    epochs = -(-options.batches // plan.iterations(1)[0])
    batches = train_batches(dataset, plan, epochs=epochs, workers=options.workers)
    rows: list[dict[str, object]] = []
    for number, _ in enumerate(progress(batches, options.batches, "loading"), 1):
        if number % options.every == 0 or number == 10:
            rows.append({"batch": number, "workers": [memory(pid) for pid in sorted(children())]})
        if number == options.batches:
            break
    return rows


def draw(rows: list[dict[str, object]], path: str) -> None:
    """Private and proportional memory of each worker over the batches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for worker in range(len(rows[0]["workers"])):  # type: ignore[arg-type]
        for kind, style in (("uss", "-"), ("pss", "--")):
            values = [row["workers"][worker][kind] / MIB for row in rows]  # type: ignore[index]
            axes.plot([row["batch"] for row in rows], values, style, label=f"worker {worker}, {kind.upper()}")
    axes.set(xlabel="batch", ylabel="MiB", ylim=(0, None), title="Memory of data-loading workers")
    axes.legend(fontsize="small")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    folder = Path(tempfile.mkdtemp(prefix="loader_memory"))
    try:
        rows = measure(options, folder)
    finally:
        shutil.rmtree(folder)
    result = {
        "benchmark": "loader_memory",
        "environment": dict(line.split(": ", 1) for line in environment("cpu").splitlines()),
        "options": dataclasses.asdict(options),
        "main_process": memory(os.getpid()),
        "rows": rows,
    }
    for row in rows:
        values = "  ".join(f"{w['uss'] / MIB:7.1f} {w['pss'] / MIB:7.1f}" for w in row["workers"])  # type: ignore
        print(f"batch {row['batch']:>5}: USS and Pss of each worker in MiB: {values}")
    write_text(options.output, json.dumps(result, indent=2) + "\n")
    draw(rows, options.figure)


if __name__ == "__main__":
    run_script(main)
