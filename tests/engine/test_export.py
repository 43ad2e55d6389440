"""Exported detectors: equal to what they were made of, and used without our package, as docs/export.md tells."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

import loce
from loce.checkpoint.load import Checkpoint
from loce.config import Config, HeadConfig, UserError, load_config
from loce.data.transforms import read_image
from loce.engine.export import FixedSizeDetector, export_run
from loce.heads import HEADS
from loce.models.backbone import TRUNKS
from loce.models.build import build_model
from loce.models.paste import paste_full
from loce.utils.files import read_csv
from scripts import export as script
from tests.conftest import random_run, stats_of
from tests.doc_pages import blocks
from tests.models.conftest import SMALL
from tests.models.small_trunks import SMALL_TRUNKS, small
from tests.tiny_runs import ROOT, environment, run

BOX, SCORE, MASK = 0.01, 1e-4, 1e-3  # docs/export.md
CANVAS = (64, 96)
Program = Callable[[Tensor, Tensor], dict[str, Tensor]]


def picture(size: tuple[int, int], seed: int = 0) -> Tensor:
    noise = np.random.default_rng(seed).integers(0, 256, (*[-(-side // 8) for side in size], 3), np.uint8)
    return torch.from_numpy(cv2.resize(noise, size[::-1])).permute(2, 0, 1).contiguous()


def check(found: dict[str, Tensor], expected: dict[str, Any], whole: tuple[int, int]) -> None:
    """The same detections, in any order where scores are close; masks where there are some.

    whole: (height, width) of the image, whose pixels the boxes are in.
    """
    count = int((found["scores"] > 0).sum())
    assert count == len(expected["scores"]) > 0
    assert not any(part[count:].any() for name, part in found.items() if name != "masks")
    scores, labels = found["scores"][:count], found["labels"][:count]
    off = (found["boxes"][:count, None] - expected["boxes"]).abs().amax(dim=2) / BOX
    off = off.maximum((scores[:, None] - expected["scores"]).abs() / SCORE)
    off = torch.where(labels[:, None] == expected["labels"], off, torch.inf)
    assert (off.amin(dim=0) < 1).all() and (off.amin(dim=1) < 1).all()
    assert ("masks" in found) == ("masks" in expected)
    if "masks" in found:
        masks = paste_full(found["masks"][:count], found["boxes"][:count], whole)
        theirs = expected["masks"][off.argmin(dim=1)]
        assert (masks != theirs).float().mean() < MASK


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights, and its file for images of 64 x 96."""
    path = tmp_path_factory.mktemp("export")
    random_run(path, gain=100)  # some scores are high
    told = export_run(path / "run", path / "detector.pt2", (60, 90), ["eval.detections=40"])
    assert told[0] == "images on a canvas of 64 x 96 px (height x width)"
    return path


@pytest.fixture(scope="module")
def program(folder: Path) -> Program:
    return torch.export.load(folder / "detector.pt2").module()


def test_an_image_that_fills_the_canvas_and_one_that_does_not(folder: Path, program: Program) -> None:
    """As in a batch with one of the canvas's size. What lies beside the content is not looked at."""
    model = Checkpoint.open(folder / "run").detector(load_config([str(folder / "tiny.yaml"), "eval.detections=40"]))
    model.only_predict()
    for size in (CANVAS, (64, 80), (33, 96)):
        image, filling = picture(size, 1), picture(CANVAS, 2)
        filling[:, : size[0], : size[1]] = image
        two = ([image, picture(CANVAS)], [(1.0, 1.0)] * 2, [size, CANVAS])
        check(program(filling, torch.tensor(size)), model.detect(*two, full_masks=True)[0], size)
    blank = program(picture(CANVAS), torch.tensor([1, 1]))  # proposals without area
    assert all(part.isfinite().all() for part in blank.values())


def check_example(rows: list[list[str]], found: dict[str, Tensor]) -> None:
    """What the program printed is what the detector finds with scores above .3."""
    wanted = [i for i, score in enumerate(found["scores"][:40].tolist()) if score > 0.3]
    assert [row[0] for row in rows] == [stats_of(6).names[found["labels"][i]] for i in wanted] != []
    for row, i in zip(rows, wanted, strict=True):
        assert float(row[1]) == pytest.approx(float(found["scores"][i]), abs=SCORE)
        assert json.loads(row[2]) == pytest.approx(found["boxes"][i].tolist(), abs=BOX)
        assert abs(int(row[3]) - int(found["masks"][i].sum())) <= 2  # pixels whose probability is a half


