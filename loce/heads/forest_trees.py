"""Class trees of Forest R-CNN (ACM MM 2020), Sec. 3.1: their file, and the k-means that makes them. Imports no torch.

A tree puts every class under one of P parents: (C,) int64 in 0..P-1, every parent with one class at least. The file
(JSON) holds the trees of one data set, with its class names and the hash of its annotation file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loce.utils.errors import UserError, raise_problems
from loce.utils.files import file_hash, write_text

FORMAT = 1
RESTARTS = 10


def k_means(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """(C,) the cluster, 0..k-1, of each point (C, F): Lloyd's algorithm from k-means++ starts, the best of ten.

    Clusters are numbered in the order of their first point, and none is empty: one that loses its last point takes the
    point farthest from its own centre. The same for the same seed. ValueError where clusters outnumber points.
    """
    if clusters > len(points):
        raise ValueError(f"{clusters} clusters of {len(points)} points")
    generator = np.random.default_rng(seed)
    runs = [_lloyd(points, _far_apart(points, clusters, generator)) for _ in range(RESTARTS)]
    owner = min(runs, key=lambda run: run[1])[0]
    _, first = np.unique(owner, return_index=True)
    return np.argsort(np.argsort(first))[owner]


def squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(C, k) from points (C, F) to centres (k, F)."""
    return np.stack([((points - centre) ** 2).sum(axis=1) for centre in centres], axis=1)


def _far_apart(points: np.ndarray, clusters: int, generator: np.random.Generator) -> np.ndarray:
    """(k, F) points to start from: each next one with probability ~ its squared distance to those before."""
    chosen = [int(generator.integers(len(points)))]
    while len(chosen) < clusters:
        nearest = squared_distances(points, points[chosen]).min(axis=1)
        nearest[chosen] = 0
        total = nearest.sum()
        left = np.setdiff1d(np.arange(len(points)), chosen)  # for points that are all alike
        chosen.append(int(generator.choice(len(points), p=nearest / total) if total > 0 else left[0]))
    return points[chosen]


def _lloyd(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, float]:
    """(C,) cluster of each point when nothing moves any more, and the sum of squared distances to the centres."""
    owner = np.full(len(points), -1)
    while True:
        distances = squared_distances(points, centres)
        nearest = distances.argmin(axis=1)
        for empty in np.setdiff1d(np.arange(len(centres)), nearest):
            own = distances[np.arange(len(points)), nearest]
            own[np.bincount(nearest, minlength=len(centres))[nearest] == 1] = -1  # takes no other's last point
            nearest[own.argmax()] = empty
        if (nearest == owner).all():
            return owner, float(distances[np.arange(len(points)), owner].sum())
        owner = nearest
        centres = np.stack([points[owner == cluster].mean(axis=0) for cluster in range(len(centres))])


def write_trees(
    path: Path,
    annotations: Path | str,
    names: Sequence[str],
    trees: Mapping[str, np.ndarray],
    made: Mapping[str, str],
) -> None:
    """Write trees, tree name -> (C,), of the classes `names` of an annotation file; made: how each was."""
    content = {
        "format": FORMAT,
        "annotations": str(annotations),
        "sha256": file_hash(annotations),
        "made": dict(made),
        "trees": {tree: parents.tolist() for tree, parents in trees.items()},
        "classes": list(names),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_trees(
    path: Path,
    annotations: Path | str,
    names: Sequence[str],
    sizes: Mapping[str, int],
) -> dict[str, np.ndarray]:
    """The trees (C,) int64 named in `sizes`, which have so many parents each.

    UserError, with everything that does not fit: no such file, none of ours, made for other annotations or classes,
    trees that lack or have another number of parents.
    """
    content = _read(path)
    problems = []
    if content["sha256"] != file_hash(annotations):
        problems.append(f"{path}: made for {content['annotations']}, whose content is not that of {annotations}")
    if content["classes"] != list(names):
        problems.append(f"{path}: its {len(content['classes'])} classes are not the {len(names)} of the training data")
    for tree, parents in sizes.items():
        found = content["trees"].get(tree)
        if found is None:
            problems.append(f"{path}: has no {tree} tree, only {', '.join(content['trees']) or 'none'}")
        elif len(found) != len(content["classes"]) or set(found) != set(range(parents)):
            number = len(set(found))
            problems.append(f"{path}: its {tree} tree has {number} parents, head.forest.{tree} says {parents}")
    if problems:
        problems.append("  build them anew: python scripts/build_forest.py config=CONFIG checkpoint=STAGE1")
    raise_problems(problems)
    return {tree: np.array(content["trees"][tree], np.int64) for tree in sizes}


def _read(path: Path) -> dict[str, Any]:
    keys = {"format", "annotations", "sha256", "classes", "trees"}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"head.forest.trees = {path}: there is no such file; build it: "
            "python scripts/build_forest.py config=CONFIG checkpoint=STAGE1"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"head.forest.trees = {path}: cannot be read ({error})") from error
    if not isinstance(content, dict) or not keys <= set(content) or content["format"] != FORMAT:
        raise UserError(f"head.forest.trees = {path}: is no file of scripts/build_forest.py, format {FORMAT}")
    return content
