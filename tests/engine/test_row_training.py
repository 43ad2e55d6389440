"""Heads trained on exported rows: against a plain loop, and against the detector that the rows are of."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.torchvision_maskrcnn import Images, build, detect
from loce.config import UserError, read_options
from loce.data.annotations.lvis import LVISAnnotations
from loce.engine.rebalancing import ROW_CONFLICTS, ROW_OPTION_OF, rebalance
from loce.engine.region_store import read_regions
from loce.engine.row_training import RowOptions, batch_of, image_of, shuffled, train_head
from loce.evaluation import evaluate_lvis
from loce.heads import HEADS
from loce.models.memory_sampling import ImageSeed
from tests.doc_pages import ROOT, blocks, clone, fenced_commands, run_command

PAGE = ROOT / "docs/rows.md"

CLASSES = 6


@pytest.fixture(scope="module")
def exported(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A Faster R-CNN of torchvision, untrained but for a classifier that says something, and its rows."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import torchvision_rows

    sys.path.pop(0)
    out = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    model = build(CLASSES, masks=False).eval()
    with torch.no_grad():
        for layer in (model.roi_heads.box_predictor.cls_score, model.rpn.head.cls_logits):
            layer.weight.normal_(std=0.3)
        for layer in (model.roi_heads.box_predictor.bbox_pred, model.rpn.head.bbox_pred):
            layer.weight.normal_(std=0.03)
    torch.save(model.state_dict(), out / "model.pth")
    torchvision_rows.write(glyphs, out)
    return model, out / "rows"


@pytest.fixture
def words(exported: tuple[Any, Path], glyphs: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Options of a training on the rows."""

    def given(*more: str, rows: Path = exported[1]) -> list[str]:
        files = (f"annotations={glyphs}/annotations/train.json", f"val_annotations={glyphs}/annotations/val.json")
        folders = (f"train={rows}/train", f"val={rows}/val", f"output={tmp_path}/out")
        return [*folders, *files, "batch_size=4", "rows=64", "warmup_iterations=0", "resamples=5", *more]

    return given


def options_of(words: list[str]) -> RowOptions:
    return read_options(RowOptions, words, ROW_CONFLICTS, ROW_OPTION_OF)


def test_the_page_shows_the_export() -> None:
    code = (ROOT / "benchmarks/torchvision_rows.py").read_text()
    for function in blocks(PAGE, "python")[0].strip().split("\n\n\n"):
        assert function in code


def test_rows_give_what_the_detector_finds(
    exported: tuple[Any, Path], words: Callable[..., list[str]], glyphs: Path, tmp_path: Path
) -> None:
    """`before` is the detector's own box AP; after training the head is another, and both are compared."""
    rebalance(options_of(words("head.name=equilibrium", "memory.enabled=true", "epochs=2", "lr=0.1")))
    model, folder = exported
    theirs = detect(model, Images(glyphs, "val", keep_empty=True))
    known = evaluate_lvis(glyphs / "annotations/val.json", theirs, "bbox").metrics
    before, after = (
        json.loads((tmp_path / "out" / name / "metrics.json").read_text())["bbox"] for name in ("before", "eval")
    )
    assert known["AP"] > 0.001 and before["AP"] == pytest.approx(known["AP"], abs=1e-3)
    assert after["AP"] != before["AP"] and (tmp_path / "out/eval/tallies_bbox.npz").is_file()
    weights = torch.load(tmp_path / "out/head.pt", weights_only=True)
    assert not np.array_equal(weights["fc_cls.weight"], np.load(folder / "train/classifier.npz")["weight"])


