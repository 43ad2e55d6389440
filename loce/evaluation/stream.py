"""Detections on disk, written in chunks by every rank: a killed inference loses at most one chunk a rank.

Beside them stand tables of what else inference saw of an image, as columns NAME_*: near misses (NEAR_MISSES, the name
that they had when the first such files were written) and the true boxes' classification.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loce.evaluation.detections import Detections, Masks, concatenate, offsets_of
from loce.utils.errors import UserError, first_few
from loce.utils.files import atomic_write
from loce.utils.progress import watched

PATTERN = "detections_*.npz"
NEAR_MISSES, TRUE_BOXES = TABLES = "clue", "true"
Table = Mapping[str, np.ndarray]  # columns of one length


class DetectionWriter:
    """Writes one rank's detections to `folder` in chunks of `chunk_images` images; use it as a context manager.

    `source` says what the detections come from (checkpoint and data); a folder that already holds chunks of another
    source is refused with UserError, so that two models are never mixed. With several ranks call `finished()` on all of
    them before any rank adds anything (a barrier), so that all share out the same remaining images.
    """

    def __init__(self, folder: str | Path, rank: int = 0, source: str = "", chunk_images: int = 100):
        self.folder, self.rank, self.source, self.chunk_images = Path(folder), rank, source, chunk_images
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pending: list[tuple[int, tuple[int, int], np.ndarray, np.ndarray, np.ndarray, Any, Any]] = []
        self._tables: list[Mapping[str, Table]] = []  # of pending images
        self._finished: set[int] = set()
        for path in chunk_paths(folder):
            with _open_chunk(path) as chunk:
                if str(chunk["source"]) != source:
                    raise UserError(
                        f"{path}: holds detections of {str(chunk['source'])!r}, not of {source!r}; "
                        "choose another output folder or delete this one"
                    )
                self._finished |= set(chunk["image_ids"].tolist())
        used = [int(path.stem.split("_")[-1]) for path in self.folder.glob(f"detections_{rank:04d}_*.npz")]
        self._next = max(used, default=-1) + 1

    def finished(self) -> np.ndarray:
        """Image ids (int64, ascending) that are safely on disk, of all ranks at the time this writer was made, and
        this rank's own since; images without detections count too."""
        return np.array(sorted(self._finished), dtype=np.int64)

    def add(
        self,
        image_id: int,
        boxes_xyxy: Any,
        scores: Any,
        category_ids: Any,
        rles: list[bytes] | None = None,
        size: tuple[int, int] | None = None,
        tables: Mapping[str, Table] | None = None,
        ranks: Any = None,
    ) -> None:
        """All detections of one image: boxes (N, 4) x1, y1, x2, y2 in px of the original image, scores (N,), the
        file's category ids (N,) (not labels), optionally N compressed RLE counts over an image of `size` (height,
        width). Arrays or CPU tensors. An image without detections is added with N = 0. tables: what else was seen, of
        TABLES; an image of which nothing was seen has empty columns. ranks (N,): how many better detections the image
        had, those of categories that were left out included; None: none were left out."""
        corners = np.asarray(boxes_xyxy, dtype=np.float32).reshape(-1, 4)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        score, category = np.asarray(scores, dtype=np.float32), np.asarray(category_ids, dtype=np.int32)
        if not len(boxes) == len(score) == len(category) or (rles is not None and len(rles) != len(boxes)):
            raise ValueError(f"image {image_id}: {len(boxes)} boxes, {len(score)} scores, {len(category)} categories")
        if rles is not None and size is None:
            raise ValueError(f"image {image_id}: masks need the size (height, width) of their image")
        ranks = None if ranks is None else np.asarray(ranks, dtype=np.int32)
        self._pending.append((int(image_id), size or (0, 0), boxes, score, category, rles, ranks))
        self._tables.append(tables or {})
        if len(self._pending) >= self.chunk_images:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one chunk."""
        if not self._pending:
            return
        # Masks and tables of all images, or of none.
        images, sizes, boxes, scores, categories, rles, ranks = zip(*self._pending, strict=True)
        has_masks = [r is not None for r in rles]
        if any(has_masks) != all(has_masks):
            raise ValueError("some images were added with masks and others without")
        names = self._tables[0].keys()
        if any(tables.keys() != names for tables in self._tables):
            raise ValueError("some images were added with near misses or true boxes and others without")
        # Flat columns; per_image and rle_lengths cut them again.
        flat = [counts for image in rles for counts in image or ()]
        chunk = {
            "source": np.array(self.source),
            "image_ids": np.array(images, dtype=np.int64),
            "per_image": np.array([len(s) for s in scores], dtype=np.int32),
            "sizes": np.array(sizes, dtype=np.int32),
            "boxes": np.concatenate(boxes),
            "scores": np.concatenate(scores),
            "category_ids": np.concatenate(categories),
            "has_masks": np.array(all(has_masks)),
            "rle_lengths": np.array([len(counts) for counts in flat], dtype=np.int32),
            "rle_counts": np.frombuffer(b"".join(flat), dtype=np.uint8),
        }
        if all(r is not None for r in ranks):
            chunk["ranks"] = np.concatenate(ranks)
        for name in names:
            for column in self._tables[0][name]:
                chunk[f"{name}_{column}"] = np.concatenate([tables[name][column] for tables in self._tables])
        path = self.folder / f"detections_{self.rank:04d}_{self._next:06d}.npz"
        with atomic_write(path) as temporary:
            np.savez(temporary, **chunk)  # type: ignore[arg-type]
        self._finished |= set(images)
        self._next, self._pending, self._tables = self._next + 1, [], []

    def __enter__(self) -> "DetectionWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush()  # also on the way out of an error: these images are done


def chunk_paths(folder: str | Path) -> list[Path]:
    """The chunks of all ranks in `folder`."""
    return sorted(Path(folder).glob(PATTERN))


def _open_chunk(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and run the inference again") from None


def read_detections(folder: str | Path, expected_image_ids: Iterable[int]) -> Detections:
    """Every rank's detections, ordered by image id, so that the result does not depend on the number of ranks.

    Raises UserError when one of `expected_image_ids` is missing (inference did not finish) and ValueError when an image
    was predicted twice or was not expected.
    """
    images: dict[int, Detections] = {}
    repeated: list[int] = []
    paths = chunk_paths(folder)
    for path in watched(paths, len(paths), f"reading {folder}", "chunks"):
        with _open_chunk(path) as chunk:
            for image, part in _by_image(chunk):
                repeated += [image] if image in images else []
                images[image] = part
    if not paths:
        raise UserError(f"{folder}: is no folder of detections of loce (no {PATTERN} in it){_meant_instead(folder)}")
    expected = {int(image) for image in expected_image_ids}
    if repeated:
        raise ValueError(f"{folder}: images that were predicted more than once: {first_few(repeated)}")
    if unexpected := sorted(images.keys() - expected):
        raise ValueError(f"{folder}: images that are not in the data set: {first_few(unexpected)}")
    if missing := sorted(expected - images.keys()):
        raise UserError(
            f"{folder}: {len(missing)} of {len(expected)} images have no predictions yet: {first_few(missing)}; "
            "run the same command again, it goes on where it stopped"
        )
    return concatenate([images[image] for image in sorted(images)])


def _meant_instead(folder: str | Path) -> str:
    """Results in a folder that somebody else has written, or folders of detections below it, as a hint."""
    below = {path.parent for path in Path(folder).rglob(PATTERN)}
    files = [path for path in Path(folder).rglob("*.json") if _may_be_results(path)]
    found = [*sorted(below), *sorted(files)]
    return f"; did you mean results={first_few(found, between=' or results=')}?" if found else ""


def _may_be_results(path: Path) -> bool:
    """Whether a file that can be read begins as a list of results."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except OSError:
        return False
    return head.lstrip()[:1] == b"[" and (b'"image_id"' in head or b'"file"' in head)


