"""Crops of single objects for the report: examples of confusions, and the worst misses of rare classes."""

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from loce.data.annotations.lvis import LVISAnnotations
from loce.data.transforms import read_image
from loce.engine.drawing import crop_object
from loce.evaluation.lost_objects import CAUSES
from loce.evaluation.true_boxes import TrueBoxes, confusions
from loce.report.reading import Run

PAIRS, EACH, RIGHT = 8, 4, 1  # confusions, crops of each, and of the class that it is taken for
MISSES, OF_CLASS = 10, 2  # misses in all, and of a class


class Crops:
    """Crops (SIDE, SIDE, 3) of the objects of a data set; images: the folder of its images."""

    def __init__(self, annotations: LVISAnnotations, images: str) -> None:
        self.annotations, self.images = annotations, images
        self.rows = {number: row for row, number in enumerate(annotations.annotation_ids.tolist())}
        self._image = lru_cache(8)(self._read)

    def _read(self, index: int) -> np.ndarray:
        height, width = (int(side) for side in self.annotations.image_sizes[index])
        return read_image(self.annotations.image_path(index, self.images), (height, width))

    def of(self, annotation_id: int, group: str) -> np.ndarray:
        """An object with what is around it, its outline in the colour of its group."""
        row = self.rows[annotation_id]
        image = self._image(int(self.annotations.image_of[row]))
        own = np.array([row])
        masked = bool(self.annotations.has_mask[row])
        code = next(iter(self.annotations.segmentations.rles(own, *image.shape[:2]))) if masked else None
        return crop_object(image, self.annotations.clipped_boxes(own)[0], code, group)


def confusion_examples(run: Run, boxes: TrueBoxes, crops: Crops) -> list[dict[str, Any]]:
    """Of the largest confusions: title, and crops with captions, the surest mistakes first; the last is an object of
    the other class that is right."""
    ids = np.sort(run.classes.ids)
    name, group = _facts(run)
    found: list[dict[str, Any]] = []
    for one in confusions(boxes, ids)[:PAIRS]:
        own, other = int(ids[one.category]), int(ids[one.other])
        wrong = np.flatnonzero((boxes.category_ids == own) & (boxes.best_ids == other))
        right = np.flatnonzero((boxes.category_ids == other) & boxes.right)
        drawn = []
        for rows, most in ((wrong, EACH), (right, RIGHT)):
            for row in rows[np.argsort(-boxes.best_scores[rows], kind="stable")][:most]:
                best = f"{boxes.best_scores[row]:.2f}"
                caption = f"{best}, own {boxes.scores[row]:.2f}" if rows is wrong else f"{best}, right"
                picture = crops.of(int(boxes.annotation_ids[row]), group[int(boxes.category_ids[row])])
                drawn.append((picture, caption))
        share = f"{one.taken} of {one.boxes} boxes"
        found.append({"title": f"{name[own]} taken for {name[other]}", "share": share, "drawn": drawn})
    return found


def miss_examples(run: Run, crops: Crops) -> list[dict[str, Any]]:
    """Lost objects of the classes with fewest training instances that lost some, at most two of a class, the largest:
    class, crop and what became of it."""
    facts = run.classes
    name, group = _facts(run)
    counts = dict(zip(facts.ids, facts.counts, strict=True))
    seen: Counter[int] = Counter()
    found: list[dict[str, Any]] = []
    for row in sorted(run.misses, key=lambda row: (counts.get(int(row["id"]), 0), -float(row["area_share"]))):
        number = int(row["id"])
        if seen[number] == OF_CLASS or len(found) == MISSES:
            continue
        seen[number] += 1
        other = f": {row['taken_for']}" if row["cause"] == "classified_as" else f" (best there: {row['taken_for']})"
        what = CAUSES[row["cause"]] + other * bool(row["taken_for"])
        own = float(row["own_score"] or "nan")
        best = "" if row["best"] == row["name"] else f", {row['best']} {float(row['best_score'] or 'nan'):.2g}"
        scores = f"; classifier at the true box: own {own:.2g}{best}" if row["best"] else ""
        drawn = crops.of(int(row["annotation_id"]), group.get(number, "r"))
        found.append({"name": name.get(number, row["name"]), "drawn": drawn, "what": f"{what}{scores}"})
    return found


def _facts(run: Run) -> tuple[Mapping[int, str], Mapping[int, str]]:
    """Names and groups by category id."""
    facts = run.classes
    return dict(zip(facts.ids, facts.names, strict=True)), dict(zip(facts.ids, facts.groups, strict=True))
