"""Score thresholds of the classes, chosen for the best F1 on evaluated data, for pictures and predictions.

Heads differ in how high they score (LOCE's scores of frequent classes are lower by design), so that one number for all
would cut one head's objects and let another's mistakes through. On the data that they were chosen on, precision and
recall at these thresholds are too good.
"""

from pathlib import Path

import numpy as np

from loce.evaluation.matching import Matches
from loce.utils.files import read_csv

FEWEST = 5  # objects; classes with fewer share a threshold
COLUMN = "threshold"  # of per_category.csv


def best_thresholds(matches: Matches) -> tuple[np.ndarray, np.ndarray]:
    """(K,) the threshold of each category, and the F1 there at IoU .5, all sizes: 2 TP / (detections + objects).

    A category with fewer than 5 objects takes the threshold that is best for all such together; F1 is then its own
    there. nan: nothing is found whatever the threshold (F1: nor are there objects).
    """
    categories = np.repeat(np.arange(len(matches.bounds) - 1), np.diff(matches.bounds))
    true, false = matches.verdicts()
    counted = true | false
    objects, scores = matches.objects[0], matches.score
    few = objects < FEWEST
    shared = _best(scores[few[categories] & counted], true[few[categories] & counted], int(objects[few].sum()))
    thresholds, f1 = np.full((2, len(objects)), np.nan)
    for k in range(len(objects)):
        own = slice(matches.bounds[k], matches.bounds[k + 1])
        mine, hits = scores[own][counted[own]], true[own][counted[own]]
        thresholds[k] = shared if few[k] else _best(mine, hits, int(objects[k]))
        if objects[k]:
            kept = mine >= thresholds[k]
            f1[k] = 2 * hits[kept].sum() / (kept.sum() + objects[k])
    return thresholds, f1


def _best(scores: np.ndarray, hits: np.ndarray, objects: int) -> float:
    """The score halfway between the last detection that is worth keeping and the next one; nan without a hit."""
    if not hits.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order].astype(np.float64), np.cumsum(hits[order])
    last = np.append(scores[1:] < scores[:-1], True)  # of equal scores all are kept, or none
    f1 = np.where(last, 2 * found / (np.arange(1, len(scores) + 1) + objects), -1)
    best = int(f1.argmax())
    return float((scores[best] + (scores[best + 1] if best + 1 < len(scores) else scores[best])) / 2)


def read_thresholds(evaluation: Path, category_ids: np.ndarray, otherwise: float) -> np.ndarray | None:
    """(C,) the thresholds that an evaluation stored, in the order of `category_ids`; `otherwise`: of categories that it
    has none of. None where the folder has none at all, as those of older versions."""
    table = evaluation / "per_category.csv"
    rows = read_csv(table) if table.is_file() else []
    stored = {int(row["id"]): float(row[COLUMN]) for row in rows if row.get(COLUMN)}
    return np.array([stored.get(int(i), otherwise) for i in category_ids]) if stored else None
