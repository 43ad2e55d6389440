"""Evaluation between epochs (`train.evaluate_every`), and the best checkpoint, which is kept beside the newest; after
long epochs without one a picture of predictions.

Best is by mask AP (box AP where masks are not evaluated) on the validation data, so its own number is too good to be
reported: RUN/eval, and every table, is of the last checkpoint.
"""

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loce.config import Config, TrainConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import val_annotations
from loce.data.dataset import TrainDataset, unaugmented
from loce.engine.boards import Shown
from loce.engine.inference import Evaluated, evaluate_models, is_evaluated
from loce.models.mask_rcnn import MaskRCNN
from loce.utils import distributed
from loce.utils.files import write_text

LONG = 60.0  # seconds of an epoch, from which on a picture of predictions is drawn after it
PREDICTIONS = "predictions.jpg"  # in the run folder, after the newest long epoch
BEST = "best.json"  # in the run folder: {"checkpoint": "checkpoints/000012300", "epoch": 3, "mask AP": 0.2} or "box AP"


def due(train: TrainConfig, epoch: int) -> bool:
    """Whether there is an evaluation after this epoch (from 1); that after the last is another matter."""
    return bool(train.evaluate_every) and epoch % train.evaluate_every == 0 and epoch < train.epochs


def evaluate_epoch(found: Sequence[Evaluated], epoch: int, iteration: int) -> list[dict[str, Shown]]:
    """Evaluate the models of a pass, each into a folder of its run, unless that is done, and note the best.

    `results` of each for the log. Every rank must call. Detections are not kept. Nothing that training depends on
    changes: evaluation draws no random numbers.
    """
    annotations = val_annotations(found[0].config)
    missing = [one for one in found if not is_evaluated(one, annotations)]
    if missing:
        evaluate_models(missing, annotations, resamples=0, errors=False)
    if not distributed.is_main():
        return [{} for _ in found]
    for one in found:
        shutil.rmtree(one.output / "detections", ignore_errors=True)
        note_best(one.output, epoch, iteration)
    return [results(one, annotations) for one in found]


def draw_predictions(model: MaskRCNN, config: Config, run: Path) -> dict[str, Shown]:
    """RUN/predictions.jpg, what a model in training finds in some validation images, and the same for the boards.

    Rank 0 only. A disk that does not take it ends no run.
    """
    from loce.engine.drawing import write_picture  # drawing: where a picture is due only
    from loce.engine.pictures import predictions

    data = unaugmented(config.data)
    annotations = val_annotations(config).of_classes(model.stats.category_ids)
    picture = predictions(model, TrainDataset(annotations, Path(data.val_images), data, config.seed), None)
    with contextlib.suppress(OSError):
        write_picture(run / PREDICTIONS, picture)
    return {"predictions/validation": picture}


def results(one: Evaluated, annotations: LVISAnnotations) -> dict[str, Shown]:
    """The numbers of an evaluation in `output`, and a picture of predictions, also written there. Rank 0 only.

    annotations: of the validation data.
    """
    from loce.engine.drawing import write_picture  # drawing: after an evaluation only
    from loce.engine.pictures import predictions

    data, annotations = unaugmented(one.config.data), annotations.of_classes(one.model.stats.category_ids)
    dataset = TrainDataset(annotations, Path(data.val_images), data, one.config.seed)
    picture = predictions(one.model, dataset, one.output)
    write_picture(one.output / PREDICTIONS, picture)
    metrics: dict[str, Any] = json.loads((one.output / "metrics.json").read_text(encoding="utf-8"))
    numbers = {
        f"eval/{kind}_{name}": float("nan") if value is None or value < 0 else value  # -1: undefined
        for kind in ("bbox", "segm", "true_boxes")
        for name, value in metrics.get(kind, {}).items()
    }
    return {**numbers, "predictions/validation": picture}


def note_best(output: Path, epoch: int, iteration: int) -> None:
    """Make this epoch's checkpoint the best one, where it is; output: its evaluation's folder. Rank 0 only."""
    run = output.parent
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
