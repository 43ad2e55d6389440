"""Annotation files and results with mistakes of the kinds that exports really make, in memory; all from a seed."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from tests.data.made_annotations import as_format, content
from tests.fuzz.mutations import change_bytes, change_value

Rng = np.random.Generator
Content = dict[str, Any]


def results_for(made: Content, rng: Rng) -> list[Content]:
    """Detections near the annotations, with box and mask."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in made["images"]}
    found = []
    for row in made["annotations"]:
        for _ in range(int(rng.integers(0, 3))):
            height, width = sizes[row["image_id"]]
            x, y, w, h = (float(v) for v in np.round(np.array(row["bbox"]) + rng.integers(-3, 4, 4), 2))
            x, y, w, h = max(x, 0.0), max(y, 0.0), max(w, 1.0), max(h, 1.0)
            code = coco_mask.frPyObjects([[x, y, x + w, y, x + w, y + h, x, y + h]], height, width)[0]
            entry = {"image_id": row["image_id"], "category_id": row["category_id"], "bbox": [x, y, w, h]}
            entry["score"] = float(rng.integers(1, 8)) / 7 if rng.random() < 0.5 else float(rng.random())
            entry["segmentation"] = {"size": [height, width], "counts": code["counts"].decode()}
            found.append(entry)
    return found


def _a_code(rows: list[Content], rng: Rng) -> Content | None:
    codes = [row["segmentation"] for row in rows if isinstance(row.get("segmentation"), dict)]
    return codes[int(rng.integers(len(codes)))] if codes else None


def break_runs(rows: list[Content], rng: Rng) -> None:
    """A run-length code that is cut, does not fill its image, is negative, null, or text of bytes."""
    code = _a_code(rows, rng)
    if code is None:
        return
    counts = code["counts"]
    if isinstance(counts, list):
        at = int(rng.integers(len(counts)))
        changes: list[Callable[[], Any]] = [
            lambda: counts[:-1],
            lambda: [-3, 3, *counts],
            lambda: [*counts[:at], counts[at] + int(rng.integers(-40, 40)), *counts[at + 1 :]],
            lambda: [float(run) for run in counts],
            lambda: [str(run) for run in counts],
            lambda: [*counts, 1 << 40],
        ]
    else:
        at = int(rng.integers(max(len(counts), 1)))
        changes = [
            lambda: counts[: -int(rng.integers(1, 5))],
            lambda: str(counts.encode()),
            lambda: counts[:at] + chr(int(rng.integers(32, 127))) + counts[at + 1 :],
            lambda: counts + "o" * int(rng.integers(1, 20)),
            lambda: counts[:at] + "é" + counts[at:],
        ]
    changes += [lambda: None, lambda: "", list, lambda: {"a": 1}]
    code["counts"] = changes[int(rng.integers(len(changes)))]()
    if rng.random() < 0.2:
        code["size"] = [code["size"][::-1], [0, 5], [10**9, 10**9], None, ["60", "60"]][int(rng.integers(5))]


def move_masks(rows: list[Content], rng: Rng) -> None:
    """Polygons as shares, of another scale, with x and y exchanged, elsewhere, far away or not finite."""
    kind = rng.choice(["shares", "scale", "exchanged", "elsewhere", "far", "nan"])
    chosen = [row for row in rows if isinstance(row.get("segmentation"), list)]
    for row in chosen if rng.random() < 0.5 else chosen[:2]:
        parts = [np.array(part, dtype=float).reshape(-1, 2) for part in row["segmentation"]]
        moved = {
            "shares": [part / 100 for part in parts],
            "scale": [part * 3 for part in parts],
            "exchanged": [part[:, ::-1] for part in parts],
            "elsewhere": [part + 45 for part in parts],
            "far": [part * 10.0 ** float(rng.integers(4, 300)) for part in parts],
            "nan": [np.where(part == part.max(), rng.choice([np.nan, np.inf]), part) for part in parts],
        }[str(kind)]
        row["segmentation"] = [part.ravel().tolist() for part in moved]


def change_boxes(rows: list[Content], rng: Rng) -> None:
    """All or one of the boxes as corners, shares, text, numbers that are none."""
    kind = rng.choice(["corners", "shares", "text", "nan", "short", "negative"])
    for row in rows if rng.random() < 0.5 else rows[:1]:
        x, y, w, h = row["bbox"]
        row["bbox"] = {
            "corners": [x, y, x + w, y + h],
            "shares": [v / 100 for v in row["bbox"]],
            "text": [str(v) for v in row["bbox"]],
            "nan": [x, float("nan"), w, float("inf")],
            "short": [x, y, w],
            "negative": [x, y, -w, h],
        }[str(kind)]


def change_flags(rows: list[Content], rng: Rng) -> None:
    """`area`, `iscrowd` and `ignore`: missing, text, null, other numbers."""
    odd: list[Any] = [0, 1, True, False, "0", None, 2, 0.5, 1.0, [], "1080", float("nan"), -1, 1e30]
    for row in rows if rng.random() < 0.3 else rows[:2]:
        key = str(rng.choice(["area", "iscrowd", "ignore"]))
        if rng.random() < 0.3:
            row.pop(key, None)
        else:
            row[key] = odd[int(rng.integers(len(odd)))]


def change_ids(made: Content, rng: Rng) -> None:
    """Ids of 64 bits, beyond them, negative, text, twice, of nobody."""
    section = str(rng.choice(["images", "annotations", "categories"]))
    old = made[section][int(rng.integers(len(made[section])))]["id"]
    new = [2**62 + 5, 2**63 - 1, 2**63, -(2**63), 2**80, -7, "7", 7.0, True, None, [1], made[section][0]["id"]]
    to = new[int(rng.integers(len(new)))]
    key = {"images": "image_id", "annotations": "", "categories": "category_id"}[section]
    for row in made[section]:
        if row["id"] == old:
            row["id"] = to
    for row in made["annotations"] if key and rng.random() < 0.8 else ():
        if row[key] == old:
            row[key] = to


