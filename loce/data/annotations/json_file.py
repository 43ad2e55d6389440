"""Opening of JSON files, with a message and a fix for what users often have in their place."""

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loce.data.annotations.json_stream import JsonStream
from loce.utils.errors import UserError
from loce.utils.files import kind_of
from loce.utils.progress import Phase, phase

_STARTS = {  # first bytes -> what that is, and what to do
    b"<": "is not JSON but a web page or XML; download it again",
    b"PK\x03\x04": "is still compressed; unpack it first: unzip {}",
    b"\xff\xfe": "is text in UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8 {} > new.json",
    b"\xfe\xff": "is text in UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8 {} > new.json",
}
_MARKLESS = ((b"{\0", b"[\0"), "UTF-16LE"), ((b"\0{", b"\0["), "UTF-16BE")
_AROUND = 4096  # bytes beside one that is no UTF-8, by which its encoding is guessed


@contextmanager
def open_json(path: str | Path, wanted: str) -> Iterator[tuple[JsonStream, Phase]]:
    """The stream of a JSON file, and the phase whose `done` counts its MiB.

    wanted: what the file should be, for messages. UserError for everything that is wrong with the file as a file:
    missing, empty, packed, in another encoding, no JSON, cut short.

    Python's garbage collector is off meanwhile: it would visit all that was parsed again and again, for two thirds of
    the time, and parsed JSON has no cycles.
    """
    path = Path(path)
    size = _check_kind(path, wanted)
    collecting = gc.isenabled()
    gc.disable()
    try:
        with path.open("rb") as file, phase(f"reading {path}", size >> 20, "MiB") as work:
            stream = JsonStream(file)
            try:
                yield stream, work
            except json.JSONDecodeError as error:
                raise UserError(_json_message(path, error.msg, *stream.place(error))) from None
            except UnicodeDecodeError as error:
                raise UserError(_encoding_message(path, error.start, size)) from None
            except RecursionError:
                raise UserError(f"{path}: brackets nested too deeply to be an {wanted}") from None
            except ValueError as error:
                if "digits" not in str(error):  # Python's limit of 4300 for whole numbers
                    raise
                raise UserError(f"{path}: holds a whole number of thousands of digits, as no {wanted} does") from None
    finally:
        if collecting:
            gc.enable()


def _check_kind(path: Path, wanted: str) -> int:
    """The file's size in bytes; UserError where it cannot be JSON in UTF-8."""
    if not os.path.exists(path):
        raise UserError(f"{path}: there is no such {wanted}")
    if not path.is_file():
        raise UserError(f"{path}: is {'a folder' if path.is_dir() else 'no file'}, not an {wanted}")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            head = file.read(_AROUND)
            blank = not head.strip()
            while blank and (more := file.read(1 << 20)):
                blank = not more.strip()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if blank:
        raise UserError(f"{path}: is empty ({size} bytes); download it again")
    for start, message in _STARTS.items():
        if head.lstrip().startswith(start):
            raise UserError(f"{path}: {message.format(path)}")
    if kind := kind_of(path):
        raise UserError(f"{path}: {kind}")
    for starts, name in _MARKLESS:
        if head.startswith(starts):
            raise UserError(f"{path}: is text in {name}; save it as UTF-8: iconv -f {name} -t UTF-8 {path} > new.json")
    return size


def _encoding_message(path: Path, place: int, size: int) -> str:
    """place: of the first byte that is no UTF-8."""
    with path.open("rb") as file:
        file.seek(max(0, place - _AROUND))
        around = file.read(2 * _AROUND)
    where = f"byte {place} of {size}"
    if any(byte < 9 for byte in around):
        return f"{path}: is not a text file ({where}); download it again"
    for code in ("gbk", "cp1252"):
        # The piece may begin and end within a character of two bytes.
        if any(_decodes(around[cut:end], code) for cut in (0, 1) for end in (len(around), len(around) - 1)):
            name = {"gbk": "GBK (Chinese Windows)", "cp1252": "Latin-1 (Windows-1252)"}[code]
            fix = f"save it as UTF-8: iconv -f {code.upper()} -t UTF-8 {path} > new.json"
            return f"{path}: is not UTF-8 text ({where}), perhaps {name}; {fix}, or download it again if it is damaged"
    return f"{path}: is not a text file ({where}); download it again"


def _decodes(piece: bytes, code: str) -> bool:
    try:
        piece.decode(code)
    except UnicodeDecodeError:
        return False
    return True


def _json_message(path: Path, message: str, line: int, character: int, left: int) -> str:
    """left: characters that follow, spaces at the end apart."""
    where = f"line {line}, character {character} of {character + left}"
    if message == "Extra data":
        return f"{path}: more than one JSON value ({where}), as in JSON Lines; one object or one list is needed"
    if left < 100 or "Unterminated" in message:
        return f"{path}: the JSON ends too early ({where}: {message}); a broken download? Fetch it again"
    return f"{path}: is not JSON ({where}: {message})"
