"""docs/dependencies.md names every dependency, and nothing is imported that it does not name."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
IMPORT_NAMES = {"PIL": "Pillow", "yaml": "pyyaml"}


def declared() -> set[str]:
    """Names between the quotes of pyproject.toml's lists of dependencies."""
    lists = re.findall(r"^(?:dependencies|dev|bench|wandb) = \[(.*?)\]", PROJECT, flags=re.DOTALL | re.MULTILINE)
    assert len(lists) == 4
    return {re.split("[><=]", text)[0] for part in lists for text in re.findall(r'"([^"]+)"', part)}


def imported() -> set[str]:
    """Top-level modules that the package and its scripts import, ours and Python's own left out."""
    found: set[str] = set()
    for path in [*(ROOT / "loce").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    ours = {"loce", *(path.stem for path in (ROOT / "scripts").glob("*.py"))}
    return {name for name in found if name not in ours | set(sys.stdlib_module_names)}


def test_every_dependency_has_its_reason() -> None:
    assert [name for name in sorted(declared()) if f"`{name}`" not in PAGE] == []


def test_every_import_is_named() -> None:
    assert {"torch", "cv2", "PIL"} <= imported()
    assert [name for name in sorted(imported()) if f"`{IMPORT_NAMES.get(name, name)}`" not in PAGE] == []
