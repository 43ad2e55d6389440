"""Draw a Glyph-LVIS set: python scripts/make_glyphs.py out=DIR [classes=50 ...]; --help lists the options."""

import sys

from loce.config import read_options, run_script


def main() -> None:
    from loce.data.glyphs.make import (  # here: the drawing processes import this file
        CONFLICTS,
        GlyphOptions,
        make_glyphs,
    )

    make_glyphs(read_options(GlyphOptions, sys.argv[1:], CONFLICTS))


if __name__ == "__main__":
    run_script(main)
