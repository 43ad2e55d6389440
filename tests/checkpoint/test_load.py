"""Checkpoints are read once, also those of older versions; what cannot be used is refused by name."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loce.checkpoint.load import FORMAT, Checkpoint, load_model, stats_to_dict, weights_hash
from loce.checkpoint.save import save
from loce.config import Config, UserError, load_config, to_dict
from loce.models.build import build_model
from loce.models.mask_rcnn import MaskRCNN
from tests.conftest import stats_of
from tests.tiny_runs import CONFIG, LOCE, ROOT, command, environment, run

# Runs a script and says how often each of a checkpoint's files was opened for reading.
COUNTED = """
import atexit, collections, json, os, runpy, sys
opened = collections.Counter()
def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".pt") and "r" in (arguments[1] or ""):
        opened[os.path.basename(str(arguments[0]))] += 1
sys.addaudithook(hook)
atexit.register(lambda: print("opened", json.dumps(opened)))
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ONCE = {"main.pt": 2}  # its checksum, its content


def opened(folder: Path, script: str, *words: str | Path) -> tuple[dict[str, int], str]:
    """How often a script opens files of checkpoints, and its output."""
    (folder / "counted.py").write_text(COUNTED)
    line = [sys.executable, str(folder / "counted.py"), *command(script, *words)[1:]]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    counts: dict[str, int] = json.loads(re.findall(r"^opened (.*)$", done.stdout, re.MULTILINE)[-1])
    return counts, done.stdout


def test_a_checkpoint_is_read_once(config: Path, stage1: Path, tmp_path: Path) -> None:
    counts, _ = opened(tmp_path, "evaluate.py", f"checkpoint={stage1}", f"output={tmp_path / 'eval'}", "resamples=0")
    assert counts == ONCE
    start = min(stage1.glob("checkpoints/*"))  # not the last one
    words = (config, *LOCE, f"train.init={start}", f"output={tmp_path / 'stage2'}", "train.evaluate=false")
    counts, text = opened(tmp_path, "finetune.py", *words)
    assert counts == ONCE
    assert f"WARNING: {start}/main.pt is of an unfinished run: {int(start.name)} of 6 iterations were done" in text
    shutil.copytree(stage1, tmp_path / "again")
    counts, text = opened(tmp_path, "train.py", config, f"output={tmp_path / 'again'}", "train.evaluate=false")
    assert counts == {**ONCE, "rank0.pt": 2} and "training is finished already" in text


def test_images_without_annotations(glyphs: Path, stage1: Path, tmp_path: Path) -> None:
    """Files of test images have no list of annotations: results for a server, and no numbers."""
    content = json.loads((glyphs / "annotations/val.json").read_text())
    (tmp_path / "image_info.json").write_text(json.dumps({k: v for k, v in content.items() if k != "annotations"}))
    words = (f"checkpoint={stage1}", f"annotations={tmp_path / 'image_info.json'}", f"output={tmp_path / 'eval'}")
    text = run("evaluate.py", *words, code=2)
    assert "image_info.json: no list of annotations" in text and "save_json=true writes results.json" in text
    (tmp_path / "empty.json").write_text(json.dumps({**content, "annotations": []}))
    text = run("evaluate.py", words[0], f"annotations={tmp_path / 'empty.json'}", words[2], code=2)
    assert "empty.json: has no annotations" in text and "save_json=true writes results.json" in text
    text = run("evaluate.py", *words, "save_json=true")
    assert f"results.json, without numbers, is in {tmp_path / 'eval'}" in text and "| AP" not in text
    rows = json.loads((tmp_path / "eval/results.json").read_text())
    assert {row["image_id"] for row in rows} <= {image["id"] for image in content["images"]} and rows
    assert not (tmp_path / "eval/metrics.json").exists()


@pytest.fixture
def tiny(tmp_path: Path) -> Config:
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(tmp_path))
    return load_config([str(tmp_path / "tiny.yaml"), f"output={tmp_path / 'run'}"])


def written(config: Config, file: Path, **changes: Any) -> MaskRCNN:
    """The model whose weights are in a file of the newest format; `changes` to its members."""
    model = build_model(config, stats_of(6), pretrained=False)
    classes = stats_to_dict(stats_of(6))
    content = {"format": FORMAT, "config": to_dict(config), "classes": classes, "model": model.state_dict()}
    torch.save({**content, **changes}, file)
    return model


def test_a_file_of_before_the_classifier_had_its_name(tiny: Config, tmp_path: Path) -> None:
    """Its weights load under today's names; hashes are those of the old names, so that records still match."""
    model = build_model(tiny, stats_of(6), pretrained=False)
    old = {name.replace("roi_heads.classifier.", "roi_heads.head."): w for name, w in model.state_dict().items()}
    assert any(name.startswith("roi_heads.head.") for name in old)
    written(tiny, tmp_path / "old.pt", model=old)
    loaded = load_model(tmp_path / "old.pt")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    digest = hashlib.sha256()
    for name, value in old.items():
        if not name.startswith(("roi_heads.tracker.", "roi_heads.memory.")):
            digest.update(name.encode() + value.numpy().tobytes())
    assert weights_hash(loaded) == digest.hexdigest()[:12]


def test_weights_that_are_not_finite(tiny: Config, tmp_path: Path) -> None:
    model = build_model(tiny, stats_of(6), pretrained=False)
    bad = [name for name, _ in model.named_parameters()][:7]
    weights = {name: w * torch.nan if name in bad else w for name, w in model.state_dict().items()}
    written(tiny, tmp_path / "bad.pt", model=weights)
    for use in (Checkpoint.open, load_model):
        with pytest.raises(UserError) as caught:
            use(tmp_path / "bad.pt")
        message = str(caught.value)
        assert f"7 of {len(weights)} tensors have values that are not finite" in message and "bad.pt" in message
        assert all(name in message for name in bad[:5]) and bad[5] not in message and "... (7 in all)" in message


def test_how_far_a_run_had_come(tiny: Config, tmp_path: Path) -> None:
    model = build_model(tiny, stats_of(6), pretrained=False)
    model.roi_heads.progress = 5 / 15
    saved = save(Path(tiny.output), tiny, stats_of(6), model, {"iteration": 5, "optimizer": {}, "scaler": {}}, {})
    half = Checkpoint.open(tiny.output)
    assert half.path == saved.folder / "main.pt" and half.unfinished and half.iterations == "5 of 15"
    written(tiny, tmp_path / "older.pt", iteration=5)
    older = Checkpoint.open(tmp_path / "older.pt")
    assert not older.unfinished and older.iterations == "5"
