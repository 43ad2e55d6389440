"""docs/paper_map.md leaves nothing of the paper out, and what it names exists."""

import ast
import re
from pathlib import Path

import pytest

from loce.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/paper_map.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
ROWS = [row for row in ROWS if row[0] != "paper"]
LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")
NAME = re.compile(r"`([^`]+)`")
EACH = pytest.mark.parametrize("row", ROWS, ids=[row[0][:40] for row in ROWS])
PARTS = (
    *(f"Eq. {i}," for i in (1, 2, 3, 4, 5, 6)),
    *("Eq. 7-8,", "Supplement Eq. 1,", "Supplement Eq. 2-3,"),
    *(f"Table {i}," for i in (1, 2, 3, 4, 5)),
    *(f"Figure {i}," for i in (1, 2, 3, 4)),
    *("Supplement, feature memory", "Supplement, dataset-based EBL", "Supplement, dataset-based MFS"),
    "Supplement, repeat factor sampling",
)


def defined(file: Path) -> set[str]:
    """Functions and classes of a file, and `Class.method`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return names | {f"{c.name}.{node.name}" for c in classes for node in c.body if isinstance(node, kinds)}


def test_every_part_of_the_paper_has_a_row() -> None:
    firsts = [row[0] for row in ROWS]
    assert [part for part in PARTS if not any(first.startswith(part) for first in firsts)] == []


@EACH
def test_no_cell_is_empty(row: list[str]) -> None:
    assert len(row) == 5
    _, file, function, test, recipe = row
    assert LINK.search(file) or re.match(r"none: \w", file)
    assert NAME.search(function) or re.match(r"none: \w", function)
    assert LINK.search(test) or re.match(r"none: \w", test)
    assert len(recipe) > 5


@EACH
def test_files_functions_and_tests_exist(row: list[str]) -> None:
    _, file, function, test, _ = row
    files = []
    for shown, path in LINK.findall(file):
        assert shown == path and (ROOT / path).is_file(), path
        files.append(ROOT / path)
    found = set().union(*(defined(path) for path in files if path.suffix == ".py"))
    assert [name for name in NAME.findall(function) if name not in found] == []
    for name, path in LINK.findall(test):
        assert name in defined(ROOT / path), f"{path} has no {name}"


@EACH
def test_recipes_load_with_their_words(row: list[str]) -> None:
    targets = re.findall(r"^([a-z0-9 -]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    words: list[list[str]] = []
    for text in NAME.findall(row[4]):
        if text.endswith(".yaml"):
            words.append([text])
        elif re.fullmatch(r"[a-z_.]+=\S+", text):
            words[-1].append(text)  # of the recipe before it
        elif text.startswith("make "):
            assert text.split()[1] in " ".join(targets).split(), text
    for recipe in words:
        load_config(recipe)
