"""Draw what a trained model finds: python scripts/predict.py CHECKPOINT IMAGE_OR_FOLDER ... [key=value ...].

Options eval.* take the place of the checkpoint's: eval.nms=0.4, eval.posthoc=norcal eval.norcal.gamma=0.8.

Writes every image with masks (or boxes), names and scores, coloured by how frequent a class was in training, and
predictions.json with all detections.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loce.config import UserError, raise_problems, read_options, run_script
from loce.utils.errors import first_few
from loce.utils.files import require_writable
from loce.utils.options import Count, Share

RECORDS = "predictions.json"
MARK = "_predicted"  # ends the name of a picture, which may lie beside its image
BREAK = "\n"
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff"),
    *(".webp", ".gif", ".ppm", ".pgm", ".jp2", ".avif"),
)
USAGE = "usage: predict.py CHECKPOINT IMAGE_OR_FOLDER ... [key=value ...]"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw the detections of a checkpoint (run folder or file) on images (files or folders)."""

    output: str = "predictions"  # folder for the pictures and predictions.json
    threshold: str = "auto"  # lowest score that is drawn, a number; auto: each class's own, of best F1 in RUN/eval
    most: Count = 50  # objects drawn in an image, the best
    overlap: Share = 0.7  # of two boxes that overlap more, whatever their classes, the better is drawn
    device: Literal["auto", "cpu", "cuda"] = "auto"


def given_threshold(text: str) -> float | None:
    """The number; None for auto. UserError for anything else."""
    try:
        number = None if text == "auto" else float(text)
    except ValueError:
        number = -1.0
    if number is not None and not 0 <= number <= 1:
        raise UserError(f"command line: threshold = {text}: must be auto, or a number >= 0 and <= 1")
    return number


def image_files(names: list[str], output: Path) -> tuple[list[Path], list[str]]:
    """The images meant by files and folders, each once, and lines on what in the folders is none.

    Folders are searched through, linked ones, too; hidden files, and pictures that this script wrote, are left alone.
    UserError with every name that means no image.
    """
    found, problems, others, own = [], [], [], 0
    for name in names:
        path = Path(name)
        if os.path.isfile(path):
            found.append(path)
        elif not os.path.isdir(path):
            problems.append(f"{name}: {'is no file' if os.path.lexists(path) else 'there is no such file or folder'}")
        else:
            there = list(files_below(path, output))
            images = [file for file, mine in there if is_image(file) and not mine]
            earlier = sum(mine and file.name != RECORDS for file, mine in there)
            others += [file for file, mine in there if not is_image(file) and not mine]
            if not images:
                but = f", but {earlier} pictures of earlier predictions; give one by its name" if earlier else ""
                problems.append(f"{name}: no image in this folder{but} (looked for {', '.join(SUFFIXES)})")
            found, own = found + images, own + earlier
    raise_problems(problems)

    lines = [f"left out: {own} pictures of earlier predictions (give one by its name to predict on it)"] if own else []
    if others:
        suffixes = Counter(file.suffix.lower() or "no suffix" for file in others)
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
        files = ", ".join(map(str, others[:5])) + (", ..." if len(others) > 5 else "")
        lines.append(f"left out: {len(others)} files of other kinds ({kinds}): {files}")
    once = {os.path.realpath(file): file for file in reversed(found)}  # the first name of each
    return [file for file in found if once[os.path.realpath(file)] is file], lines


def is_image(file: Path) -> bool:
    """By its suffix; a link that leads nowhere, or a pipe, is none."""
    return file.suffix.lower() in SUFFIXES and os.path.isfile(file)


def files_below(folder: Path, output: Path) -> Iterator[tuple[Path, bool]]:
    """(file, whether predict.py wrote it) of all that is below a folder and not hidden, in the order of names.

    Written by predict.py: NAME_predicted.png (NAME.jpg.png, of older versions) below any folder that has a
    predictions.json, or below an `output` that lies in `folder`; and that file itself.
    """
    seen = {folder.resolve()}  # links may go round in circles
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (here / name).resolve() not in seen
        )
        seen |= {(here / name).resolve() for name in folders}
        roots = [here, *(above for above in here.parents if above.is_relative_to(folder))]
        inside = any(root != folder and root.resolve() == output.resolve() for root in roots)
        ours = inside or any((root / RECORDS).is_file() for root in roots)
        for name in sorted(names):
            file = here / name
            older = Path(file.stem).suffix.lower() in SUFFIXES
            picture = file.suffix == ".png" and (older or file.stem.endswith(MARK))
            if not name.startswith("."):
                yield file, ours and (picture or name == RECORDS)


