"""Requirements of training and evaluation on an annotation file; check-data reports them in the same words."""

from collections.abc import Sequence

import numpy as np

from loce.data.annotations.lvis import LVISAnnotations, misplaced_text
from loce.data.annotations.plausible import MANY_MISPLACED, SINGLE
from loce.data.annotations.training_rows import BAD_BOX
from loce.utils.errors import first_few


def compared_types(annotations: LVISAnnotations, without_mask: str, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """ "bbox", "segm" or both: what is evaluated. wanted: the user's choice; () is both, but boxes alone where
    masks were not read, and where `data.without_mask` is box and some masks cannot be compared with."""
    if wanted:
        return tuple(wanted)
    boxes = not annotations.with_masks or (without_mask == "box" and annotations.bad_masks)
    return ("bbox",) if boxes else ("bbox", "segm")


def training_problems(annotations: LVISAnnotations, allow_misplaced: bool = False) -> list[str]:
    """What training refuses: masks that are not where their boxes are. Single bad annotations it leaves out."""
    odd = len(annotations.empty_masks) + len(annotations.misplaced)
    if allow_misplaced or odd <= max(SINGLE, MANY_MISPLACED * annotations.masks_compared):
        return []
    return [
        f"{annotations.path}: {misplaced_text(annotations)}. Mend the masks; data.allow_misplaced=true "
        "(allow_misplaced=true where there is no recipe) takes them as they are"
    ]


def evaluation_problems(
    annotations: LVISAnnotations,
    masks: bool = True,
    protocols: Sequence[str] = (),
    allow_misplaced: bool = False,
) -> list[str]:
    """What evaluation refuses, since it compares with every object. masks: masks are compared, too."""
    ids, problems = annotations.annotation_ids, []

    def refuse(number: int, what: str, named: str, compared: str, fix: str = "") -> None:
        told = f"{annotations.path}: {number} {what} (annotations {named})"
        problems.append(f"{told}: evaluation compares with every {compared}, so mend or remove them{fix}")

    box = np.isnan(annotations.xywh).any(axis=1)
    area = np.isnan(annotations.areas) & ~box
    with np.errstate(invalid="ignore"):
        negative = (annotations.xywh[:, 2:] < 0).any(axis=1) & ~box
    for rows, what in (
        (box, BAD_BOX),
        (negative, "boxes with negative width or height"),
        (area, "annotations whose area is not a number"),
    ):
        if rows.any():
            refuse(int(rows.sum()), what, first_few(ids[rows]), "object")
    boxes_alone = (
        ", or evaluate boxes alone: iou_types=bbox of scripts/evaluate.py, data.without_mask=box of a training; "
        "model.masks=false is a detector of boxes"
    )
    for reason, number in annotations.bad_masks.items() if masks else ():
        refuse(number, reason, first_few(annotations.first_ids(reason), number), "mask", boxes_alone)
    lacking = [name for name in protocols if name in ("lvis", "fixed", "pool")]
    if lacking and annotations.negatives is None:
        problems.append(
            f"{annotations.path}: has no neg_category_ids, which protocol {lacking[0]} needs; set eval.protocol=coco "
            "(or auto)"
        )
    return problems + (training_problems(annotations, allow_misplaced) if masks else [])
