"""AP-pool: the detections of all categories in one ranking by score (Dave et al., arXiv 2102.01066).

Detections find objects of their own category, as ever; true and false positives are then counted down one ranking, so
a score must mean the same in every category. APr, APc and APf rank the categories of their group alone. Every object
counts as much as any other, so frequent categories count most. A detection of a category without objects is a false
positive where that category was verified to be absent. As in the authors' evaluator, at most 10,000 detections of a
category are ranked; of equal scores the earlier image is first, then the earlier category.
"""

from dataclasses import replace

import numpy as np

from loce.evaluation.matching import Matches
from loce.utils.classes import GROUPS

POOLS = ("all", *GROUPS)  # they take the place of categories


def pooled(matches: Matches) -> Matches:
    """The same matches with four pools in the place of the categories: all of them, and those of each group."""
    truth = matches.truth
    category = np.repeat(np.arange(len(truth.category_ids)), np.diff(matches.bounds))
    ranking = np.lexsort((category, matches.image, -matches.score))  # stable
    place = np.full(len(category), -1)
    place[matches.overlapping] = np.arange(len(matches.overlapping))
    # Of each pool: its detections, the overlapping ones among these, and its objects.
    inside = [np.ones(len(truth.frequency), dtype=bool), *(truth.frequency == group for group in GROUPS)]
    rows = [ranking[chosen[category[ranking]]] for chosen in inside]
    objects = [np.flatnonzero(chosen[truth.category]) for chosen in inside]
    row, near = np.concatenate(rows), place[np.concatenate(rows)]
    overlapping = np.flatnonzero(near >= 0)
    near, own = near[overlapping], np.concatenate(objects)
    sizes = [len(found) for found in objects]
    pools = np.arange(len(POOLS))
    return Matches(
        truth=replace(
            truth.some(own),
            category=np.repeat(pools, sizes).astype(np.int32),
            category_ids=pools,
            label_ids=pools,
            names=list(POOLS),
            frequency=np.array(POOLS),
            negative=None,
            not_exhaustive=None,
        ),
        bounds=np.append(0, np.cumsum([len(ranked) for ranked in rows])),
        row=matches.row[row],
        image=matches.image[row],
        score=matches.score[row],
        false_positive=matches.false_positive[row],
        overlapping=overlapping,
        matched=matches.matched[near],
        ignored=matches.ignored[near],
        taken=matches.taken[near],
        place=None,
        object_ignored=matches.object_ignored[own],
        objects=np.stack([matches.objects[:, chosen].sum(axis=1) for chosen in inside], axis=1),
    )


def members(frequency: np.ndarray, group: str) -> np.ndarray:
    """(K,) bool: what AP of a group, or of all (""), is the mean of: its categories, or where pooled its pool."""
    if len(frequency) and frequency[0] == POOLS[0]:
        return frequency == (group or POOLS[0])
    return (frequency == group) | (not group)
