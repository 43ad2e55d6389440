"""Whole runs on data that is not as it should be, through the scripts that users start."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tests.data.made_annotations import as_format, content

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
data: {{train_annotations: {0}/train.json, train_images: {0}/images, val_annotations: {0}/val.json,
  val_images: {0}/images, short_edges: [64], test_short_edge: 64, long_edge: 100, workers: 1}}
model: {{backbone: tiny, weights: none, norm: group, frozen_stages: 0, fpn_channels: 8, fc_features: 8,
  mask_channels: 8, mask_convs: 1, rpn: {{anchor_scale: 4, pre_nms_train: 50, pre_nms_test: 50, post_nms: 30,
  batch_per_image: 16}}, roi: {{batch_per_image: 16, finest_scale: 14}}}}
train: {{batch_size: 4, epochs: 1, drops: [], log_every: 1, clip_norm: 10}}
"""


def write_set(folder: Path, name: str, made: dict[str, Any]) -> None:
    """An annotation file and its images; a file that is there stays."""
    (folder / f"{name}.json").write_text(json.dumps(made))
    for image in made["images"]:
        path = folder / "images" / "/".join(image["coco_url"].split("/")[-2:])
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            noise = np.random.default_rng(image["id"]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            cv2.imwrite(str(path), cv2.resize(noise, (image["width"], image["height"])))


def of_split(made: dict[str, Any], split: str) -> dict[str, Any]:
    for image in made["images"]:
        image["coco_url"] = image["coco_url"].replace("train2017", split)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path, "train", as_format(content(images=24), "lvis_v1"))
    write_set(tmp_path, "val", of_split(as_format(content(images=6, seed=1), "lvis_v1"), "val2017"))
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(tmp_path))
    return tmp_path


def run(*words: str | Path, processes: int = 1, code: int = 0, script: str = "train.py") -> str:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [*launch, str(ROOT / "scripts" / script), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr  # torchrun's own code is 1
    if processes == 1:
        assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_two_ranks_end_together_with_one_list(folder: Path) -> None:
    paths = sorted((folder / "images/train2017").iterdir())
    for path in paths[::4]:
        path.write_bytes(b"\xff\xd8 cut")
    text = run(folder / "tiny.yaml", f"output={folder / 'run'}", "train.evaluate=false", processes=2, code=2)
    assert "more than 1 of 24 images cannot be used" in text and "`make check-data` finds all of them" in text
    lists = text.split("more than 1 of 24 images cannot be used, too many to go on:\n")[1:]  # of rank 0, perhaps of 1
    assert len({part.split("`make check-data`")[0] for part in lists}) == 1
    for path in paths[::4]:
        told = text.count(f"warning: image {int(path.stem)}: {path}: damaged")
        assert told == 1, (path, told)  # an epoch shows each of them once, on one rank or the other


def test_training_and_evaluation_go_on_without_missing_images(folder: Path) -> None:
    for split, number in (("train2017", 5), ("val2017", 2)):
        for path in sorted((folder / "images" / split).iterdir())[:number]:
            path.unlink()
    words = (folder / "tiny.yaml", f"output={folder / 'run'}")
    refused = run(*words, code=2)
    assert "5 of 24 images are missing" in refused and "2 of 6 images are missing" in refused
    text = run(*words, "data.allow_missing=true")
    assert f"data: left out: 5 images that are missing in {folder / 'images'} (data.allow_missing)" in text
    assert "note: PARTIAL: the numbers are of 4 of 6 images" in text
    facts = json.loads((folder / "run/eval/evaluation.json").read_text())
    assert facts["images"] == 4 and any(note.startswith("PARTIAL") for note in facts["notes"])


def test_images_in_both_splits_are_said_when_training_starts(folder: Path) -> None:
    made = json.loads((folder / "train.json").read_text())
    made["images"] = made["images"][:6]
    ids = {image["id"] for image in made["images"]}
    made["annotations"] = [row for row in made["annotations"] if row["image_id"] in ids]
    write_set(folder, "val", made)
    text = run(folder / "tiny.yaml", f"output={folder / 'run'}")
    assert "data: WARNING: 6 images are in" in text and "no result of unseen images" in text


def test_masks_that_evaluation_cannot_read_are_said_before_training(folder: Path) -> None:
    made = json.loads((folder / "val.json").read_text())
    made["annotations"][3]["segmentation"] = [[1, 2, 3, 4, 5]]
    (folder / "val.json").write_text(json.dumps(made))
    text = run(folder / "tiny.yaml", f"output={folder / 'run'}", code=2)
    assert f"(annotations {made['annotations'][3]['id']}): evaluation compares with every mask" in text
    assert "iter 1/" not in text


def test_a_set_of_boxes_alone_trains_and_is_evaluated_by_boxes(folder: Path) -> None:
    """As docs/own_data.md says it."""
    for split in ("train", "val"):
        made = json.loads((folder / f"{split}.json").read_text())
        for row in made["annotations"]:
            row["segmentation"] = []
        (folder / f"{split}.json").write_text(json.dumps(made))
    config, option, output = folder / "tiny.yaml", "data.without_mask=box", f"output={folder / 'run'}"
    assert "nothing to mend" in run(config, option, "decode=none", script="check_data.py")
    assert "data.without_mask=box" in run(config, output, code=2)  # how it could go on
    assert "bbox, " in (text := run(config, option, output)) and "segm, " not in text
    words = (f"checkpoint={folder / 'run'}", "resamples=0", f"output={folder / 'numbers'}")
    run(*words, "iou_types=bbox", script="evaluate.py")
    metrics = json.loads((folder / "numbers/metrics.json").read_text())
    assert any("bbox" in str(key) for key in metrics) and not any("segm" in str(key) for key in metrics)


@pytest.mark.slow
def test_classes_of_one_split_and_images_without_objects_through_both_stages(folder: Path) -> None:
    train, val = (json.loads((folder / f"{split}.json").read_text()) for split in ("train", "val"))
    ids = sorted(
        {row["category_id"] for row in train["annotations"]} & {row["category_id"] for row in val["annotations"]}
    )
    only_val, only_train = ids[0], ids[1]
    bare = {image["id"] for image in train["images"][:3]}
    train["annotations"] = [
        row for row in train["annotations"] if row["category_id"] != only_val and row["image_id"] not in bare
    ]
    val["annotations"] = [row for row in val["annotations"] if row["category_id"] != only_train]
    for split, made in (("train", train), ("val", val)):
        (folder / f"{split}.json").write_text(json.dumps(made))
    stage1, loce = folder / "stage1", folder / "loce"
    text = run(folder / "tiny.yaml", f"output={stage1}")
    assert re.search(r"data: left out: [3-9] images without an annotation that training uses", text), text
    words = (f"output={loce}", f"train.init={stage1}", "data.keep_empty=true", "train.freeze=trunk")
    words = (*words, "head.name=equilibrium", "memory.enabled=true")
    text = run(folder / "tiny.yaml", *words, script="finetune.py")
    rows = {int(row["id"]): row for row in csv.DictReader((loce / "eval/per_category.csv").open())}
    assert rows[only_train]["AP"] == "-1" and float(rows[only_val]["AP"]) >= 0
    memory = torch.load(max(loce.glob("checkpoints/*/memory0.pt")), weights_only=True)
    labels = [category["id"] for category in train["categories"]]
    assert memory["written"][labels.index(only_val)] == 0 and memory["written"][labels.index(only_train)] > 0