def test_training_is_a_plain_loop(words: Callable[..., list[str]], glyphs: Path) -> None:
    """Softmax: cross-entropy and SGD, written from the equations, on the same rows."""
    options = options_of(words("drops=[]", "epochs=2"))
    annotations = LVISAnnotations.open(options.annotations, masks=False)
    files = sorted(Path(options.train).glob("regions_*.npz"))
    width = read_regions(files[0], CLASSES, "features").features.shape[1]
    torch.manual_seed(1)
    head = HEADS["softmax"](width, annotations.stats)
    weight, bias = (value.detach().double() for value in (head.fc_cls.weight, head.fc_cls.bias))
    train_head(head, files, annotations, options)

    moved = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for epoch in range(2):
        rng = np.random.default_rng([0, epoch])
        images = shuffled(files, annotations, options, rng)
        for _ in range(12 // 4):
            seeds = [ImageSeed(int(rng.integers(2**62)), place) for place in range(4)]
            x, labels, _ = batch_of(images, seeds, options)
            x, own = x.double(), F.one_hot(labels, CLASSES + 1).double()
            slope = ((x @ weight.T + bias).softmax(dim=1) - own) / len(x)
            for value, momentum, gradient in zip((weight, bias), moved, (slope.T @ x, slope.sum(dim=0)), strict=True):
                momentum.mul_(0.9).add_(gradient + 1e-4 * value)
                value.sub_(0.02 * 4 / 16 * momentum)
    torch.testing.assert_close(head.fc_cls.weight.double(), weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.fc_cls.bias.double(), bias, rtol=1e-4, atol=1e-6)


def test_an_epoch_shows_every_image_once(words: Callable[..., list[str]]) -> None:
    options = options_of(words())
    annotations = LVISAnnotations.open(options.annotations, masks=False)
    files = sorted(Path(options.train).glob("regions_*.npz"))
    shown = shuffled(files, annotations, options, np.random.default_rng(0))
    for _ in range(3):
        batch_of(shown, [ImageSeed(0, place) for place in range(4)], options)
    assert next(shown, None) is None


def test_labels_by_overlap(exported: tuple[Any, Path], glyphs: Path) -> None:
    """The slow twin: each box by itself; and labels that the file gives are taken."""
    annotations = LVISAnnotations.open(glyphs / "annotations/train.json", masks=False)
    regions = read_regions(exported[1] / "train/regions_000000.npz", CLASSES, "features")
    rows = slice(*regions.bounds[:2])
    own = annotations.rows(int(np.flatnonzero(annotations.image_ids == regions.image_ids[0])[0]))
    found = image_of(regions, rows, annotations, int(annotations.image_of[own[0]]), 0.5)
    truth = annotations.corners(own)
    assert found.labels[: len(own)].tolist() == annotations.labels[own].tolist()  # objects stand in front
    for box, label, instance in zip(
        regions.boxes[rows].tolist(), found.labels.tolist(), found.instances.tolist(), strict=True
    ):
        ious = [iou(box, other) for other in truth.tolist()]
        if max(ious) < 0.49:
            assert (label, instance) == (CLASSES, -1)
        elif max(ious) > 0.51:
            assert instance >= 0 and label == annotations.labels[own[instance]]


def iou(a: list[float], b: list[float]) -> float:
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / max(sum(areas) - shared, 1e-6)


@pytest.mark.parametrize("name", sorted(set(HEADS) - {"forest", "simcal", "balms"}))
def test_every_head_takes_rows(name: str, words: Callable[..., list[str]]) -> None:
    options = options_of(words(f"head.name={name}", "memory.enabled=true", "epochs=1", "drops=[]", "lr=0.001"))
    annotations = LVISAnnotations.open(options.annotations, masks=False)
    head = HEADS[name](256, annotations.stats, options.head)
    start = [value.clone() for value in head.parameters()]
    train_head(head, sorted(Path(options.train).glob("regions_*.npz")), annotations, options)
    assert any(not torch.equal(a, b) for a, b in zip(start, head.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": None}, r"is no file of regions \('features"),
        ({"features": np.full((1, 256), np.nan, np.float32)}, "features are .* not"),
        ({"image_ids": np.array([10**6])}, "images that are not in .*train.json: 1000000"),
        ({"labels": np.array([7])}, "labels go up to 7, the background's is 6"),
        ({"boxes": np.zeros((1, 6, 4), np.float32)}, "needs labels, or one box of each row"),
        ({"classifier": np.zeros((9, 256))}, "6 classes and the background, which is last, are 7"),
        ({"classifier": np.zeros((7, 8))}, "features differ in width: train 256, val 256, classifier.npz 8"),
    ],
)
def test_mistakes_in_rows(change: dict, message: str, exported: Any, words: Any, tmp_path: Path) -> None:
    """Each is told before anything is trained."""
    shutil.copytree(exported[1], tmp_path / "rows")
    file = tmp_path / "rows/train/regions_000000.npz"
    with np.load(file) as content:
        columns = {name: content[name] for name in content.files}
    for name, value in change.items():
        if name == "classifier":
            np.savez(file.with_name("classifier.npz"), weight=value, bias=np.zeros(len(value)))
        elif value is None:
            del columns[name]
        elif name == "features":
            columns[name] = value
        else:
            columns[name] = (
                np.resize(value, (len(columns[name]), *value.shape[1:]))
                if name in columns
                else np.resize(value, len(columns["boxes"]))
            )
    np.savez(file, **columns)
    with pytest.raises(UserError, match=message):
        rebalance(options_of(words(rows=tmp_path / "rows")))
    assert not (tmp_path / "out/head.pt").exists()


@pytest.mark.slow
def test_the_page_from_its_first_to_its_last_command(tmp_path: Path) -> None:
    """Exactly its commands, on fewer images."""
    folder = clone(tmp_path)
    for command in fenced_commands(PAGE):
        said = run_command(command.replace("train_images=1200 val_images=150", "train_images=60 val_images=20"), folder)
    assert "B is better in" in said and (folder / "runs/faster/loce/eval/metrics.json").is_file()


@pytest.mark.parametrize(
    ("words_given", "message"),
    [
        (["train="], "train = .*: must name a folder with regions_"),
        (["head.name=simcal"], "this head reads more than rows"),
        (["memory.capacity=4"], "an option of memory.enabled=true"),
        (["head.seesaw.p=0.5"], "an option of head.name=seesaw"),
        (["batch_size=400"], "there are 12 training images"),
        (["head.name=eql"], "another weight and bias than classifier.npz; head.reset=true"),
    ],
)
def test_wrong_options(words_given: list[str], message: str, words: Any) -> None:
    kept = [word for word in words() if word.partition("=")[0] not in {w.partition("=")[0] for w in words_given}]
    with pytest.raises(UserError, match=message):
        rebalance(options_of([*kept, *words_given]))
