"""Check a data set without changing anything; exit code 2 where something must be mended, else 0.

python scripts/check_data.py CONFIG.yaml [data.train_images=DIR ...] [decode=all] [key=value ...]
python scripts/check_data.py annotations=A.json images=DIR [key=value ...]     # or A.json images=DIR
Keys are those of a run, too: model.masks=false data.keep_empty=true.
"""

import sys
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from loce.config import (
    Config,
    Count,
    Natural,
    UserError,
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
    images: str = ""  # its image folder; without one no image is looked at
    decode: Literal["sample", "all", "none"] = "sample"  # images that are decoded: damaged ones, sizes
    sample: Count = 1000  # images of each file, with decode=sample
    workers: Natural = 4  # threads that decode
    allow_misplaced: bool = False  # as data.allow_misplaced of a CONFIG


def read_words(words: list[str]) -> tuple[Options, list[tuple[str, str]], Config]:
    """The options, the (annotation file, image folder) pairs to check, and the options of the run (or defaults)."""
    if "-h" in words or "--help" in words:
        read_options(Options, ["-h"])
    words = [f"annotations={word}" if word.endswith(".json") and "=" not in word else word for word in words]
    names = {field.name for field in fields(Options)}
    own = [word for word in words if word.partition("=")[0] in names]
    options = read_options(Options, own)
    rest = [word for word in words if word not in own]
    if options.annotations:
        named = [word for word in rest if word.startswith(("data.train_", "data.val_"))]
        if recipes := [*named, *(word for word in rest if "=" not in word)]:
            raise UserError(f"command line: {' '.join(recipes)}: does not go with annotations={options.annotations}")
        config = from_dict({}, "defaults", rest)
        if options.allow_misplaced:
            config = replace(config, data=replace(config.data, allow_misplaced=True))
        return options, [(options.annotations, options.images)], config
    if options.images:
        raise UserError("command line: images=: needs annotations=; with a CONFIG: data.train_images, data.val_images")
    config = load_config(rest if rest and "=" not in rest[0] else ["stage1.yaml", *rest])
    data = config.data
    return options, [(data.train_annotations, data.train_images), (data.val_annotations, data.val_images)], config


def main() -> None:
    options, pairs, config = read_words(sys.argv[1:])
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
    print("nothing to mend")


if __name__ == "__main__":
    run_script(main)
