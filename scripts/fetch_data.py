"""Fetch annotations and COCO images: python scripts/fetch_data.py [version=1.0|0.5|coco] [out=data] [key=value ...]

Goes on where it stopped, skips what is there, checks sizes and checksums (loce/data/download.py has them).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loce.config import read_options, run_script


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of scripts/fetch_data.py."""

    version: Literal["1.0", "0.5", "coco"] = "1.0"  # annotations of LVIS v1 or v0.5, or of COCO 2017
    out: str = "data"  # folder; configs/ expect data
    only: Literal["all", "annotations", "images"] = "all"
    mirror: str = ""  # URL of a folder that holds the archives; nothing else is asked then
    keep: bool = False  # leave the archives there after unpacking


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    from loce.data.download import ANNOTATIONS, IMAGES, fetch_all, from_mirror  # after the command line is right

    archives = [
        *(ANNOTATIONS[options.version] if options.only != "images" else ()),
        *(IMAGES if options.only != "annotations" else ()),
    ]
    fetch_all(from_mirror(archives, options.mirror) if options.mirror else archives, Path(options.out), options.keep)


if __name__ == "__main__":
    run_script(main)
