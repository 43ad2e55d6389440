"""Draw what a trained model finds: python scripts/predict.py CHECKPOINT IMAGE_OR_FOLDER ... [key=value ...].

Writes every image with masks, names and scores, coloured by how frequent a class was in training, and predictions.json
with all detections.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loce.config import UserError, raise_problems, read_options, run_script
from loce.utils.options import Count, Fraction, Share

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2", ".avif")
USAGE = "usage: predict.py CHECKPOINT IMAGE_OR_FOLDER ... [key=value ...]"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw the detections of a checkpoint (run folder or file) on images (files or folders)."""

    output: str = "predictions"  # folder for the pictures and predictions.json
    threshold: Fraction = 0.3  # lowest score that is drawn; predictions.json has all detections
    most: Count = 50  # objects drawn in an image, the best
    overlap: Share = 0.7  # of two boxes that overlap more, whatever their classes, the better is drawn
    device: Literal["auto", "cpu", "cuda"] = "auto"


def image_files(names: list[str]) -> list[Path]:
    """The images meant by files and folders (searched through). UserError with every name that means none."""
    found, problems = [], []
    for name in names:
        path = Path(name)
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not path.exists():
            problems.append(f"{name}: there is no such file or folder")
        elif not inside:
            problems.append(f"{name}: no image in this folder (looked for {', '.join(SUFFIXES)})")
        found += inside
    raise_problems(problems)
    return found


def pictures(files: list[Path], output: Path) -> dict[Path, Path]:
    """Where each image's picture goes: below `output`, by the path below the folder that holds them all."""
    root = Path(*_common([file.resolve().parent.parts for file in files]))
    return {file: (output / file.resolve().relative_to(root)).with_suffix(file.suffix + ".png") for file in files}


def _common(paths: list[tuple[str, ...]]) -> list[str]:
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared


def detections(
    model: Any,
    files: list[Path],
    scale_16bit: str,
    bad: list[str],
) -> Iterator[tuple[Path, Any, dict[str, Any]]]:
    """(file, image, what was found) of every image that can be read; messages on the others go into `bad`."""
    import torch

    from loce.data.transforms import ImageError, read_image
    from loce.utils.progress import progress

    for file in progress(files, len(files), "predicting", "images"):
        try:
            image = read_image(file, None, scale_16bit=scale_16bit)
        except ImageError as error:
            bad.append(str(error))
            continue
        yield file, image, model.detect_images([torch.from_numpy(image).permute(2, 0, 1)])[0]


def records(file: Path, image: Any, found: dict[str, Any], stats: Any, drawn: list[int]) -> Iterator[dict[str, Any]]:
    """An image's detections as predictions.json has them: COCO's fields, the file, the class's name, whether drawn."""
    height, width = image.shape[:2]
    for row, (box, score, label) in enumerate(zip(found["boxes"], found["scores"], found["labels"], strict=True)):
        x1, y1, x2, y2 = box.tolist()
        yield {
            "file": str(file),
            "category_id": int(stats.category_ids[label]),
            "name": stats.names[label],
            "group": str(stats.groups[label]),
            "score": round(float(score), 6),
            "bbox": [round(side, 2) for side in (x1, y1, x2 - x1, y2 - y1)],
            "segmentation": {"size": [height, width], "counts": found["rles"][row].decode()},
            "drawn": row in drawn,
        }


def main() -> None:
    names = [w for w in sys.argv[1:] if not w.startswith("-") and ("=" not in w or Path(w).exists())]
    options = read_options(Options, [word for word in sys.argv[1:] if word not in names])
    if len(names) < 2:
        raise UserError(USAGE)
    files = image_files(names[1:])

    from loce.checkpoint.load import Checkpoint
    from loce.engine.pictures import draw_detections, write_picture
    from loce.utils import distributed
    from loce.utils.files import write_text

    checkpoint = Checkpoint.open(names[0])
    model = checkpoint.detector().to(distributed.setup(options.device)).eval()
    targets = pictures(files, Path(options.output))
    all_records: list[dict[str, Any]] = []
    bad: list[str] = []
    for file, image, found in detections(model, files, checkpoint.config.data.scale_16bit, bad):
        limits = (options.threshold, options.most, options.overlap)
        picture, drawn = draw_detections(image, found, model.stats, *limits)
        write_picture(targets[file], picture)
        all_records += records(file, image, found, model.stats, drawn.tolist())
    write_text(Path(options.output, "predictions.json"), json.dumps(all_records))
    shown = sum(record["drawn"] for record in all_records)
    count = f"{len(files) - len(bad)} pictures with {shown} objects (score >= {options.threshold:g})"
    print(f"wrote {count} to {options.output}/")
    print(f"wrote {Path(options.output, 'predictions.json')}: all {len(all_records)} detections")
    if not shown and all_records:
        best = max(record["score"] for record in all_records)
        print(f"nothing scored {options.threshold:g}; the best is {best:.3f}: threshold={best / 2:.2g} draws more")
    if bad:
        raise UserError("\n".join([f"{len(bad)} of {len(files)} images could not be read:", *bad]))


if __name__ == "__main__":
    run_script(main)
