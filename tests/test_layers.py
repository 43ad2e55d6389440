"""The package's own rules: who may import whom, and what no file may do."""

import ast
import subprocess
import sys
import time
from pathlib import Path
from statistics import quantiles

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "loce"
LAYERS = {
    0: "config conflicts method_options options errors yaml_text classes distributed env files "
    "checkpoint_files progress runlog runlock session stopping pace board wandb_log",
    1: "data box_generator memory_bank memory_packing mean_score equilibrium_loss forest_trees heads",
    2: "models evaluation",
    3: "engine build checkpoint resume start validation job divergence replay convert drawing inference run plots "
    "tree_building contact_sheet header trials profiling report",
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names.split()}
# Within a layer, what may import what (a folder's files may import each other; layers 0 and 3 are open, see below).
NEIGHBOURS = {("heads", "equilibrium_loss"), ("memory_packing", "memory_bank")}
NO_TORCH = (
    "config",
    "conflicts",
    "method_options",
    "options",
    "errors",
    "yaml_text",
    "classes",
    "files",
    "progress",
    "env",
)
MAY_NAME_CONFIG = set(LAYERS[3].split()) - {"engine", "plots", "contact_sheet"} | {
    "config"
}  # what scripts call directly
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


def part(module: str) -> str:
    """loce.heads.base -> heads."""
    return module.split(".")[1]


@EACH_FILE
def test_imports_go_down_only(path: Path):
    if module_name(path) == "loce":  # the public functions are imported on first use
        return
    own = part(module_name(path))
    assert own in LAYER, f"loce/{own} has no layer: write it into the table of this test"
    for module in imports(path):
        root = module.split(".")[0]
        assert root not in ("scripts", "tests", "benchmarks"), f"{path} imports {module}"
        if root != "loce" or module == "loce":
            continue
        other = part(module)
        allowed = (
            LAYER[other] < LAYER[own]
            or other == own
            or (own, other) in NEIGHBOURS
            or LAYER[other] == LAYER[own] == 0
            or (LAYER[other] == LAYER[own] == 3 and (own, other) != ("engine", "build"))
        )
        assert allowed, f"{path.relative_to(ROOT)} (layer {LAYER[own]}) imports {module} (layer {LAYER[other]})"


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
def test_only_models_import_torchvision_models(path: Path):
    if path.parent.name != "models":
        assert not any(module.startswith("torchvision.models") for module in imports(path))


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


@EACH_FILE
def test_only_builders_name_the_whole_config(path: Path):
    """Everything else takes its own section, or values."""
    if module_name(path) != "loce" and part(module_name(path)) in MAY_NAME_CONFIG:
        return
    names = {node.id for node in ast.walk(TREES[path]) if isinstance(node, ast.Name)}
    aliases = {alias.name for node in ast.walk(TREES[path]) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert "Config" not in names | aliases


@EACH_FILE
def test_a_file_fits_a_reader(path: Path):
    if path.name != "config.py":
        assert len(path.read_text().splitlines()) <= 300


def test_functions_are_short():
    functions = [n for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for node in functions]
    assert quantiles(lengths, n=10)[8] <= 40


@EACH_FILE
def test_every_public_thing_has_a_docstring(path: Path):
    assert ast.get_docstring(TREES[path]) or not TREES[path].body, f"{path}: no docstring"
    for node in TREES[path].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


@pytest.mark.parametrize("name", NO_TORCH)
def test_options_need_no_torch(name: str):
    """So that a mistake in the options is reported at once."""
    assert run(f"import sys, loce.{name}; print('torch' in sys.modules)") == "False\n"


def test_import_loce_is_fast():
    started = time.monotonic()
    assert run("import sys, loce; print('torch' in sys.modules)") == "False\n"
    assert time.monotonic() - started < 3


def test_public_names():
    run("import loce; assert callable(loce.evaluate_lvis) and callable(loce.load_model)")
