"""Train a detector: python (or torchrun --nproc_per_node=N) scripts/train.py CONFIG [key=value ...].

It checks everything first, trains, and evaluates. The same command goes on where a run stopped. Words win over CONFIG.
"""

import sys

from loce.config import load_config, run_script


def main() -> None:
    config = load_config(sys.argv[1:])
    from loce.engine.train import train  # torch is imported after the options are known to be right

    train(config)


if __name__ == "__main__":
    run_script(main)