def add_lists(made: Content, rng: Rng) -> None:
    """Lists and nested objects that look like images or annotations and are none; the same list twice."""
    other = {"id": 1, "image_id": 1, "category_id": 1, "width": 5, "height": 5, "name": "v"}
    kind = rng.choice(["videos", "attributes", "licenses", "nested", "before"])
    if kind in ("videos", "licenses"):
        made[str(kind)] = [dict(other) for _ in range(int(rng.integers(0, 4)))]
    elif kind == "before":
        made |= {key: made.pop(key) for key in rng.permutation(list(made)).tolist()}
    else:
        rows = made[str(rng.choice(["images", "annotations", "categories"]))]
        for row in rows if rng.random() < 0.5 else rows[:1]:
            row["attributes"] = dict(other) if kind == "attributes" else [{"a": [dict(other)]}, dict(other)]


def change_fields(made: Content, rng: Rng) -> None:
    """Names twice, groups, LVIS's lists, sizes: missing in some, or something else."""
    kind = rng.choice(["name", "frequency", "neg", "loose", "size", "annotations", "count"])
    image, category = made["images"][int(rng.integers(len(made["images"])))], made["categories"][0]
    if kind == "name":
        category["name"] = [made["categories"][1]["name"], 5, None, ""][int(rng.integers(4))]
    elif kind in ("frequency", "count"):
        category["frequency" if kind == "frequency" else "image_count"] = ["x", None, 3, "r"][int(rng.integers(4))]
    elif kind == "size":
        image[str(rng.choice(["height", "width"]))] = ["60", None, 0, 60.0, 70][int(rng.integers(5))]
        if rng.random() < 0.5:
            image.pop("width")
    elif kind == "annotations":
        made["annotations"] = [[], None, {}, "x"][int(rng.integers(4))]
    else:
        key = "neg_category_ids" if kind == "neg" else "not_exhaustive_category_ids"
        image[key] = [[], [1], ["1"], None, [99], [made["categories"][0]["id"]], 7][int(rng.integers(7))]
        if rng.random() < 0.3:
            image.pop(key)


def encoded(made: Any, rng: Rng) -> bytes:
    """As JSON in some encoding, with or without a byte order mark, spaces and line breaks."""
    indent = [None, None, None, 1][int(rng.integers(4))]
    text = json.dumps(made, ensure_ascii=bool(rng.random() < 0.5), indent=indent)
    code = str(
        rng.choice(
            ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gbk", "latin-1"], p=[0.5, 0.3, 0.05, 0.05, 0.05, 0.05]
        )
    )
    return text.encode(code, "replace")


def as_numpy(value: Any, rng: Rng) -> Any:
    """The same content with some of its numbers and lists as NumPy's."""
    if isinstance(value, dict):
        return {key: as_numpy(item, rng) for key, item in value.items()}
    if isinstance(value, list):
        plain = bool(value) and all(type(item) in (int, float) and abs(item) < 2**53 for item in value)
        if plain and rng.random() < 0.3:
            return np.array(value)
        return tuple(value) if rng.random() < 0.05 else [as_numpy(item, rng) for item in value]
    if type(value) is int and -(2**63) <= value < 2**63 and rng.random() < 0.3:
        return np.int64(value) if rng.random() < 0.7 else np.array(value)
    return np.float64(value) if type(value) is float and rng.random() < 0.3 else value


CHANGES: tuple[Callable[[Content, list[Content], Rng], Any], ...] = (
    lambda made, found, rng: break_runs(made["annotations"], rng),
    lambda made, found, rng: break_runs(found, rng),
    lambda made, found, rng: move_masks(made["annotations"], rng),
    lambda made, found, rng: change_boxes(made["annotations"], rng),
    lambda made, found, rng: change_boxes(found, rng),
    lambda made, found, rng: change_flags(made["annotations"], rng),
    lambda made, found, rng: change_ids(made, rng),
    lambda made, found, rng: add_lists(made, rng),
    lambda made, found, rng: add_lists(made, rng),
    lambda made, found, rng: change_value(made, rng),
    lambda made, found, rng: change_value(found, rng) if found else None,
)


def reader_case(seed: int) -> tuple[Content, list[Content], bytes, bytes]:
    """A changed annotation file and results for it: as values, and as the bytes of their files."""
    rng = np.random.default_rng([0xEAD, seed])
    made = as_format(content(images=4, seed=int(rng.integers(50))), str(rng.choice(["lvis_v1", "coco"])))
    for row in made["annotations"]:
        row["bbox"] = [round(side, 2) for side in row["bbox"]]
    if rng.random() < 0.3:
        made["categories"][1]["name"] = "红色 café"
    found = results_for(made, rng)
    for _ in range(int(rng.integers(0, 3))):
        try:
            CHANGES[int(rng.integers(len(CHANGES)))](made, found, rng)
            if rng.random() < 0.3:
                change_fields(made, rng)
        except (TypeError, KeyError, IndexError, ValueError, AttributeError):
            pass  # what should be changed was changed before
    raw, raw_found = encoded(made, rng), encoded(found, rng)
    if rng.random() < 0.1:
        raw = change_bytes(raw, rng)
    if rng.random() < 0.1:
        raw_found = change_bytes(raw_found, rng)
    return copy.deepcopy(made), found, raw, raw_found
