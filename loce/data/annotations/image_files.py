"""Image files by the names in an annotation file: where each lies, and what is there in place of a missing one.

A name is a path below the image folder, "split/file" or "file". Where no file has it, others are tried: the file
without its folder, and COCO's names of 2014 and 2017 for each other. No two names ever get one file that way.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from loce.utils.errors import UserError

_COCO_2014 = re.compile(r"COCO_[a-z]+20\d\d_(\d{12}\.\w+)")  # COCO_val2014_000000000001.jpg; since 2017 without prefix
_COCO_2017 = re.compile(r"\d{12}\.\w+")
_SUBFOLDERS = 100  # looked into for files that are not where they are looked for


def image_name(image: Mapping[str, Any]) -> str:
    """The path "split/file" or "file" below the image folder; empty where the image has no name.

    COCO and LVIS v0.5 give `file_name`, LVIS v1 `coco_url`, whose last two parts are the split and the file; where both
    name one file, the split counts. Backslashes are read as slashes.
    """
    url, name = image.get("coco_url"), image.get("file_name")
    split = "/".join(url.split("/")[-2:]) if isinstance(url, str) else ""
    if not isinstance(name, str) or not name:
        return split
    name = name.replace("\\", "/")
    same = "/" in split and "/" not in name and bare_name(name) == bare_name(split)
    return split if same else name


def is_readable_name(name: str) -> bool:
    """Whether a name can be that of a file and stand in a message: no control characters, no half characters."""
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in name)


def bare_name(name: str) -> str:
    """The file's own name, as COCO writes it since 2017."""
    file = name.rpartition("/")[2]
    match = _COCO_2014.fullmatch(file)
    return match[1] if match else file


def shared_names(names: Iterable[str]) -> frozenset[str]:
    """Bare names that several different names have: only the whole name says which file is meant."""
    counts = Counter(bare_name(name) for name in {os.path.normpath(name) for name in names})
    return frozenset(name for name, count in counts.items() if count > 1)


def other_places(name: str) -> Iterator[str]:
    """Where else below the folder the file of a name may lie that no other image has."""
    split, _, file = name.rpartition("/")
    yield file
    if (bare := bare_name(name)) != file:
        yield os.path.join(split, bare)
        yield bare
    elif _COCO_2017.fullmatch(file):
        for year in ("train2014", "val2014"):
            yield f"{year}/COCO_{year}_{file}"
            yield f"COCO_{year}_{file}"


class Listings:
    """What folders hold; each is listed once. Asking file by file takes minutes on a network disk."""

    def __init__(self) -> None:
        self.names = cache(self._names)
        self.twins = cache(self._twins)

    def holds(self, path: str) -> bool:
        """Whether a file or folder is there."""
        folder, _, name = path.rpartition("/")
        return name in self.names(folder or ("/" if path.startswith("/") else "."))

    @staticmethod
    def _names(folder: str) -> frozenset[str]:
        try:
            return frozenset(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no name for a folder at all
            return frozenset()
        except OSError as error:
            raise UserError(f"{folder}: cannot be read ({error.strerror})") from None

    def _twins(self, folder: str, whole: bool) -> dict[str, str]:
        """Names in a folder by `_alike`."""
        return {_alike(name, whole): name for name in sorted(self.names(folder), reverse=True)}

    def twin(self, folder: str, name: str) -> str | None:
        """The path below `folder` that differs from `name` in spelling alone, step by step; None where none does."""
        found, parts = "", PurePosixPath(name).parts
        for number, part in enumerate(parts, 1):
            here = os.path.join(folder, found) if found else folder
            there = part if part in self.names(here) else self.twins(here, True).get(_alike(part, True))
            if there is None and number == len(parts):  # of a file, not of a folder, the extension may differ, too
                there = self.twins(here, False).get(_alike(part, False))
            if there is None:
                return None
            found = os.path.join(found, there)
        return found


def _alike(name: str, whole: bool) -> str:
    """Equal for names that people take for the same; whole: with the extension."""
    plain = " ".join(unicodedata.normalize("NFKC", unquote(name)).casefold().split())
    return plain if whole else os.path.splitext(plain)[0]


def _difference(wanted: str, there: str) -> str:
    """In what two names that are alike differ."""
    steps: dict[str, Callable[[str], str]] = {
        "the Unicode form": lambda name: unicodedata.normalize("NFC", name),
        "upper and lower case": str.casefold,
        "the escapes (%20 and such)": unquote,
        "the extension": lambda name: os.path.splitext(name)[0].casefold(),
    }
    for difference, step in steps.items():
        if step(wanted) == step(there):
            return difference
    return "spelling"


def _quoted(name: str, unlike: str) -> str:
    """A name in quotes; in ASCII, too, where the other one may look the same."""
    return f"{name!r}" if name.isascii() and unlike.isascii() else f"{name!r} ({ascii(name)[1:-1]})"


def there_instead(names: Sequence[str], shared: frozenset[str], folder: str | Path) -> str:
    """A sentence on what the folder has in place of missing images: nearly their names, files of others; else ""."""
    folder, listings = str(folder), Listings()
    # One file for several images.
    flat = [name for name in names if bare_name(name) in shared and listings.holds(f"{folder}/{bare_name(name)}")]
    if flat:
        file = bare_name(flat[0])
        same = sorted(name for name in names if bare_name(name) == file)
        which = f"{' or '.join(same[:2])}" if len(same) > 1 else f"{same[0]} or another image called so"
        return f"{folder} has {file}, which may be {which}; put each of them under its whole name."
    # Files of nearly these names.
    twins = [(name, twin) for name in names if (twin := _twin(name, shared, folder, listings))]
    if twins:
        wanted, there = twins[0]
        return (
            f"{len(twins)} of them are there under another name: the first is {_quoted(wanted, there)} in the file and "
            f"{_quoted(there, wanted)} in {folder} (they differ in {_difference(wanted, there)}); rename the images or "
            "correct the names in the file."
        )
    # The files themselves, a folder further down.
    below = sorted(name for name in listings.names(folder) if os.path.isdir(os.path.join(folder, name)))
    for place in (os.path.join(folder, name) for name in below[:_SUBFOLDERS]):
        found = sum(listings.holds(f"{place}/{name}") for name in names)
        if found:
            return f"{found} of them are in {place}: is this the folder to give?"
    return ""


def _twin(name: str, shared: frozenset[str], folder: str, listings: Listings) -> str | None:
    """The path below `folder` of nearly a missing image's name, with its folders or without them."""
    flat = name.rpartition("/")[2]
    return listings.twin(folder, name) or (None if flat in shared else listings.twin(folder, flat))
