"""Options: what is read, what is refused, and in which words."""

import ast
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from loce.config import (
    CONFLICTS,
    GONE,
    OPTION_OF,
    Config,
    TrainConfig,
    UserError,
    dump,
    from_dict,
    images_per_rank,
    load_config,
    read_options,
    run_script,
    to_dict,
)
from loce.utils.options import Count, Range, schema
from loce.utils.yaml_text import dotted, load_yaml, show

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.name != "tables.yaml")


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """load_config for YAML text in ./run.yaml of an empty folder, and words."""
    monkeypatch.chdir(tmp_path)

    def read(text: str = "", *words: str) -> Config:
        Path("run.yaml").write_text(text)
        return load_config(["run.yaml", *words])

    return read


def message(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


# What is read


def test_an_empty_file_gives_the_defaults_and_a_run_folder(load):
    assert load() == Config(output="runs/run")


def test_yaml_then_words(load):
    config = load(
        "train: {epochs: 30, lr: 1}\neval:\nmodel:\n  rpn:\n    nms: 0.5\n",
        "train.lr=1e-3",
        "data.short_edges=[96, 128]",
    )
    assert config.train == TrainConfig(epochs=30, lr=1e-3)
    assert config.model.rpn.nms == 0.5
    assert config.data.short_edges == (96, 128)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E1", 10.0), ("2", 2.0), (".5", 0.5), ("5.", 5.0), ("+1e+2", 100.0), ("010", 10.0)],
)
def test_numbers_are_read_as_written(load, text: str, value: float):
    for config in (load(f"train: {{lr: {text}}}"), load("", f"train.lr={text}")):
        assert config.train.lr == value and type(config.train.lr) is float


@pytest.mark.parametrize("text", ["1:30", "1_000", "0x10", "true", "1.0", ".inf", "''", "null", "2024-01-01", "[1]"])
def test_what_is_no_whole_number(load, text: str):
    assert f"train.epochs = {text}: must be a whole number >= 1" in message(load, f"train: {{epochs: {text}}}")


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("output=", "runs/run"),
        ("output=1e-3", "1e-3"),
        ("output=a: b", "a: b"),
        ("output=x=y", "x=y"),
        ("output='7'", "7"),
        ("output=no", "no"),
    ],
)
def test_text_words_are_taken_as_they_stand(load, word: str, value: str):
    assert load("", word).output == value


def test_bare_names_are_found_here_then_in_configs_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(["loce"]).head.name == "equilibrium"  # the repository's
    (tmp_path / "configs" / "sub").mkdir(parents=True)
    (tmp_path / "configs" / "loce.yaml").write_text("seed: 1")
    (tmp_path / "configs" / "sub" / "a.yaml").write_text("seed: 3")
    assert load_config(["loce.yaml"]).seed == 1
    (tmp_path / "loce").mkdir()  # a folder is no CONFIG
    assert load_config(["loce"]).seed == 1
    (tmp_path / "loce.yaml").write_text("seed: 2")
    assert load_config(["loce"]).seed == 2
    assert load_config(["sub/a.yaml"]) == Config(seed=3, output="runs/sub/a")


def test_run_folder_follows_the_place_below_configs():
    assert load_config(["glyphs/loce"]).output == "runs/glyphs/loce"
    assert load_config([str(ROOT / "configs" / "stage1.yaml")]).output == "runs/stage1"
    assert load_config(["methods/seesaw,glyphs/softmax.yaml"]).output == "runs/glyphs/methods/seesaw"


def test_of_recipes_with_commas_between_a_later_one_wins(write):
    write(one="base: loce.yaml\ntrain: {epochs: 9, drops: [8], lr: 0.5}\n", two="train: {epochs: 12}\n")
    both = load_config(["one,two", "train.lr=0.25"])
    assert (both.train.epochs, both.train.drops, both.train.lr, both.head.name) == (12, (8,), 0.25, "equilibrium")
    assert both.output == "runs/one"
    write(three="base: [one.yaml, two.yaml]\noutput: runs/one\n")
    assert load_config(["three", "train.lr=0.25"]) == both
    with pytest.raises(UserError, match="CONFIG four not found"):
        load_config(["one,four"])


# The recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_state_differences_only(path: Path):
    config = load_config([str(path)])
    values, text = dotted(to_dict(Config())), load_yaml(path.read_text(), str(path))
    for base in bases(path):
        stated = {key: value for key, value in load_yaml(base.read_text(), str(base)).items() if key != "base"}
        values |= dotted(stated)
    for key, value in dotted({key: value for key, value in text.items() if key != "base"}).items():
        assert value != values[key], f"{path}: {key} is the default, or what a base says"
    assert from_dict(load_yaml(dump(config), "dump")) == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_say_where_they_come_from(path: Path):
    """What its header does not say of hardware and data is as its base says."""
    for word in ("# Paper: ", "# Command: ", "# Expected: "):
        assert word in path.read_text()
    assert any("# Hardware: " in file.read_text() for file in (path, *bases(path)))


