"""How much sharper two recipes compare as arms of one pass than as runs of different seeds.

    python benchmarks/paired.py [records=docs/records] [output=benchmarks/results/paired.json]

From the records of the tables. One pass: both start from one stage 1 and see the same images and draws, as the rows of
a seed do (docs/together.md: arms are equal to their single runs). Apart: each has seeds of its own. The
images that both are evaluated on are the same in either case. Legend: S seeds, B resampled sets of images.
"""

import json
import sys
from dataclasses import dataclass
from math import ceil

import numpy as np

from loce.config import read_options, run_script
from loce.report.tables.cells import markdown_table
from loce.report.tables.rows import Records, RunOptions, read_table
from loce.utils.environment import code
from loce.utils.files import write_text

PAIRS = (  # table, row, row that it is compared with
    (1, "s, EBL + MFS", "baseline"),
    (1, "s, EBL", "baseline"),
    (1, "s, EBL + MFS", "s, MFS"),
    (2, "alpha = 0.8", "alpha = 0.9"),
    (4, "k = 4, m = 8", "k = 8, m = 4"),
)
HALF_WIDTH = 0.5  # AP: of the 95% interval that the last columns count seeds for


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the spread of differences in a pass and apart."""

    records: str = "docs/records"
    output: str = "benchmarks/results/paired.json"


def spread(ours: Records, theirs: Records, column: str) -> dict[str, float]:
    """Mean difference of `column`, and its standard deviation over seeds in one pass and apart, and over images."""
    other = {record["seed"]: record for record in theirs}
    pairs = [(record, other[record["seed"]]) for record in ours if record["seed"] in other]
    a_S, b_S = (np.array([pair[side]["values"][column] for pair in pairs]) for side in (0, 1))
    images_SB = np.array([np.subtract(*(record["resamples"][column] for record in pair)) for pair in pairs])
    return {
        "seeds": len(pairs),
        "difference": float((a_S - b_S).mean()),
        "one pass": float((a_S - b_S).std(ddof=1)),
        "apart": float(np.sqrt(a_S.var(ddof=1) + b_S.var(ddof=1))),  # of independent seeds
        "images": float(images_SB.std(axis=1).mean()),
    }


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    tables = {n: read_table(RunOptions(seeds=5, records=options.records), n) for n in {pair[0] for pair in PAIRS}}
    found, cells = {}, []
    for number, ours, theirs in PAIRS:
        values = {c: spread(tables[number].records(ours), tables[number].records(theirs), c) for c in ("box AP", "AP")}
        found[f"{ours} - {theirs}"] = values
        seeds = (
            [max(1, ceil((1.96 * v[kind] / HALF_WIDTH) ** 2)) for v in values.values()]
            for kind in ("one pass", "apart")
        )
        cells.append(
            [
                f"{ours} - {theirs}",
                *(f"{v['difference']:+.2f}: {v['one pass']:.2f} / {v['apart']:.2f}" for v in values.values()),
                *(" / ".join(map(str, count)) for count in zip(*seeds, strict=True)),
            ]
        )
    head = ["", "box AP: one pass / apart", "AP: one pass / apart", "seeds, box AP", "seeds, AP"]
    print("\n".join(markdown_table(head, cells)))
    write_text(options.output, json.dumps({"code": code(), "pairs": found}, indent=1) + "\n")
    print(f"\nwrote {options.output}")


if __name__ == "__main__":
    run_script(main)
