"""The recipes of the peer methods: alike in all but the method, so that a table of them compares methods only."""
"""The recipes of the compared methods: the schedule of their peers, and nothing but the method differs."""

import re
from pathlib import Path
from typing import Any

import pytest

from loce.config import Config, load_config, to_dict
from loce.options import flatten, schema

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "methods").glob("*.yaml"))
EACH = pytest.mark.parametrize("name", NAMES)
# What a method may change beside its own section and the part of the detector that is frozen: recipe -> keys, and why.
OWN: dict[str, tuple[str, ...]] = {
    "reweighted": ("train.clip_norm",),  # rows of a class with one instance weigh hundreds
}
METHOD_KEYS = ("head.", "sampler.", "train.freeze", "output")
# Set from the data by a rule that the recipe's header gives, so they differ between LVIS and Glyph-LVIS.
FROM_DATA = ("head.eql.threshold",)


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
    for folder, peer in (("", "baseline" if one_stage else "loce"), ("glyphs/", "stage1" if one_stage else "softmax")):
        changed = differences(f"{folder}methods/{name}", f"{folder}{peer}")
        allowed = set(OWN.get(name, ()))
        if one_stage and folder:
            allowed |= {"train.epochs", "train.drops"}
        if not one_stage and not folder:
            allowed |= {"memory.enabled"}  # the peer is LOCE
        assert {key for key in changed - allowed if not key.startswith(METHOD_KEYS)} == set()


@EACH
def test_one_stage_is_as_long_as_two(name: str):
    config = load_config([f"glyphs/methods/{name}"])
    stages = [load_config([f"glyphs/{stage}"]).train.epochs for stage in ("stage1", "softmax")]
    assert config.train.epochs == (stages[1] if config.train.init else sum(stages))


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
    assert {"Paper", "Hardware", "Published", "Schedule", "Expected"} <= set(text)
    assert f"{config.train.epochs} epochs" in text["Schedule"]
    if config.train.init:
        assert f"(after {folder}{Path(config.train.init).name}.yaml)" in text["Command"]
    if not folder:
        assert text["Writes to"] == config.output
        iterations = re.match(rf"{config.train.epochs} epochs, about ([\d,]+) iterations", text["Length"])
        assert iterations and int(iterations[1].replace(",", "")) == round(config.train.epochs * 99388 / 16, -3)
from loce.config import load_config
from tests.test_recipes import CONFIGS, flat, header

# What a method goes on from, by data: a recipe and words. All train as long as stage 1 and LOCE together.
END_TO_END = {
    "lvis": ["baseline"],
    "glyphs": ["glyphs/stage1", "train.epochs=7", "train.drops=[4, 6]"],
}
AFTER_STAGE_1 = {
    "lvis": ["loce", "head.name=softmax", "memory.enabled=false"],
    "glyphs": ["glyphs/softmax"],
}
BASELINE = {"lvis": END_TO_END["lvis"], "glyphs": AFTER_STAGE_1["glyphs"]}
# Recipe -> the training it has with its peers, and all that is the method's own, the same for both data sets.
METHODS: dict[str, tuple[dict[str, list[str]], dict[str, Any]]] = {
    "balanced_softmax": (END_TO_END, {"head.name": "balanced_softmax"}),
    "logit_adjustment": (END_TO_END, {"head.name": "logit_adjustment"}),
    "norcal": (BASELINE, {"head.name": "norcal"}),
}
# Recipe and data -> what differs between the data sets.
DIFFER: dict[tuple[str, str], dict[str, Any]] = {}
FOLDERS = {"lvis": "methods", "glyphs": "glyphs/methods"}
EACH = pytest.mark.parametrize(("name", "data"), [(name, data) for name in METHODS for data in FOLDERS])


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_no_recipe_is_left_out(folder: str):
    assert set(METHODS) == {path.stem for path in (CONFIGS / folder).glob("*.yaml")}


@EACH
def test_recipes_are_their_peers_training_with_the_method(name: str, data: str):
    peers, changes = METHODS[name]
    recipe = f"{FOLDERS[data]}/{name}"
    expected = {**flat(load_config(peers[data])), **changes, **DIFFER.get((name, data), {}), "output": f"runs/{recipe}"}
    assert flat(load_config([recipe])) == expected


@EACH
def test_headers_say_what_the_recipe_is(name: str, data: str):
    recipe = f"{FOLDERS[data]}/{name}"
    text, config = header(recipe), load_config([recipe])
    script = f"scripts/{'finetune' if config.train.init else 'train'}.py {recipe}.yaml"
    assert f"{'torchrun --nproc_per_node=8' if data == 'lvis' else 'python'} {script}" in text
    schedule = re.search(r"^# Schedule:  (\d+) epochs", text, re.MULTILINE)
    assert schedule and int(schedule[1]) == config.train.epochs
    assert re.search(r"^# Published: \S", text, re.MULTILINE)
    if data == "lvis":
        assert f"# Writes to: {config.output}\n" in text
        iterations = re.search(rf"^# Length:    {config.train.epochs} epochs, about ([\d,]+) iter", text, re.MULTILINE)
        assert iterations
        if config.sampler.name == "uniform":
            assert int(iterations[1].replace(",", "")) == round(config.train.epochs * 99388 / 16, -3)
    if config.train.init:
        start = f"{Path(config.train.init).relative_to('runs')}.yaml"
        assert start in text and load_config([start]).output == config.train.init
