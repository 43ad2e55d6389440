"""From the ids of an annotation file to positions in its lists, with a mistake for each id that leads nowhere.

Shapes: A annotations, I images, C categories.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loce.data.annotations.reader import NAMED, Mistakes
from loce.utils.classes import GROUPS


@dataclass(frozen=True)
class LabelLists:
    """A list of labels per image, flat: labels (L,) int32, first (I+1,) int64."""

    labels: np.ndarray
    first: np.ndarray

    def of(self, index: int) -> np.ndarray:
        """Labels of one image."""
        return self.labels[self.first[index] : self.first[index + 1]]


def category_ids(categories: list[Any], mistakes: Mistakes) -> np.ndarray:
    """(C,) int64 ids of the list of categories, in its order."""
    for number, category in enumerate(categories):
        if not (isinstance(category, dict) and type(category.get("id")) is int and "name" in category):
            mistakes.add("categories without a whole-number id or without a name", f"number {number}")
    if not categories:
        mistakes.add("empty list", "categories")
    ids = [c["id"] if isinstance(c, dict) and type(c.get("id")) is int else -1 for c in categories]
    return np.array(ids, dtype=np.int64)


def check_unique(kind: str, ids: np.ndarray, mistakes: Mistakes) -> None:
    """A mistake for each id that is there more than once."""
    values, counts = np.unique(ids, return_counts=True)
    for value in values[counts > 1]:
        mistakes.add(f"{kind} ids used more than once", str(value))


def look_up(
    kind: str, known: np.ndarray, wanted: Sequence[int], annotation_ids: np.ndarray, mistakes: Mistakes
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
    lists: list[Any], category_ids: np.ndarray, image_ids: np.ndarray, mistakes: Mistakes
) -> LabelLists | None:
    """The category ids given per image as labels; None where no image has such a list."""
    if all(ids is None for ids in lists):
        return None
    label_of = {int(category): label for label, category in enumerate(category_ids)}
    labels: list[int] = []
    first = [0]
    for image, ids in zip(image_ids, lists, strict=True):
        for category in ids if isinstance(ids, list) else []:
            if type(category) is not int or category not in label_of:
                mistakes.add("unknown categories in image lists (absent, not exhaustive)", f"image {image}: {category}")
            else:
                labels.append(label_of[category])
        first.append(len(labels))
    return LabelLists(np.array(labels, dtype=np.int32), np.array(first, dtype=np.int64))


def file_groups(categories: list[dict[str, Any]], mistakes: Mistakes) -> np.ndarray | None:
    """The file's own groups; None where no category has one."""
    groups = [category.get("frequency") for category in categories]
    if all(group is None for group in groups):
        return None
    for category, group in zip(categories, groups, strict=True):
        if group not in GROUPS:
            mistakes.add("categories whose `frequency` is not r, c or f", f"{category['name']} ({group})")
    return np.array([str(group) for group in groups], dtype="<U1")


def tell_apart(ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The (A,) annotation ids, each once: of equal ones the first stays, the others get new ids; and a note on that."""
    order = np.argsort(ids, kind="stable")
    again = np.zeros(len(ids), dtype=bool)
    again[order[1:]] = ids[order[1:]] == ids[order[:-1]]
    number = int(again.sum())
    if not number:
        return ids, []
    examples = np.unique(ids[again])
    named = ", ".join(map(str, examples[:NAMED])) + (", ..." if len(examples) > NAMED else "")
    told = ids.copy()
    told[again] = ids.max() + 1 + np.arange(number)
    return told, [f"{number} annotations have the id of another one ({named}): they were given new ids"]
