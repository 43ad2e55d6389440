"""Stored regions of a detector on a set of images: their logits, from which calibrations are evaluated in seconds, or
their features, on which classification heads are trained (row_training.py).

A folder of files regions_NNNNNN.npz with some images each, in columns that any detector can write (docs/rows.md):

    source ()                    text: what the regions come from
    image_ids (I,)               int64, ids of the annotation file
    regions (I,)                 int32, how many each image has; they stand image after image, R in all
    boxes (R, 4) or (R, K, 4)    float32, x1, y1, x2, y2 in pixels of the original image; of a region, or by class
    logits (R, K)                float16 or float32, of K classes; of all C, in order, where `classes` is missing
    background (R,)              its logit; missing where scores are sigmoids
    classes (R, K)               int, labels of the logits, ascending: places in the file's list of categories
    rest (R,)                    float32, log of the sum of e^z over the classes left out; missing where none is
    features (R, D)              float16 or float32, what the classifier reads; they may stand in the place of `logits`
    labels (R,)                  int, of training images: places in the file's list of categories, C for background,
                                 -100 for neither; missing: by the IoU of `boxes` with the annotations

Legend: I images, R regions, K kept classes of C, L logits of the classifier, D features.
"""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loce.config import Config, EvalConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.loader import Batches, EvalDataset
from loce.evaluation.detections import Detections
from loce.models.detection import detect, detect_of_classes
from loce.models.mask_rcnn import MaskRCNN
from loce.utils import distributed
from loce.utils.errors import UserError
from loce.utils.files import atomic_write
from loce.utils.progress import progress

PATTERN = "regions_*.npz"
CHUNK = 100  # images of a file
FINITE = ("logits", "boxes", "features")
FLOATS = (*FINITE, "background", "rest")
NEVER = -1e4  # logit of a class that was left out, of sigmoids


@dataclass(frozen=True, kw_only=True)
class Regions:
    """The content of a file; `bounds` (I + 1,) cuts the regions into images, `classes` (R, K) is always there."""

    image_ids: np.ndarray
    bounds: np.ndarray
    boxes: Tensor
    logits: Tensor | None
    background: Tensor | None
    classes: Tensor
    rest: Tensor | None
    features: Tensor | None
    labels: Tensor | None
    num_classes: int

    @cached_property
    def whole_logits(self) -> Tensor:
        """(R, C + 1), background last, or (R, C) for sigmoids, fp32; what was left out shares `rest` evenly."""
        assert self.logits is not None
        left_out = self.num_classes - self.logits.shape[1]
        z_RC = self.logits.new_full((len(self.logits), self.num_classes), NEVER)
        if left_out and self.rest is not None:
            z_RC[:] = (self.rest - np.log(left_out))[:, None]
        z_RC.scatter_(1, self.classes, self.logits)
        return z_RC if self.background is None else torch.cat([z_RC, self.background[:, None]], dim=1)

    def scores(self, calibrated: Callable[[Tensor], Tensor]) -> Tensor:
        """(R, K) scores of the kept classes, by `calibrated`: logits -> scores of all classes."""
        return calibrated(self.whole_logits).gather(1, self.classes)

    def detections(
        self,
        scores_RK: Tensor,
        options: EvalConfig,
        category_ids: np.ndarray,
        allowed: Callable[[int], np.ndarray] | None = None,
    ) -> Detections:
        """What inference finds in these images with these scores; category_ids: of each label.

        allowed: (C,) bool of an image, the classes that count there; all detections of these, with their ranks, as
        inference keeps them for protocols without a cap. None: the best detections of an image, of any class.
        """
        boxes_RK4 = self.boxes if self.boxes.dim() == 3 else self.boxes[:, None].expand(-1, scores_RK.shape[1], -1)
        found, ranks = [], []
        for image, *ends in zip(
            self.image_ids.tolist(), self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True
        ):
            rows = slice(*ends)
            boxes, scores, classes = boxes_RK4[rows], scores_RK[rows], self.classes[rows]
            own = detect(boxes, scores, options, classes)
            ranks.append(torch.arange(len(own[1])))
            if allowed is not None:
                these = (own, torch.from_numpy(allowed(image)), options)
                own, ranks[-1] = detect_of_classes(boxes, scores, *these, uncapped=True, classes_NC=classes)
            found.append(own)
        corners, best, labels = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        return Detections(
            image_ids=np.repeat(self.image_ids, [len(part[1]) for part in found]),
            category_ids=category_ids[labels],
            scores=best,
            boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
            ranks=torch.cat(ranks).numpy(),
        )


