"""docs/methods.md is what the code says today, and has what readers look for."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from loce.config import HeadConfig
from loce.heads import HEADS
from loce.utils.options import schema

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/methods.md").read_text(encoding="utf-8")


def part(name: str) -> str:
    """What the page says of a head."""
    return PAGE.partition(f"## `head.name={name}`")[2].partition("\n## ")[0]


def test_the_page_is_current() -> None:
    code = "import sys; sys.path.insert(0, 'scripts'); import methods_page; print(methods_page.page(), end='')"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert made == PAGE, "run: python scripts/methods_page.py"


@pytest.mark.parametrize("name", sorted(HEADS))
def test_every_head_says_what_it_is(name: str) -> None:
    module = importlib.import_module(HEADS[name].__module__)
    first = (inspect.getdoc(module) or "").partition("\n")[0]
    assert re.search(r"20\d\d|arXiv", first), f"{module.__name__}: the first line names no paper"
    text = part(name)
    assert first in text and "**State:**" in text and "**Differences from the paper / the released code:**" in text
    assert "Recipes:\n\n- [`" in text
    sections = get_type_hints(HeadConfig)
    keys = schema(sections[name], f"head.{name}.") if name in sections else {}
    assert all(f"\n{key} = " in text for key in keys)
