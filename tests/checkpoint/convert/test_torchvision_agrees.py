"""A Mask R-CNN that torchvision trained: converted, it detects the same, and LOCE starts from it.

What differs on purpose (docs/differences.md: rounded anchors) is put in from outside.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.mask_rcnn import MaskRCNN
from torchvision.ops import MultiScaleRoIAlign

from benchmarks.torchvision_maskrcnn import Images, build, train
from loce.checkpoint.convert import convert
from loce.checkpoint.load import load_model
from loce.config import UserError, load_config
from loce.engine.preflight import preflight
from loce.engine.trainer import Trainer
from loce.models.roi_heads import pool
from tests.doc_pages import ROOT, blocks, clone, fenced_commands, run_command
from tests.tiny_runs import metrics, train_here

PAGE = ROOT / "docs/rebalance.md"
SIZES = ["data.short_edges=[64]", "data.test_short_edge=64", "data.long_edge=128", "model.rpn.anchor_scale=4"]


@pytest.fixture(scope="module")
def theirs(glyphs: Path) -> MaskRCNN:
    """Trained for a step on `glyphs`, with classifier and regressors that then say something."""
    torch.manual_seed(0)
    model = build(6)
    train(model, Images(glyphs, "train"), 1)
    with torch.no_grad():
        for layer in (model.roi_heads.box_predictor.cls_score, model.rpn.head.cls_logits):
            layer.weight.normal_(std=0.3)
        for layer in (model.roi_heads.box_predictor.bbox_pred, model.rpn.head.bbox_pred):
            layer.weight.normal_(std=0.03)
    return model.eval()


@pytest.fixture(scope="module")
def converted(theirs: MaskRCNN, glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    torch.save(theirs.state_dict(), folder / "model.pth")
    file = str(glyphs / "annotations/train.json")
    content, report = convert(folder / "model.pth", file, file, overrides=SIZES)
    torch.save(content, folder / "converted.pt")
    told = next(line for line in report if line.startswith("to train from it: "))
    assert {"model.backbone=resnet18", "model.roi.aligned=false", "data.short_edges=[64]"} <= set(told.split())
    return folder / "converted.pt"


@torch.no_grad()
def test_detections_are_torchvisions(theirs: MaskRCNN, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = load_model(converted)
    monkeypatch.setattr(ours.rpn, "anchors", lambda features: rounded(theirs, features))
    generator = torch.Generator().manual_seed(0)
    for size in ((64, 64), (64, 128)):
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
        found = ours.detect_images([image])[0]
        expected = theirs([image / 255])[0]
        assert len(found["scores"]) == len(expected["scores"]) == 300
        torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=1e-5)
        assert expected["scores"][0] > 2 * expected["scores"][-1] and len(expected["labels"].unique()) > 1
        assert torch.equal(found["labels"][:50], expected["labels"][:50] - 1)
        torch.testing.assert_close(found["boxes"][:50], expected["boxes"][:50], rtol=0, atol=0.01)


def rounded(theirs: MaskRCNN, features: list[Tensor]) -> list[Tensor]:
    """torchvision's anchors for our feature maps, level by level; the last map's stride is 64, as ours."""
    maker = theirs.rpn.anchor_generator
    grids, device = [list(x.shape[-2:]) for x in features], features[0].device
    strides = [[torch.tensor(4 * 2**level)] * 2 for level in range(len(features))]
    maker.set_cell_anchors(torch.float32, device)
    return maker.grid_anchors(grids, strides)


@pytest.mark.parametrize("side", [7, 14])
def test_pooling_is_torchvisions(side: int) -> None:
    torch.manual_seed(0)
    features = [torch.randn(2, 3, 256 // stride, 320 // stride) for stride in (4, 8, 16, 32)]
    corners = torch.rand(2, 40, 2) * 200
    boxes = list(torch.cat([corners, corners + torch.exp(torch.rand(2, 40, 2) * 5)], dim=2))
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], side, sampling_ratio=2)
    expected = theirs({str(i): x for i, x in enumerate(features)}, boxes, [(256, 320)] * 2)
    torch.testing.assert_close(pool(features, boxes, side, 56.0, aligned=False), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(pool(features, boxes, side, 56.0), expected, atol=0.1)


def recipe(converted: Path, glyphs: Path, folder: Path, *words: str) -> list[str]:
    """The page's recipe with the data of `glyphs`, as words for `load_config`."""
    (body,) = blocks(PAGE, "yaml")
    body = body.replace("runs/glyphs20", str(glyphs)).replace("runs/theirs/converted.pt", str(converted))
    (folder / "rebalance.yaml").write_text(body)
    return [str(folder / "rebalance.yaml"), f"output={folder / 'run'}", "data.workers=0", *words]


