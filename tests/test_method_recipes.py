"""The recipes of the peer methods: alike in all but the method, so that a table of them compares methods only."""

import re
from pathlib import Path
from typing import Any

import pytest

from loce.config import Config, load_config, to_dict
from loce.data.glyphs.make import GlyphOptions
from loce.data.glyphs.plan import EMPTY_SHARE, long_tail
from loce.utils.options import flatten, schema

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "methods").glob("*.yaml"))
EACH = pytest.mark.parametrize("name", NAMES)
MEMORY = tuple(key for key in schema(Config) if key.startswith("memory."))
# What a method may change beside its own section and the part of the detector that is frozen: recipe -> keys, and why.
OWN: dict[str, tuple[str, ...]] = {
    "balms": ("train.init",),  # a stage 1 of its own: sigmoids
    "ldam": ("train.clip_norm",),  # its late class weights, as reweighted
    "reweighted": ("train.clip_norm",),  # rows of a class with one instance weigh hundreds
    "forest": ("model.rpn.nms_resampling",),  # the other half of the method
    "fasa": MEMORY,
    "bacl": MEMORY,
    "simcal": ("train.lr", "train.momentum", "train.weight_decay"),  # its own optimiser, as published
}
METHOD_KEYS = ("head.", "sampler.", "train.freeze", "output")
# Set from the data by a rule that the recipe's header gives, so they differ between LVIS and Glyph-LVIS.
FROM_DATA = (
    *("head.eql.threshold", "head.gol.threshold", "sampler.repeat_threshold"),
    *("head.forest.trees", "head.forest.visual", "head.forest.geometrical"),
)
# With repeated images an epoch is longer: 318 to 545 iterations, not 248. Not more of them in all than the peers have.
LONGER_EPOCHS = {"rfs": 5, "rfs_linear": 3, "irfs": 4, "balms_stage1": 4, "balms": 1}


def header(path: str) -> dict[str, str]:
    text = (CONFIGS / f"{path}.yaml").read_text()
    return dict(re.findall(r"^# (\w+(?: \w+)?): +(.+)$", text, re.MULTILINE))


def flat(path: str) -> dict[str, Any]:
    sections = {key for key in schema(Config) if any(other.startswith(f"{key}.") for other in schema(Config))}
    return {key: value for key, value, _ in flatten(Config, to_dict(load_config([path])), "") if key not in sections}


def differences(path: str, peer: str) -> set[str]:
    ours, theirs = flat(path), flat(peer)
    return {key for key in ours if ours[key] != theirs[key]}


def test_every_method_has_both_recipes():
    assert sorted(path.stem for path in (CONFIGS / "glyphs" / "methods").glob("*.yaml")) == NAMES


@EACH
def test_a_method_differs_from_its_peers_by_itself_only(name: str):
    """One stage: the baseline's training. Two: the second stage of softmax, from the same first stage."""
    one_stage = not load_config([f"methods/{name}"]).train.init
    first = name.endswith("_stage1")
    peers = {"": ("stage1" if first else "baseline") if one_stage else "loce", "glyphs/": "stage1"}
    for folder, peer in {**peers, **({} if one_stage else {"glyphs/": "softmax"})}.items():
        changed = differences(f"{folder}methods/{name}", f"{folder}{peer}")
        allowed = set(OWN.get(name, ()))
        if folder and (one_stage or name in LONGER_EPOCHS):
            allowed |= {"train.epochs", "train.drops"}
        if not one_stage and not folder:
            allowed |= {"memory.enabled"}  # the peer is LOCE
        assert {key for key in changed - allowed if not key.startswith(METHOD_KEYS)} == set()


@EACH
def test_one_stage_is_as_long_as_two(name: str):
    config = load_config([f"glyphs/methods/{name}"])
    stages = [load_config([f"glyphs/{stage}"]).train.epochs for stage in ("stage1", "softmax")]
    assert config.train.epochs == LONGER_EPOCHS.get(name, stages[1] if config.train.init else sum(stages))


@EACH
def test_the_method_is_the_same_on_both_data_sets(name: str):
    parts = ("head.", "sampler.", "memory.", "indicator.", "train.freeze", "model.rpn.nms")
    changed = differences(f"methods/{name}", f"glyphs/methods/{name}")
    assert {key for key in changed if key.startswith(parts)} <= set(FROM_DATA)


@EACH
@pytest.mark.parametrize("folder", ["", "glyphs/"])
def test_headers_say_what_the_recipe_is(name: str, folder: str):
    path = f"{folder}methods/{name}"
    text, config = header(path), load_config([path])
    script = "finetune.py" if config.train.init else "train.py"
    assert f"scripts/{script} {path}.yaml" in text["Command"]
    assert {"Paper", "Published", "Schedule", "Expected"} <= set(text)
    assert f"{config.train.epochs} epochs" in text["Schedule"]
    if config.train.init:
        assert f"(after {Path(config.train.init).relative_to('runs')}.yaml)" in text["Command"]
    if not folder:
        assert text["Writes to"] == config.output
        iterations = re.match(rf"{config.train.epochs} epochs, about ([\d,]+) iterations", text["Length"])
        assert iterations and int(iterations[1].replace(",", "")) == round(config.train.epochs * 99388 / 16, -3)


def test_eqls_tail_on_glyphs_is_rare_and_common():
    """The threshold's rule: of the planned image counts, those of rare and common classes fall below it."""
    options = GlyphOptions(out="")
    counts = long_tail(50, options.train_images, options.classes_per_image)
    annotated = options.train_images * (1 - EMPTY_SHARE)
    threshold = load_config(["glyphs/methods/eql"]).head.eql.threshold
    assert ((counts / annotated < threshold) == (counts <= 100)).all()