def read_regions(file: Path, num_classes: int, needs: str = "logits") -> Regions:
    """The regions of a file; UserError where it is not one, or lacks the column `needs`, with what is wrong."""
    try:
        with np.load(file, allow_pickle=False) as content:
            columns = {name: content[name] for name in content.files}
        known, boxes, counts = columns[needs], columns["boxes"], columns["regions"]
        image_ids = columns["image_ids"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: is no file of regions ({error}); docs/rows.md has its columns") from None
    rows, logits = len(boxes), columns.get("logits")
    of_all = (rows, num_classes)
    classes = columns.get("classes", np.broadcast_to(np.arange(num_classes), of_all))
    kept, labels = logits.shape if logits is not None else of_all, columns.get("labels", np.zeros(rows, np.int64))
    finite = {name: np.isfinite(columns[name]).all() for name in FINITE if name in columns}
    wrong = {
        f"{needs} are {known.shape}, not ({rows}, columns), a row for each of the boxes": known.shape[:1] != (rows,)
        or known.ndim != 2,
        f"regions add up to {counts.sum()}, boxes have {rows} rows": counts.sum() != rows,
        f"image_ids are {image_ids.shape}, regions {counts.shape}": image_ids.shape != counts.shape,
        f"boxes are {boxes.shape}": boxes.shape not in ((rows, 4), (*kept, 4)),
        f"classes are {classes.shape}, logits {kept}; without classes there is a logit of each of the "
        f"{num_classes}": classes.shape != kept,
        f"classes go up to {classes.max(initial=0)} of {num_classes}": classes.max(initial=0) >= num_classes,
        f"labels are {labels.shape}": labels.shape != (rows,),
        f"labels go up to {labels.max(initial=0)}, the background's is {num_classes}": labels.max(initial=0)
        > num_classes,
        f"{', '.join(name for name, is_finite in finite.items() if not is_finite)} are not finite": not all(
            finite.values()
        ),
    }
    if problems := [what for what, is_wrong in wrong.items() if is_wrong]:
        raise UserError(f"{file}: {'; '.join(problems)}")
    float32 = {name: torch.from_numpy(columns[name]).float() for name in FLOATS if name in columns}
    return Regions(
        image_ids=image_ids,
        bounds=np.append(0, np.cumsum(counts)),
        boxes=float32["boxes"],
        logits=float32.get("logits"),
        background=float32.get("background"),
        classes=torch.from_numpy(classes.astype(np.int64)),
        rest=float32.get("rest"),
        features=float32.get("features"),
        labels=torch.from_numpy(labels.astype(np.int64)) if "labels" in columns else None,
        num_classes=num_classes,
    )


def store_regions(
    model: MaskRCNN,
    config: Config,
    annotations: LVISAnnotations,
    images: str,
    indices: Sequence[int],
    folder: Path,
    source: str,
    most: tuple[int, int],
    sigmoid: bool = False,
) -> list[Path]:
    """The files of regions of the images `indices`, in `folder`; written by all ranks where they are not there.

    images: their folder; source: what the regions depend on, files of another source are replaced; most: regions of an
    image, those with the largest odds of any class against the background, and classes of a region, the largest logits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dataset, model = EvalDataset(annotations, Path(images), config.data), model.eval()
    parts = {
        folder / f"regions_{n:06d}.npz": indices[i : i + CHUNK] for n, i in enumerate(range(0, len(indices), CHUNK))
    }
    mine = [file for file in list(parts)[distributed.rank() :: distributed.world_size()] if _source(file) != source]
    size = config.eval.batch_size
    todo = [list(parts[file][i : i + size]) for file in mine for i in range(0, len(parts[file]), size)]
    batches = iter(
        progress(Batches(dataset, todo, len(todo), config.data.workers), len(todo), f"regions {folder.name}")
    )
    for file in mine:
        rows: list[dict[str, Tensor]] = []
        ids: list[int] = []
        while len(ids) < len(parts[file]):
            samples = next(batches)
            found = model.regions([s["image"] for s in samples], [s["scale"] for s in samples])
            rows += [keep(boxes_NC4, logits_NL, most, sigmoid) for boxes_NC4, logits_NL in found]
            ids += [s["image_id"] for s in samples]
        columns = {name: torch.cat([row[name] for row in rows]).cpu().numpy() for name in rows[0]}
        counts = np.array([len(row["logits"]) for row in rows], np.int32)
        with atomic_write(file) as temporary:
            columns |= {"source": np.array(source), "image_ids": np.array(ids), "regions": counts}
            np.savez(temporary, **columns)  # type: ignore[arg-type]
    next(batches, None)  # ends the line of progress
    distributed.barrier()
    return list(parts)


def keep(boxes_NC4: Tensor, logits_NL: Tensor, most: tuple[int, int], sigmoid: bool = False) -> dict[str, Tensor]:
    """The columns of an image, see above, of at most so many regions and classes; both stay in their order."""
    classes = boxes_NC4.shape[1]
    z_NC = logits_NL[:, :classes].float()
    odds_N = z_NC.logsumexp(dim=1) - (0 if sigmoid else logits_NL[:, -1].float())
    rows_R = odds_N.topk(min(most[0], len(odds_N))).indices.sort().values
    z_RC = z_NC[rows_R]
    classes_RK = z_RC.topk(min(most[1], classes), dim=1).indices.sort(dim=1).values
    columns = {
        "boxes": boxes_NC4[rows_R[:, None], classes_RK].float(),
        "logits": z_RC.gather(1, classes_RK).half(),
        "classes": classes_RK.to(torch.int16 if classes < 2**15 else torch.int32),
    }
    if not sigmoid:
        columns["background"] = logits_NL[rows_R, -1].half()
        if classes_RK.shape[1] < classes:
            columns["rest"] = z_RC.scatter(1, classes_RK, -torch.inf).logsumexp(dim=1)
    return columns


def _source(file: Path) -> str:
    """What a file of regions comes from; "" where it is not there or damaged."""
    try:
        with np.load(file, allow_pickle=False) as content:
            return str(content["source"])
    except Exception:  # zipfile, zlib and NumPy raise half a dozen kinds
        return ""