def test_the_example(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/export.md's program, which cannot import our package."""
    (text,) = blocks(ROOT / "docs/export.md", "python")
    assert len(text.splitlines()) <= 25
    (folder / "use.py").write_text(text)
    image = picture(CANVAS)
    cv2.imwrite(str(folder / "image.png"), image.permute(1, 2, 0).numpy()[:, :, ::-1])
    expected = loce.load_model(folder / "run")([image])[0]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "loce", None)
        patch.setattr(sys, "argv", ["use.py", str(folder / "detector.pt2"), str(folder / "image.png")])
        runpy.run_path(str(folder / "use.py"))
    check_example([row.split("\t") for row in capsys.readouterr().out.splitlines()], expected)


def test_mistakes_are_found_before_work_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(folder / "new.pt2")
    for words, problem in (
        (["run"], "usage: "),
        (["run", out, "size=[64]"], r"size = \[64\]: must be a height and a width"),
        (["run", str(folder / "new.pt")], r"must end in \.pt2"),
        (["run", str(folder / "detector.pt2")], "exists; files are never overwritten"),
        ([str(folder / "run"), out], r"size: must be given, as size=\[800,1333\]: there is no .*val\.json"),
    ):
        monkeypatch.setattr(sys, "argv", ["export.py", *words])
        with pytest.raises(UserError, match=problem):
            script.main()
    assert not Path(out).exists()


CASES: dict[str, Config] = {
    **{name: Config(model=SMALL, head=HeadConfig(name=name)) for name in HEADS},  # type: ignore[arg-type]
    **{name: Config(model=small(name)) for name in SMALL_TRUNKS},
    "boxes only": Config(model=replace(SMALL, masks=False)),
    "torchvision's RoIAlign": Config(model=replace(SMALL, roi=replace(SMALL.roi, aligned=False))),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_head_and_kind_of_trunk(case: str) -> None:
    config = CASES[case]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name, trunk in SMALL_TRUNKS.items():
            patch.setitem(TRUNKS, name, trunk)
        torch.manual_seed(0)
        model = build_model(config, stats_of(6), pretrained=False).only_predict()
        image = picture(CANVAS)
        expected = model.detect([image], [(1.0, 1.0)], [CANVAS], full_masks=True)[0]
        detector, example = FixedSizeDetector(model, CANVAS), (image, torch.tensor(CANVAS))
        detector(*example)
        check(torch.export.export(detector, example).module()(*example), expected, CANVAS)


@pytest.mark.slow
def test_fifty_images(stage1: Path, glyphs: Path, tmp_path: Path) -> None:
    """A trained detector, its default size and thresholds; one image by the program of docs/export.md alone."""
    run("export.py", stage1, tmp_path / "detector.pt2")
    files = {"about.json": ""}
    program = torch.export.load(tmp_path / "detector.pt2", extra_files=files).module()
    about, model = json.loads(files["about.json"]), loce.load_model(stage1)
    assert about["canvas"] == [64, 64] and about["names"] == list(model.class_names)
    thresholds = {row["name"]: row["threshold"] for row in read_csv(stage1 / "eval/per_category.csv")}
    chosen = [float(thresholds[name] or 0.3) for name in about["names"]]
    assert about["thresholds"] == pytest.approx(chosen)
    images = [read_image(path, None) for path in sorted(glyphs.glob("*2017/*.jpg"))]
    images += [image[::-1] for image in images] + [image[:, ::-1] for image in images]
    counts = []
    for image in images[:50]:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous()
        expected = model([pixels])[0]
        check(program(pixels, torch.tensor([64, 64])), expected, (64, 64))
        counts.append(len(expected["scores"]))
    assert len(counts) == 50
    (text,) = blocks(ROOT / "docs/export.md", "python")
    (tmp_path / "use.py").write_text(text.replace('torch.tensor(about["thresholds"])[found["labels"]]', "0"))
    cv2.imwrite(str(tmp_path / "image.png"), images[0][:, :, ::-1])
    line = "import runpy, sys; sys.modules['loce'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    words = [sys.executable, "-c", line, "use.py", "detector.pt2", "image.png"]
    variables = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=variables)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == counts[0], done.stderr
