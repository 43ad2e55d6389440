"""Write a trained detector as one file that runs without loce: python scripts/export.py RUN OUT.pt2 [key=value ...].

RUN: run folder, checkpoint folder or file. Options eval.* take the place of the checkpoint's (eval.detections=100), and
train.ema=0 takes the weights of the last step. How the file is used: docs/export.md.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from loce.config import UserError, read_options, run_script
from loce.utils.files import require_writable
from loce.utils.options import Range

USAGE = "usage: export.py RUN OUT.pt2 [size=[800,1333]] [eval.KEY=value ...]"
OF_RUN = ("eval.", "train.ema=")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Export a detector."""

    size: tuple[Annotated[int, Range(32, 8192)], ...] = ()  # height, width; (): the commonest of the validation images


def main() -> None:
    paths = [word for word in sys.argv[1:] if "=" not in word and not word.startswith("-")]
    overrides = [word for word in sys.argv[1:] if word.startswith(OF_RUN)]
    options = read_options(Options, [word for word in sys.argv[1:] if word not in (*paths, *overrides)])
    if len(paths) != 2:
        raise UserError(USAGE)
    if len(options.size) not in (0, 2):
        raise UserError(f"size = {list(options.size)}: must be a height and a width, as size=[800,1333]")
    run, out = map(Path, paths)
    if out.suffix != ".pt2":
        raise UserError(f"{out}: the name must end in .pt2, as torch.export asks for")
    if out.exists():
        raise UserError(f"{out} exists; files are never overwritten: remove it, or give another name")
    require_writable(out.parent, "")

    from loce.engine.export import export_run  # torch, after the command line is known to be right

    print("\n".join([*export_run(run, out, options.size, overrides), f"wrote {out}"]))


if __name__ == "__main__":
    run_script(main)
