"""Folders of evaluations: none overwrites that of another file, or takes numbers away from one that is there."""

import json
from pathlib import Path

from loce.config import Config, from_dict, to_dict
from loce.engine.inference import ORIGIN, evaluation_folder


def name(run: Path, own: str, *words: str, train: str = "t/train.json", **report: object) -> str:
    """Name of the folder for an evaluation of a run whose validation file is `own`, with other options."""
    files = [f"data.val_annotations={own}", f"data.train_annotations={train}"]
    old = from_dict(to_dict(Config()), "", files)
    return evaluation_folder(run, old, from_dict(to_dict(old), "", words), report).name


def test_names(tmp_path: Path) -> None:
    assert name(tmp_path, "a/val.json") == "eval"
    assert name(tmp_path, "a/val.json", "eval.nms=0.4", max_detections=5) == "eval_eval.nms=0.4_max_detections=5"
    assert name(tmp_path, "a/val.json", "data.val_annotations=a/val2.json") == "eval_val2"
    assert name(tmp_path, "a/val.json", "data.val_annotations=t/train.json") == "eval_train"


def test_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    files = [f"mine/{split}/_annotations.coco.json" for split in ("valid", "test", "train")]
    names = [name(tmp_path, files[0], f"data.val_annotations={file}", train=files[2]) for file in files]
    assert names == ["eval", "eval_test-_annotations.coco", "eval_train-_annotations.coco"]
    # Two files that the run does not know: the second is named by more of its path, whatever comes first.
    first = name(tmp_path, "v.json", "data.val_annotations=a/x.json")
    (tmp_path / first).mkdir()
    (tmp_path / first / ORIGIN).write_text("weights 0, head softmax, a/x.json (sha256 0), images .")
    assert first == "eval_x" and name(tmp_path, "v.json", "data.val_annotations=a/x.json") == first
    assert name(tmp_path, "v.json", "data.val_annotations=b/x.json") == "eval_b-x"


def test_fewer_outputs_stand_beside(tmp_path: Path) -> None:
    assert name(tmp_path, "v.json", resamples=0) == "eval"  # nothing is there
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/evaluation.json").write_text(json.dumps({"intervals": {"bbox": {"AP": [0, 1]}, "segm": {}}}))
    (tmp_path / "eval/errors.csv").touch()
    assert name(tmp_path, "v.json") == name(tmp_path, "v.json", resamples=100) == "eval"
    assert name(tmp_path, "v.json", resamples=0) == "eval_resamples=0"
    words = "eval_iou_types=bbox_eval.errors=false"
    assert name(tmp_path, "v.json", "eval.errors=false", iou_types=["bbox"]) == words
