"""Validation images with what they hold and what each run finds, drawn, as data URIs for the page."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from loce.data.annotations.lvis import LVISAnnotations
from loce.engine.pictures import RULE, comparisons
from loce.evaluation.stream import read_detections
from loce.report.reading import Run
from loce.utils.errors import UserError

QUALITY = 85  # of JPEG
Pictures = dict[str, dict[str, str]]  # image -> caption -> data URI


def pictures(runs: Sequence[Run], count: int) -> tuple[Pictures, list[str]]:
    """At most `count` images, those with rare classes first, and notes on what is not drawn and why."""
    if not count:
        return {}, []
    able = [run for run in runs if any((run.folder / "eval/detections").glob("*.npz"))]
    notes = [f"{run.title}: no stored detections (eval/detections)" for run in runs if run not in able]
    if not able:
        return {}, notes
    first = able[0]
    path, images = str(first.facts.get("annotations")), str(first.option("data", "val_images"))
    same = [run for run in able if run.facts.get("annotations") == path]
    notes += [f"{run.title}: was evaluated on other data" for run in able if run not in same]
    try:
        annotations = LVISAnnotations.open(path, keep_empty=True)
        found = {run.title: read_detections(run.folder / "eval/detections", annotations.image_ids) for run in same}
        classes = dict(zip(first.classes.ids, zip(first.classes.names, first.classes.groups, strict=True), strict=True))
        drawn = comparisons(annotations, images, found, classes, count)
        return {name: {k: _uri(picture) for k, picture in row.items()} for name, row in drawn}, [*notes, RULE]
    except UserError as error:
        here = "paths are relative to where the runs were started: start the report there, too"
        return {}, [*notes, f"Not drawn: {error} ({here})"]


def _uri(picture: np.ndarray) -> str:
    """A picture as a data URI."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
