"""Cache of large annotation files: their flat arrays on disk, mapped into memory instead of parsed again.

A folder for each (content of the file, options, this package's code that reads it), so that nothing stale is ever
found: one .npy file for each array, and meta.json, which is written last; without it the folder does not count. The
pages are shared by all processes of a machine. The annotation file itself is read once, for its hash.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from loce.data.annotations.lookups import LabelLists
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.annotations.segmentations import Segmentations
from loce.utils.classes import ClassStats
from loce.utils.errors import expand_home
from loce.utils.files import atomic_write, file_hash, write_text
from loce.utils.progress import print_line

LARGE = 32 << 20  # bytes; a smaller file is read in a second or two
PARTS: dict[str, Any] = {
    "stats": ClassStats,
    "segmentations": Segmentations,
    "negatives": LabelLists,
    "not_exhaustive": LabelLists,
}


def default_folder() -> Path | None:
    """$XDG_CACHE_HOME/loce/annotations, by default ~/.cache/loce/annotations; may be deleted at any time.

    None where the user has no home directory, as in containers without an entry for the user.
    """
    cache = expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return None if cache.startswith("~/") else Path(cache, "loce/annotations")


def open_annotations(
    path: str | Path,
    rare_max: int = 10,
    common_max: int = 100,
    keep_empty: bool = False,
    box_masks: bool = False,
    *,
    masks: bool = True,
    annotated: bool = True,
    folder: Path | None = None,
    large: int = LARGE,
) -> LVISAnnotations:
    """`LVISAnnotations.open`, from `folder` (None: `default_folder`) where the same was opened before.

    Files below `large` bytes are read as they are. A cache that cannot be written, or is damaged, costs time only.
    """
    path, options = Path(path), (rare_max, common_max, keep_empty, box_masks)
    named = {"masks": masks, "annotated": annotated}
    if not path.is_file() or path.stat().st_size < large:
        return LVISAnnotations.open(path, *options, **named)
    folder = folder or default_folder()
    if folder is None:
        print_line(f"{path}: not kept for the next time: there is no home directory; XDG_CACHE_HOME may name a folder")
        return LVISAnnotations.open(path, *options, **named)
    # A folder for each content, options and code.
    sources = sorted(Path(__file__).parent.glob("*.py"))
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    chosen = "-".join(str(int(option)) for option in (*options, *named.values()))
    place = folder / f"{file_hash(path)}-{chosen}-{code}"
    try:
        return _load(place, str(path))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        print_line(f"warning: {place} is damaged ({error}); {path} is read again")
    annotations = LVISAnnotations.open(path, *options, **named)
    try:
        _store(annotations, place)
    except OSError as error:
        print_line(f"{path}: not kept for the next time, since {place} cannot be written ({error.strerror})")
    return annotations


def _store(annotations: LVISAnnotations, place: Path) -> None:
    values: dict[str, Any] = {}
    parts = {"file": annotations} | {name: getattr(annotations, name) for name in PARTS}
    for name, part in parts.items():
        if part is None:
            continue
        values[name] = {}
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, np.ndarray):
                with atomic_write(place / f"{name}.{field.name}.npy") as temporary:
                    np.save(temporary, value, allow_pickle=False)
            elif field.name not in (*PARTS, "path"):
                values[name][field.name] = value
    write_text(place / "meta.json", json.dumps(values))


def _load(place: Path, path: str) -> LVISAnnotations:
    values = json.loads((place / "meta.json").read_text(encoding="utf-8"))
    for file in place.glob("*.npy"):
        part, field = file.stem.split(".")
        try:
            values[part][field] = np.load(file, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        except ValueError:  # "cannot mmap an empty file"; of a damaged one this raises again
            values[part][field] = np.load(file, allow_pickle=False)
    values["stats"]["names"] = tuple(values["stats"]["names"])
    parts: dict[str, Any] = {name: cls(**values[name]) if name in values else None for name, cls in PARTS.items()}
    return LVISAnnotations(path=path, **parts, **values["file"])
