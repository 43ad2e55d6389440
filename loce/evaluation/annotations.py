"""Ground truth of LVIS- and COCO-style files as flat arrays, and the federated rule (LVIS, arXiv 1908.03195, Sec. 3).

Legend: I images and K categories, both in ascending order of id; G annotations, ordered by image and category.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from loce.evaluation.gathering import Gathered, has_all
from loce.evaluation.reading import offenders, read_json
from loce.utils.classes import frequency_groups
from loce.utils.errors import raise_problems

FEDERATED_KEYS = ("neg_category_ids", "not_exhaustive_category_ids")


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """Annotations of one data set; `load_annotations` makes it.

    image_ids (I,), category_ids (K,) int64 ascending; sizes (I, 2) height, width; names K; frequency (K,) "r"/"c"/"f";
    label_ids (K,) int64, category ids in the file's order; image, category (G,) indices; boxes (G, 4) x, y, width,
    height in px; areas (G,) px^2; ignore, crowd (G,) bool; ids (G,); segmentations: G polygons or RLEs, or None when
    they were left out; negative, not_exhaustive (I, K) bool or None for COCO-style files; notes: what a reader of the
    numbers should know; source: where it came from.
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    category_ids: np.ndarray
    label_ids: np.ndarray
    names: list[str]
    frequency: np.ndarray
    ids: np.ndarray
    image: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    ignore: np.ndarray
    crowd: np.ndarray
    segmentations: list[Any] | None
    negative: np.ndarray | None
    not_exhaustive: np.ndarray | None
    notes: list[str] = field(default_factory=list)
    source: str = ""

    def __len__(self) -> int:
        return len(self.image)

    @property
    def federated(self) -> bool:
        """True when the file says which categories were verified in which image (LVIS)."""
        return self.negative is not None

    def counted(self) -> np.ndarray:
        """(I, K) bool: where a detection can count under LVIS's rules: the category is there, or known not to be."""
        counted = np.ones((len(self.image_ids), len(self.category_ids)), dtype=bool)
        if self.negative is not None:
            counted = self.negative.copy()
            real = self.areas > 0  # an annotation without area does not exist under LVIS's rules
            counted[self.image[real], self.category[real]] = True
        return counted


