"""Small data sets, and mistakes made in them at random: in the JSON's values, in its bytes, in the image files.

Everything depends on the seed alone.
"""

import copy
import gzip
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from tests.data.made_annotations import as_format, content

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        7,
        0.5,
        -0.0,
        1e-300,
        1e300,
        float("nan"),
        float("inf"),
        1 << 31,
        1 << 63,
        -(1 << 70),
    ),
    *(
        "",
        "7",
        "a",
        "../..",
        "/",
        "a\0b",
        "\ud800",
        "x" * 5000,
        "é.jpg",
        [],
        {},
        [[]],
        [None],
        [1, 2, 3, 4],
        [[1, 2, 3]],
    ),
    *(
        [[1, 2, 3, 4, 5, 6, 7]],
        [[0, 0, 0, 0, 0, 0]],
        [[1e9, 1, 2, 3, 4, 5]],
        [[5, 5, 20, 5, 20, 20]],
        [-5, -5, 500, 500],
    ),
    *([10, 10, 0, 0], [30, 30, -10, -10], [1, 2, 3], [1, 2, 3, "4"], [1e18, 0, 1, 1], [0, 0, 1e-9, 5], {"a": 1}),
    *({"size": [40, 40], "counts": [1600]}, {"size": [60, 60], "counts": "PPo0"}, {"size": [-1, 4], "counts": [1, 2]}),
    *(
        {"size": [1 << 20, 1 << 20], "counts": "0"},
        {"size": "ab", "counts": 3},
        {"id": 1, "image_id": 1, "category_id": 1},
    ),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within a JSON value, down to the coordinates."""
    found = [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        found += places(item, (*path, key))
    return found


def change_value(made: Any, rng: np.random.Generator) -> Any:
    """Another value somewhere, a key or an element removed, doubled, exchanged or of another place."""
    every = places(made)[1:]
    depth = int(rng.integers(1, 6))  # else nearly all would be coordinates
    paths = [path for path in every if len(path) == depth] or every
    *above, key = paths[int(rng.integers(len(paths)))]
    parent = made
    for step in above:
        parent = parent[step]
    kind = rng.choice(["odd", "odd", "odd", "gone", "twice", "other", "renamed", "bit more"])
    if kind == "gone":
        del parent[key]
    elif kind == "twice" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif kind == "other":
        value = made
        for step in every[int(rng.integers(len(every)))]:
            value = value[step]
        parent[key] = copy.deepcopy(value)
    elif kind == "renamed" and isinstance(parent, dict):
        parent[rng.choice(["id", "image_id", "name", "x", key.upper()])] = parent.pop(key)
    elif kind == "bit more" and type(parent[key]) in (int, float):
        parent[key] += float(rng.normal() * 50) if rng.random() < 0.5 else int(rng.integers(-50, 50))
    else:
        parent[key] = copy.deepcopy(ODD[int(rng.integers(len(ODD)))])
    return made


def change_bytes(raw: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, one or more bytes changed, moved, doubled or inserted, or packed."""
    kind = rng.choice(["cut", "flip", "flip", "insert", "remove", "double", "zeros", "gzip", "prefix"])
    at, length = int(rng.integers(len(raw) + 1)), int(rng.integers(1, 30))
    if kind == "cut":
        return raw[:at]
    if kind == "flip":
        changed = bytearray(raw)
        for place in rng.integers(len(raw), size=int(rng.integers(1, 4))) if raw else ():
            changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    if kind == "insert":
        return raw[:at] + rng.bytes(length) + raw[at:]
    if kind == "remove":
        return raw[:at] + raw[at + length :]
    if kind == "double":
        return raw[:at] + raw[at : at + 20 * length] + raw[at:]
    if kind == "zeros":
        return raw[:at] + bytes(length) + raw[at + length :]
    if kind == "gzip":
        return gzip.compress(raw, mtime=0)
    return (b"\xef\xbb\xbf", b"version https://git-lfs", b"PK\x03\x04", b"\xff\xfe", b" \n")[length % 5] + raw


def change_image(path: Path, rng: np.random.Generator) -> None:
    """A damaged file, one of another kind or size, or none."""
    kind = rng.choice(["bytes", "bytes", "mode", "exif", "size", "gone", "folder", "16 bit"])
    raw = path.read_bytes()
    with Image.open(io.BytesIO(raw)) as file:
        picture = file.convert("RGB")
    if kind == "bytes":
        path.write_bytes(change_bytes(raw, rng))
    elif kind == "mode":
        mode = rng.choice(["L", "P", "CMYK", "LA", "RGBA", "1", "YCbCr"])
        form = "JPEG" if mode in ("CMYK", "YCbCr") else rng.choice(["PNG", "TIFF", "GIF"])
        picture.convert(mode).convert("RGBA" if (mode, form) == ("LA", "GIF") else mode).save(path, form)
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(0, 12))
        picture.save(path, "JPEG", exif=exif.tobytes() + rng.bytes(int(rng.integers(0, 3))))
    elif kind == "size":
        picture.resize((picture.size[1], picture.size[0]) if rng.random() < 0.5 else (1, 1)).save(path, "PNG")
    elif kind == "16 bit":
        path.write_bytes(cv2.imencode(".png", np.asarray(picture).astype(np.uint16) * 257)[1].tobytes())
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()


def make_case(seed: int, folder: Path) -> Path:
    """Write a data set with one to three mistakes: FOLDER/annotations.json and FOLDER/images; gives the file's path."""
    rng = np.random.default_rng([0xF022, seed])
    made = as_format(content(images=5, seed=int(rng.integers(20))), rng.choice(["lvis_v1", "lvis_v0.5", "coco"]))
    names = [
        (i.get("file_name") or i["coco_url"].partition("org/")[2]).rpartition("COCO_val2014_")[2]
        for i in made["images"]
    ]
    for name, image in zip(names, made["images"], strict=True):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cv2.resize(coarse, (image["width"], image["height"])))
    kinds = rng.choice(["value", "value", "bytes", "image"], int(rng.integers(1, 4)))
    for _ in range(int((kinds == "value").sum())):
        made = change_value(made, rng)
    raw = json.dumps(made).encode()
    for _ in range(int((kinds == "bytes").sum())):
        raw = change_bytes(raw, rng)
    (folder / "annotations.json").write_bytes(raw)
    for name in rng.permutation(names)[: int((kinds == "image").sum())]:
        change_image(folder / "images" / name, rng)
    return folder / "annotations.json"
