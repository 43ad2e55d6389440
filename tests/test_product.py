"""Every image sampler x classification head x feature memory: it trains and detects, or is refused with the reason."""

import itertools
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from loce.config import CONFUSION_HEADS, Config, HeadConfig, SamplerConfig, UserError, load_config
from loce.data.build import train_annotations, train_dataset
from loce.data.glyphs.make import GlyphOptions, make_glyphs
from loce.data.loader import train_batches, training_plan
from loce.heads import HEADS, Head
from loce.models.build import build_model, build_optimizer
from tests.engine.test_training import CONFIG

SAMPLERS = get_args(get_type_hints(SamplerConfig)["name"])
NAMES = get_args(get_type_hints(HeadConfig)["name"])
SECOND_STAGES = ("balms", "simcal")  # train with a frozen detector only
CELLS = [
    pytest.param(*cell, id="-".join([cell[0], cell[1], "memory" if cell[2] else "plain"]))
    for cell in itertools.product(SAMPLERS, NAMES, (False, True))
]
GAUSSIAN = ("memory.kind=gaussian", "memory.fill_instances=0")
FEW = ("softmax", "fcbl", "balms")


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images, and a recipe for them."""
    folder = tmp_path_factory.mktemp("product")
    sizes = {"classes": 6, "train_images": 12, "val_images": 6, "size": 64, "smallest": 0.26, "largest": 0.4}
    make_glyphs(GlyphOptions(out=str(folder), workers=1, **sizes))
    (folder / "tiny.yaml").write_text(CONFIG.format(folder))
    return folder


def words(sampler: str, head: str, memory: bool) -> list[str]:
    """What a user types for a cell, with all that the head or the memory need."""
    chosen = [f"sampler.name={sampler}", f"head.name={head}", f"memory.enabled={str(memory).lower()}"]
    chosen.append("eval.score_threshold=0")  # one step from random weights
    if head in SECOND_STAGES:
        chosen += ["train.freeze=detector", "train.init=stage1"]
    elif memory or head == "disalign":  # which rescales a frozen classifier
        chosen += ["train.freeze=trunk", "train.init=stage1"]
    if head == "forest":  # the trees that a head has before it is given some
        chosen += ["head.forest.trees=unused", "head.forest.visual=2", "head.forest.geometrical=3"]
    if memory and head == "simcal":
        chosen.append("memory.level=roi")
    return chosen


def refused(sampler: str, head: str) -> str | None:
    """Why a cell makes no sense, as the user reads it."""
    if head == "simcal" and sampler != "bilevel":
        return "set sampler.name=bilevel"
    return None


@pytest.mark.parametrize(
    "head", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "simcal"]
)
def test_a_cell_with_gaussians(glyphs: Path, head: str) -> None:
    """Of regions, drawn by confusion where the head has one, and apart from the rest."""
    draw = "confusion" if head in CONFUSION_HEADS else "score"
    chosen = [*GAUSSIAN, "memory.source=regions", f"memory.draw={draw}", "memory.loss_weight=0.5"]
    losses = one_step(load_config([str(glyphs / "tiny.yaml"), *words("uniform", head, True), *chosen]))
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses.values())


def test_confusion_heads_are_those_that_keep_one() -> None:
    own = {name for name, head in HEADS.items() if head.own_share is not Head.own_share}
    assert own == set(CONFUSION_HEADS)


def one_step(config: Config) -> dict[str, float]:
    """The losses of an optimiser step from random weights; all that trains has gradients, and something is detected."""
    annotations = train_annotations(config)
    dataset = train_dataset(config, annotations)
    torch.manual_seed(0)
    model = build_model(config, annotations.stats)
    plan = training_plan(dataset, config.sampler, config.data, 4, 0, model.roi_heads.classifier.meta_batch)
    optimizer = build_optimizer(model, config.train)
    samples = next(iter(train_batches(dataset, plan, epochs=1)))
    model.train()
    losses = model(samples)
    sum(losses.values()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    optimizer.step()
    model.eval()
    found = model([samples[0]["image"]])[0]
    assert (found["scores"] >= 0).all() and (found["scores"] <= 1).all() and len(found["masks"]) == len(found["boxes"])
    assert len(found["boxes"]) > 0 and found["labels"].max() < len(annotations.stats)
    return {name: float(loss.detach()) for name, loss in losses.items()}


def test_every_head_has_a_name_and_every_name_a_head() -> None:
    assert set(NAMES) == set(HEADS)


@pytest.mark.parametrize(("sampler", "head", "memory"), CELLS)
def test_a_cell(glyphs: Path, sampler: str, head: str, memory: bool) -> None:
    argv = [str(glyphs / "tiny.yaml"), *words(sampler, head, memory)]
    if reason := refused(sampler, head):
        with pytest.raises(UserError, match=reason):
            load_config(argv)
        return
    losses = one_step(load_config(argv))
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses.values())
    assert any(loss > 0 for name, loss in losses.items() if name.startswith("loss_cls"))
    boxes_train = head not in SECOND_STAGES
    assert ("loss_box" in losses) == ("loss_mask" in losses) == ("loss_rpn_cls" in losses) == boxes_train
