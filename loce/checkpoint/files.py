"""Checkpoints on disk: a checksum for every file, none half-written, a full disk survived, damage found and named.

`RUN/checkpoints/000001500/` holds files of every process, `checksums.json`, and `main.pt`, which gets its name last and
loses it first: a folder without it is unfinished, or being deleted, and is ignored.
"""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from loce.utils.files import atomic_write, sha256, sync, write_text

MAIN, FROZEN, CHECKSUMS = "main.pt", "frozen.pt", "checksums.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Measured:
    """File object for torch.save: counts and hashes what passes, keeps the first error instead of raising it.

    After an error it still counts, so that the bytes that found no place are known.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self.digest, self.size, self.written = hashlib.sha256(), 0, 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        total = len(view)
        self.size += total
        self.digest.update(view)
        while len(view) and self.error is None:
            try:
                done = os.write(self.descriptor, view)
            except OSError as error:
                self.error = error
            else:
                self.written, view = self.written + done, view[done:]
        return total

    def flush(self) -> None:
        """Nothing is held back."""


def write(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Save `content` as `path`: {name, bytes, sha256}, or {name, problem, full} where the disk did not take it.

    After a failure there is no file and no temporary one. full: the disk or the quota, and not the disk itself.
    """
    file = None
    try:
        with atomic_write(path) as temporary:
            file = _Measured(temporary)
            try:
                torch.save(content, file)  # type: ignore[arg-type]
            finally:
                os.close(file.descriptor)
            if file.error is not None:
                raise file.error
        return {"name": path.name, "bytes": file.size, "sha256": file.digest.hexdigest()}
    except OSError as error:
        return {"name": path.name, "problem": _problem(path, error, file), "full": error.errno in DISK_FULL}


def _problem(path: Path, error: OSError, file: _Measured | None) -> str:
    text = f"{path}: {error.strerror or error}"
    if file is None or not file.size:
        return text
    missing = file.size - file.written
    rest = f", {megabytes(missing)} of them found no place" if missing else ""
    return f"{text}; it takes {megabytes(file.size)}{rest}"


def link(path: Path, same: dict[str, Any]) -> dict[str, Any]:
    """Give the file of `same` (what `write` said of it, and its path) the name `path`, too: as `write`.

    {} where it is gone, or where the file system has no hard links from there to here.
    """
    try:
        os.link(same["path"], path)
        sync(path.parent)
    except OSError:
        return {}
    return {**same, "name": path.name, "linked": True}


def finish(folder: Path, files: list[dict[str, Any]], content: dict[str, Any]) -> dict[str, Any]:
    """Write checksums and `main.pt`, which makes a folder with all other `files` a checkpoint; as `write`."""
    main = write(folder / f"{MAIN}.new", content)
    if "problem" in main:
        return main
    known = {file["name"]: {k: file[k] for k in ("bytes", "sha256")} for file in [*files, {**main, "name": MAIN}]}
    try:
        write_text(folder / CHECKSUMS, json.dumps(known, indent=1) + "\n")
        os.replace(folder / f"{MAIN}.new", folder / MAIN)
        sync(folder)
    except OSError as error:
        return {"name": CHECKSUMS, "problem": _problem(folder, error, None), "full": error.errno in DISK_FULL}
    return main


def start(folder: Path) -> None:
    """An empty `folder`, also after a crash of the machine; what it held (a damaged checkpoint, say) is deleted.

    Never raises: what cannot be made shows when files are written.
    """
    try:
        discard(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)
    except OSError:
        return


def discard(folder: Path) -> None:
    """Delete a checkpoint; killed on the way, it leaves an unfinished one. OSError where that is not possible."""
    if folder.is_dir():
        (folder / MAIN).unlink(missing_ok=True)
        sync(folder)
        shutil.rmtree(folder)


def finished(run: Path) -> list[Path]:
    """Finished checkpoint folders of a run, newest first."""
    return sorted((f for f in _folders(run) if (f / MAIN).is_file()), key=lambda f: int(f.name), reverse=True)


def _folders(run: Path) -> list[Path]:
    return [f for f in (run / "checkpoints").glob("*") if f.name.isdecimal()]


def tidy(
    run: Path,
    newest: Path,
    keep: int,
    best: Path | None = None,
) -> bool:
    """Delete what is older than `newest`, but for the `keep` newest finished ones and `best`; was there any?

    OSError where something could not be deleted.
    """
    older = [f for f in _folders(run) if int(f.name) <= int(newest.name)]
    kept = {newest, best, *[f for f in finished(run) if f in older][:keep]}
    old = [folder for folder in older if folder not in kept]
    for folder in old:
        discard(folder)
    return bool(old)


def damage(folder: Path) -> str:
    """What is wrong with the files of a finished checkpoint; "" when all are as they were written."""
    try:
        known = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        problems = [problem for name, facts in known.items() if (problem := _compare(folder / name, facts))]
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    if MAIN not in known:
        problems.append(f"{CHECKSUMS} does not name {MAIN}")
    return "; ".join(problems)


def damage_of(file: Path) -> str:
    """What is wrong with one file that lies beside its checksums; "" where nothing is known against it."""
    try:
        known = json.loads((file.parent / CHECKSUMS).read_text(encoding="utf-8"))
        return _compare(file, known[file.name]) if file.name in known else ""
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"


def _compare(file: Path, facts: dict[str, Any]) -> str:
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != facts["bytes"]:
        return f"{file.name} has {file.stat().st_size} bytes, {facts['bytes']} were written"
    return "" if sha256(file) == facts["sha256"] else f"{file.name} has another checksum than when it was written"


def megabytes(count: float) -> str:
    """A size in bytes as text, such as "180.3 MB"."""
    if count >= 1e10:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
