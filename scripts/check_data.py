"""Check a data set without changing anything; exit code 2 where something must be mended, else 0.

python scripts/check_data.py CONFIG.yaml [data.train_images=DIR ...] [decode=all] [key=value ...]
python scripts/check_data.py A.json images=DIR [key=value ...]                # or annotations=A.json images=DIR
python scripts/check_data.py TRAIN.json VAL.json images=DIR recipe=mine.yaml    # write a recipe, and check both
Keys are those of a run, too: model.masks=false data.keep_empty=true.
"""

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loce.config import (
    Config,
    Count,
    Natural,
    UserError,
    diff,
    from_dict,
    load_config,
    raise_problems,
    read_options,
    run_script,
)

if TYPE_CHECKING:
    from loce.data.annotations.lvis import LVISAnnotations


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of scripts/check_data.py, besides those of a CONFIG."""

    annotations: str = ""  # annotation file, in place of a CONFIG
    val: str = ""  # annotation file for validation, beside that of training
    images: str = ""  # their image folder; without one no image is looked at
    val_images: str = ""  # that of validation, where it is another one
    recipe: str = ""  # file to write: a recipe for these two, with reasons, and beside it LOCE's
    decode: Literal["sample", "all", "none"] = "sample"  # images that are decoded: damaged ones, sizes
    sample: Count = 1000  # images of each file, with decode=sample
    workers: Natural = 4  # threads that decode
    allow_misplaced: bool = False  # as data.allow_misplaced of a CONFIG


def read_words(words: list[str]) -> tuple[Options, list[tuple[str, str]], Config]:
    """The options, the (annotation file, image folder) pairs to check, and the options of the run (or defaults)."""
    if "-h" in words or "--help" in words:
        read_options(Options, ["-h"])
    files = [word for word in words if word.endswith(".json") and "=" not in word]
    if len(files) > 2:
        raise UserError(f"command line: {' '.join(files)}: one file, or one for training and one for validation")
    named = [f"{key}={file}" for key, file in zip(("annotations", "val"), files, strict=False)]
    words = [*named, *(word for word in words if word not in files)]
    names = {field.name for field in fields(Options)}
    own = [word for word in words if word.partition("=")[0] in names]
    options = read_options(Options, own)
    rest = [word for word in words if word not in own]
    if options.annotations:
        paths = [word for word in rest if word.startswith(("data.train_", "data.val_"))]
        if recipes := [*paths, *(word for word in rest if "=" not in word)]:
            raise UserError(f"command line: {' '.join(recipes)}: does not go with annotations={options.annotations}")
        pairs = [(options.annotations, options.images)]
        pairs += [(options.val, options.val_images or options.images)] if options.val else []
        if options.recipe and not (options.val and options.images):
            raise UserError("command line: recipe=: needs TRAIN.json VAL.json images=DIR")
        config = from_dict({}, "defaults", rest)
        if options.allow_misplaced:
            config = replace(config, data=replace(config.data, allow_misplaced=True))
        return options, pairs, config
    if options.images or options.val or options.val_images or options.recipe:
        raise UserError(
            "command line: images=, val=, val_images=, recipe=: needs annotations=; a CONFIG has data.train_images, ..."
        )
    config = load_config(rest if rest and "=" not in rest[0] else ["stage1.yaml", *rest])
    data = config.data
    return options, [(data.train_annotations, data.train_images), (data.val_annotations, data.val_images)], config


def main() -> None:
    options, pairs, config = read_words(sys.argv[1:])
    commands: list[str] = []
    if options.recipe:
        from loce.engine.guide import write_recipes

        lines, commands = write_recipes(Path(options.recipe), pairs[0], pairs[1], diff(Config(), config))
        print("\n".join(lines))
        config = load_config([options.recipe])
    from loce.data.check import Report, check_pair, check_set, long_tail_lines  # after the command line is right

    sample = {"sample": options.sample, "all": sys.maxsize, "none": 0}[options.decode]
    report = Report()
    found: list[LVISAnnotations | None] = []
    uses: tuple[Any, ...] = ("training", "evaluation") if len(pairs) == 2 else ("",)
    for (path, images), use in zip(pairs, uses, strict=True):
        printed = len(report.lines)
        annotations = check_set(path, images, report, sample, options.workers, config, use)
        if annotations is not None and not found:  # the training set
            report.lines += long_tail_lines(annotations, config.data, config.sampler, config.memory)
        found.append(annotations)
        print("\n".join(report.lines[printed:]), flush=True)
    if len(pairs) == 2 and found[0] is not None and found[1] is not None:
        printed = len(report.lines)
        check_pair(found[0], found[1], pairs[0][1], pairs[1][1], report)
        print("\n".join(report.lines[printed:]), flush=True)
    raise_problems(report.problems)
    print("\n".join(["nothing to mend", *commands]))


if __name__ == "__main__":
    run_script(main)
