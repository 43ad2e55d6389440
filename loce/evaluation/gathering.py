"""Annotation dicts to arrays, part by part, so that a large file never stands in memory as Python objects."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from loce.evaluation.reading import offenders

_PART = 10_000  # annotations that are held as Python objects at a time
INTEGERS, REALS, FLAGS = ("id", "image_id", "category_id"), ("area", "bbox"), ("ignore", "iscrowd")


class Gathered:
    """Annotations of one file or list as columns, and what is wrong with them (`problems`); segmentations as they are,
    polygons in float64 arrays, or left out when not `masks`."""

    def __init__(self, masks: bool):
        self.masks = masks
        self.problems: list[str] = []
        self.segmentations: list[Any] = []
        self._pending: list[Any] = []
        self._parts: list[dict[str, np.ndarray]] = []

    def hook(self, value: dict[str, Any]) -> Any:
        """For `read_json`: takes annotations out of the stream, leaves everything else."""
        if "image_id" not in value or "category_id" not in value:
            return value
        if self.masks and isinstance(value.get("segmentation"), list):
            with suppress(TypeError, ValueError):  # what is no polygon stays, and is reported when it is needed
                value["segmentation"] = [np.asarray(polygon, dtype=np.float64) for polygon in value["segmentation"]]
        elif not self.masks:
            value.pop("segmentation", None)
        self._pending.append(value)
        if len(self._pending) >= _PART:
            self._flush()
        return None

    def extend(self, annotations: Iterable[Any]) -> None:
        """Take annotations that are already objects; they are read, never changed."""
        self._pending.extend(annotations)
        self._flush()

    def columns(self) -> dict[str, np.ndarray]:
        """id, image_id, category_id (G,) int64; area (G,), bbox (G, 4) float64; ignore, iscrowd (G,) bool."""
        self._flush()
        none: dict[str, np.ndarray] = {key: np.zeros(0, dtype=np.int64) for key in INTEGERS}
        none |= {"area": np.zeros(0), "bbox": np.zeros((0, 4))} | {key: np.zeros(0, dtype=bool) for key in FLAGS}
        return {key: np.concatenate([part[key] for part in (none, *self._parts)]) for key in none}

    def _flush(self) -> None:
        part, self._pending = self._pending, []
        needed = (*INTEGERS, *REALS, *(["segmentation"] if self.masks else []))
        if bad := [a.get("id", a) if isinstance(a, Mapping) else a for a in part if not has_all(a, needed)]:
            self.problems.append(f"annotations without all of {', '.join(needed)}: {offenders(bad)}")
            return
        if bad := [a["id"] for a in part if not _is_box(a["bbox"])]:
            self.problems.append(f"annotations whose bbox is not [x, y, width, height]: {offenders(bad)}")
        if bad := [a["id"] for a in part if not isinstance(a["area"], (int, float))]:
            self.problems.append(f"annotations whose area is not a number: {offenders(bad)}")
        columns = {key: _integers([a[key] for a in part]) for key in INTEGERS}
        for key in INTEGERS:
            if part and columns[key].dtype.kind != "i":
                bad = [a[key] for a in part if _integers([a[key]]).dtype.kind != "i"]
                self.problems.append(f"annotations whose {key} is not an integer: {offenders(map(repr, bad))}")
        if not part or self.problems:
            return
        columns |= {key: np.array([a[key] for a in part], dtype=np.float64) for key in REALS}
        columns |= {key: np.array([bool(a.get(key, 0)) for a in part]) for key in FLAGS}
        self._parts.append(columns)
        if self.masks:
            self.segmentations += [a["segmentation"] for a in part]


def _integers(values: list[Any]) -> np.ndarray:
    """(N,) of a kind other than "i" where one is no integer, or one that does not fit 64 bits."""
    try:
        column = np.array(values)
    except ValueError:  # lists of different lengths
        return np.array(values, dtype=object)
    return column if column.ndim == 1 else column.astype(object)


def has_all(entry: Any, keys: Iterable[str]) -> bool:
    """True for an object with all of `keys`."""
    return isinstance(entry, Mapping) and all(key in entry for key in keys)


def _is_box(box: Any) -> bool:
    return hasattr(box, "__len__") and len(box) == 4 and all(isinstance(v, (int, float, np.number)) for v in box)
