"""Lookup of the ids in an annotation file: positions in its lists, and a mistake for each unknown id.

Shapes: A annotations, I images, C categories.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loce.data.annotations.reader import Mistakes, short
from loce.data.annotations.values import as_list, is_number, is_whole
from loce.utils.classes import GROUPS
from loce.utils.errors import first_few


@dataclass(frozen=True)
class LabelLists:
    """A list of labels per image, flat: labels (L,) int32, first (I+1,) int64."""

    labels: np.ndarray
    first: np.ndarray

    def of(self, index: int) -> np.ndarray:
        """Labels of one image."""
        return self.labels[self.first[index] : self.first[index + 1]]

    def bitmap(self, classes: int) -> np.ndarray:
        """(I, C) bool: the label is in the image's list."""
        found = np.zeros((len(self.first) - 1, classes), dtype=bool)
        found[np.repeat(np.arange(len(found)), np.diff(self.first)), self.labels] = True
        return found


def category_ids(categories: list[Any], mistakes: Mistakes) -> np.ndarray:
    """(C,) int64 ids of the list of categories, in its order."""
    good = []
    for number, category in enumerate(categories):
        if not isinstance(category, Mapping) or "id" not in category or "name" not in category:
            mistakes.add("categories without a whole-number id or without a name", f"number {number}")
            continue
        own, name = as_list(category["id"]), as_list(category["name"])
        if not is_whole(own):
            mistakes.add("categories whose id is no whole number of 64 bits", f"{name} ({short(own)})")
        elif any("\ud800" <= letter <= "\udfff" for letter in str(name)):  # found when results are written
            kind = "categories whose name has half a character, which no file can hold; give them another"
            mistakes.add(kind, f"{short(name)!a} ({own})")
        elif not (is_number(name) or (isinstance(name, str) and name.strip())):
            mistakes.add("categories whose name is no text", f"id {own} ({name!a:.60})")
        else:
            good.append(int(own))
    if not categories:
        mistakes.add("empty list", "categories")
    return np.array(good, dtype=np.int64)


def check_unique(kind: str, ids: np.ndarray, mistakes: Mistakes) -> None:
    """A mistake for each id that is used more than once."""
    values, counts = np.unique(ids, return_counts=True)
    for value in values[counts > 1]:
        mistakes.add(f"{kind} ids used more than once", str(value))


def look_up(
    kind: str,
    known: np.ndarray,
    wanted: Sequence[int],
    annotation_ids: np.ndarray,
    mistakes: Mistakes,
) -> np.ndarray:
    """(A,) int32 positions in `known` of the ids `wanted`; an unknown one is a mistake that names its annotation."""
    ids = np.array(wanted, dtype=np.int64)
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known[order], ids), len(known) - 1)
    found = order[place]
    for row in np.flatnonzero(known[found] != ids):
        mistakes.add(f"annotations with an unknown {kind}", f"annotation {annotation_ids[row]} ({kind}_id {ids[row]})")
    return found.astype(np.int32)


def label_lists(
    key: str,
    lists: list[Any],
    category_ids: np.ndarray,
    image_ids: np.ndarray,
    mistakes: Mistakes,
) -> LabelLists | None:
    """The category ids that images give as `key`, as labels; None where no image has such a list."""
    if all(ids is None for ids in lists):
        return None
    label_of = {int(category): label for label, category in enumerate(category_ids)}
    labels: list[int] = []
    first = [0]
    for image, ids in zip(image_ids, lists, strict=True):
        ids = [as_list(category) for category in ids] if isinstance(ids, list) else ids
        if ids is not None and not (isinstance(ids, list) and all(is_whole(category) for category in ids)):
            mistakes.add(f"images whose {key} is not a list of category ids", f"image {image}")
            continue
        for category in ids or ():
            if category in label_of:
                labels.append(label_of[category])
            else:
                mistakes.add("unknown categories in image lists (absent, not exhaustive)", f"image {image}: {category}")
        first.append(len(labels))
    return LabelLists(np.array(labels, dtype=np.int32), np.array(first, dtype=np.int64))


def file_groups(categories: list[Mapping[str, Any]], mistakes: Mistakes) -> np.ndarray | None:
    """The file's own groups; None where no category has one."""
    groups = [category.get("frequency") for category in categories]
    if all(group is None for group in groups):
        return None
    for category, group in zip(categories, groups, strict=True):
        if group not in GROUPS:
            mistakes.add("categories whose `frequency` is not r, c or f", f"{category['name']} ({short(group)})")
    return np.array([str(group) for group in groups], dtype="<U1")


def file_counts(categories: list[Mapping[str, Any]]) -> np.ndarray | None:
    """(C,) int64: in how many images of the training set a category is, as LVIS files say; None where one does not."""
    counts = [category.get("image_count") for category in categories]
    return np.array(counts, dtype=np.int64) if all(is_whole(count) for count in counts) else None


def tell_apart(ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The (A,) annotation ids, each once: of equal ones the first stays, the others get new ids; and a note on that."""
    order = np.argsort(ids, kind="stable")
    again = np.zeros(len(ids), dtype=bool)
    again[order[1:]] = ids[order[1:]] == ids[order[:-1]]
    number = int(again.sum())
    if not number:
        return ids, []
    unique = ids.copy()
    unique[again] = np.setdiff1d(np.arange(1, len(ids) + number + 1), ids)[:number]
    named = first_few(np.unique(ids[again]))
    return unique, [f"{number} annotations have the id of another one ({named}): they were given new ids"]


def equal_names(categories: list[Mapping[str, Any]]) -> list[str]:
    """A note on categories that share a name: two classes to the model, one to everybody who reads the names."""
    ids = defaultdict(list)
    for category in categories:
        ids[str(category["name"])].append(str(category["id"]))
    twice = [f"{name!r} (ids {', '.join(own)})" for name, own in ids.items() if len(own) > 1]
    if not twice:
        return []
    return [
        f"WARNING: {len(twice)} names belong to more than one category: {first_few(twice)}. They are different classes "
        "to the model; give them different names, or give all annotations of a name one category"
    ]
