"""Importer of Pascal VOC: an XML file an image; boxes count from 1 and hold their last pixel."""

from pathlib import Path
from xml.etree import ElementTree

from loce.data.importers.source import Found, Instance, Source, number_in
from loce.utils.errors import UserError

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def is_format(source: Source) -> bool:
    """Whether an XML file of VOC is there. UserError for CVAT's own XML."""
    return any(_root(file) is not None for file in source.with_suffix(".xml"))


def read(source: Source) -> Found:
    """Images and objects: xmin 1, xmax 10 is x 0, width 10, where no coordinate of the set is 0."""
    found, boxes = Found("voc"), []
    for file in source.with_suffix(".xml"):
        if (root := _root(file)) is None:
            found.notes.add("XML files left out: broken, or no <annotation>", str(file))
            continue
        name = (root.findtext("filename") or file.stem).strip()
        size = [number_in(root.findtext(f"size/{side}")) for side in ("width", "height")]
        if (picture := source.annotated((name, file.stem), file, size, found)) is None:
            continue
        for element in root.findall("object"):
            label = (element.findtext("name") or "").strip()
            corners = [number_in(element.findtext(f"bndbox/{side}")) for side in CORNERS]
            x1, y1, x2, y2 = (side or 0 for side in corners)
            if not label or None in corners:
                where = f"{file} ({label or 'no name'})"
                found.notes.add("objects left out: no name, or no box of four numbers", where)
                continue
            if (element.findtext("difficult") or "").strip() == "1":
                found.notes.add("objects are marked as difficult: kept like others", f"{file} ({label})")
            instance = Instance(label, [min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1)])
            outline = [number_in(child.text) for child in element.findall("polygon/*")]
            if len(outline) >= 6 and len(outline) % 2 == 0 and None not in outline:
                instance.mask = [[side or 0 for side in outline]]
            boxes.append(instance)
            picture.instances.append(instance)
    # One set counts in one way: a coordinate of 0 tells that it counts from 0, to the border.
    lowest = min((min(instance.box[:2]) for instance in boxes), default=1)
    from_zero = source.rules.first_pixel == "0" or (source.rules.first_pixel == "auto" and lowest < 1)
    how = "begin at 0 (a coordinate is 0) and end at the border"
    if not from_zero:
        how = "begin at 1 and hold their last pixel"
        for instance in boxes:
            x, y, width, height = instance.box
            instance.box = [x - 1, y - 1, width + 1, height + 1]
    if boxes:
        found.notes.add(f"boxes {how}; first_pixel=0 or 1 says otherwise", str(source.path), len(boxes))
    if any("SegmentationObject" in file.parts for file in source.images):
        found.notes.add("pictures in SegmentationObject are not read: objects have boxes alone", "its masks")
    return found


def _root(file: Path) -> ElementTree.Element | None:
    """The root of VOC's XML; None of any other file."""
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError):
        return None
    if root.tag == "annotations" and root.find("image") is not None:
        raise UserError(f"{file}: is CVAT's own XML; export the task as COCO 1.0")
    return root if root.tag == "annotation" else None