def pictures(files: list[Path], named: list[str], output: Path) -> dict[Path, Path]:
    """Where each image's picture goes: NAME_predicted.png below `output`, by the path below the folder that was named,
    or by its own name where it was named itself.

    Where two would meet, those have the path below the folder that holds all images, and keep their suffixes, too.
    UserError where a picture would be one of the images.
    """
    absolute = {file: Path(os.path.abspath(file)) for file in files}
    below = {}  # named folder -> the folder below it that holds all its images
    for folder in (Path(os.path.abspath(name)) for name in named if os.path.isdir(name)):
        parents = [path.parent for path in absolute.values() if path.is_relative_to(folder)]
        below[folder] = Path(os.path.commonpath(parents or [folder]))
    short = {
        file: path.relative_to(next((r for f, r in below.items() if path.is_relative_to(f)), path.parent)).with_suffix(
            ""
        )
        for file, path in absolute.items()
    }
    root = Path(os.path.commonpath([path.parent for path in absolute.values()]))
    often = Counter(short.values())
    names = {f: short[f] if often[short[f]] == 1 else path.relative_to(root) for f, path in absolute.items()}
    targets = {file: output / name.with_name(f"{name.name}{MARK}.png") for file, name in names.items()}
    images = {path.resolve() for path in absolute.values()}
    raise_problems(
        [
            f"{file}: its picture would be {target}, which is an image itself: choose another output=FOLDER"
            for file, target in targets.items()
            if target.resolve() in images
        ]
    )
    return targets


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


def records(
    file: Path,
    image: Any,
    found: dict[str, Any],
    stats: Any,
    drawn: list[int],
) -> Iterator[dict[str, Any]]:
    """An image's detections as predictions.json has them: COCO's fields, the file, the class's name, whether drawn."""
    height, width = image.shape[:2]
    codes = found.get("rles")  # none of a detector of boxes
    for row, (box, score, label) in enumerate(zip(found["boxes"], found["scores"], found["labels"], strict=True)):
        x1, y1, x2, y2 = box.tolist()
        yield {
            "file": str(file),
            "category_id": int(stats.category_ids[label]),
            "name": stats.names[label],
            "group": str(stats.groups[label]),
            "score": round(float(score), 6),
            "bbox": [round(side, 2) for side in (x1, y1, x2 - x1, y2 - y1)],
            **({"segmentation": {"size": [height, width], "counts": codes[row].decode()}} if codes else {}),
            "drawn": row in drawn,
        }


def main() -> None:
    names = [w for w in sys.argv[1:] if not w.startswith("-") and ("=" not in w or Path(w).exists())]
    overrides = [word for word in sys.argv[1:] if word.startswith("eval.") and word not in names]
    options = read_options(Options, [word for word in sys.argv[1:] if word not in (*names, *overrides)])
    if len(names) < 2:
        raise UserError(USAGE)
    output, threshold = Path(options.output), given_threshold(options.threshold)
    files, left_out = image_files(names[1:], output)
    targets = pictures(files, names[1:], output)
    require_writable(output)

    from loce.checkpoint.load import Checkpoint
    from loce.engine.class_facts import calibrate, posthoc_text
    from loce.engine.drawing import write_picture
    from loce.engine.inference import stored_thresholds
    from loce.engine.pictures import SURE, Limits, draw_detections
    from loce.utils import distributed
    from loce.utils.files import write_text

    # Every image with its picture; all detections in one file.
    checkpoint = Checkpoint.open(names[0])
    config = checkpoint.config_with(overrides)
    model = checkpoint.detector(config).to(distributed.setup(options.device)).only_predict()
    run = Path(names[0])
    calibrate(model, config, run if run.is_dir() else run.with_suffix(""))
    if text := posthoc_text(config):
        print(f"scores: calibrated post hoc by {text}")
    least: Any = threshold
    if threshold is None:
        own, told = stored_thresholds(checkpoint, model, config, SURE)
        left_out, least = [*left_out, told], SURE if own is None else own
    print("\n".join(left_out), end="\n" * bool(left_out))
    limits = Limits(least, options.most, options.overlap)
    all_records: list[dict[str, Any]] = []
    bad: list[str] = []
    for file, image, found in detections(model, files, config.data.scale_16bit, bad):
        picture, drawn = draw_detections(image, found, model.stats, limits)
        write_picture(targets[file], picture)
        all_records += records(file, image, found, model.stats, drawn.tolist())
    write_text(output / RECORDS, json.dumps(all_records))
    # What was written, and what to change where nothing was drawn or not all could be read.
    shown = sum(record["drawn"] for record in all_records)
    which = "" if threshold is None else f" (threshold {threshold:g})"
    print(f"wrote {len(files) - len(bad)} pictures with {shown} objects{which} to {options.output}/")
    print(f"wrote {output / RECORDS}: all {len(all_records)} detections")
    if not shown and all_records:
        best = max(record["score"] for record in all_records)
        print(f"nothing scored enough; the best is {best:.3f}: threshold={best / 2:.2g} draws more")
    if bad:
        raise UserError(f"{len(bad)} of {len(files)} images could not be read:\n{first_few(bad, between=BREAK)}")


if __name__ == "__main__":
    run_script(main)
