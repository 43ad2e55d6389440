"""Size and shape of the code: lines, files at the top, modules of a training, frames from `main` to the loss.

    python benchmarks/structure.py [ROOT] [output=benchmarks/results/structure.json]

Of this repository or of another checkout of it, whose numbers are added to those in the file, by commit. Frames and
modules are those of a training on a tiny Glyph-LVIS, in processes of their own that import the checkout's code.
"""

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from loce.config import UserError, read_options, run_script
from loce.utils.files import write_text

SUFFIXES = {"loce": ".py", "scripts": ".py", "configs": ".yaml", "tests": ".py"}
TRAIN = ("loce.engine.train", "loce.run")  # the module of `train`: now, and in checkouts of before
WORDS = (  # a training of seconds, as keys of any version
    *("data.short_edges=[64]", "data.test_short_edge=64", "data.workers=0"),
    *("model.fpn_channels=16", "model.fc_features=32", "model.mask_channels=8", "model.mask_convs=1"),
    *("train.batch_size=4", "train.epochs=1", "train.drops=[]", "train.warmup_iterations=1", "train.evaluate=false"),
)
GLYPHS = ("classes=4", "train_images=8", "val_images=4", "size=64", "smallest=0.26", "largest=0.4", "workers=1")
PROBE = """
import runpy, sys
root, sys.argv = sys.argv[1], sys.argv[2:]
stack = []

def watch(frame, event, _):
    if event != "call" or frame.f_code.co_name != "equilibrium_loss" or stack:
        return
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith((root + "/loce/", root + "/scripts/")) and frame.f_code.co_name != "<module>":
            stack.append(path[len(root) + 1 :] + ":" + frame.f_code.co_name)
        frame = frame.f_back

sys.setprofile(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
sys.setprofile(None)
print("FRAMES", *reversed(stack))
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Count what the code of a checkout is made of."""

    output: str = "benchmarks/results/structure.json"


def python(root: Path, *words: str | Path, folder: Path | None = None) -> str:
    """What Python prints that imports `loce` from the checkout at `root`."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=folder or root)
    if done.returncode:
        raise UserError(f"{' '.join(line)}\n{done.stdout}{done.stderr}")
    return done.stdout


def lines(root: Path) -> dict[str, int]:
    """Lines of each folder's files of its kind."""
    files = {folder: (root / folder).rglob(f"*{suffix}") for folder, suffix in SUFFIXES.items()}
    return {f: sum(len(p.read_text(encoding="utf-8").splitlines()) for p in paths) for f, paths in files.items()}


def functions(root: Path) -> dict[str, int]:
    """Private functions and methods of the package, and those whose name stands once beside the definition."""
    private = once = comments = 0
    for path in (root / "loce").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        nodes = list(ast.walk(ast.parse(text)))
        defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.name[0] == "_" and n.name[1] != "_"}
        named = Counter(
            n.id if isinstance(n, ast.Name) else n.attr for n in nodes if isinstance(n, ast.Name | ast.Attribute)
        )
        private += len(defined)
        once += sum(named[name] == 1 for name in defined)
        comments += sum(line.lstrip().startswith("#") for line in text.splitlines())
    return {"private functions": private, "private functions called once": once, "whole-line comments": comments}


def modules(root: Path) -> dict[str, int]:
    """Modules of the package: all, and those that importing `train` loads."""
    name = next(n for n in TRAIN if (root / n.replace(".", "/")).with_suffix(".py").exists())
    code = f"import sys, {name}; print(sum(m.split('.')[0] == 'loce' for m in sys.modules))"
    return {
        "modules of loce": len(list((root / "loce").rglob("*.py"))),
        "modules loaded by train": int(python(root, "-c", code)),
    }


def frames(root: Path) -> list[str]:
    """Functions of ours on the stack in `equilibrium_loss`, from `main` of scripts/finetune.py on."""
    scripts = root / "scripts"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python(root, scripts / "make_glyphs.py", "out=glyphs", *GLYPHS, folder=folder)
        data = [
            *(f"data.{split}_annotations=glyphs/annotations/{split}.json" for split in ("train", "val")),
            *(f"data.{split}_images=glyphs" for split in ("train", "val")),
        ]
        python(root, scripts / "train.py", "glyphs/stage1.yaml", *data, *WORDS, "output=stage1", folder=folder)
        words = ("glyphs/loce.yaml", *data, *WORDS, "train.init=stage1", "output=loce")
        text = python(root, "-c", PROBE, root, scripts / "finetune.py", *words, folder=folder)
    stack = next(line.split()[1:] for line in text.splitlines() if line.startswith("FRAMES"))
    return stack[stack.index("scripts/finetune.py:main") :]


def main() -> None:
    roots = [word for word in sys.argv[1:] if "=" not in word and not word.startswith("-")]
    options = read_options(Options, [word for word in sys.argv[1:] if word not in roots])
    root = Path(roots[0] if roots else Path(__file__).parents[1]).resolve()
    if not (root / "loce").is_dir():
        raise UserError(f"{root}: no checkout (it has no folder loce)")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root).stdout
    stack = frames(root)
    found = {
        "lines": lines(root),
        "files at the top of loce": len(list((root / "loce").glob("*.py"))),
        **modules(root),
        **functions(root),
        "frames from main to equilibrium_loss": len(stack),
        "frames": stack,
    }
    file = Path(options.output)
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    write_text(file, json.dumps({**before, commit.strip(): found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_script(main)
