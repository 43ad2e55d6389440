"""The main job on data drawn here: stage 1, then LOCE and an equally long softmax control; a table and two figures.

python scripts/demo.py: about ten minutes on two CPU cores. What is finished is not done again.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from loce.config import load_config, run_script
from loce.files import write_text

SCRIPTS = Path(__file__).resolve().parent
DATA, RUNS = Path("runs/glyphs50"), Path("runs/glyphs")
ROWS = {"softmax": "stage 1 + softmax", "loce": "stage 1 + LOCE"}  # config -> name in the table
COLUMNS = ("box AP", "mask AP", "APr", "APc", "APf", "minutes")


def run(name: str, *words: str) -> float:
    """Run a script of ours; minutes it took. Ends the demo with the script's exit code when it fails."""
    print(f"\n$ python scripts/{name} {' '.join(words)}", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, str(SCRIPTS / name), *words]).returncode
    if code:
        sys.exit(code)
    return (time.monotonic() - started) / 60


def step(folder: Path, finished: Path, script: str, *words: str) -> float:
    """Run a script unless what it makes is there; minutes it took, now or then."""
    note = folder / "demo_minutes.txt"
    if finished.exists() and note.exists():
        print(f"{folder}: finished before, used as it is")
        return float(note.read_text())
    minutes = run(script, *words)
    write_text(note, f"{minutes:.3f}\n")
    return minutes


def table(minutes: dict[str, float]) -> str:
    """The demo's results in Markdown."""
    lines = ["| Glyph-LVIS, 50 classes | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for config, name in ROWS.items():
        metrics = json.loads((RUNS / config / "eval" / "metrics.json").read_text())
        box, mask = metrics["bbox"], metrics["segm"]
        values = (box["AP"], mask["AP"], mask["APr"], mask["APc"], mask["APf"])
        cells = [f"{100 * value:.1f}" for value in values] + [f"{minutes[config]:.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    started = time.monotonic()
    run("make_glyphs.py", f"out={DATA}")
    minutes = {"stage1": step(RUNS / "stage1", RUNS / "stage1/eval/metrics.json", "train.py", "glyphs/stage1.yaml")}
    for name in ROWS:
        folder = RUNS / name
        minutes[name] = step(folder, folder / "eval/metrics.json", "finetune.py", f"glyphs/{name}.yaml")

    from loce.build import val_annotations
    from loce.plots import equilibrium_figure, prediction_sheet

    config = load_config(["glyphs/loce.yaml"])
    folders = {"stage 1": RUNS / "stage1"} | {title: RUNS / name for name, title in ROWS.items()}
    equilibrium_figure({title: folder / "eval" for title, folder in folders.items()}, RUNS / "equilibrium.png")
    detections = {title: RUNS / name / "eval/detections" for name, title in ROWS.items()}
    prediction_sheet(val_annotations(config), config.data.val_images, detections, RUNS / "predictions.png")
    text = table(minutes)
    write_text(RUNS / "table.md", text)
    print(f"\n{text}")
    print(
        "mask AP unless said; protocol lvis, 300 detections an image; both rows start from the same stage-1 checkpoint"
    )
    print(f"stage 1 took {minutes['stage1']:.1f} minutes, the demo {(time.monotonic() - started) / 60:.1f} this time")
    for name in ("table.md", "equilibrium.png", "predictions.png"):
        print(f"wrote {RUNS / name}")


if __name__ == "__main__":
    run_script(main)
