"""The guide's choices on made data sets, its slow twin for anchors, and the recipes that it writes."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loce.config import UserError, load_config
from loce.data.annotations.lvis import LVISAnnotations
from loce.engine.guide import CPU_BASE, GPU_BASE, anchor_fit, choose, write_recipes
from tests.tiny_runs import ROOT, environment


def made(
    images: int = 100,
    size: tuple[int, int] = (320, 240),
    side: float = 60,
    masks: int | None = None,
    classes: int = 6,
) -> dict[str, Any]:
    """A set of images of this width and height with an object each, of classes ever rarer; `masks` of them have one."""
    rng = np.random.default_rng(0)
    kinds = np.minimum(rng.geometric(0.4, images), classes)
    square = [[5, 5, 5 + side, 5, 5 + side, 5 + side, 5, 5 + side]]
    rows = [
        {"id": n, "image_id": n, "category_id": int(kind), "bbox": [5, 5, side, side], "area": side**2, "iscrowd": 0}
        | ({"segmentation": square} if masks is None or n < masks else {})
        for n, kind in enumerate(kinds)
    ]
    names = [{"id": n, "name": f"c{n}"} for n in range(1, classes + 1)]
    shown = [{"id": n, "width": size[0], "height": size[1], "file_name": f"{n}.jpg"} for n in range(images)]
    return {"images": shown, "annotations": rows, "categories": names}


def chosen(content: dict[str, Any], gpu: float = 0, cores: int = 2) -> dict[str, Any]:
    annotations = LVISAnnotations.open(content, box_masks=True)
    choices = choose(annotations, GPU_BASE if gpu else CPU_BASE, gpu, cores)
    assert all(choice.reason for choice in choices)
    return {choice.key: choice.value for choice in choices}


def test_image_size_follows_images_objects_and_time() -> None:
    usual = chosen(made())
    assert usual["data.test_short_edge"] == 240 and usual["data.short_edges"] == [176, 208, 240]
    assert chosen(made(side=10))["data.test_short_edge"] == 384  # 10 px become 16
    assert chosen(made(side=3))["data.test_short_edge"] == 480  # images are made twice as large at most
    large = made(size=(4000, 3000), side=700)
    few, many = (chosen(large, cores=cores) for cores in (1, 4))
    assert few["data.test_short_edge"] < many["data.test_short_edge"] < 512
    assert chosen(made(size=(4000, 3000), side=20))["data.test_short_edge"] == 512
    assert chosen(made(size=(1000, 800), side=100), gpu=24e9)["data.test_short_edge"] == 800
    assert chosen(made(size=(4000, 3000), side=80), gpu=24e9)["data.test_short_edge"] == 1200


def test_length_follows_the_images() -> None:
    few, many = chosen(made(images=50)), chosen(made(images=5000))
    assert few["train.epochs"] == 200 and few["train.drops"] == [160]
    assert many["train.epochs"] == 2 and "train.warmup_iterations" not in many
    assert chosen(made(images=8))["train.warmup_iterations"] == 50
    assert chosen(made(images=5000), gpu=24e9)["train.epochs"] == 24


def test_batch_follows_the_memory() -> None:
    content = made(size=(1333, 800), side=100)
    batches = [chosen(content, gpu=memory)["train.batch_size"] for memory in (80e9, 24e9, 16e9, 8e9)]
    assert batches == [16, 8, 4, 2] and "train.batch_size" not in chosen(content)


def test_masks_groups_and_detections() -> None:
    assert not {"model.masks", "data.without_mask"} & set(chosen(made()))
    assert chosen(made(masks=0))["model.masks"] is False
    assert chosen(made(masks=60))["data.without_mask"] == "box"
    bounds = chosen(made(images=1000))
    stats = LVISAnnotations.open(made(images=1000), bounds["data.rare_max"], bounds["data.common_max"]).stats
    assert all(stats.group_mask(group).any() for group in "rcf")
    assert chosen(made())["eval.detections"] == 100
    many = made(images=300, classes=120)
    assert chosen(many)["eval.detections"] == 100  # most of them are placeholders
    assert chosen(many)["data.drop_empty"] and "data.drop_empty" not in chosen(made())
    for row in many["annotations"]:
        row["category_id"] = row["id"] % 120 + 1
    assert not {"eval.detections", "data.drop_empty"} & set(chosen(many))


def test_anchors_fit_as_a_loop_says() -> None:
    rng = np.random.default_rng(1)
    sides = rng.uniform(3, 200, (40, 2))
    for scale in (2, 5, 8):
        best = []
        for width, height in sides:
            overlaps = []
            for stride, ratio in itertools.product((4, 8, 16, 32, 64), (0.5, 1.0, 2.0)):
                w, h = scale * stride / ratio**0.5, scale * stride * ratio**0.5
                common = min(w, width) * min(h, height)
                overlaps.append(common / (w * h + width * height - common))
            best.append(max(overlaps))
        assert anchor_fit(sides, scale) == pytest.approx(sum(best) / len(best), rel=1e-12)
    assert chosen(made(size=(320, 240), side=40))["model.rpn.anchor_scale"] != 4


def test_recipes_load_and_are_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.json").write_text(json.dumps(made(masks=0)))
    pairs = ("train.json", "photos"), ("val.json", "photos")
    lines, commands = write_recipes(Path("mine.yaml"), *pairs, {"data.exif": "apply", "data.short_edges": (64,)})
    stage1, loce = load_config(["mine.yaml"]), load_config(["mine_loce.yaml"])
    assert (stage1.data.train_annotations, stage1.data.val_images) == ("train.json", "photos")
    assert stage1.data.exif == "apply" and stage1.data.short_edges == (64,) and not stage1.model.masks
    assert loce.train.init == stage1.output == "runs/mine" and loce.head.name == "equilibrium"
    assert loce.train.epochs == -(-stage1.train.epochs // 4) and loce.data == stage1.data and loce.model == stage1.model
    assert (
        any("no object has a mask" in line for line in lines)
        and "# no object has a mask" in Path("mine.yaml").read_text()
    )
    assert commands[1] == "python scripts/train.py mine.yaml" and "mine_loce.yaml" in commands[2]
    with pytest.raises(UserError, match=r"mine.yaml is there, and is not overwritten"):
        write_recipes(Path("mine.yaml"), *pairs, {})
    with pytest.raises(UserError, match=r"must end in .yaml"):
        write_recipes(Path("mine"), *pairs, {})
    Path("none.json").write_text(json.dumps({**made(), "annotations": []}))
    with pytest.raises(UserError, match=r"none of its objects"):
        write_recipes(Path("other.yaml"), ("none.json", "photos"), pairs[1], {})


def test_the_script_writes_a_recipe_and_checks_by_it(tmp_path: Path) -> None:
    """What is wrong with the data is said all the same: here there is no image."""
    (tmp_path / "train.json").write_text(json.dumps(made(images=20)))
    words = ["train.json", "train.json", "images=.", "recipe=mine.yaml", "decode=none"]
    line = [sys.executable, str(ROOT / "scripts/check_data.py"), *words]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=300)
    assert done.returncode == 2 and "20 of 20 images are missing" in done.stderr, done.stdout + done.stderr
    assert "wrote mine.yaml" in done.stdout and load_config([str(tmp_path / "mine.yaml")]).data.train_images == "."
