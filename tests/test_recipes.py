"""The recipes are what their headers and the paper's Sec. 4.1 say; configs/tables.yaml holds the paper's Tables 1-4."""

import re
from pathlib import Path
from typing import Any

import pytest

from loce.config import GONE, Config, load_config, to_dict
from loce.data.glyphs.plan import EMPTY_SHARE, long_tail
from loce.data.glyphs.scenes import VERSION_2
from loce.report.tables.rows import Recipes
from loce.utils.options import flatten, schema
from loce.utils.yaml_text import load_yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
LOCE = {
    "head.name": "equilibrium",
    "memory.enabled": True,
    "train.freeze": "trunk",
    "train.epochs": 6,
    "train.drops": [3, 5],
}
PLUS = {"memory.level": "roi", "train.freeze": "backbone"}
V05 = {
    "data.train_annotations": "data/lvis_v0.5/annotations/lvis_v0.5_train.json",
    "data.train_images": "data/coco/train2017",
    "data.val_annotations": "data/lvis_v0.5/annotations/lvis_v0.5_val.json",
    "data.val_images": "data/coco/val2017",
}
R101 = {"model.backbone": "resnet101"}
ADAMW = {
    "train.optimizer": "adamw",
    "train.lr": 1e-4,
    "train.weight_decay": 0.05,
    "train.decay_norms": False,
}
LAYER_NORM = {"model.norm": "layer", "model.frozen_stages": 0}
CONVNEXT_S = {"model.backbone": "convnext_small", **LAYER_NORM}
MODERN = {
    "data.resize": "lsj",
    "sampler.name": "repeat_factor",
    "head.name": "fedloss",
    **ADAMW,
    "train.layer_decay": 0.8,
    "train.schedule": "cosine",
    "train.warmup_iterations": 1000,
    "train.clip_norm": 1.0,
    "train.ema": 0.9998,
    "train.epochs": 36,
}
# Recipe -> all that differs from the defaults, which are Sec. 4.1's stage 1 on LVIS v1 with R-50 (test_config.py).
DIFFERENCES: dict[str, dict[str, Any]] = {
    "stage1": {},
    "stage1_r101": R101,
    "stage1_v05": V05,
    "loce": {**LOCE, "train.init": "runs/stage1"},
    "softmax": {"train.freeze": "trunk", "train.epochs": 6, "train.drops": [3, 5], "train.init": "runs/stage1"},
    "loce_plus": {**LOCE, **PLUS, "train.init": "runs/stage1"},
    "loce_r101": {**R101, **LOCE, "train.init": "runs/stage1_r101"},
    "loce_v05": {**V05, **LOCE, "train.init": "runs/stage1_v05"},
    "stage1_swin_t": {"model.backbone": "swin_t", **LAYER_NORM, **ADAMW},
    "stage1_convnext_s": {**CONVNEXT_S, **ADAMW},
    "faster_rcnn": {"model.masks": False},
    "modern": {**CONVNEXT_S, **MODERN, "data.copy_paste": 0.5, "data.paste_from": "rare"},
    "modern_loce": {**CONVNEXT_S, **LOCE, "data.resize": "lsj", "head.reset": True, "train.init": "runs/modern"},
    "baseline": {"train.epochs": 30, "train.drops": [22, 28]},
    "coco": {
        "data.train_annotations": "data/coco/annotations/instances_train2017.json",
        "data.val_annotations": "data/coco/annotations/instances_val2017.json",
        "eval.detections": 100,
    },
}
# Tables 1 and 5: box AP, mask AP, APr, APc, APf of the recipes that the paper has numbers for.
EXPECTED = {
    "baseline": (20.4, 20.2, 2.9, 18.2, 30.1),
    "loce": (27.4, 26.6, 18.5, 26.2, 30.7),
    "loce_r101": (29.0, 28.0, 19.5, 27.8, 32.0),
    "loce_v05": (28.2, 28.4, 22.0, 29.0, 30.2),
}
EACH = pytest.mark.parametrize("name", DIFFERENCES)


