"""Atomic file writing (a kill leaves the old file or the new one, never half of one), JSON, CSV and hashes."""

import csv
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loce.utils.errors import UserError

_STARTS = {  # first bytes -> what that is, and what to do
    b"\x1f\x8b": "is still compressed; unpack it first: gunzip -k {}",
    b"BZh": "is still compressed; unpack it first: bunzip2 -k {}",
    b"\xfd7zXZ": "is still compressed; unpack it first: unxz -k {}",
    b"\x28\xb5\x2f\xfd": "is still compressed; unpack it first: unzstd {}",
    b"7z\xbc\xaf": "is still compressed; unpack it first: 7z x {}",
    **dict.fromkeys(
        (b"\x80\2}", b"\x80\3", b"\x80\4", b"\x80\5"), "is a pickle of Python, which is not read, since it may run code"
    ),
    b"version https://git-lfs": "is a git-lfs pointer of {size} bytes, not the file; fetch it: git lfs pull",
    b"<": "is a web page or XML; download it again",
}


def inside(folder: Path | str, name: str) -> Path:
    """The path of `name`, which may have several parts, in `folder`. UserError where it would lead out of it."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or path.name in ("", "."):
        raise UserError(f"{name!r} is no name for a folder in {folder}: it leads out of it")
    return Path(folder, name)


def require_writable(folder: Path | str, fix: str = "; choose another with output=...") -> None:
    """UserError where `folder`, or the first above it that is there, takes no files. Makes nothing."""
    place = Path(os.path.abspath(folder))
    try:
        while not _is_there(place):
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(f"{folder}: no files can be written there ({error.strerror}){fix}") from None


def _is_there(path: Path) -> bool:
    """Whether there is a file or folder; OSError where the path itself is wrong, as below a file."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def kind_of(path: Path | str) -> str:
    """What a file of another kind than it is taken for is, and what to do; "" where that is not known."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(512)
    if not size:
        return "is empty (0 bytes); download it again"
    found = (message for start, message in _STARTS.items() if head.lstrip().startswith(start))
    message = "is a tar archive; unpack it first: tar xf {}" if head[257:262] == b"ustar" else next(found, "")
    return message.format(path, size=size)


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Gives a temporary path in the folder of `path` (created if missing); at the end it is synced and renamed.

    The temporary name keeps the suffix of `path`, since some writers choose the format by it. When the block raises,
    `path` stays as it was and the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{os.getpid()}{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)  # the rename itself
    finally:
        temporary.unlink(missing_ok=True)


class PatientFile:
    """A file that lines are added to. What a full disk does not take is kept, and written before what comes next."""

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self.kept = b""

    def write(self, text: str) -> str:
        """Add `text`; what the disk said where it did not take all of it, else ""."""
        self.kept += text.encode(errors="backslashreplace")  # names of files may be no UTF-8
        try:
            while self.kept:
                self.kept = self.kept[os.write(self.descriptor, self.kept) :]
        except OSError as error:
            return f"{self.path}: {error.strerror}"
        return ""

    def sync(self) -> str:
        """Wait until all of it would survive a crash of the machine; as `write`."""
        problem = self.write("")
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            problem = problem or f"{self.path}: {error.strerror}"
        return problem

    def close(self) -> str:
        """As `write`, for the last time: what is still kept then is lost."""
        problem = self.write("")
        os.close(self.descriptor)
        return problem and f"{problem}; {len(self.kept)} bytes are lost"


def write_text(path: Path | str, text: str) -> None:
    """`text` as the whole file, UTF-8, by `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any, as_text: bool = False, **style: Any) -> str:
    """JSON of plain data. It has no infinity and no NaN: they become null, or "inf" and "nan" (`as_text`).

    style: of `json.dumps`, such as indent=1.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(value) if as_text else None
        return value

    return json.dumps(plain(value), allow_nan=False, **style)


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """CSV of rows, the header first: six digits of a float, nothing for nan."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow([x if not isinstance(x, float) else "" if math.isnan(x) else f"{x:.6g}" for x in row])
    return text.getvalue()


def read_csv(path: Path | str) -> list[dict[str, str]]:
    """Rows of a CSV file with a header."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sha256(path: Path | str) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_hash(path: Path | str) -> str:
    """First 12 digits of the SHA-256 of a file."""
    return sha256(path)[:12]


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