def test_the_papers_recipes():
    stage1, loce = load_config(["stage1"]), load_config(["loce"])
    assert stage1 == Config(output="runs/stage1")
    assert (stage1.train.epochs, stage1.train.drops) == (24, (16, 22))
    assert (loce.train.epochs, loce.train.drops, loce.train.freeze) == (6, (3, 5), "trunk")
    assert loce.memory.enabled and loce.head.name == "equilibrium" and loce.train.init == stage1.output


def bases(path: Path) -> list[Path]:
    """Every recipe that a recipe stands on, the first one first."""
    names = load_yaml(path.read_text(), str(path)).get("base", [])
    own = [ROOT / "configs" / name for name in ([names] if isinstance(names, str) else names)]
    return [each for base in own for each in (*bases(base), base)]


# Recipes on recipes


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Recipes in an empty folder, by path."""
    monkeypatch.chdir(tmp_path)

    def write_all(**texts: str) -> None:
        for name, text in texts.items():
            path = Path(f"{name.replace('__', '/')}.yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write_all


def test_a_recipe_stands_on_ours_and_only_says_what_differs(write):
    write(mine="base: loce.yaml\ntrain: {epochs: 12, drops: [8]}\n")
    loce, mine = load_config(["loce"]), load_config(["mine", "train.lr=0.01"])
    train = dataclasses.replace(loce.train, epochs=12, drops=(8,), lr=0.01)
    assert mine == dataclasses.replace(loce, output="runs/mine", train=train)
    assert from_dict(load_yaml(dump(mine), "config.yaml")) == mine  # what is written holds the result, and no base


def test_a_later_base_wins_and_the_recipe_itself_is_last(write):
    write(a="seed: 1\ntrain: {lr: 1, epochs: 30}", b="base: a.yaml\nseed: 2", c="seed: 3\ntrain: {lr: 3}")
    write(mine="base: [b, c.yaml]\ntrain: {momentum: 0.5}")
    mine = load_config(["mine"])
    assert (mine.seed, mine.train.lr, mine.train.epochs, mine.train.momentum) == (3, 3, 30, 0.5)
    write(mine="base: [c.yaml, b.yaml]\ntrain: {epochs: 40}")
    assert (load_config(["mine"]).seed, load_config(["mine"]).train.epochs) == (2, 40)
    write(mine="base: [b.yaml, a.yaml]")  # of a common base, its last place counts
    assert load_config(["mine"]).seed == 1


def test_where_a_base_is_looked_for(write):
    write(loce="seed: 5", configs__loce="base: loce.yaml\nseed: 6", sub__near="seed: 7")
    write(sub__a="base: near.yaml", sub__b="base: ../loce.yaml", sub__c="base: loce.yaml")
    assert load_config(["sub/a"]).seed == 7 and load_config(["sub/b"]).seed == 5
    ours = load_config(["sub/c"])  # not the file here: configs/loce.yaml, which stands on the repository's of that name
    assert ours.seed == 6 and ours.head.name == "equilibrium"


def test_bases_that_are_wrong(write):
    write(mine="base: loec.yaml", a="base: ./b.yaml", b="base: ./a.yaml", c="base: 3", d="base: loce.yaml\nseed: x")
    missing = "mine.yaml: base = loec.yaml: not found in configs/ or beside this file; did you mean loce.yaml? --help"
    assert message(load_config, ["mine"]).startswith(missing)
    assert message(load_config, ["a"]).endswith("base: a recipe stands on itself: a.yaml on b.yaml on a.yaml")
    text = "c.yaml: base = 3: must be a recipe, or a list of recipes, such as [loce.yaml]"
    assert message(load_config, ["c"]) == text
    assert message(load_config, ["d"]) == "d.yaml: seed = x: must be a whole number >= 0 and <= 4294967295"
    write(mine="base: bad.yaml", bad="train: {epochs: 0}")
    assert message(load_config, ["mine"]) == "bad.yaml: train.epochs = 0: must be a whole number >= 1"


def test_a_recipe_switches_off_what_its_base_has_options_of(write):
    write(mine="base: loce_plus.yaml\nmemory: {enabled: false}")
    assert load_config(["mine"]).memory.level == "roi"
    write(mine="base: loce_plus.yaml\nmemory: {enabled: false, capacity: 9}")
    assert message(load_config, ["mine"]) == (
        "mine.yaml: memory.capacity = 9, memory.enabled = false: an option of memory.enabled=true, which is not chosen"
    )


# Out and in again


def test_dump_is_the_inverse_of_load(load, tmp_path):
    words = ["output=1e-3", "train.init=010", "data.train_images=a: #b", "train.drops=[]", "train.lr=1e-12", "seed=7"]
    config = load("", *words)
    (tmp_path / "dumped.yaml").write_text(dump(config))
    assert load_config(["dumped.yaml"]) == config
    assert from_dict(to_dict(config)) == config


def test_to_dict_holds_plain_values_only():
    def walk(value: Any) -> None:
        assert type(value) in (dict, list, str, int, float, bool)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(item)

    walk(to_dict(Config()))


def test_a_dictionary_is_checked_like_a_file():
    assert message(from_dict, {"train": {"epoch": 3}}, "ckpt.pt") == (
        "ckpt.pt: train.epoch = 3: unknown key; did you mean train.epochs?"
    )


# What is refused, word for word

SINGLE = {
    "train: {freze: trunk}": "run.yaml: train.freze = trunk: unknown key; did you mean train.freeze?",
    "gpu: {lr: 3}": "run.yaml: gpu = {lr: 3}: unknown key; --help lists all keys",
    "momentum: 0.5": "run.yaml: momentum = 0.5: unknown key; "
    "did you mean head.pcb.momentum or indicator.momentum or memory.momentum or train.momentum or eval.logn.momentum?",
    "memory: {enable: true}": "run.yaml: memory.enable = true: unknown key; did you mean memory.enabled?",
    "model: {roi: 512}": (
        "run.yaml: model.roi = 512: is a section; its keys are model.roi.positive_iou, model.roi.batch_per_image, "
        "model.roi.positive_fraction, model.roi.finest_scale, model.roi.aligned"
    ),
    "data: {workers: true}": "run.yaml: data.workers = true: must be a whole number >= 0",
    "data: {group_by_aspect: 1}": "run.yaml: data.group_by_aspect = 1: must be true or false",
    "data: {flip: 1.5}": "run.yaml: data.flip = 1.5: must be a number >= 0 and <= 1",
    "train: {lr: fast}": "run.yaml: train.lr = fast: must be a number > 0",
    "train: {lr: 1e999}": "run.yaml: train.lr = inf: must be a number > 0",
    "output: 2024-01-01\nseed: -1": "run.yaml: seed = -1: must be a whole number >= 0 and <= 4294967295",
    "output: 12": "run.yaml: output = 12: must be text",
    "indicator: {background_score: 0}": ("run.yaml: indicator.background_score = 0: must be a number > 0 and <= 1"),
    "sampler: {name: Uniform}": (
        "run.yaml: sampler.name = Uniform: must be uniform | repeat_factor | class_balanced | bilevel"
    ),
    "data: {short_edges: 640}": (
        "run.yaml: data.short_edges = 640: must be a list of whole numbers >= 1, such as [1, 2]"
    ),
    "data: {short_edges: [96, 0]}": (
        "run.yaml: data.short_edges = [96, 0]: must be a list of whole numbers >= 1, such as [1, 2]"
    ),
    "train.lr: 1\ntrain: {lr: 1}": "run.yaml: train.lr = 1: given twice",
    "memory: {enabled: true}": (
        "run.yaml: memory.enabled = true, train.freeze = none (default): the stored features would be stale; "
        "set train.freeze=trunk (or backbone, with memory.level=roi)"
    ),
    "train: {drops: [3, 30]}": (
        "run.yaml: train.drops = [3, 30], train.epochs = 24 (default): drops must increase and stay below epochs"
    ),
    "seed: 1\nseed: 2": "run.yaml, line 2: not valid YAML: seed stands twice",
    "- 1": "run.yaml: must hold `key: value` lines, but holds [1]",
    "seed: !!python/name:os.system x": (
        "run.yaml, line 1: not valid YAML: the tag tag:yaml.org,2002:python/name:os.system is not allowed"
    ),
    "seed: 1\noutput: !!set {x}": "run.yaml, line 2: not valid YAML: the tag tag:yaml.org,2002:set is not allowed",
    "train: {lr: !x 1}": "run.yaml, line 1: not valid YAML: the tag !x is not allowed",
    "train:\n\tlr: 1": "run.yaml, line 2: not valid YAML: found character '\\t' that cannot start any token",
}


@pytest.mark.parametrize("text", SINGLE)
def test_text_of_one_problem(load, text: str):
    assert message(load, text) == SINGLE[text]


WORDS = {
    "train.lr": "command line: train.lr: must be key=value, without dashes; did you mean train.lr?",
    "--train.lr=1": "command line: --train.lr=1: must be key=value, without dashes; did you mean train.lr?",
    "--lr=1": "command line: --lr=1: must be key=value, without dashes; did you mean train.lr?",
    "lr=1": "command line: lr = 1: unknown key; did you mean train.lr?",
    "train.l=1": "command line: train.l = 1: unknown key; did you mean train.lr?",
    "train.epochs=": "command line: train.epochs = null: must be a whole number >= 1",
    "train.drops=16,22": "command line: train.drops = 16,22: must be a list of whole numbers >= 1, such as [1, 2]",
    "eval.protocol=[lvis, voc]": (
        "command line: eval.protocol = [lvis, voc]: must be auto | lvis | fixed | pool | coco, or a list of these"
    ),
    "train=fast": (
        "command line: train = fast: is a section; its keys are train.freeze, train.init, train.resume, "
        "train.batch_size, train.accumulate, train.epochs, train.lr, train.lr_batch_size, train.optimizer, "
        "train.momentum, train.weight_decay, train.decay_norms, train.layer_decay, "
        "train.warmup_iterations, train.warmup_factor, train.schedule, train.drops, train.drop_factor, "
        "train.clip_norm, train.ema, train.precision, train.log_every, train.checkpoint_every, train.keep_checkpoints, "
        "train.evaluate, train.evaluate_every, train.dry_run, train.overfit, train.wandb"
    ),
}


@pytest.mark.parametrize("word", WORDS)
def test_text_of_one_wrong_word(load, word: str):
    assert message(load, "", word) == WORDS[word]


def test_everything_wrong_is_said_at_once(load):
    text = "train: {freze: trunk, epochs: 0}\nmodel: {backbone: tiny}\ndata: {rare_max: 20, common_max: 10}\n"
    assert message(load, text, "x", "train.accumulate=3", "train.batch_size=4", "seed=1", "seed=1") == "\n".join(
        [
            "8 problems:",
            "  command line: x: must be key=value, without dashes",
            "  run.yaml: train.freze = trunk: unknown key; did you mean train.freeze?",
            "  run.yaml: train.epochs = 0: must be a whole number >= 1",
            "  command line: seed = 1: given twice",
            "  run.yaml: data.common_max = 10, data.rare_max = 20: common_max must not be below rare_max",
            "  run.yaml: model.backbone = tiny, model.weights = imagenet (default): "
            "the tiny backbone has no ImageNet weights; set model.weights=glyphs or none",
            "  run.yaml: model.backbone = tiny, model.norm = frozen (default): "
            "the tiny backbone has group norm only; set model.norm=group",
            "  command line: train.batch_size = 4, train.accumulate = 3: batch_size must be divisible by accumulate",
        ]
    )


IMPOSSIBLE = [
    ("data.train_annotations=",),
    ("data.val_annotations=",),
    ("data.train_images=",),
    ("data.val_images=",),
    ("data.rare_max=101",),
    ("data.short_edges=[]",),
    ("data.resize=lsj", "data.lsj_scale=[2, 0.1]"),
    ("data.long_edge=799", "data.test_short_edge=1"),
    ("data.test_short_edge=1334",),
    ("model.rpn.negative_iou=0.8",),
    ("model.rpn.batch_per_image=1",),
    ("model.roi.batch_per_image=3",),
    ("model.backbone=tiny", "model.norm=group"),
    ("model.weights=glyphs",),
    ("model.backbone=tiny", "model.weights=none", "model.norm=batch", "model.frozen_stages=0"),
    ("model.backbone=swin_t",),
    ("model.norm=layer",),
    ("model.stochastic_depth=0.5",),
    ("model.weights=none", "model.frozen_stages=0"),
    ("model.weights=none", "model.norm=batch"),
    ("memory.enabled=true",),
    ("memory.enabled=true", "train.freeze=backbone", "train.init=x"),
    ("memory.enabled=true", "memory.kind=gaussian"),
    ("memory.enabled=true", "train.freeze=trunk", "train.init=x", "memory.draw=adaptive"),
    ("memory.enabled=true", "train.freeze=trunk", "train.init=x", "memory.draw=confusion"),
    ("train.freeze=trunk",),
    ("model.norm=batch", "train.freeze=trunk", "train.init=x"),
    ("train.accumulate=3",),
    ("train.evaluate_every=1", "train.evaluate=false"),
    ("train.evaluate_every=24",),
    ("train.overfit=8", "train.dry_run=true"),
    ("train.overfit=8", "head.name=simcal", "sampler.name=bilevel", "train.freeze=detector", "train.init=x"),
    ("train.drops=[16, 16]",),
    ("train.optimizer=adamw",),
    ("head.reset=true",),
    (
        *("head.name=simcal", "sampler.name=bilevel", "train.freeze=detector", "train.init=x"),
        "head.reset=true",
    ),
    (
        *("head.name=simcal", "sampler.name=bilevel", "train.freeze=detector", "train.init=x"),
        "memory.enabled=true",
    ),
    ("head.name=balms",),
    ("head.name=disalign", "train.freeze=backbone", "train.init=x"),
    ("head.name=disalign", "train.freeze=detector", "train.init=x", "head.reset=true"),
    ("head.name=simcal", "train.freeze=detector", "train.init=x"),
    ("head.name=forest",),
    (
        *("head.name=forest", "head.forest.trees=x"),
        *("head.forest.visual=0", "head.forest.geometrical=0"),
    ),
    ("eval.protocol=[]",),
    ("eval.protocol=[coco, pool]",),
    ("eval.posthoc=fracal", "head.name=seesaw"),
    ("eval.posthoc=norcal", "head.name=eql"),
    ("eval.posthoc=logit_adjustment", "head.name=balanced_softmax"),
    ("eval.posthoc=tau_norm", "head.name=ldam"),
    ("head.name=bags", "head.bags.bounds=[10, 10]"),
]


def test_every_row_of_the_table_of_conflicts_has_its_case():
    assert len(IMPOSSIBLE) == len(CONFLICTS)


@pytest.mark.parametrize("row", range(len(IMPOSSIBLE)), ids=[" ".join(words) for words in IMPOSSIBLE])
def test_each_impossible_combination(load, row: int):
    """The words break this row of the table and no other."""
    text = message(load, "", *IMPOSSIBLE[row])
    assert text.endswith(f": {CONFLICTS[row][2]}") and "\n" not in text


def test_one_protocol_or_several(load):
    one, several = load("", "eval.protocol=fixed"), load("eval: {protocol: [lvis, pool]}")
    assert (load("").eval.protocols, one.eval.protocols, several.eval.protocols) == (
        ("auto",),
        ("fixed",),
        ("lvis", "pool"),
    )
    assert one.eval.uncapped and several.eval.uncapped and not load("").eval.uncapped
    assert "  protocol: fixed\n" in dump(one) and "  protocol: [lvis, pool]\n" in dump(several)
    assert load(dump(several)) == several


def test_ways_out_of_conflicts(load):
    memory = ["memory.enabled=true", "train.init=runs/stage1"]
    assert load("", *memory, "train.freeze=trunk").memory.level == "fc"
    assert load("", *memory, "train.freeze=backbone", "memory.level=roi").memory.enabled
    gaussian = ["memory.enabled=true", "memory.kind=gaussian"]  # whose means follow what trains
    assert load("", *gaussian, "memory.fill_instances=0").train.freeze == "none"
    assert load("", *gaussian, "train.init=runs/stage1", "train.freeze=backbone").memory.level == "fc"
    assert load("", "model.weights=none", "train.init=x").model.norm == "frozen"
    assert load("", "model.weights=none", "model.norm=group", "model.frozen_stages=0").model.weights == "none"


def test_drops_of_a_recipe_do_not_count_under_a_cosine(load):
    assert load("train: {epochs: 3, drops: [2]}\n", "train.schedule=cosine", "train.epochs=1").train.epochs == 1


def test_keys_of_rules_exist():
    for keys, _, _ in CONFLICTS:
        assert set(keys) <= set(schema(Config))
    assert {*OPTION_OF, *(key for key, _ in OPTION_OF.values())} <= set(schema(Config))
    assert set(GONE).isdisjoint(schema(Config))


# An option of what is not chosen


def another_value(key: str) -> str:
    """Not the default of `key`, as a word has it."""
    hint, value = schema(Config)[key], dotted(to_dict(Config()))[key]
    if get_origin(hint) is Literal:
        return get_args(hint)[-1 if value == get_args(hint)[0] else 0]
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, list):
        return str(value[:-1])
    return "x" if isinstance(value, str) else str(value + 1 if isinstance(value, int) else value / 2 or 0.5)


OTHER_CHOICE = {"indicator.kind": "prior", "model.mask_predictor": "linear", "memory.enabled": "false"} | {
    "model.masks": "false",
    "memory.kind": "gaussian",
    "memory.source": "regions",
    "memory.draw": "score",
    "head.reweighted.by": "inverse_frequency",
    "head.balms.meta_lr": "0.0",
    "head.ldam.reweight_from": "1.0",
    "head.ecm.normalised": "false",
    "head.fcbl.reweight": "false",
    "head.iif.normalised": "false",
    "sampler.name": "class_balanced",
    "sampler.repeat_by": "images",
    "head.name": "softmax",
    "eval.posthoc": "none",
    "data.resize": "short_edge",
    "data.copy_paste": "0.0",
    "train.schedule": "cosine",
    "train.weight_decay": "0.0",
    "train.freeze": "trunk",
}
IDLE = {
    key: rule
    for key in dotted(to_dict(Config()))
    for part, rule in OPTION_OF.items()
    if f"{key}.".startswith(f"{part}.") and key != rule[0]
}


@pytest.mark.parametrize("key", IDLE)
def test_an_option_of_what_is_not_chosen_is_refused(load, key: str):
    chooser, values = IDLE[key]
    others = {"indicator.background_count": "score", "data.short_edges": "lsj"}
    others |= {"memory.momentum": "ring", "memory.classes_per_draw": "adaptive"}
    other = others.get(key, OTHER_CHOICE[chooser])
    head = [f"head.name={key.split('.')[1]}"] if chooser.startswith("head.") and chooser != "head.name" else []
    head += ["train.freeze=detector", "train.init=x"] if "head.name=balms" in head else []
    head += ["train.init=x"] if chooser == "train.freeze" else []
    if chooser.startswith("memory.") and chooser != "memory.enabled":
        head = ["memory.enabled=true", "train.freeze=trunk", "train.init=x"]
        head += ["memory.kind=gaussian"] if other == "adaptive" else []
    choice = f"{chooser} {values}" if isinstance(values, Range) else f"{chooser}={show(values[0])}"
    text = message(load, "", *head, f"{key}={another_value(key)}", f"{chooser}={other}")
    assert text.startswith(f"command line: {key} = ")
    assert text.endswith(f", {chooser} = {other}: an option of {choice}, which is not chosen")


def test_text_of_an_option_of_what_is_not_chosen(load):
    assert message(load, "", "sampler.repeat_threshold=0.5") == (
        "command line: sampler.repeat_threshold = 0.5, sampler.name = uniform (default): "
        "an option of sampler.name=repeat_factor, which is not chosen"
    )
    text = "head: {name: seesaw, ldam: {beta: 0.5, reweight_from: 1}}\nmemory: {capacity: 9}\n"
    assert message(load, text).splitlines()[1:] == [
        "  run.yaml: head.ldam.beta = 0.5, head.name = seesaw: an option of head.name=ldam, which is not chosen",
        "  run.yaml: head.ldam.reweight_from = 1.0, head.name = seesaw: "
        "an option of head.name=ldam, which is not chosen",
        "  run.yaml: memory.capacity = 9, memory.enabled = false (default): "
        "an option of memory.enabled=true, which is not chosen",
    ]


def test_a_word_switches_off_what_a_recipe_has_options_of(load, tmp_path):
    """And what is written of such a run is read again: it states every option."""
    recipe = "memory: {enabled: true, capacity: 9}\nhead: {name: eql, eql: {threshold: 0}}\n"
    recipe += "train: {freeze: trunk, init: x}\n"
    config = load(recipe, "memory.enabled=false", "head.name=softmax")
    assert (config.memory.enabled, config.memory.capacity, config.head.eql.threshold) == (False, 9, 0)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load_config(["again.yaml"]) == from_dict(to_dict(config)) == config
    for words in (("memory.enabled=false", "memory.capacity=8"), ("memory.capacity=8", "memory.enabled=false")):
        assert "an option of memory.enabled=true" in message(load, recipe, *words)
    assert "an option of head.name=ldam" in message(from_dict, to_dict(config), "x", ["head.ldam.scale=2"])
    assert load("", "sampler.repeat_threshold=1e-3").sampler.name == "uniform"  # a default changes nothing


# Options of before


def test_options_that_went_are_passed_over_where_they_say_what_is_done_now(load):
    stored = to_dict(Config())
    stored["memory"] |= {"transform": "inverse", "eta": "box", "allow_stale": False}
    stored["indicator"]["warm_start"] = True
    stored["head"]["equilibrium"] = {"background": "fixed"}
    assert from_dict(stored) == Config()
    assert load("memory: {eta: box}", "head.equilibrium.background=fixed") == Config(output="runs/run")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("memory", "transform", "log_inverse"),
        ("memory", "eta", "image"),
        ("memory", "allow_stale", True),
        ("indicator", "warm_start", False),
    ],
)
def test_options_that_went_say_so(load, section: str, key: str, value: Any):
    reason = f"{section}.{key} = {show(value)}: this option went (docs/log.md); commit 558207e is the last with it"
    assert message(from_dict, {section: {key: value}}, "old.pt") == f"old.pt: {reason}"
    assert message(load, "", f"{section}.{key}={show(value)}") == f"command line: {reason}"


def test_the_learned_background_went(load):
    reason = "this option went (docs/log.md); commit 558207e is the last with it"
    assert message(from_dict, {"head": {"equilibrium": {"background": "learned"}}}, "old.pt") == (
        f"old.pt: head.equilibrium = {{background: learned}}: {reason}"
    )
    assert message(load, "", "head.equilibrium.background=learned") == (
        f"command line: head.equilibrium.background = learned: {reason}"
    )


def test_a_wrong_value_is_not_reported_again_as_a_conflict(load):
    assert message(load, "", "train.drops=[x]", "train.epochs=0").count("drops") == 1


def test_no_config_and_unknown_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    there = "--help lists the recipes"
    usage = f"command line: no CONFIG given; usage: scripts/train.py CONFIG [key=value ...]; {there}"
    assert message(load_config, []) == usage
    assert message(load_config, ["train.lr=1"]) == usage
    assert message(load_config, ["stag1"]) == (
        f"command line: CONFIG stag1 not found here or in configs/; did you mean stage1.yaml? {there}"
    )
    assert message(load_config, ["zzz"]) == f"command line: CONFIG zzz not found here or in configs/; {there}"


def test_an_unreadable_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_bytes(b"seed: \xff")
    assert message(load_config, ["bad"]).startswith("bad.yaml: cannot be read: 'utf-8' codec")


# Batches over ranks


def test_images_per_rank():
    assert images_per_rank(TrainConfig(), 8) == 2
    assert images_per_rank(TrainConfig(accumulate=4), 2) == 2
    assert message(images_per_rank, TrainConfig(accumulate=2), 3) == (
        "train.batch_size = 16: must be divisible by processes x train.accumulate = 3 x 2; "
        "set train.batch_size=12 or another multiple, or start another number of processes"
    )
    assert "set train.batch_size=32 or" in message(images_per_rank, TrainConfig(), 32)


# Other scripts' options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """Options of a script."""

    out: str  # folder
    classes: Count = 50  # how many
    style: Literal["plain", "noisy"] = "plain"
    sizes: tuple[float, ...] = (1.0,)


def test_read_options():
    words = ["out=x", "classes=7", "style=noisy", "sizes=[1, 2.5]"]
    assert read_options(Drawing, words) == Drawing(out="x", classes=7, style="noisy", sizes=(1.0, 2.5))


@pytest.mark.parametrize(("text", "place"), [("~", ""), ("~/runs/x", "/runs/x")])
def test_a_tilde_is_the_home_directory(text, place, load, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = f"{tmp_path}{place}"
    assert read_options(Drawing, [f"out={text}"]).out == home
    assert load("", f"output={text}").output == home
    assert load(f"data: {{train_images: '{text}'}}\ntrain: {{init: {text}/y}}").data.train_images == home
    assert from_dict({"output": text}).output == home
    for other in ("a~", "./~/x", "~$lock.json"):
        assert read_options(Drawing, [f"out={other}"]).out == other


def test_homes_of_others_and_variables(load, monkeypatch, tmp_path):
    """A shell reads neither after `key=` in quotes, nor in a recipe."""
    monkeypatch.setenv("DISK", str(tmp_path))
    monkeypatch.delenv("DISC", raising=False)
    root = os.path.expanduser("~root")
    assert load("output: ${DISK}/a\ndata: {train_images: ~root/b}", "train.init=x_$DISK").output == f"{tmp_path}/a"
    assert read_options(Drawing, ["out=~root/b"]).out == f"{root}/b"
    assert load("train: {init: '$DISK/c'}").train.init == f"{tmp_path}/c"
    for text, missing in (
        ("$DISC/a", "variable DISC"),
        ("a/${DISC}", "variable DISC"),
        ("~nobody.here/a", "user nobody"),
    ):
        assert f"no {missing}" in message(load, f"output: {text}") and "whole path" in message(
            load, "", f"output={text}"
        )
    (tmp_path / "$DISC").mkdir()  # unless that is what it is called
    assert load("output: $DISC").output == "$DISC"


def test_a_tilde_where_nobody_is_at_home(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda text: text)
    text = message(read_options, Drawing, ["out=~/x"])
    assert text == "command line: out = ~/x: there is no home directory here (HOME is not set); give the whole path"
    monkeypatch.undo()
    monkeypatch.setenv("HOME", "")  # as some containers have it; ~/x would be /x
    assert message(read_options, Drawing, ["out=~/x"]) == text


def test_read_options_says_everything():
    text = message(read_options, Drawing, ["clases=3", "style=loud", "sizes=[a]"])
    assert text == "\n".join(
        [
            "4 problems:",
            "  command line: clases = 3: unknown key; did you mean classes?",
            "  command line: style = loud: must be plain | noisy",
            "  command line: sizes = [a]: must be a list of numbers, such as [1, 2]",
            "  command line: out is missing: text",
        ]
    )


def test_a_required_option_with_a_wrong_value():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Table:
        number: Count

    assert message(read_options, Table, ["number=x"]) == "command line: number = x: must be a whole number >= 1"


def test_read_options_help(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "Draw: python scripts/draw.py out=DIR.\n\nMore.\n")
    with pytest.raises(SystemExit) as caught:
        read_options(Drawing, ["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        *("Draw: python scripts/draw.py out=DIR.", "", "More.", ""),
        "Options of a script.",
        f"  {'out = (required)':<40} text; folder",
        f"  {'classes = 50':<40} a whole number >= 1; how many",
        f"  {'style = plain':<40} plain | noisy",
        f"  {'sizes = [1.0]':<40} a list of numbers, such as [1, 2]",
    ]


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        (Range(0, 1), [0, 1], [-0.1, 1.1]),
        (Range(0, 1, above=True), [1e-9, 1], [0, 1.1]),
        (Range(0, 1, below=True), [0, 0.99], [1]),
    ],
)
def test_range(limits: Range, inside: list[float], outside: list[float]):
    assert all(value in limits for value in inside)
    assert not any(value in limits for value in outside)


# Scripts


def test_help_lists_every_key_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["stage1.yaml", "-h"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    for key, hint in schema(Config).items():
        assert dataclasses.is_dataclass(hint) or re.search(rf"^  {re.escape(key)} = .+; \S", out, re.MULTILINE), key
    assert "  train.lr = 0.02                          a number > 0; at a batch of `lr_batch_size`" in out


SCRIPTS = [path for path in sorted((ROOT / "scripts").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_the_docstring_of_a_script_says_how_it_is_called(path: Path):
    """-h prints it; what stands before key=value is nowhere else."""
    assert f"scripts/{path.name}" in ast.get_docstring(ast.parse(path.read_text()))


def test_a_mistake_ends_a_script_with_2_and_no_traceback(capsys):
    def main() -> None:
        raise UserError("data: no such folder")

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: data: no such folder\n"


def test_our_own_mistakes_keep_their_traceback():
    def main() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_script(main)


def test_options_are_checked_before_anything_heavy_is_imported():
    code = (
        "import sys; from loce.config import load_config, run_script\n"
        "assert not {'torch', 'torchvision', 'numpy'} & set(sys.modules)\n"
        "run_script(lambda: load_config(['stage1', 'train.lr=0']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "error: command line: train.lr = 0: must be a number > 0\n"


def run_as_script(program: str, *words: str, read: int = -1, **variables: str) -> tuple[int, bytes, str]:
    """(exit code, standard output, standard error); read: bytes after which nobody reads the output any more."""
    with subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    ) as process:
        assert process.stdout and process.stderr
        out = process.stdout.read(read)
        process.stdout.close()
        error = process.stderr.read().decode(errors="replace")
    return process.returncode, out, error


SCRIPT = """
import sys
from loce.config import UserError, run_script
from loce.utils.options import print_help
from loce.utils.progress import progress, print_line
def main():
    {}
