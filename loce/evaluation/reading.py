"""Reading JSON files that may be huge or broken, and telling the user what is wrong with them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loce.utils.errors import UserError
from loce.utils.progress import phase

BLOCK = 1 << 24  # characters read at a time; results files are larger than memory would like
_MAGIC = {
    b"PK\x03\x04": "is a zip archive; unzip it first",
    b"\x1f\x8b": "is compressed with gzip; run gunzip first",
    b"version https://git-lfs": "is a git-lfs pointer, not the data; run `git lfs pull`",
    b"<": "is a web page or XML, not JSON; download it again",
}


def _check_kind(path: Path) -> None:
    """Tell apart what people really have where a JSON file should be."""
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    with path.open("rb") as file:
        head = file.read(64)
    if not head.strip():
        raise UserError(f"{path}: is empty; write or download it again")
    for magic, message in _MAGIC.items():
        if head.startswith(magic):
            raise UserError(f"{path}: {message}")


def _explain(path: Path, text: str, error: json.JSONDecodeError) -> UserError:
    size = path.stat().st_size
    if error.msg == "Extra data":
        return UserError(f"{path}: more than one JSON value (JSON lines?); join them into one list")
    if error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg:
        return UserError(f"{path}: ends in the middle (truncated at {size} bytes); copy or download it again")
    return UserError(f"{path}: is not JSON ({error})")


def read_json(path: str | Path, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value in a JSON file; `hook` sees every object as it is read and what it returns takes the object's place.

    Raises UserError for a missing, empty, truncated, zipped or otherwise wrong file, saying which.
    """
    path = Path(path)
    _check_kind(path)
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        with phase(f"reading {path}", text.count("{"), "objects") as work:
            return json.loads(text, object_hook=work.counting(hook or (lambda value: value)))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise _explain(path, text, error) from None


def _last_border(text: str) -> int:
    """Index of the last "{" that opens a member of the outer list and has a whole member before it, or -1.

    In results only outer objects follow each other as "}, {"; were this wrong for a file, its block would not parse.
    """
    end = len(text)
    while (start := text.rfind("{", 0, end)) > 0:
        before = text[max(0, start - 64) : start].rstrip()
        if before.endswith(",") and before[:-1].rstrip().endswith("}"):
            return start
        end = start
    return -1


def _blocks(path: Path) -> Iterator[str]:
    """The text of a JSON file in pieces that are cut between members of its outer list."""
    with path.open(encoding="utf-8") as file:
        text = file.read(BLOCK)
        while new := file.read(BLOCK):
            cut = _last_border(text)
            if cut > 0:
                yield text[:cut].rstrip()[:-1] + "]"
                text = "[" + text[cut:]
            text += new
        yield text


def block_count(path: str | Path) -> int:
    """How many pieces `iterate_json_list` cuts a file into, roughly; 1 where there is no such file."""
    return -(-Path(path).stat().st_size // BLOCK) if Path(path).is_file() else 1


def iterate_json_list(path: str | Path) -> Iterator[list[Any]]:
    """The members of a JSON file that holds one list, some thousands at a time, so that the file may be huge.

    Raises UserError as `read_json` does, and when the file holds something else than a list.
    """
    path = Path(path)
    _check_kind(path)
    text = ""
    try:
        for text in _blocks(path):
            if not text.lstrip().startswith("["):
                kind = type(read_json(path)).__name__  # reports JSON lines and broken files
                raise UserError(f"{path}: holds a {kind}, not a list of results")
            yield json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise _explain(path, text, error) from None


def offenders(values: Any, count: int | None = None) -> str:
    """The first five of `values` for an error message, and how many there are."""
    values = list(values)
    count = len(values) if count is None else count
    return ", ".join(str(value) for value in values[:5]) + (f", ... ({count} in all)" if count > 5 else "")
