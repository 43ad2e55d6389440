"""Make one COCO-style file of what an annotation tool wrote: Pascal VOC, YOLO, LabelMe, COCO of CVAT, Roboflow, ...

python scripts/import_data.py SOURCE OUT [split=0.1] [merge=[vehicle:car+truck]] [drop=[other]] [key=value ...]
SOURCE: the folder with annotations and images, or one file. OUT: a folder for annotations.json (or, of a split,
train.json and val.json) and import.txt, the report. Images stay where they are, and nothing in SOURCE is changed.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loce.config import UserError, read_options, run_script
from loce.utils.files import require_writable, write_text
from loce.utils.options import Decay, Natural

USAGE = "usage: import_data.py SOURCE OUT [split=0.1] [key=value ...]"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Import annotations."""

    format: Literal["auto", "voc", "yolo", "labelme", "coco"] = "auto"  # of SOURCE
    split: Decay = 0.0  # share of the images for val.json, of every class about so much; 0: one file
    seed: Natural = 0  # of the split
    merge: tuple[str, ...] = ()  # new:old+old, as [vehicle:car+truck]; classes that become one
    drop: tuple[str, ...] = ()  # classes that are left out, with their objects
    first_pixel: Literal["auto", "0", "1"] = "auto"  # VOC's first coordinate; auto: 1, but 0 where a box begins at 0
    rotated: Literal["refuse", "polygon"] = "refuse"  # turned boxes of CVAT; polygon: the turned rectangle is the mask
    exif: Literal["ignore", "apply"] = "ignore"  # apply: photos were annotated as EXIF turns them (data.exif=apply)


def merged(words: tuple[str, ...]) -> dict[str, str]:
    """Old name -> new name of merge=[new:old+old]. UserError for words of another form."""
    pairs: dict[str, str] = {}
    for word in words:
        new, colon, old = word.partition(":")
        if not colon or not new.strip() or not old.strip():
            raise UserError(f"command line: merge = {word}: must be new:old+old, such as vehicle:car+truck")
        pairs |= {name.strip(): new.strip() for name in old.split("+")}
    return pairs


def main() -> None:
    names = [word for word in sys.argv[1:] if not word.startswith("-") and ("=" not in word or Path(word).exists())]
    options = read_options(Options, [word for word in sys.argv[1:] if word not in names])
    if len(names) != 2:
        raise UserError(USAGE)
    source, output = Path(names[0]), Path(names[1])
    merge = merged(options.merge)
    if output.resolve() == source.resolve():
        raise UserError(f"{output}: is the source itself, where nothing is written; choose another OUT")
    require_writable(output, "; choose another OUT")

    from loce.data.import_set import change_classes, coco_content, report_lines, split_pictures
    from loce.data.importers import Rules, read_source

    # Read, change classes, split.
    found = read_source(source, options.format, Rules(options.first_pixel, options.rotated, options.exif))
    change_classes(found, merge, options.drop)
    lines, parts = report_lines(found), {"annotations": found.pictures}
    if options.split:
        chosen, told = split_pictures(found.pictures, options.split, options.seed)
        lines += told
        sides = {"train": False, "val": True}
        parts = {n: [p for p, v in zip(found.pictures, chosen, strict=True) if v is side] for n, side in sides.items()}
    # Write, and say what comes next.
    root = source if source.is_dir() else source.parent
    for name, pictures in parts.items():
        write_text(output / f"{name}.json", json.dumps(coco_content(pictures, found.classes, root)) + "\n")
        lines.append(
            f"wrote {output / name}.json: {len(pictures)} images, {sum(len(p.instances) for p in pictures)} objects"
        )
    files = " ".join(f"{output / name}.json" for name in parts)
    recipe = f" recipe={output.name}.yaml" if options.split else ""
    exif = " data.exif=apply" if options.exif == "apply" else ""
    lines.append(f"next: python scripts/check_data.py {files} images={root}{recipe}{exif}")
    write_text(output / "import.txt", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main)
