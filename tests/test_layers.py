"""The package's own rules: which room may import which, and what no file may do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "loce"
# From the ground up: a room imports itself, rooms below it and, of its own floor, nobody.
FLOORS = (
    ("utils",),
    ("config", "data.glyphs", "box_generator", "mean_score", "memory_bank", "equilibrium_loss"),
    ("data.annotations", "posthoc", "gaussian_memory", "adaptive_rates"),
    ("heads",),
    ("data", "evaluation"),
    ("models",),
    ("checkpoint",),
    ("engine",),
    ("report",),
    ("scripts", "benchmarks"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
NO_TORCH = (
    "config",
    "utils.options",
    "utils.errors",
    "utils.classes",
    "utils.files",
    "utils.progress",
    "evaluation.lvis_ap",
)
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
EACH_FILE = pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, dotted; `from loce import x` counts as loce.x where that is a module."""
    found: set[str] = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
    return found


def room(module: str) -> str:
    """loce.data.glyphs.plan -> data.glyphs, loce.heads.base -> heads, loce.config -> config."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if ".".join(parts[:2]) in FLOOR else parts[0]


@EACH_FILE
def test_imports_go_down_only(path: Path):
    own = module_name(path)
    if own == "loce":  # the public functions are imported on first use
        return
    for module in imports(path):
        root = module.split(".")[0]
        assert root not in ("scripts", "tests", "benchmarks"), f"{path} imports {module}"
        if root == "loce" and room(module) != room(own):
            assert FLOOR[room(module)] < FLOOR[room(own)], f"{own} imports {module}"


def test_no_cycles():
    graph = {name: imports(path) & set(MODULES) - {name} for name, path in MODULES.items() if name != "loce"}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in graph.get(name, ()):
                if not name.startswith(f"{other}."):  # `from loce.heads import x` inside heads is the folder itself
                    visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@EACH_FILE
def test_no_registries_no_hidden_imports_no_fixed_device(path: Path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute):
                assert called.attr not in ("cuda", "register", "import_module"), f"{path}:{node.lineno}"
            if isinstance(called, ast.Name):
                assert called.id not in ("exec", "eval", "globals", "__import__", "register"), f"{path}:{node.lineno}"
    modules = imports(path) - {"importlib.metadata"}  # which imports nothing
    assert not any(module.split(".")[0] == "importlib" for module in modules)
    assert "models" in path.parts or not any(module.startswith("torchvision.models") for module in modules)


@EACH_FILE
def test_every_public_thing_has_a_docstring(path: Path):
    assert ast.get_docstring(TREES[path]) or not TREES[path].body, f"{path}: no docstring"
    for node in TREES[path].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


@pytest.mark.parametrize("name", NO_TORCH)
def test_options_and_evaluation_need_no_torch(name: str):
    """So that a mistake in the options is reported at once, and an evaluation starts at once."""
    assert run(f"import sys, loce.{name}; print('torch' in sys.modules)") == "False\n"


def test_public_names():
    names = ["box_generator", "mean_score", "memory_bank", "equilibrium_loss"]
    modules = "; ".join(f"import loce.{name}" for name in names)
    run(f"import loce; {modules}; assert callable(loce.evaluate_lvis) and callable(loce.load_model)")
