"""Train a classification head on rows that any detector exported (feature, box, label), and evaluate it on others.

python scripts/rebalance_rows.py train=ROWS/train annotations=TRAIN.json val=ROWS/val val_annotations=VAL.json
    head.name=equilibrium memory.enabled=true [output=DIR] [key=value ...]
docs/rows.md shows how rows are exported. Numbers before and after go to DIR/before and DIR/eval.
"""

import sys

from loce.config import read_options, run_script
from loce.engine.rebalancing import ROW_CONFLICTS, ROW_OPTION_OF, rebalance
from loce.engine.row_training import RowOptions


def main() -> None:
    rebalance(read_options(RowOptions, sys.argv[1:], ROW_CONFLICTS, ROW_OPTION_OF))


if __name__ == "__main__":
    run_script(main)
