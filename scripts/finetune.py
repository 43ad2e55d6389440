"""Stage 2: python (or torchrun --nproc_per_node=N) scripts/finetune.py CONFIG [key=value ...].

It starts from the checkpoint train.init (loce.yaml: runs/stage1); else as scripts/train.py.
"""

import sys

from loce.config import UserError, load_config, run_script


def main() -> None:
    config = load_config(sys.argv[1:])
    if not config.train.init:
        raise UserError(
            "train.init is empty: fine-tuning starts from a stage-1 checkpoint; set train.init=RUN_FOLDER_OR_FILE "
            "(train one with scripts/train.py stage1.yaml)"
        )
    from loce.engine.train import train  # torch is imported after the options are known to be right

    train(config)


if __name__ == "__main__":
    run_script(main)
