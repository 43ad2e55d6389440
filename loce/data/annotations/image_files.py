"""Image files of an annotation file: where each lies, and files of similar names where one is missing.

A name is a path below the image folder, "split/file" or "file". Where no file has it, others are tried: its ends
("day1/a.jpg" and "a.jpg" of "/home/anna/day1/a.jpg"), and COCO's names of 2014 and 2017 for each other. No two names
ever get one file that way.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_plus

from loce.utils.errors import UserError, first_few

_COCO_2014 = re.compile(
    r"COCO_([a-z]+20\d\d)_(\d{12}\.\w+)"
)  # COCO_val2014_000000000001.jpg; since 2017 without prefix
_COCO_2017 = re.compile(r"\d{12}\.\w+")
_URL = re.compile(r"(\w[\w+.-]+)://[^/]*(/[^?#]*)")  # of any kind: https, gs, file
_HIDDEN = dict.fromkeys([*range(0xFE00, 0xFE10), 0x200B, 0x200D, 0x2060, 0xFEFF])  # code points that show nothing
_SUBFOLDERS = 100  # looked into for files that are not where they are looked for


def image_name(image: Mapping[str, Any]) -> str:
    """The path "split/file" or "file" below the image folder; empty where the image has no name.

    COCO and LVIS v0.5 give `file_name`, LVIS v1 `coco_url`, whose last two parts are the split and the file; where both
    name one file, the split counts. Of a URL the path is read, and backslashes as slashes.
    """
    url, name = image.get("coco_url"), image.get("file_name")
    split = "/".join(_path(url).split("/")[-2:]) if isinstance(url, str) else ""
    if not isinstance(name, str) or not name:
        return split
    name = _path(name)
    same = "/" in split and "/" not in name and bare_name(name) == bare_name(split)
    return split if same else name


def _path(name: str) -> str:
    """A name with slashes; of a URL its path, without server, query and escapes."""
    if not (url := _URL.match(name)):
        return name.replace("\\", "/")
    path = unquote(url[2])
    return path if url[1] == "file" else path.lstrip("/")


def is_readable_name(name: str) -> bool:
    """Whether a name can be that of a file and stand in a message: no control characters, no half characters."""
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in name)


def bare_name(name: str) -> str:
    """The file's own name, as COCO writes it since 2017."""
    file = name.rpartition("/")[2]
    match = _COCO_2014.fullmatch(file)
    return match[2] if match else file


def _ends(name: str) -> Iterator[tuple[str, str]]:
    """Ends of a path, the longest first, each as it stands and with the bare name: a/b.png, b.png."""
    folders, bare = [part for part in name.split("/")[:-1] if part not in ("", ".", "..")], bare_name(name)
    for start in range(len(folders) + 1):
        folder = "".join(f"{part}/" for part in folders[start:])
        yield folder + name.rpartition("/")[2], folder + bare


def shared_names(names: Iterable[str]) -> frozenset[str]:
    """Ends, with bare names, that several different names have: only a longer one says which file is meant."""
    counts = Counter(bare for name in {os.path.normpath(name) for name in names} for _, bare in _ends(name))
    return frozenset(name for name, count in counts.items() if count > 1)


def other_places(name: str, shared: Container[str]) -> Iterator[str]:
    """Where else below the folder the file of a name may lie that no other image has. shared: see `shared_names`."""
    for end, bare in _ends(name):
        if bare not in shared:
            yield end
            if bare != end:
                yield bare
    if bare_name(name) in shared:
        return
    file = name.rpartition("/")[2]
    if own := _COCO_2014.fullmatch(file):
        yield f"{own[1]}/{file}"
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

    def _twins(self, folder: str, whole: bool) -> dict[str, list[str]]:
        """Names in a folder by `_alike`."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.names(folder)):
            found.setdefault(_alike(name, whole), []).append(name)
        return found

    def twin(self, folder: str, name: str, others: Container[str] = ()) -> str | None:
        """The path below `folder` that differs from `name` in spelling alone, at any step; None where none does.

        others: paths, with `folder`, that are none, since they are somebody else's.
        """
        part, _, rest = name.partition("/")
        alike = self.twins(folder, True).get(_alike(part, True), [])
        there = [part] if part in self.names(folder) else []
        there += [twin for twin in alike if twin != part]
        if not rest:  # of a file, not of a folder, the extension may differ, too
            there += self.twins(folder, False).get(_alike(part, False), [])
        for step in there:
            path = os.path.join(folder, step)
            found = self.twin(path, rest, others) if rest else step
            if found and (rest or path not in others):
                return f"{step}/{found}" if rest else step
        return None


def _alike(name: str, whole: bool) -> str:
    """A key that is equal for names of different spelling; whole: with the extension."""
    plain = unicodedata.normalize("NFKC", _one_encoding(unquote_plus(name))).translate(_HIDDEN).casefold()
    plain = " ".join(plain.split())
    return plain if whole else os.path.splitext(plain)[0].rstrip()


def _one_encoding(name: str) -> str:
    """The text of a name whose bytes on the disk are Latin-1, as old archives of Windows unpack."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode("cp1252", "replace")
    return name


