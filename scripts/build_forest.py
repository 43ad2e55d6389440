"""Build the parent trees of Forest R-CNN for a recipe's data: python scripts/build_forest.py config=C checkpoint=RUN.

They are written to the recipe's head.forest.trees, with the numbers of parents that it says.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loce.config import Count, UserError, load_config, read_options, run_script


@dataclass(frozen=True, kw_only=True)
class Options:
    """Build the parent trees of Forest R-CNN."""

    config: str  # recipe with head.name=forest: its data, its numbers of parents, and the file that is written
    words: tuple[str, ...] = ()  # key=value that change the recipe
    checkpoint: str = ""  # run folder or checkpoint of a detector trained on this data, for the visual tree
    lexical: str = ""  # JSON {class name: parent name}, for the lexical tree
    instances: Count = 50  # of each class that are looked at, from distinct images
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    config = load_config([options.config, *options.words])
    file = Path(config.head.forest.trees)
    if file.exists():
        raise UserError(f"head.forest.trees = {file}: is there already; runs may need it, so delete it yourself first")

    from loce.engine.forest_building import build_trees
    from loce.utils import distributed  # torch is imported after the options are known to be right

    device = distributed.setup(options.device)
    try:
        trees = build_trees(config, options.checkpoint, options.lexical, options.instances, device)
    finally:
        distributed.teardown()
    print(f"{file}: {', '.join(f'{tree} tree with {parents} parents' for tree, parents in trees.items())}")


if __name__ == "__main__":
    run_script(main)
