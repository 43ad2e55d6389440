"""Stage 2: python (or torchrun --nproc_per_node=N) scripts/finetune.py CONFIG [CONFIG ...] [key=value ...].

It starts from the checkpoint train.init (loce.yaml: runs/stage1); else as scripts/train.py. Several recipes train in
one pass, each into its own run folder, if they differ in head, indicator and memory only (docs/together.md); words of
one alone are quoted with it: finetune.py loce.yaml "loce.yaml memory.enabled=false output=runs/ebl" train.log_every=100
"""

import sys

from loce.config import UserError, run_script
from loce.engine.passes import read_recipes


def main() -> None:
    configs = read_recipes(sys.argv[1:])
    if not all(config.train.init for config in configs):
        raise UserError(
            "train.init is empty: fine-tuning starts from a stage-1 checkpoint; set train.init=RUN_FOLDER_OR_FILE "
            "(train one with scripts/train.py stage1.yaml)"
        )
    from loce.engine.train import train  # torch is imported after the options are known to be right

    train(*configs)


if __name__ == "__main__":
    run_script(main)
