"""One job in a run folder at a time: rank 0 holds a lock on RUN/lock, which the system ends with the job."""

import errno
import fcntl
import os
import socket
from datetime import datetime
from pathlib import Path

from loce.utils.errors import UserError
from loce.utils.progress import say

NAME = "lock"
PARTS = ("checkpoints", "tensorboard", "eval")  # folders in a run folder that must be writable, too


class RunLock:
    """The right to write into a run folder. UserError where it cannot be written, or another job writes into it.

    A lock of `fcntl.lockf` belongs to the process alone: forked workers that outlive a killed job do not hold it. The
    file system may not know locks (some network file systems): then there is a warning and no protection.
    """

    def __init__(self, folder: Path) -> None:
        self.file, self.made = folder / NAME, _missing(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            closed = [str(folder / part) for part in PARTS if (folder / part).exists() and not _writable(folder / part)]
            if closed:
                raise PermissionError(errno.EACCES, f"no right to write into {', '.join(closed)}")
            self.descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._take(folder)
        except OSError as error:
            self._remove_folders()
            raise UserError(
                f"output = {folder}: cannot be written ({error.strerror}); choose another with output=..."
            ) from error

    def _take(self, folder: Path) -> None:
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.pread(self.descriptor, 1000, 0).decode(errors="replace").strip()
                os.close(self.descriptor)
                raise UserError(
                    f"output = {folder}: another job writes into it ({holder or 'which has not said who it is'}); "
                    "wait for it, stop it, or choose another folder with output=..."
                ) from error
            say(f"WARNING: {self.file}: this file system has no locks ({error.strerror}): start no second job here")
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {started}\n".encode(), 0)

    def undo(self) -> None:
        """Give it back as if the job had never begun; folders that were made for it go, if nothing else is in them."""
        if self.made:
            self.file.unlink(missing_ok=True)
        os.close(self.descriptor)
        self._remove_folders()

    def _remove_folders(self) -> None:
        for folder in self.made:
            try:
                folder.rmdir()
            except OSError:
                return  # somebody else's file is in there


def _missing(folder: Path) -> list[Path]:
    """The folders that have to be made for this one, itself first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)
