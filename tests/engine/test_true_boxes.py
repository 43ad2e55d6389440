"""Class scores of true boxes come with the detections: as from a pass of their own, whatever stopped the inference."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from loce.checkpoint.load import Checkpoint
from loce.data.build import val_annotations
from loce.data.dataset import TrainDataset, unaugmented
from loce.engine.inference import Evaluated, evaluate_checkpoints, infer
from loce.evaluation.annotations import FederatedFilter
from loce.evaluation.true_boxes import TrueBoxes, read_true_boxes

NO_ERRORS = ["eval.errors=false"]


@pytest.fixture
def copied(stage1: Path, tmp_path: Path) -> Path:
    """The run folder of `stage1`, a copy."""
    shutil.copytree(stage1, tmp_path / "run")
    return tmp_path / "run"


def same(folder: Path, expected: TrueBoxes | None) -> bool:
    found = read_true_boxes(folder)
    assert found is not None and expected is not None
    return all(np.array_equal(column, vars(expected)[name]) for name, column in vars(found).items())


def test_as_a_pass_of_their_own(stage1: Path) -> None:
    """Images as training sees them, unaugmented, one after the other."""
    checkpoint = Checkpoint.open(stage1)
    config, model = checkpoint.config, checkpoint.detector().eval()
    annotations, boxes = val_annotations(config), read_true_boxes(stage1 / "eval")
    dataset, ids = TrainDataset(annotations, config.data.val_images, unaugmented(config.data), 0), annotations.stats
    rows, scores, labels = [], [], []
    for index in annotations.train_images.tolist():
        sample, roi = dataset[index, 0], model.roi_heads
        with torch.no_grad():
            maps = model.features(model.batch_images([sample["image"]])[0])
            found = roi.scores(roi.classifier(roi.features_of(roi.pool(maps, [sample["boxes"]], 7))))
        rows, scores, labels = rows + sample["rows"].tolist(), [*scores, *found], labels + sample["labels"].tolist()
    assert boxes is not None and boxes.annotation_ids.tolist() == annotations.annotation_ids[rows].tolist()
    assert boxes.category_ids.tolist() == ids.category_ids[labels].tolist()
    assert boxes.best_ids.tolist() == [ids.category_ids[int(row.argmax())] for row in scores]
    assert boxes.best_scores == pytest.approx([float(row.max()) for row in scores], rel=1e-6)
    assert boxes.scores == pytest.approx([float(row[i]) for row, i in zip(scores, labels, strict=True)], rel=1e-6)
    # The same in the table of classes.
    table = np.genfromtxt(stage1 / "eval/mean_scores.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    for row in table:
        own = boxes.category_ids == row["id"]
        assert row["boxes"] == own.sum()
        if own.any():
            assert row["mean_score"] == pytest.approx(boxes.scores[own].mean(), abs=1e-6)
            assert row["accuracy"] == pytest.approx((boxes.best_ids == boxes.category_ids)[own].mean(), abs=1e-6)


def test_an_inference_that_was_stopped(copied: Path) -> None:
    """Goes on where it stopped, with the same result."""
    checkpoint, expected = Checkpoint.open(copied), read_true_boxes(copied / "eval")
    numbers = json.loads((copied / "eval/metrics.json").read_text())
    annotations, origin = val_annotations(checkpoint.config), (copied / "eval/origin.txt").read_text()
    shutil.rmtree(copied / "eval")
    found = Evaluated(checkpoint.detector(), checkpoint.config, copied / "eval", "")
    infer([found], annotations.only([0, 2]), FederatedFilter(annotations), [origin])
    (copied / "eval/origin.txt").write_text(origin)
    first = (copied / "eval/detections/detections_0000_000000.npz").read_bytes()
    evaluate_checkpoints([copied], copied / "eval", NO_ERRORS, "cpu", resamples=0)
    assert (copied / "eval/detections/detections_0000_000000.npz").read_bytes() == first
    assert same(copied / "eval", expected)
    assert json.loads((copied / "eval/metrics.json").read_text()) == numbers


def test_folders_of_older_versions(copied: Path) -> None:
    """Detections without true boxes stay where their scores stand beside them; else inference begins anew."""
    expected, (chunk,) = read_true_boxes(copied / "eval"), (copied / "eval/detections").glob("*.npz")
    with np.load(chunk) as content:
        old = {name: column for name, column in content.items() if not name.startswith("true_")}
    np.savez(chunk, **old)
    before = chunk.read_bytes()
    evaluate_checkpoints([copied], copied / "eval", NO_ERRORS, "cpu", resamples=0)
    assert chunk.read_bytes() == before and same(copied / "eval", expected)
    (copied / "eval/mean_scores.csv").unlink()
    evaluate_checkpoints([copied], copied / "eval", NO_ERRORS, "cpu", resamples=0)
    assert chunk.read_bytes() != before and same(copied / "eval", expected)
    assert (copied / "eval/mean_scores.csv").is_file()