run_script(main)
"""


@pytest.mark.parametrize(
    "settings",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "utf-8"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_terminal_without_the_letters_of_a_name(settings):
    names = r"'\u81ea\u884c\u8f66 \xfc \udcff'"  # Chinese, German, and a file name that is no UTF-8
    body = f"name = {names}; list(progress([1], 1, name)); print_line(name); print(name); raise UserError(name)"
    code, out, error = run_as_script(SCRIPT.format(body), **settings)
    assert code == 2 and "Traceback" not in error and error.startswith("error: ") and out.count(b"\n") == 4


def test_nobody_reads_the_output():
    code, out, error = run_as_script(SCRIPT.format("print_help('line\\n' * 100_000)"), "--help", read=10)
    assert (code, len(out), error) == (0, 10, "")
    code, _, error = run_as_script(SCRIPT.format("[print('line', flush=True) for _ in range(100_000)]"), read=10)
    assert code == 141 and error.startswith("stopped: nobody reads standard output any more") and error.count("\n") == 1
    code, _, error = run_as_script(SCRIPT.format("raise BrokenPipeError('of another pipe')"))
    assert code == 1 and "of another pipe" in error


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(closed, tmp_path):
    """As jobs of some schedulers have them. A file that is opened then is no stream."""
    work = "print('told'); f = open('made', 'w'); print('told', file=sys.stderr); f.write('kept'); f.close()"
    (tmp_path / "work.py").write_text(SCRIPT.format(work))
    for program, code in (("work.py", 0), ("none.py", 2)):
        (tmp_path / "none.py").write_text(SCRIPT.format("exec('raise UserError(1)')"))
        line = f"{sys.executable} {program} {closed}"
        paths = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, env=paths)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "made").read_text() == "kept"


def test_words_are_as_a_shell_would_give_them(monkeypatch, tmp_path):
    program = SCRIPT.format("print(sys.argv[1:])")
    _, out, _ = run_as_script(program, "~", "~/x", "a=~/x", "~x", HOME="/home/me")
    assert out.decode().strip() == str(["/home/me", "/home/me/x", "a=~/x", "~x"])
