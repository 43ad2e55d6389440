"""Subprocesses of scripts: run one, or run it unless it is finished; run folders, and the numbers in them."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from loce.utils.errors import UserError
from loce.utils.files import write_text

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
TRIALS = ("dry_run", "overfit")  # folders in a run folder


def run(name: str, *words: str, processes: int = 1) -> float:
    """Run a script of scripts/; minutes it took. Ends this process with the script's exit code when it fails."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    launch = f"torchrun --nproc_per_node={processes}" if torchrun else "python"
    print(f"\n$ {launch} scripts/{name} {' '.join(words)}", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, *torchrun, str(SCRIPTS / name), *words]).returncode
    if code:
        sys.exit(code)
    return (time.monotonic() - started) / 60


def step(
    folder: Path,
    script: str,
    *words: str,
    init: Path | None = None,
    processes: int = 1,
) -> float:
    """Train and evaluate into the run folder `folder`, unless that is done; minutes it took, now or then.

    init: the run folder it starts from. UserError where that was trained anew after `folder` was.
    """
    note = folder / "minutes.txt"
    if is_evaluated(folder) and note.exists():
        if init is not None and (init / "minutes.txt").stat().st_mtime > note.stat().st_mtime:
            raise UserError(f"{folder} started from an older {init}, which was trained anew since; delete {folder}")
        print(f"{folder}: finished before, used as it is", flush=True)
        return float(note.read_text())
    minutes = run(script, *words, processes=processes)
    write_text(note, f"{minutes:.3f}\n")
    return minutes


def finetune_together(recipes: dict[Path, str], processes: int = 1) -> None:
    """Train and evaluate second stages in one pass; each run folder notes its share of the minutes.

    recipes: run folder -> recipe and words, as one word of a shell.
    """
    minutes = run("finetune.py", *recipes.values(), processes=processes)
    for folder in recipes:
        write_text(folder / "minutes.txt", f"{minutes / len(recipes):.3f}\n")


def is_evaluated(folder: Path) -> bool:
    """Whether the run is trained to its end and evaluated."""
    return (folder / "eval/metrics.json").exists()


def average_precisions(evaluation: Path) -> list[float]:
    """Box AP, then mask AP, APr, APc and APf of an evaluation's folder, in percent; negative of no classes.

    Of a detector of boxes the groups are of boxes, and mask AP is negative.
    """
    metrics = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
    box = metrics["bbox"]
    mask = metrics.get("segm", {**box, "AP": -1.0})
    return [100 * value for value in (box["AP"], mask["AP"], mask["APr"], mask["APc"], mask["APf"])]


def newest_run(runs: Path) -> Path | None:
    """The run folder below `runs` with the checkpoint written last; trials in a run folder are no runs."""
    found = [file for file in runs.glob("**/checkpoints/*/main.pt") if file.parents[2].name not in TRIALS]
    files = sorted(found, key=lambda file: file.stat().st_mtime)
    return files[-1].parents[2] if files else None


def folders_of(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The folders among a command's words, each once, or else the newest run below runs/; and the other words."""
    named = [word for word in words if not word.startswith("-") and ("=" not in word or Path(word).exists())]
    folders = [Path(word) for word in dict.fromkeys(word.rstrip("/") for word in named)]
    newest = None if folders or {"-h", "--help"} & set(words) else newest_run(Path("runs"))
    return folders or ([newest] if newest else []), [word for word in words if word not in named]