def _difference(wanted: str, there: str) -> str:
    """The difference between two names that are alike, in words."""
    steps: dict[str, Callable[[str], str]] = {
        "the Unicode form": lambda name: unicodedata.normalize("NFC", name),
        "upper and lower case": str.casefold,
        "the escapes (%20 and such)": unquote_plus,
        "spaces": lambda name: "".join(name.split()),
        "the extension": lambda name: os.path.splitext(name)[0].casefold(),
    }
    for difference, step in steps.items():
        if step(wanted) == step(there):
            return difference
    return "spelling"


def _quoted(name: str, unlike: str) -> str:
    """A name in quotes; in ASCII, too, where the other one may look the same."""
    return f"{name!r}" if name.isascii() and unlike.isascii() else f"{name!r} ({ascii(name)[1:-1]})"


def there_instead(
    names: Sequence[str],
    shared: frozenset[str],
    folder: str | Path,
    taken: Collection[str] = (),
) -> str:
    """A sentence on what the folder has in place of missing images: nearly their names, files of others; else "".

    taken: the files of the images that are not missing.
    """
    folder, listings = str(folder), Listings()
    if not os.path.isdir(folder):
        return _no_folder(folder)
    # One file for several images.
    ends = {name: [bare for _, bare in _ends(name) if bare in shared] for name in names}
    for file in (bare for some in ends.values() for bare in some if listings.holds(f"{folder}/{bare}")):
        same = sorted(name for name in names if file in ends[name])
        which = f"{' or '.join(same[:2])}" if len(same) > 1 else f"{same[0]} or another image called so"
        return f"{folder} has {file}, which may be {which}; put each of them under its whole name."
    # Files of nearly these names.
    twins = []
    for name in names:
        paths = (name, *(end for end, bare in _ends(name) if bare not in shared))  # with its folders or without them
        twins += [(name, twin) for path in paths if (twin := listings.twin(folder, path, taken))][:1]
    if twins:
        wanted, there = twins[0]
        return (
            f"{len(twins)} of them are there under another name: the first is {_quoted(wanted, there)} in the file and "
            f"{_quoted(there, wanted)} in {folder} (they differ in {_difference(wanted, there)}); rename the images or "
            "correct the names in the file."
        )
    # The files themselves, a folder further down.
    below = sorted(name for name in listings.names(folder) if os.path.isdir(os.path.join(folder, name)))
    places = [os.path.join(folder, name) for name in below[:_SUBFOLDERS]]
    known = [(name, name if bare_name(name) in shared else bare_name(name)) for name in names]
    held = {place: sum(any(listings.holds(f"{place}/{n}") for n in both) for both in known) for place in places}
    held = {place: number for place, number in held.items() if number}
    if len(held) == 1 and not taken:
        place, number = next(iter(held.items()))
        return f"{number} of them are in {place}: is this the folder to give?"
    if held:
        where = first_few(f"{number} in {place}" for place, number in held.items())
        return (
            f"Some are further down ({where}): put the folder before the name in the file, or link all into {folder}."
        )
    return ""


def _no_folder(folder: str) -> str:
    """A sentence on what is there in place of a folder of images; "" where nothing is."""
    path = os.path.abspath(folder)
    if os.path.lexists(path):
        packed = "; an archive is unpacked first" if os.path.splitext(path)[1] in (".zip", ".tar", ".gz") else ""
        return f"{folder} is no folder: give the one that has the images{packed}."
    twin = Listings().twin("/", path.lstrip("/"))
    return f"Did you mean {f'/{twin}'!r}?" if twin and os.path.isdir(f"/{twin}") else ""
