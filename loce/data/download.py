"""Fetching a ZIP file over HTTP so that a cut connection costs nothing, and unpacking it inside its folder only.

A file grows as NAME.part beside its place; the next call asks the server for the rest only (HTTP Range), or starts over
where the server cannot do that. NAME itself appears when its size and checksum are right (where no checksum is known:
when every member's CRC is), so a file of that name is always whole.
"""

import errno
import hashlib
import http.client
import os
import re
import shutil
import stat
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from loce.utils.errors import UserError
from loce.utils.progress import Progress, say

TRIES = 6  # in a row without a new byte, per place
TIMEOUT = 60.0  # seconds without a byte
_BLOCK = 1 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RETRY = (408, 425, 429)  # and 500 and above: the server may answer later
_JUNK = "__MACOSX"  # what macOS adds to archives


class RefusedError(Exception):
    """Why a place, or what it gave, is not taken; the next place is tried."""


def download(urls: Sequence[str], path: Path, size: int | None = None, checksum: str = "", wait: float = 1.0) -> None:
    """The ZIP file at the first of `urls` that gives a right one, as `path`.

    size: bytes, None where not known. checksum: "sha256:..." or "md5:...", "" where not known. wait: seconds before the
    second try; doubled for each further one. UserError: no place gives the file (with every place's reason), disk full.
    """
    part = path.with_name(f"{path.name}.part")
    reasons = []
    for url in urls:
        try:
            _fetch(url, part, size, wait)
        except RefusedError as error:
            reasons.append(f"{url}: {error}")
            say(reasons[-1])
            continue
        try:
            check_file(part, size, checksum)
        except RefusedError as error:
            part.unlink()
            reasons.append(f"{url}: {error}; removed")
            say(reasons[-1])
            continue
        os.replace(part, path)
        return
    if part.exists() and not part.stat().st_size:
        part.unlink()
    raise UserError(
        f"{path.name} could not be fetched:\n"
        + "\n".join(f"  {reason}" for reason in reasons)
        + f"\nRun the command again later (what has arrived is kept), or put the file there by hand: {path}"
    )


def check_file(path: Path, size: int | None, checksum: str) -> None:
    """RefusedError where its size, checksum or, without a checksum, the CRC of a member is wrong."""
    if size is not None and path.stat().st_size != size:
        raise RefusedError(f"{path.stat().st_size} bytes, {size} expected")
    if checksum:
        _check_digest(path, *checksum.split(":"))
    else:
        _check_members(path)


def safe_members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files in an archive; UserError if one would be written outside the folder, or is a link."""
    members = [info for info in archive.infolist() if not info.is_dir() and not info.filename.startswith(_JUNK)]
    bad = []
    for info in members:
        path = PurePosixPath(info.filename)
        outside = path.is_absolute() or ".." in path.parts or re.search(r"[\\:]", info.filename)
        if outside or stat.S_ISLNK(info.external_attr >> 16):
            bad.append(info.filename)
    if bad:
        raise UserError(
            f"{archive.filename}: {len(bad)} of its files would be written outside the folder, or are links "
            f"(the first: {bad[0]}); nothing was unpacked. This is not the original file: remove it"
        )
    return members


def unpack_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Write one file of an archive to `path`. UserError: its CRC is wrong, or the disk is full."""
    try:
        with archive.open(member) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)
    except zipfile.BadZipFile as error:
        path.unlink()
        raise UserError(f"{archive.filename}: damaged ({error}); remove it and run the command again") from None
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def require_space(needs: Sequence[tuple[Path, int]]) -> None:
    """UserError unless every disk has room for its (folder, bytes); folders need not exist yet."""
    wanted: dict[int, tuple[Path, int]] = {}
    for folder, number in needs:
        place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        first, so_far = wanted.get(place.stat().st_dev, (place, 0))
        wanted[place.stat().st_dev] = first, so_far + number
    problems = []
    for place, number in wanted.values():
        free = shutil.disk_usage(place).free
        if free < number:
            problems.append(
                f"{place}: {number / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free: free "
                f"{(number - free) / 1e9:.1f} GB, or choose a folder on another disk"
            )
    if problems:
        raise UserError("\n".join(problems))


def _fetch(url: str, part: Path, size: int | None, wait: float) -> None:
    """Complete `part` from one place. RefusedError when the place says no, or nothing new came in TRIES tries."""
    best, tries = -1, 0
    while True:
        try:
            problem = _stream(url, part, size)
        except HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in _RETRY:
                raise RefusedError(problem) from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                raise UserError(f"{part}: {error.strerror}; free some space and run the command again") from None
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        if not problem:
            return
        now = part.stat().st_size
        tries = 1 if now > best else tries + 1
        best = max(best, now)
        if tries >= TRIES:
            raise RefusedError(f"given up after {TRIES} tries: {problem}")
        pause = wait * 2 ** (tries - 1)
        say(f"{url}: {problem}; trying again in {pause:g} s")
        time.sleep(pause)


def _stream(url: str, part: Path, size: int | None) -> str:
    """One request for what `part` lacks; gives "" when it is complete then, else what happened."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        file = open(part, "ab")  # noqa: SIM115 (closed below; what cannot be opened is the user's to mend, not to retry)
    except OSError as error:
        raise UserError(f"{part}: cannot be written ({error.strerror}); choose another folder") from None
    with file:
        have = file.tell()
        if size is not None and have >= size:
            return ""  # the checksum decides
        headers = {"User-Agent": "loce", **({"Range": f"bytes={have}-"} if have else {})}
        try:
            answer = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
        except HTTPError as error:
            if error.code != 416:
                raise
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return ""
            file.truncate(0)  # longer than the file there: something else
            return "the part that was here does not belong to this file; starting over"
        with answer:
            start, total = _range(answer, have)
            if total is not None and size is not None and total != size:
                raise RefusedError(f"holds another file: {total} bytes, {size} expected")
            if start != have:
                file.truncate(0)
            return _copy(answer, file, start, total, part.stem)


def _range(answer: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
    """First byte of what a server sends, and how long the whole file is (None: it does not say)."""
    if answer.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if not match or int(match[1]) != have:
            raise RefusedError(f"answers the request for the rest with {answer.headers.get('Content-Range')}")
        return have, int(match[2])
    length = answer.headers.get("Content-Length")
    return 0, None if length is None else int(length)


def _copy(answer: http.client.HTTPResponse, file: BinaryIO, start: int, total: int | None, label: str) -> str:
    """Append an answer to a file from byte `start` on; gives "" or, where the connection was cut, a line about it."""
    done = start
    display = Progress(label, -(-(total or 0) // _BLOCK), done // _BLOCK, unit="MiB")
    try:
        while block := answer.read(_BLOCK):
            file.write(block)
            display.advance((done + len(block)) // _BLOCK - done // _BLOCK)
            done += len(block)
    finally:
        display.close()
    return "" if total is None or done == total else f"the connection was cut at {done} of {total} bytes"


def _check_digest(path: Path, kind: str, wanted: str) -> None:
    digest = hashlib.new(kind, usedforsecurity=False)
    display = Progress(f"{kind} of {path.name}", -(-path.stat().st_size // _BLOCK), unit="MiB")
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            display.advance()
    display.close()
    if digest.hexdigest() != wanted:
        raise RefusedError(f"wrong {kind}: {digest.hexdigest()}, {wanted} expected")


def _check_members(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise RefusedError(f"not a whole ZIP file ({error})") from None
    if bad:
        raise RefusedError(f"{bad} in it is damaged")
