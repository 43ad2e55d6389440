"""docs/dependencies.md names every dependency, and what is declared is what is imported."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
IMPORT_NAMES = {"PIL": "pillow", "cv2": "opencv-python", "yaml": "pyyaml"}
LISTS = ("dependencies", "dev", "bench", "wandb")


def declared(name: str) -> set[str]:
    """Names between the quotes of one of pyproject.toml's lists of dependencies."""
    part = re.search(rf"^{name} = \[(.*?)\]", PROJECT, flags=re.DOTALL | re.MULTILINE)
    assert part
    return {re.split("[><=]", text)[0] for text in re.findall(r'"([^"]+)"', part[1])}


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
    assert [name for name in sorted({x for part in LISTS for x in declared(part)}) if f"`{name}`" not in PAGE] == []


def test_declared_is_what_is_imported() -> None:
    """In both directions; some is on wish. torch imports `tensorboard`, the tests compare with `lvis`."""
    found = {IMPORT_NAMES.get(name, name) for name in imported()} - {"wandb", "safetensors"}
    assert found == declared("dependencies") - {"tensorboard", "lvis"}