def read_table(folder: str | Path, name: str) -> dict[str, np.ndarray] | None:
    """Every rank's rows of one of TABLES, or None where inference left none for some of its images."""
    parts = []
    for path in chunk_paths(folder):
        with _open_chunk(path) as chunk:
            parts.append({key.partition("_")[2]: chunk[key] for key in chunk.files if key.startswith(f"{name}_")})
    if not parts or not all(parts):
        return None
    return {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}


def _by_image(chunk: Any) -> Iterator[tuple[int, Detections]]:
    """(image id, its detections) of one chunk."""
    column = {key: chunk[key] for key in chunk.files if not key.startswith(TABLES)}
    rows = offsets_of(column["per_image"])
    ends = offsets_of(column["rle_lengths"])
    for n, image in enumerate(column["image_ids"].tolist()):
        s, e = rows[n], rows[n + 1]
        masks = None
        if column["has_masks"]:
            masks = Masks(
                counts=column["rle_counts"][ends[s] : ends[e]],
                offsets=ends[s : e + 1] - ends[s],
                sizes=np.repeat(column["sizes"][n : n + 1], e - s, axis=0),
            )
        own = Detections(
            image_ids=np.full(e - s, image, dtype=np.int64),
            category_ids=column["category_ids"][s:e].astype(np.int64),
            scores=column["scores"][s:e],
            boxes=column["boxes"][s:e],
            masks=masks,
            ranks=column["ranks"][s:e] if "ranks" in column else None,
        )
        yield image, own
