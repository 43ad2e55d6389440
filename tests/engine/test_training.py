"""Whole runs on a tiny Glyph-LVIS, through the scripts that users start, in processes of their own."""

import json
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loce.config import load_config
from loce.data.build import train_annotations
from loce.data.glyphs.make import GlyphOptions, make_glyphs
from loce.engine.arm import load_initial_weights
from loce.models.build import build_model
from tests.tiny_runs import CONFIG, LOCE, TIMING, main_file, memory, metrics, run, weights


@pytest.fixture(scope="module")
def stage2(config: Path, stage1: Path) -> Path:
    folder = stage1.with_name("stage2")
    text = run("finetune.py", config, *LOCE, f"train.init={stage1}", f"output={folder}", "train.evaluate=false")
    assert "0 new, 0 dropped" in text
    assert "feature memory:" in text
    return folder


def test_a_run_leaves_everything_that_is_promised(stage1: Path) -> None:
    lines = metrics(stage1)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    losses = {"loss", "loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "loss_mask"}
    expected = losses | {"lr", "images_per_second", "data_share", "peak_memory_gib", "mean_score/r"}
    assert all(expected <= set(line) for line in lines)
    # 2 warm-up iterations from a thousandth, then a tenth after epoch 1; 0.01 at batch 16 is 0.0025 at batch 4
    assert [line["lr"] for line in lines] == pytest.approx([2.5e-6, 0.00125125, 2.5e-3, 2.5e-4, 2.5e-4, 2.5e-4])
    for name in ("config.yaml", "env.txt", "log.txt", "eval/metrics.json", "eval/mean_scores.csv"):
        assert (stage1 / name).stat().st_size, name
    for picture in ("first_samples.jpg", "eval/predictions.jpg"):
        assert min(cv2.imread(str(stage1 / picture)).shape[:2]) > 400
    pages = EventAccumulator(str(stage1 / "tensorboard")).Reload().Tags()
    curves = {"loss/all", "loss/mask", "speed/learning_rate", "mean_score/rare", "memory/peak_GiB", "eval/segm_AP"}
    assert curves <= set(pages["scalars"])
    assert pages["images"] == ["run/first_samples", "predictions/validation"]
    assert pages["histograms"] == ["mean_score/classes"]
    assert {"run/header/text_summary", "run/config/text_summary"} <= set(pages["tensors"])
    log = (stage1 / "log.txt").read_text()
    assert "expected end: the run is over before" in log and re.search(r"disk: up to [\d.]+ MB .* are free", log)
    found = json.loads((stage1 / "eval/metrics.json").read_text())
    assert set(found) == {"bbox", "segm", "true_boxes"} and all(-1 <= value <= 1 for value in found["segm"].values())


def test_stage_2_trains_the_four_parts_and_nothing_else(stage1: Path, stage2: Path) -> None:
    before, after = weights(stage1), weights(stage2)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = ("roi_heads.classifier.", "roi_heads.fc_reg.", "roi_heads.mask_head.", "rpn.")
    assert changed - {"roi_heads.tracker.scores"} == {name for name in before if name.startswith(parts)}
    assert after["written"].min() > 0  # every class has a training image
    assert all({"memory_fill/r", "mean_score/r"} <= set(line) for line in metrics(stage2))


def near(lines: list[dict[str, float]], others: list[dict[str, float]]) -> None:
    """Fail where two runs' metrics differ by more than rounding does in a few steps."""
    for line, other in zip(lines, others, strict=True):
        compared = {k: v for k, v in other.items() if k not in TIMING}
        assert {k: v for k, v in line.items() if k not in TIMING} == pytest.approx(compared, rel=1e-3)


def test_two_processes_train_and_evaluate_like_one(config: Path, stage1: Path) -> None:
    folder = stage1.with_name("two")
    text = run("train.py", config, f"output={folder}", processes=2)
    assert "batch: 4 = 2 ranks x 2 images x 1 steps" in text
    one, two = metrics(stage1), metrics(folder)
    near(two, one)
    assert len(list((folder / "eval/detections").glob("detections_000[01]_*.npz"))) == 2


def test_shared_memory_makes_one_and_two_processes_train_alike(config: Path, stage1: Path) -> None:
    """From the filling of the memory to the last step."""
    words = (*LOCE, "memory.shared=true", f"train.init={stage1}", "train.evaluate=false")
    one, two = stage1.with_name("shared1"), stage1.with_name("shared2")
    run("finetune.py", config, *words, f"output={one}")
    run("finetune.py", config, *words, f"output={two}", processes=2)
    near(metrics(two), metrics(one))
    assert memory(one)["written"].min() > 0
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=1e-3, atol=1e-4)
    assert not main_file(two).with_name("memory1.pt").exists()


def test_accumulation_sees_the_same_images(config: Path, stage1: Path) -> None:
    folder = stage1.with_name("accumulate")
    run("train.py", config, f"output={folder}", "train.accumulate=2", "train.evaluate=false")
    assert metrics(folder)[0]["loss_rpn_cls"] == pytest.approx(metrics(stage1)[0]["loss_rpn_cls"], rel=0.02)


