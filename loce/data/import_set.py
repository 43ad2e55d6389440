"""A clean COCO-style file, or two, from what importers.py found: classes merged or dropped, a split by class.

Near-duplicates stay on one side: frames of a video and copies that an augmentation made have names with one beginning.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from loce.data.importers import AnnotatedImage, Found, Instance
from loce.utils.errors import UserError, first_few

TAIL = re.compile(r"(\.rf\.[0-9a-f]{8,}|_(jpe?g|png|bmp))$", re.IGNORECASE)  # what Roboflow adds to a name


def change_classes(found: Found, merge: Mapping[str, str], drop: Sequence[str]) -> None:
    """Rename and remove classes. merge: old name -> new one. UserError for names that are none of the classes."""
    unknown = [name for name in (*merge, *drop) if name not in found.classes]
    if unknown:
        raise UserError(f"merge, drop: {first_few(unknown)}: none of the classes {', '.join(found.classes)}")
    for picture in found.pictures:
        kept = [instance for instance in picture.instances if instance.name not in drop]
        for instance in (instance for instance in picture.instances if instance.name in drop):
            found.notes.add(f"objects of the dropped class {instance.name}", picture.file.name)
        for instance in kept:
            if instance.name in merge:
                found.notes.add(f"objects of {instance.name} became {merge[instance.name]}", picture.file.name)
                instance.name = merge[instance.name]
        picture.instances = kept
    found.classes = list(dict.fromkeys(merge.get(name, name) for name in found.classes if name not in drop))
    if not found.classes:
        raise UserError("drop: no class is left")


def video_of(file: Path) -> str:
    """What frames of one video, and copies of one photo, have in common: the path without its last number.

    clip/frame_0012.jpg -> clip/frame_; cat_7_jpg.rf.0a1b2c3d4e.jpg -> cat_.
    """
    stem = file.stem
    while (shorter := TAIL.sub("", stem)) != stem:
        stem = shorter
    return str(file.with_name(re.sub(r"\d+$", "", stem) or "#"))


def split_pictures(pictures: Sequence[AnnotatedImage], share: float, seed: int) -> tuple[list[bool], list[str]]:
    """Which pictures are for validation, and lines on what was done.

    Groups of one `video_of` go to one side, unless one alone is larger than the share: then it is no video but how the
    camera counts. Rarest class first, every class gets about `share` of its images into validation, at least one image,
    and keeps at least one for training, where it has two groups or more (iterative stratification, Sechidis 2011).
    """
    rng = np.random.default_rng(seed)
    sizes = Counter(video_of(picture.file) for picture in pictures)
    most = max(1, share * len(pictures))
    names = [video_of(p.file) if sizes[video_of(p.file)] <= most else str(p.file) for p in pictures]
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name, []).append(index)
    shown = {
        name: Counter(c for i in own for c in {instance.name for instance in pictures[i].instances})
        for name, own in groups.items()
    }
    images = sum(shown.values(), Counter[str]())
    of_class = {c: [name for name in groups if c in shown[name]] for c in images}
    side: dict[str, bool] = {}
    for c in sorted(of_class, key=lambda c: (len(of_class[c]), c)):
        wanted = max(1.0, share * images[c])
        there = float(sum(shown[name][c] for name in of_class[c] if side.get(name)))
        free = [name for name in of_class[c] if name not in side]
        trained = any(side.get(name) is False for name in of_class[c])
        for place, n in enumerate(rng.permutation(len(free))):
            last = not trained and place == len(free) - 1  # else the class had no image in training
            # Into validation while that brings it nearer to what is wanted.
            side[free[n]] = not last and there + shown[free[n]][c] / 2 <= wanted
            there += shown[free[n]][c] * side[free[n]]
            trained |= not side[free[n]]
    empty = [name for name in groups if name not in side]
    for place, n in enumerate(rng.permutation(len(empty))):
        side[empty[n]] = place < round(share * len(empty))
    chosen = [side[name] for name in names]
    # What was done, and what could not be.
    several = [own for own in groups.values() if len(own) > 1]
    lines = [
        f"split: {len(chosen) - sum(chosen)} images to train, {sum(chosen)} to val (seed {seed}); {len(several)} "
        f"groups of like names ({sum(map(len, several))} images) stay together"
    ]
    large = [name for name, size in sizes.items() if size > most]
    if large:
        lines.append(
            f"split: more images than val's share begin with {first_few(large)}: taken one by one, not as a video"
        )
    for name, lacking in (("val", True), ("train", False)):
        without = [c for c in of_class if not any(side[group] is lacking for group in of_class[c])]
        if without:
            lines.append(f"split: no image in {name}: {first_few(without)} (in one image or group alone)")
    return chosen, lines


def coco_content(pictures: Sequence[AnnotatedImage], classes: Sequence[str], root: Path) -> dict[str, Any]:
    """The file as a dict: ids from 1, file names below `root`, areas in px^2 of the masks, else of the boxes."""
    ids = {name: number for number, name in enumerate(classes, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures, 1):
        name = picture.file.relative_to(root).as_posix()
        images.append({"id": number, "file_name": name, "width": picture.width, "height": picture.height})
        for instance in picture.instances:
            row: dict[str, Any] = {"id": len(annotations) + 1, "image_id": number, "category_id": ids[instance.name]}
            row |= {"bbox": instance.box, "area": _area(instance, picture), "iscrowd": int(instance.crowd)}
            annotations.append(row | ({"segmentation": instance.mask} if instance.mask else {}))
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _area(instance: Instance, picture: AnnotatedImage) -> float:
    if not instance.mask:
        return round(instance.box[2] * instance.box[3], 3)
    code: Any = instance.mask
    if isinstance(code, list):
        code = coco_mask.merge(coco_mask.frPyObjects(code, picture.height, picture.width))
    elif isinstance(code["counts"], list):
        code = coco_mask.frPyObjects(code, picture.height, picture.width)
    return float(coco_mask.area(code))


def report_lines(found: Found) -> list[str]:
    """What was read, what became of the rest, and classes that hold nothing."""
    instances = [instance for picture in found.pictures for instance in picture.instances]
    counts = Counter(instance.name for instance in instances)
    masks = sum(bool(instance.mask) for instance in instances)
    empty = [name for name in found.classes if not counts[name]]
    without = sum(not picture.instances for picture in found.pictures)
    shown = ", ".join(f"{name} {counts[name]}" for name in found.classes)
    lines = [
        f"format {found.format}: {len(found.pictures)} images ({without} without objects), {len(instances)} objects, "
        f"{masks} of them with masks, {len(found.classes)} classes: {shown}",
        *(
            f"{count} {kind}: {first_few(found.notes.examples[kind], count)}"
            for kind, count in found.notes.counts.items()
        ),
    ]
    if empty:
        lines.append(f"classes without an object: {', '.join(empty)}; leave them out by 'drop=[{', '.join(empty)}]'")
    if 0 < masks < len(instances):
        lines.append(
            f"{len(instances) - masks} objects have boxes alone: data.without_mask=box takes the filled box as mask"
        )
    elif not masks:
        lines.append("there are no masks: model.masks=false in recipes and check-data (a Faster R-CNN)")
    return lines
