"""Mistakes of the user: one exception, one way to print it."""

import os
import sys
import time
from collections.abc import Callable, Sequence


class UserError(Exception):
    """A mistake of the user; the message says everything that is wrong and how to mend it. Scripts exit with 2."""


def raise_problems(problems: Sequence[str]) -> None:
    """One UserError for all `problems` (a line each); nothing happens when there are none."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems:\n" + "\n".join(f"  {problem}" for problem in problems))


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; a UserError is printed without traceback and ends the process with exit code 2."""
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(3)  # torchrun stops the other ranks when rank 0 leaves: a mistake seen by all is printed once
        print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr)
        sys.exit(2)
