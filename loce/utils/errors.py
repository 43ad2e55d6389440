"""Exceptions that end a script early, each with its exit code, and lists in messages."""

import io
import os
import select
import stat
import sys
import time
from collections.abc import Callable, Iterable, Sequence

FEW = 5  # examples of anything that a message names


class UserError(Exception):
    """A mistake of the user; the message says everything that is wrong and how to mend it. Scripts exit with 2."""


class DivergedError(Exception):
    """A loss, a gradient or a weight is not finite. Scripts exit with 3."""


class RankLostError(Exception):
    """Another rank ended, which the message explains as far as this one knows. Scripts exit with 1."""


class Stopped(BaseException):
    """A signal, named by the message, asked the run to stop; the same command goes on. Scripts exit with 75.

    Like KeyboardInterrupt no Exception, so that nothing on the way takes it for an error of its own.
    """


def raise_problems(problems: Sequence[str]) -> None:
    """One UserError for all `problems` (a line each); nothing happens when there are none."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems:\n" + "\n".join(f"  {problem}" for problem in problems))


def first_few(values: Iterable[object], total: int | None = None, between: str = ", ") -> str:
    """The first five of `values` as text and, where there are more, how many: "1, 2, 3, 4, 5, ... (9 in all)".

    total: of the whole, where `values` are only the first ones.
    """
    texts = [str(value) for value in values]
    total = len(texts) if total is None else total
    return between.join(texts[:FEW]) + (f"{between}... ({total} in all)" if total > FEW else "")


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; what is above is printed without traceback and ends the process with its exit code.

    Words `~`, `~/x` and `~anna/x` mean home directories, as in a shell. Letters that the terminal lacks are written as
    escapes. Where nobody reads the output any more (`| head`), the script ends with 141, as others do, and help with 0.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this; the next file would get its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for all of the process)
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.argv[1:] = map(expand_home, sys.argv[1:])
    try:
        try:
            _run(main)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # A pipe whose other end is closed is "readable".
        if not (stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode) and select.select([sys.stdout], [], [], 0)[0]):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes when it ends
        if {"-h", "--help"} & {*sys.argv}:
            sys.exit(0)  # `--help | head` is no failure, which torchrun and make would report
        _leave("stopped: nobody reads standard output any more; write it to a file instead", 141)


def expand_home(text: str) -> str:
    """`~`, `~/x` and `~anna/x` as paths in somebody's home directory; as they are where there is none."""
    return os.path.expanduser(text) if os.environ.get("HOME") != "" else text


def _run(main: Callable[[], None]) -> None:
    rank = os.environ.get("RANK", "0")
    try:
        main()
    except UserError as error:
        if rank != "0":
            time.sleep(3)  # torchrun stops the other ranks when rank 0 leaves: a mistake seen by all is printed once
        _leave(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", 2)
    except RankLostError as error:
        _leave(str(error), 1)
    except DivergedError as error:
        _leave(f"error: {error}" if rank == "0" else "", 3)
    except Stopped as request:
        _leave(f"stopped by {request}; the same command goes on" if rank == "0" else "", 75)


def _leave(message: str, code: int) -> None:
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)