def test_loce_starts_from_it(converted: Path, glyphs: Path, tmp_path: Path) -> None:
    config = load_config(recipe(converted, glyphs, tmp_path, "device=cpu"))
    with preflight(config) as found:
        made = Trainer([config], torch.device("cpu"), found.annotations)
    assert not any("WARNING" in line for line in made.arms[0].notes)
    stored = torch.load(converted, weights_only=True)["model"]
    state = made.arms[0].model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in stored.items() if "tracker" not in key)
    assert made.arms[0].model.roi_heads.memory is not None and not made.arms[0].model.config.roi.aligned


def test_loce_starts_from_a_faster_r_cnn(theirs: MaskRCNN, glyphs: Path, tmp_path: Path) -> None:
    """The same page without a mask head: a step of LOCE on boxes."""
    torch.save({k: v for k, v in theirs.state_dict().items() if "mask" not in k}, tmp_path / "model.pth")
    file = str(glyphs / "annotations/train.json")
    content, report = convert(tmp_path / "model.pth", file, file, overrides=SIZES)
    torch.save(content, tmp_path / "converted.pt")
    told = next(line for line in report if line.startswith("to train from it: ")).split()
    assert "model.masks=false" in told and not any(word.startswith("model.mask_") for word in told)
    words = recipe(
        tmp_path / "converted.pt", glyphs, tmp_path, "model.masks=false", "device=cpu", "train.evaluate=false"
    )
    page = tmp_path / "rebalance.yaml"
    lines = [line for line in page.read_text().splitlines() if "mask_" not in line]
    page.write_text("\n".join(lines))
    trainer = train_here([load_config(words)], 1)
    assert not any("WARNING" in line for line in trainer.arms[0].notes)
    (line,) = metrics(tmp_path / "run")
    assert line["loss_cls"] > 0 and line["loss_box"] > 0 and "loss_mask" not in line


def test_options_against_the_weights_are_warned_of(converted: Path, glyphs: Path, tmp_path: Path) -> None:
    words = recipe(converted, glyphs, tmp_path, "model.roi.aligned=true", "model.mask_predictor=normalised")
    config = load_config(words)
    with preflight(config) as found:
        made = Trainer([config], torch.device("cpu"), found.annotations)
    warning = next(line for line in made.arms[0].notes if line.startswith("WARNING"))
    assert "made with model.mask_predictor=linear model.roi.aligned=false, this run says otherwise" in warning


def test_a_resnet_34_is_refused(theirs: MaskRCNN, tmp_path: Path) -> None:
    state = {key: value for key, value in theirs.state_dict().items() if "layer3" not in key}
    state |= {f"backbone.body.layer3.{i}.conv1.weight": torch.zeros(1) for i in range(6)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"6 blocks of 2 convolutions in layer3; loce has ResNet-18 \(2 of 2\)"):
        convert(tmp_path / "x.pth")


@pytest.mark.slow
def test_the_page_from_its_first_to_its_last_command(tmp_path: Path) -> None:
    """Exactly its commands, on fewer images."""
    folder = clone(tmp_path)
    (folder / "rebalance.yaml").write_text(blocks(PAGE, "yaml")[0])
    commands = fenced_commands(PAGE)
    assert len(commands) == 6
    for command in commands:
        run_command(command.replace("train_images=1200 val_images=150", "train_images=60 val_images=20"), folder)
    for run in ("theirs/before", "rebalanced/eval", "control/eval"):
        numbers = json.loads((folder / f"runs/{run}/metrics.json").read_text())
        assert 0 <= numbers["segm"]["AP"] <= 1
