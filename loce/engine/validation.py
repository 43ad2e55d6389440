"""Evaluation between epochs (`train.evaluate_every`), and the best checkpoint, which is kept beside the newest.

Best is by mask AP (box AP where masks are not evaluated) on the validation data, so its own number is too good to be
reported: RUN/eval, and every table, is of the last checkpoint.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from loce.config import Config, TrainConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import val_annotations
from loce.data.dataset import TrainDataset, unaugmented
from loce.engine.boards import Shown
from loce.engine.inference import evaluate_model, is_evaluated
from loce.models.mask_rcnn import MaskRCNN
from loce.utils import distributed
from loce.utils.files import write_text

BEST = "best.json"  # in the run folder: {"checkpoint": "checkpoints/000012300", "epoch": 3, "mask AP": 0.2} or "box AP"


def due(train: TrainConfig, epoch: int) -> bool:
    """Whether there is an evaluation after this epoch (from 1); that after the last is another matter."""
    return bool(train.evaluate_every) and epoch % train.evaluate_every == 0 and epoch < train.epochs


def evaluate_epoch(
    model: MaskRCNN,
    config: Config,
    run: Path,
    epoch: int,
    iteration: int,
) -> dict[str, Shown]:
    """Evaluate into RUN/eval_epoch_<epoch> unless that is done, and note the best; `results` for the log.

    Every rank must call. Detections are not kept. Nothing that training depends on changes: evaluation draws no random
    numbers.
    """
    output = run / f"eval_epoch_{epoch:02d}"
    annotations = val_annotations(config)
    if not is_evaluated(model, config, output, annotations):
        source = f"{run} after {iteration} iterations"
        evaluate_model(model, config, output, source, annotations, resamples=0, errors=False)
    if distributed.is_main():
        shutil.rmtree(output / "detections", ignore_errors=True)
        note_best(run, output, epoch, iteration)
    return results(model, config, output, annotations) if distributed.is_main() else {}


def results(
    model: MaskRCNN,
    config: Config,
    output: Path,
    annotations: LVISAnnotations,
) -> dict[str, Shown]:
    """The numbers of an evaluation in `output`, and a picture of predictions, also written there. Rank 0 only.

    annotations: of the validation data.
    """
    from loce.engine.pictures import predictions, write_picture  # drawing: after an evaluation only

    data = unaugmented(config.data)
    picture = predictions(model, TrainDataset(annotations, Path(data.val_images), data, config.seed), output)
    write_picture(output / "predictions.jpg", picture)
    metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    numbers = {
        f"eval/{kind}_{name}": float("nan") if value is None or value < 0 else value  # -1: undefined
        for kind in ("bbox", "segm")
        for name, value in metrics.get(kind, {}).items()
    }
    return {**numbers, "predictions/validation": picture}


def note_best(
    run: Path,
    output: Path,
    epoch: int,
    iteration: int,
) -> None:
    """Make this epoch's checkpoint the best one, where it is. Rank 0 only."""
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    name, kind = ("mask AP", "segm") if "segm" in metrics else ("box AP", "bbox")
    score = float(metrics[kind]["AP"])
    known = read_best(run)
    if not known or known["epoch"] == epoch or score > known.get(name, -1):
        found = {"checkpoint": f"checkpoints/{iteration:09d}", "epoch": epoch, name: score}
        write_text(run / BEST, json.dumps(found) + "\n")


def read_best(run: Path) -> dict[str, Any]:
    """What is known of the best checkpoint; {} where there is none."""
    file = run / BEST
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def best_checkpoint(run: Path) -> Path | None:
    """The folder of the best checkpoint."""
    found = read_best(run)
    return run / found["checkpoint"] if found else None