class FederatedFilter:
    """What annotations say of an image: which categories can count there (cap detections first, apply this second,
    paste masks last), and its objects.

    Labels are the categories in the file's order; `label_ids` (C,) turns them into category ids.
    """

    def __init__(self, annotations: "str | Path | Mapping[str, Any] | GroundTruth"):
        truth = load_annotations(annotations, masks=False)
        self.label_ids = truth.label_ids
        self._column = np.searchsorted(truth.category_ids, truth.label_ids)
        self._label = np.argsort(self._column)
        self._truth, self._bounds = truth, np.searchsorted(truth.image, np.arange(len(truth.image_ids) + 1))
        self._row = {int(image): row for row, image in enumerate(truth.image_ids)}
        self._counted = truth.counted()

    def allowed(self, image_id: int) -> np.ndarray:
        """(C,) bool over labels, all true for COCO-style files; KeyError for an image that the file does not have."""
        return self._counted[self._row[image_id]][self._column]

    def objects(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """What is to be found in an image: boxes (G, 4) float32 x1, y1, x2, y2 in px, and labels (G,) int64."""
        row, truth = self._row[image_id], self._truth
        rows = slice(self._bounds[row], self._bounds[row + 1])
        corners = np.concatenate([truth.boxes[rows, :2], truth.boxes[rows, :2] + truth.boxes[rows, 2:]], axis=1)
        return corners.astype(np.float32), self._label[truth.category[rows]]


def load_annotations(annotations: "str | Path | Mapping[str, Any] | GroundTruth", masks: bool = True) -> GroundTruth:
    """Ground truth from a path, a loaded dict (left as it is) or itself; `masks=False` leaves segmentations out.

    Raises UserError with every mistake found: missing keys, repeated ids of images or categories, numbers that are not
    finite.
    """
    if isinstance(annotations, GroundTruth):
        return annotations
    gathered = Gathered(masks)
    if isinstance(annotations, Mapping):
        source, data = "annotations", annotations
    else:
        source, data = str(annotations), read_json(annotations, gathered.hook)
    if not isinstance(data, Mapping) or not all(
        isinstance(data.get(k), list) for k in ("images", "annotations", "categories")
    ):
        raise_problems([f"{source}: an annotation file needs the lists images, annotations and categories"])
    gathered.extend(a for a in data["annotations"] if a is not None)
    problems = gathered.problems + _problems(data)
    raise_problems([f"{source}: {problem}" for problem in problems])
    return _assemble(data, gathered, masks, source)


def _problems(data: Mapping[str, Any]) -> list[str]:
    """Mistakes in images and categories."""
    problems = []
    for kind, keys in (("images", ("id", "height", "width")), ("categories", ("id", "name"))):
        if not data[kind]:
            problems.append(f"{kind} is empty")
        bad = [e.get("id", e) if isinstance(e, Mapping) else e for e in data[kind] if not has_all(e, keys)]
        if bad:
            problems.append(f"{kind} without all of {', '.join(keys)}: {offenders(bad)}")
            continue
        for key in ("id", "height", "width") if kind == "images" else ("id",):
            values = [entry[key] for entry in data[kind]]
            bad = [v for v in values if not _is_integer(v)]
            if bad:
                problems.append(f"{kind} whose {key} is not an integer: {offenders(map(repr, bad))}")
            elif key == "id" and len(set(values)) < len(values):
                unique, counts = np.unique(values, return_counts=True)
                problems.append(f"{kind} with the same id twice: {offenders(unique[counts > 1])}")
    for key in FEDERATED_KEYS:
        lists = ((e["id"], e.get(key, [])) for e in data["images"] if has_all(e, ("id",)))
        if bad := [i for i, ids in lists if not isinstance(ids, list) or not all(map(_is_integer, ids))]:
            problems.append(f"images whose {key} is not a list of category ids: {offenders(bad)}")
    return problems


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and abs(int(value)) < 1 << 62


def _assemble(data: Mapping[str, Any], gathered: Gathered, masks: bool, source: str) -> GroundTruth:
    """Arrays in ascending order of image and category id."""
    images = sorted(data["images"], key=lambda image: image["id"])
    label_ids = np.array([category["id"] for category in data["categories"]], dtype=np.int64)
    categories = sorted(data["categories"], key=lambda category: category["id"])
    image_ids = np.array([image["id"] for image in images], dtype=np.int64)
    category_ids = np.sort(label_ids)
    column = gathered.columns()
    notes: list[str] = []

    image, image_known = positions(image_ids, column["image_id"])
    category, category_known = positions(category_ids, column["category_id"])
    for what, known in (("images", image_known), ("categories", category_known)):
        if not known.all():
            notes.append(
                f"{np.count_nonzero(~known)} annotations belong to {what} that are not in the file: not counted"
            )
    known = np.flatnonzero(image_known & category_known)
    finite = np.isfinite(column["bbox"]).all(axis=1) & np.isfinite(column["area"])
    bad = column["id"][known][~finite[known]]
    raise_problems([f"{source}: annotations whose bbox or area is not finite: {offenders(bad)}"] * bool(len(bad)))
    unique, counts = np.unique(column["id"][known], return_counts=True)
    if len(unique) < len(known):
        again = f"{len(known) - len(unique)} annotations have the id of another one: {offenders(unique[counts > 1])}"
        notes.append(f"{again}; all of them count")
    rows = known[np.lexsort((category[known], image[known]))]  # stable: file order within a cell
    negative, not_exhaustive = _federated(images, category_ids, source, notes)
    return GroundTruth(
        image_ids=image_ids,
        sizes=np.array([(i["height"], i["width"]) for i in images], dtype=np.int64),
        category_ids=category_ids,
        label_ids=label_ids,
        names=[str(c["name"]) for c in categories],
        frequency=_frequency(categories, image[rows], category[rows], notes),
        ids=column["id"][rows],
        image=image[rows].astype(np.int32),
        category=category[rows].astype(np.int32),
        boxes=column["bbox"][rows],
        areas=column["area"][rows],
        ignore=column["ignore"][rows],
        crowd=column["iscrowd"][rows],
        segmentations=[gathered.segmentations[row] for row in rows] if masks else None,
        negative=negative,
        not_exhaustive=not_exhaustive,
        notes=notes,
        source=source,
    )


def only_images(truth: GroundTruth, image_ids: np.ndarray, why: str) -> GroundTruth:
    """The ground truth of some of its images, with a note that says so."""
    kept = np.isin(truth.image_ids, image_ids)
    rows = np.flatnonzero(kept[truth.image])
    parts = {name: getattr(truth, name)[rows] for name in ("ids", "category", "boxes", "areas", "ignore", "crowd")}
    return replace(
        truth,
        image_ids=truth.image_ids[kept],
        sizes=truth.sizes[kept],
        image=(np.cumsum(kept) - 1)[truth.image[rows]].astype(np.int32),
        segmentations=None if truth.segmentations is None else [truth.segmentations[row] for row in rows],
        negative=None if truth.negative is None else truth.negative[kept],
        not_exhaustive=None if truth.not_exhaustive is None else truth.not_exhaustive[kept],
        notes=[*truth.notes, f"PARTIAL: the numbers are of {kept.sum()} of {len(kept)} images, {why}"],
        **parts,
    )


def positions(ascending: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each of `values` in `ascending`, and whether it is there at all (the index is then meaningless)."""
    index = np.searchsorted(ascending, values).clip(max=len(ascending) - 1)
    return index, ascending[index] == values


def _federated(
    images: list[Mapping[str, Any]], category_ids: np.ndarray, source: str, notes: list[str]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(I, K) bitmaps of the categories verified absent and of those not annotated to the last object."""
    have = [FEDERATED_KEYS[0] in image for image in images]
    if not any(have):
        notes.append("no neg_category_ids: not an LVIS file, so every category counts in every image (COCO-style)")
        return None, None
    if not all(have):
        bad = [image["id"] for image, has in zip(images, have, strict=True) if not has]
        raise_problems([f"{source}: images without neg_category_ids, which others have: {offenders(bad)}"])
    maps = []
    for key in FEDERATED_KEYS:
        counts = np.array([len(image.get(key, ())) for image in images])
        ids = np.array([i for image in images for i in image.get(key, ())], dtype=np.int64)
        column, known = positions(category_ids, ids)
        bitmap = np.zeros((len(images), len(category_ids)), dtype=bool)
        bitmap[np.repeat(np.arange(len(images)), counts)[known], column[known]] = True
        maps.append(bitmap)
    if not any(FEDERATED_KEYS[1] in image for image in images):
        notes.append("no not_exhaustive_category_ids: taken as none")
    return maps[0], maps[1]


def _frequency(
    categories: list[Mapping[str, Any]], image: np.ndarray, category: np.ndarray, notes: list[str]
) -> np.ndarray:
    """(K,) "r", "c" or "f": the file's own, else by its image counts, else by the images counted here."""
    if all(c.get("frequency") in ("r", "c", "f") for c in categories):
        return np.array([c["frequency"] for c in categories])
    if all("image_count" in c for c in categories):
        notes.append("no frequency: groups r/c/f are from image_count with LVIS's bounds (10 and 100 images)")
        return frequency_groups(np.array([c["image_count"] for c in categories]))
    notes.append("no frequency or image_count: groups r/c/f count the images of this very file, not of training")
    cells = np.unique(image * len(categories) + category) % len(categories)
    return frequency_groups(np.bincount(cells, minlength=len(categories)))