def header(name: str) -> str:
    """The comments on top of a recipe."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def flat(config: Config) -> dict[str, Any]:
    sections = {key for key in schema(Config) if any(other.startswith(f"{key}.") for other in schema(Config))}
    return {key: value for key, value, _ in flatten(Config, to_dict(config), "") if key not in sections}


def test_no_recipe_is_left_out():
    assert set(DIFFERENCES) == {path.stem for path in CONFIGS.glob("*.yaml")} - {"tables"}


@EACH
def test_recipes_change_this_and_nothing_else(name: str):
    defaults, config = flat(Config()), flat(load_config([name]))
    changed = {key: value for key, value in config.items() if value != defaults[key]}
    assert changed == {**DIFFERENCES[name], "output": f"runs/{name}"}


@EACH
def test_headers_say_what_the_recipe_is(name: str):
    text, config = header(name), load_config([name])
    script = "finetune.py" if config.train.init else "train.py"
    assert f"--nproc_per_node=8 scripts/{script} {name}.yaml" in text
    assert f"# Writes to: {config.output}\n" in text
    assert f"# Length:    {config.train.epochs} epochs, about " in text
    if config.train.init:
        assert f"(after {Path(config.train.init).name}.yaml)" in text
        assert load_config([Path(config.train.init).name]).output == config.train.init


@EACH
def test_headers_expect_what_the_paper_publishes(name: str):
    expected = header(name).partition("# Expected:")[2]
    if name not in EXPECTED:
        assert re.match(r"  (not published|no number is published)", expected)
        return
    box, mask, rare, common, frequent = EXPECTED[name]
    numbers = f"box AP {box}, mask AP {mask} (rare {rare}, common {common}, frequent {frequent}), Table "
    assert numbers in expected.splitlines()[0]


@pytest.mark.parametrize(
    ("name", "per_epoch"), [("stage1", 99388 / 16), ("stage1_v05", 56740 / 16), ("coco", 117266 / 16)]
)
def test_lengths_follow_from_the_images_with_annotations(name: str, per_epoch: float):
    variants = {
        "stage1": [
            "stage1",
            "stage1_r101",
            "stage1_swin_t",
            "stage1_convnext_s",
            "faster_rcnn",
            "loce",
            "softmax",
            "loce_plus",
            "loce_r101",
            "baseline",
            "modern",
            "modern_loce",
        ],
        "stage1_v05": [name, "loce_v05"],
    }
    for variant in variants.get(name, [name]):
        said = re.search(r"about ([\d,]+) iterations", header(variant))
        iterations = load_config([variant]).train.epochs * per_epoch
        assert said and int(said[1].replace(",", "")) == round(iterations, -3), variant


# The tables of the paper, row by row: words that make the row from the recipe `loce`, and the numbers.
DEFAULT = (27.4, 26.6, 18.5, 26.2, 30.7)
PAPER: dict[str, list[tuple[str, dict[str, Any], tuple[float, ...]]]] = {
    "table1": [
        ("baseline", {}, (20.4, 20.2, 2.9, 18.2, 30.1)),
        ("loce", {"memory.enabled": False}, (24.0, 23.8, 8.3, 23.7, 30.7)),
        ("loce", {"head.name": "softmax"}, (26.0, 25.7, 18.4, 25.0, 29.8)),
        ("loce", {}, DEFAULT),
        ("loce", {"indicator.kind": "prior"}, (23.4, 23.1, 20.8, 23.1, 24.1)),
    ],
    "table2": [
        ("loce", {"indicator.momentum": 0.8}, (27.2, 26.4, 17.2, 26.3, 30.7)),
        ("loce", {"indicator.momentum": 0.9}, DEFAULT),
        ("loce", {"indicator.momentum": 0.95}, (27.3, 26.6, 18.1, 26.4, 30.7)),
    ],
    "table3": [
        ("loce", {"indicator.background_score": 0.1}, (26.7, 26.0, 17.8, 25.5, 30.3)),
        ("loce", {"indicator.background_score": 0.01}, DEFAULT),
        ("loce", {"indicator.background_score": 0.001}, (27.4, 26.5, 18.4, 26.0, 30.7)),
    ],
    "table4": [
        ("loce", {"memory.classes_per_draw": k, "memory.features_per_class": m}, numbers)
        for k, m, numbers in [
            (2, 2, (27.1, 26.3, 17.8, 26.1, 30.6)),
            (4, 4, (27.2, 26.5, 18.3, 26.1, 30.6)),
            (4, 8, (27.3, 26.6, 18.5, 26.3, 30.6)),
            (8, 4, DEFAULT),
            (8, 8, (27.2, 26.5, 17.5, 26.3, 30.7)),
        ]
    ],
}
TABLES = load_yaml((CONFIGS / "tables.yaml").read_text(), "tables.yaml")


def test_tables_are_the_papers():
    assert set(TABLES) == {"recipes", *PAPER, "table5", "table6", "table7", "table8", "table9", "table10"}
    for table, rows in PAPER.items():
        ours = [(row["recipe"], tuple(row["paper"])) for row in TABLES[table]["rows"]]
        assert ours == [(recipe, numbers) for recipe, _, numbers in rows], table


@pytest.mark.parametrize(("table", "questions"), [("table6", 12), ("table7", 5), ("table9", 9)])
def test_questions_of_ours_are_answered_by_rows_that_exist(table: str, questions: int):
    rows = TABLES[table]["rows"]
    names = [row["name"] for row in rows]
    assert {row.get("against", "LOCE") for row in rows if "question" in row} <= set(names)
    assert sum("question" in row for row in rows) >= questions and not any("paper" in row for row in rows)


def test_rows_that_need_an_option_that_went_are_closed():
    for table, content in TABLES.items():
        for row in content["rows"] if table != "recipes" else ():
            assert ("last" in row) == any(word.partition("=")[0] in GONE for word in row.get("words", [])), row["name"]


def test_rows_of_table_7_train_longer_and_differ_from_the_row_they_are_compared_with_as_they_say():
    rows = {row["name"]: row for row in TABLES["table7"]["rows"] if "start" not in row}
    named = TABLES["recipes"]["glyphs"]["named"]
    files = {name: named.get(row["recipe"], f"glyphs/methods/{row['recipe']}") for name, row in rows.items()}
    whole = {name: flat(load_config([files[name], *row["words"]])) for name, row in rows.items()}
    for name, row in rows.items():
        recipe, longer = load_config([files[name]]).train, load_config([files[name], *row["words"]]).train
        times = 4 if row["recipe"] == "loce" else 2
        assert longer.epochs == times * recipe.epochs
        assert longer.drops == tuple(times * epoch for epoch in recipe.drops)
        other = whole[row.get("against", name)]
        changed = {key for key, value in whole[name].items() if value != other[key]} - {"output", "head.name"}
        assert changed == {
            "EQL": {"head.eql.threshold"},
            "k = 2, m = 2": {"memory.classes_per_draw", "memory.features_per_class"},
        }.get(name, set())


@pytest.mark.parametrize("data", ["glyphs", "glyph100", "glyph1203", "lvis"])
@pytest.mark.parametrize("table", PAPER)
def test_rows_differ_from_their_recipe_by_what_the_paper_varies(table: str, data: str):
    for row, (recipe, changes, _) in zip(TABLES[table]["rows"], PAPER[table], strict=True):
        file = TABLES["recipes"][data]["named"][recipe]
        whole = flat(load_config([file]))
        assert flat(load_config([file, *row.get("words", [])])) == {**whole, **changes}, row["name"]


def test_rows_start_from_the_stage_1_of_their_data():
    for data, recipes in TABLES["recipes"].items():
        stage1 = load_config([recipes["stages"][0]])
        named = recipes["named"]
        assert load_config([named["loce"]]).train.init == stage1.output
        assert load_config([named["baseline"]]).train.init == ("" if data == "lvis" else stage1.output)


def test_the_recipe_with_training_fcs_is_the_row_that_was_measured():
    row = next(row for row in TABLES["table6"]["rows"] if row["name"] == "FCs train, roi")
    plus = flat(load_config(["glyphs/loce_plus"]))
    assert flat(load_config(["glyphs/loce", *row["words"], f"output={plus['output']}"])) == plus


@pytest.mark.parametrize("data", ["glyphs", "glyph100", "glyph1203"])
def test_the_glyph_baseline_is_trained_as_long_as_loce(data: str):
    softmax, loce = (flat(load_config([TABLES["recipes"][data]["named"][name]])) for name in ("baseline", "loce"))
    assert {key for key in loce if loce[key] != softmax[key]} == {"output", "head.name", "memory.enabled"}


@pytest.mark.parametrize(("data", "shares"), [("glyph100", [28, 38, 34]), ("glyph1203", [337, 461, 405])])
def test_sets_of_version_2_have_the_groups_of_lvis_and_iterations_as_their_headers_say(data: str, shares: list[int]):
    words = dict(word.split("=") for word in TABLES["recipes"][data]["glyphs"])
    images = int(words["train_images"])
    counts = long_tail(int(words["classes"]), images, float(words["classes_per_image"]), VERSION_2)
    assert [(counts <= 10).sum(), ((counts > 10) & (counts <= 100)).sum(), (counts > 100).sum()] == shares
    stage1 = load_config([f"{data}/stage1"]).train
    said = re.search(rf"\b{stage1.epochs} epochs of ([\d,]+) iterations", header(f"{data}/stage1"))
    per_epoch = images * (1 - EMPTY_SHARE) / stage1.batch_size
    assert said and 0.99 < int(said[1].replace(",", "")) / per_epoch < 1.001 and words["version"] == "2"
    two, one = (load_config([f"{data}/{name}"]).train.epochs for name in ("two_stages", "one_stage"))
    assert one == stage1.epochs + two
    # The tail that EQL and RFS know is rare and common; epochs of repeated images are longer, and fewer.
    threshold = float(TABLES["recipes"][data]["words"]["eql"][0].partition("=")[2])
    assert ((counts / (images * (1 - EMPTY_SHARE)) < threshold) == (counts <= 100)).all()


@pytest.mark.parametrize("data", ["glyph100", pytest.param("glyph1203", marks=pytest.mark.slow)])
def test_a_method_on_another_glyph_set_is_the_one_of_glyph_50(data: str):
    """All methods, in the detector and training of that set."""
    recipes = Recipes(**TABLES["recipes"][data])
    method = ("head.", "sampler.", "memory.", "indicator.", "model.rpn.nms", "train.freeze", "train.momentum")
    own = (
        *method,
        "output",
        "train.epochs",
        "train.drops",
        "train.init",
        "train.lr",
        "train.clip",
        "train.warmup",
        "train.weight_decay",
    )
    thresholds = {"sampler.repeat_threshold", "head.eql.threshold", "head.gol.threshold"}
    trees = {"head.forest.trees", "head.forest.visual", "head.forest.geometrical"}
    peer = flat(load_config([f"{data}/stage1"]))
    for path in (CONFIGS / "glyphs/methods").glob("*.yaml"):
        here, there = flat(load_config(recipes.command(path.stem))), flat(load_config([str(path)]))
        differing = {key for key in here if key.startswith(method) and here[key] != there[key]}
        assert differing <= (trees if path.stem == "forest" else thresholds), path.stem
        assert here["output"] == f"runs/{data}/methods/{path.stem}"
        same = ("train.clip_norm",) if data == "glyph1203" else ("train.clip_norm", "train.lr", "train.weight_decay")
        assert [here[key] for key in same] == [there[key] for key in same], path.stem
        assert [key for key in here if here[key] != peer[key] and not key.startswith(own)] == []
