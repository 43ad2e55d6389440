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
    b"\xff\xfe\0\0": "is text in UTF-32; save it as UTF-8: iconv -f UTF-32 -t UTF-8 {} > new.json",
    b"\0\0\xfe\xff": "is text in UTF-32; save it as UTF-8: iconv -f UTF-32 -t UTF-8 {} > new.json",
    b"\xff\xfe": "is text in UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8 {} > new.json",
    b"\xfe\xff": "is text in UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8 {} > new.json",
}
_MARKLESS = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")  # without a byte order mark; the wider ones first
_CODES = {"gbk": "GBK (Chinese Windows)", "big5": "Big5", "shift_jis": "Shift_JIS", "euc_kr": "EUC-KR"}
_HINTS = {  # what stands where the JSON is wrong -> what that may be
    "}": "a comma too many before it",
    "]": "a comma too many before it",
    "'": "text that Python printed; write it with json.dump",
    "/": "a comment, which JSON does not know",
    "\ufeff": "a byte order mark inside the file, which must go",
    "\0": "empty bytes of a broken download; fetch it again",
}
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
                following = error.doc[error.pos : error.pos + 1]
                raise UserError(_json_message(path, error.msg, following, *stream.place(error))) from None
            except UnicodeDecodeError as error:
                raise UserError(_encoding_message(path, error.start, size)) from None
            except RecursionError:
                raise UserError(f"{path}: brackets nested too deeply for {_one(wanted)}") from None
            except ValueError as error:
                if "digits" not in str(error):  # Python's limit of 4300 for whole numbers
                    raise
                raise UserError(f"{path}: holds a whole number of thousands of digits, as no {wanted} does") from None
    finally:
        if collecting:
            gc.enable()


def _one(wanted: str) -> str:
    return f"an {wanted}" if wanted.startswith("a") else f"a {wanted}"


def _check_kind(path: Path, wanted: str) -> int:
    """The file's size in bytes; UserError where it cannot be JSON in UTF-8."""
    if not os.path.exists(path):
        raise UserError(f"{path}: there is no such {wanted}")
    if not path.is_file():
        raise UserError(f"{path}: is {'a folder' if path.is_dir() else 'no file'}, not {_one(wanted)}")
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
    begins = head[: len(head) // 4 * 4]
    for name in _MARKLESS:
        if b"\0" in begins and begins.decode(name, errors="replace").lstrip()[:1] in ("{", "["):
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
    # The piece may begin and end within a character of two bytes.
    pieces = [around[cut:end] for cut in (0, 1) for end in (len(around), len(around) - 1)]
    likely = [code for code in _CODES if any(_decodes(piece, code) for piece in pieces)]
    if not likely and _decodes(around, "cp1252"):
        likely = ["cp1252"]
    if likely:
        names = " or ".join((_CODES | {"cp1252": "Latin-1 (Windows-1252)"})[code] for code in likely)
        fix = f"save it as UTF-8: iconv -f {likely[0].replace('_', '-').upper()} -t UTF-8 {path} > new.json"
        more = "; look whether its names are legible then" if len(likely) > 1 else ""
        return (
            f"{path}: is not UTF-8 text ({where}), perhaps {names}; {fix}{more}, or download it again if it is damaged"
        )
    return f"{path}: is not a text file ({where}); download it again"


def _decodes(piece: bytes, code: str) -> bool:
    try:
        piece.decode(code)
    except UnicodeDecodeError:
        return False
    return True


def _json_message(path: Path, message: str, following: str, line: int, character: int, left: int) -> str:
    """following: the character at the mistake; left: how many follow, spaces at the end apart."""
    where = f"line {line}, character {character} of {character + left}"
    if following in _HINTS and "Unterminated" not in message:
        return f"{path}: is not JSON ({where}: {message}); perhaps {_HINTS[following]}"
    if message == "Extra data":
        return f"{path}: more than one JSON value ({where}), as in JSON Lines; one object or one list is needed"
    if left < 8 or "Unterminated" in message:
        return f"{path}: the JSON ends too early ({where}: {message}); a broken download? Fetch it again"
    return f"{path}: is not JSON ({where}: {message})"
