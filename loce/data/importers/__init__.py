"""Importers of what annotation tools write, a file for each format; source.py has what they share.

Each gives the images with their objects in pixels, COCO's way (from 0, x, y, width, height), and notes on everything
that was left out or read otherwise than it is written. Nothing is changed in the source.
"""

from pathlib import Path

from loce.data.importers import coco, labelme, voc, yolo
from loce.data.importers.source import AnnotatedImage, Found, Instance, Rules, Source, cut_at_border
from loce.utils.errors import UserError

__all__ = ["FORMATS", "AnnotatedImage", "Found", "Instance", "Rules", "read_source"]

FORMATS = {"voc": voc, "yolo": yolo, "labelme": labelme, "coco": coco}


def read_source(path: Path, kind: str, rules: Rules) -> Found:
    """All images and objects of a file or folder. kind: one of FORMATS, or auto. UserError where nothing is found."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    source = Source(path, rules)
    kinds = [kind] if kind != "auto" else [name for name, module in FORMATS.items() if module.is_format(source)]
    if len(kinds) != 1:
        what = f"holds several formats: choose format={' or format='.join(kinds)}" if kinds else "holds no annotations"
        raise UserError(
            f"{path}: {what} (looked for Pascal VOC's XML, YOLO's data.yaml or classes.txt, LabelMe's and COCO's JSON; "
            "of CVAT and Label Studio export COCO)"
        )
    found = FORMATS[kinds[0]].read(source)
    if not found.pictures:
        found.notes.raise_all(str(path))
        raise UserError(f"{path}: no image with annotations in format {kinds[0]}")
    if not found.classes:  # the format has no list of them
        found.classes = sorted({instance.name for picture in found.pictures for instance in picture.instances})
    cut_at_border(found)
    return found
