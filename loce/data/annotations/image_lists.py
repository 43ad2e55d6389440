"""Lists of images by id or file name: subsets to evaluate (one a line), and attributes of images (a CSV file)."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import numpy as np

from loce.utils.errors import UserError, first_few, raise_problems
from loce.utils.files import read_csv


def listed_images(path: str, image_ids: np.ndarray, names: Iterable[str]) -> list[int]:
    """Indices, ascending, of the images that a file lists, one a line; blank lines and `#` lines are none.

    image_ids (I,) and names, "split/file", of all images. UserError: no such file, images that are not among them or
    listed twice, nothing in it.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            entries = [line.strip() for line in file if line.strip() and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"eval.images = {path}: cannot be read: {error}") from None
    if not entries:
        raise UserError(f"eval.images = {path}: lists no image")
    return sorted(find_images(path, entries, image_ids, names))


def attributes_of_images(path: str, image_ids: np.ndarray, names: Iterable[str]) -> dict[tuple[str, str], np.ndarray]:
    """(attribute, value) -> indices of its images, from a CSV file with a header: an image in the first column, in each
    further one an attribute. An empty cell is no value. UserError as for `listed_images`."""
    try:
        rows = read_csv(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"eval.slices = {path}: cannot be read: {error}") from None
    if not rows or len(rows[0]) < 2:
        raise UserError(f"eval.slices = {path}: needs a header, and columns of images and of an attribute at least")
    first, *attributes = rows[0]
    found = find_images(path, [row[first].strip() for row in rows], image_ids, names)
    slices: dict[tuple[str, str], list[int]] = {}
    for index, row in zip(found, rows, strict=True):
        for attribute in attributes:
            if value := (row[attribute] or "").strip():
                slices.setdefault((attribute, value), []).append(index)
    return {key: np.array(sorted(slices[key])) for key in sorted(slices)}


def find_images(path: str, entries: Sequence[str], image_ids: np.ndarray, names: Iterable[str]) -> list[int]:
    """Index of each entry: an id, a name, or the file name alone where only one image has it."""
    places = {str(number): index for index, number in enumerate(image_ids.tolist())}
    every = list(names)
    files = Counter(PurePosixPath(name).name for name in every)
    for index, name in enumerate(every):
        own = PurePosixPath(name).name
        for known in (name, *([own] if files[own] == 1 else [])):
            places.setdefault(known, index)
    unknown = [entry for entry in entries if entry not in places]
    twice = [entry for entry, count in Counter(places.get(entry) for entry in entries).items() if count > 1]
    problems = [f"{path}: images that are not in the annotation file: {first_few(unknown)}"] if unknown else []
    if not unknown and twice:
        problems.append(f"{path}: images that are listed twice: {first_few(image_ids[index] for index in twice)}")
    raise_problems(problems)
    return [places[entry] for entry in entries]