def test_bf16_trains(config: Path, stage1: Path) -> None:
    folder = stage1.with_name("bf16")
    run("train.py", config, f"output={folder}", "train.precision=bf16", "train.evaluate=false")
    assert metrics(folder)[0]["loss"] == pytest.approx(metrics(stage1)[0]["loss"], rel=0.1)


@pytest.mark.parametrize("words", [("memory.dtype=bfloat16",), ("memory.level=roi",)])
def test_stage_2_in_bf16(config: Path, stage1: Path, stage2: Path, words: tuple[str, ...]) -> None:
    folder = stage1.with_name("bf16" + words[0])
    common = (f"train.init={stage1}", f"output={folder}", "train.evaluate=false", "train.precision=bf16")
    run("finetune.py", config, *LOCE, *words, *common)
    assert metrics(folder)[0]["loss"] == pytest.approx(metrics(stage2)[0]["loss"], rel=0.1)
    wanted = torch.bfloat16 if "bfloat16" in words[0] else torch.float32
    assert memory(folder)["features"].dtype == wanted


@pytest.mark.slow
def test_one_and_three_ranks_evaluate_to_the_same_numbers(config: Path, stage1: Path) -> None:
    alone = json.loads((stage1 / "eval/metrics.json").read_text())
    output = stage1.with_name("evaluated")
    run("evaluate.py", f"checkpoint={stage1}", f"output={output}", processes=3)
    assert json.loads((output / "metrics.json").read_text()) == alone


def test_a_head_of_the_same_weights_is_tried_at_evaluation(config: Path, stage1: Path) -> None:
    """After the fact, into a folder of its own; weights that do not fit are told."""
    words = ("evaluate.py", f"checkpoint={stage1}", "resamples=0")
    text = run(*words, "head.name=norcal", "head.norcal.gamma=0.9")
    folder = stage1 / "eval_head.name=norcal_head.norcal.gamma=0.9"
    assert "main.pt with head.name=norcal head.norcal.gamma=0.9, weights" in text and str(folder) in text
    assert json.loads((folder / "evaluation.json").read_text())["results"].count("head norcal norcal.gamma=0.9") == 1
    assert (stage1 / "eval/origin.txt").read_text() != (folder / "origin.txt").read_text()
    causes = (stage1 / "eval/errors.csv").read_text().splitlines()
    row = dict(zip(causes[0].split(","), causes[1].split(","), strict=True))
    assert row["no_detection"] == "" and row["no_proposal"] != ""  # inference left its clues
    assert "do not fit the options" in run(*words, "head.name=bags", code=2)
    assert "head.norcal.gama" in run(*words, "head.norcal.gama=1", code=2)


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("train.py", ("data.train_annotations=nowhere/train.json",), "nowhere/train.json"),
        ("train.py", ("data.train_images=nowhere",), "12 of 12 images are missing"),
        ("train.py", ("train.epocs=3",), "train.epochs"),
        ("finetune.py", (), "scripts/train.py stage1.yaml"),
        ("finetune.py", ("train.init=runs/never",), "train.init = runs/never: no finished checkpoint there"),
        ("train.py", ("train.batch_size=3", "train.accumulate=2"), "divisible"),
    ],
)
def test_mistakes_are_told_without_traceback(config: Path, script: str, words: tuple[str, ...], message: str) -> None:
    text = run(script, config, f"output={config.parent}/never", *words, code=2)
    assert message in text
    assert "Traceback" not in text
    assert not (config.parent / "never").exists()


def test_checkpoint_of_other_classes_is_refused(config: Path, stage1: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    sizes = {"classes": 5, "train_images": 6, "val_images": 4, "size": 64, "smallest": 0.26, "largest": 0.4}
    make_glyphs(GlyphOptions(out=str(data), workers=1, **sizes))
    other = tmp_path / "other.yaml"
    other.write_text(CONFIG.format(data))
    text = run("finetune.py", other, *LOCE, f"train.init={stage1}", f"output={tmp_path}/run", code=2)
    assert "has 6 classes, the training data has 5" in text
    assert "Traceback" not in text


def test_load_model_predicts(stage1: Path) -> None:
    import loce

    model = loce.load_model(stage1)
    image = torch.randint(0, 255, (3, 50, 70), dtype=torch.uint8)
    found = model([image])[0]
    assert set(found) == {"boxes", "labels", "scores", "masks"}
    count = len(found["scores"])
    assert found["boxes"].shape == (count, 4) and found["masks"].shape == (count, 50, 70)
    assert len(model.class_names) == 6


def test_what_a_second_stage_has_otherwise_is_said(config: Path, stage1: Path) -> None:
    options = load_config([str(config), f"train.init={stage1}", "data.short_edges=[48]"])
    stats = train_annotations(options).stats
    others = replace(stats, groups=np.array(["f", *stats.groups[1:]]))
    told = [line for line in load_initial_weights(options, build_model(options, others), others) if "WARNING" in line]
    assert told[0] == f"WARNING: {stage1} saw images at data.short_edges=[64], this run shows others"
    assert told[1].startswith(f"WARNING: 1 of 6 classes are in other groups than in {stage1}: ") and len(told) == 2
    same = load_config([str(config), f"train.init={stage1}"])
    assert "WARNING" not in " ".join(load_initial_weights(same, build_model(same, stats), stats))
