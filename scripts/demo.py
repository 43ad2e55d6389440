"""The main job on data drawn here: stage 1, then LOCE and an equally long softmax control; a table and two figures.

python scripts/demo.py: about six minutes on two CPU cores. What is finished is not done again.
"""

import time
from pathlib import Path

import torch

from loce.config import load_config, run_script
from loce.report.tables.cells import markdown_table, percent
from loce.report.tables.steps import average_precisions, finetune_together, is_evaluated, run, step
from loce.utils.environment import available_cores
from loce.utils.files import write_text

DATA, RUNS = Path("runs/glyphs50"), Path("runs/glyphs")
ROWS = {"softmax": "stage 1 + softmax", "loce": "stage 1 + LOCE"}  # config -> name in the table
COLUMNS = ("box AP", "mask AP", "APr", "APc", "APf", "minutes")


def table(minutes: dict[str, float]) -> str:
    """The demo's results in Markdown."""
    rows = []
    for config, name in ROWS.items():
        values = average_precisions(RUNS / config / "eval")
        rows.append([name, *(percent([value]) for value in values), f"{minutes[config]:.1f}"])
    return "\n".join(markdown_table(["Glyph-LVIS, 50 classes", *COLUMNS], rows)) + "\n"


def main() -> None:
    # Data, stage 1, then LOCE and its control in one pass; what is finished is not done again.
    started = time.monotonic()
    run("make_glyphs.py", f"out={DATA}")
    # Two ranks of one thread each keep two cores busier than one rank of two threads.
    ranks = 1 if torch.cuda.is_available() else min(2, available_cores())
    minutes = {"stage1": step(RUNS / "stage1", "train.py", "glyphs/stage1.yaml", processes=ranks)}
    if not any(is_evaluated(RUNS / name) for name in ROWS):
        finetune_together({RUNS / name: f"glyphs/{name}.yaml" for name in ROWS})
    for name in ROWS:
        minutes[name] = step(RUNS / name, "finetune.py", f"glyphs/{name}.yaml", init=RUNS / "stage1")

    from loce.data.build import val_annotations
    from loce.engine.drawing import write_picture
    from loce.engine.pictures import comparison_sheet
    from loce.report.figures import equilibrium_figure

    # Two figures and the table.
    config = load_config(["glyphs/loce.yaml"])
    folders = {"stage 1": RUNS / "stage1"} | {title: RUNS / name for name, title in ROWS.items()}
    equilibrium_figure({title: folder / "eval" for title, folder in folders.items()}, RUNS / "equilibrium.png")
    evaluations = {title: RUNS / name / "eval" for name, title in ROWS.items()}
    sheet = comparison_sheet(val_annotations(config), config.data.val_images, evaluations, count=6)
    write_picture(RUNS / "predictions.jpg", sheet)
    text = table(minutes)
    write_text(RUNS / "table.md", text)
    print(f"\n{text}")
    print(
        "mask AP unless said; protocol lvis, 300 detections an image; both rows start from the same stage-1 checkpoint"
    )
    print(f"stage 1 took {minutes['stage1']:.1f} minutes, the demo {(time.monotonic() - started) / 60:.1f} this time")
    for name in ("table.md", "equilibrium.png", "predictions.jpg"):
        print(f"wrote {RUNS / name}")


if __name__ == "__main__":
    run_script(main)
