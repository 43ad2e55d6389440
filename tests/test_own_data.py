"""docs/own_data.md on a COCO-style set: no field of LVIS, category ids with gaps. The page's own commands are run."""

import csv
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from loce.config import load_config
from loce.data.build import train_annotations, val_annotations
from loce.data.glyphs.exports import write_export
from loce.utils.yaml_text import dump_yaml, load_yaml, parse_value
from scripts import check_data, import_data
from tests.doc_pages import ROOT, clone, fenced_commands, run_command

PAGE = ROOT / "docs/own_data.md"
# What makes the page's runs short, appended to them: a tiny model on images of 64 pixels, two epochs.
SHORT = (
    "data.short_edges=[64] data.test_short_edge=64 data.workers=0 model.backbone=tiny model.weights=none "
    "model.norm=group model.frozen_stages=0 model.fpn_channels=16 model.fc_features=32 model.mask_channels=8 "
    "model.mask_convs=1 model.rpn.anchor_scale=4 model.rpn.post_nms=50 model.roi.batch_per_image=32 "
    "train.epochs=2 train.drops=[1] train.warmup_iterations=2 train.log_every=1 train.clip_norm=10"
)


def coco_style(glyphs: Path, folder: Path, name: str = "mine") -> Path:
    """`glyphs` as somebody's own set in `folder`/`name`: only COCO's fields, ids 7, 14, ..., one folder of images."""
    mine = folder / name
    (mine / "images").mkdir(parents=True)
    for split in ("train", "val"):
        content = json.loads((glyphs / f"annotations/{split}.json").read_text())
        new_id = {category["id"]: 7 * (i + 1) for i, category in enumerate(content["categories"])}
        images = []
        for image in content["images"]:
            source = glyphs / "/".join(image["coco_url"].split("/")[-2:])
            shutil.copy(source, mine / "images")
            images.append({key: image[key] for key in ("id", "width", "height")} | {"file_name": source.name})
        fields = ("id", "image_id", "bbox", "area", "segmentation")
        found = content["annotations"]
        content = {
            "images": images,
            "annotations": [
                {**{key: a[key] for key in fields}, "iscrowd": 0, "category_id": new_id[a["category_id"]]}
                for a in found
            ],
            "categories": [{"id": new_id[c["id"]], "name": c["name"]} for c in content["categories"]],
        }
        (mine / f"{split}.json").write_text(json.dumps(content))
    return mine


def paths(mine: Path) -> list[str]:
    return [
        *(f"data.{split}_annotations={mine / split}.json" for split in ("train", "val")),
        *(f"data.{split}_images={mine / 'images'}" for split in ("train", "val")),
    ]


def test_classes_and_groups_are_read_from_the_file(glyphs: Path, tmp_path: Path) -> None:
    """Names and ids as they stand there; rare, common, frequent by the config's bounds on counted images."""
    mine = coco_style(glyphs, tmp_path)
    content = json.loads((mine / "train.json").read_text())
    counted = [len({a["image_id"] for a in content["annotations"] if a["category_id"] == 7 * c}) for c in range(1, 7)]
    low, high = sorted(counted)[1], sorted(counted)[3]
    assert low < high < max(counted)
    bounds = [f"data.rare_max={low}", f"data.common_max={high}"]
    config = load_config(["stage1.yaml", *paths(mine), *bounds])
    stats = train_annotations(config).stats
    assert stats.category_ids.tolist() == [7, 14, 21, 28, 35, 42]
    assert list(stats.names) == [category["name"] for category in content["categories"]]
    assert stats.image_counts.tolist() == counted
    assert stats.groups.tolist() == ["r" if n <= low else "c" if n <= high else "f" for n in counted]
    assert val_annotations(config).negatives is None
    assert np.unique(stats.groups).size == 3


def run_in_process(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of the page in this process, in the folder of now."""
    _, script, *words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [script, *words])
    {"import_data": import_data, "check_data": check_data}[Path(script).stem].main()


def export_of(glyphs: Path, kind: str, folder: Path) -> None:
    """`folder`/export, as an annotation tool writes it, of the glyphs."""
    (folder / "set").mkdir()
    for path in glyphs.iterdir():
        (folder / "set" / path.name).symlink_to(path)
    write_export(folder / "set", kind)
    (folder / f"set/{kind}").rename(folder / "export")


@pytest.mark.parametrize("kind", ["voc", "labelme"])
def test_from_an_export_to_recipes(
    kind: str,
    glyphs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The page's first two commands; what they print next is the page's next command."""
    export_of(glyphs, kind, tmp_path)
    monkeypatch.chdir(tmp_path)
    first, second, _, train, finetune, _, report, _ = fenced_commands(PAGE)
    run_in_process(first, monkeypatch)
    assert capsys.readouterr().out.endswith(f"next: {second}\n")
    run_in_process(second, monkeypatch)
    assert capsys.readouterr().out.endswith("\n".join(["nothing to mend", "next:", train, finetune, report, ""]))
    for recipe in ("mine.yaml", "mine_loce.yaml"):
        config = load_config([recipe])
        assert config.model.masks == (kind == "labelme") and config.data.train_annotations == "mine/train.json"


@pytest.mark.slow
def test_the_commands_of_the_page(glyphs: Path, tmp_path: Path) -> None:
    """From an export to LOCE and its control, compared, with report and pictures; `SHORT` goes into the recipes."""
    folder = clone(tmp_path)
    export_of(glyphs, "labelme", folder)
    before = {file: file.read_bytes() for file in (folder / "export").iterdir()}
    commands = fenced_commands(PAGE)
    scripts = [next(Path(word).stem for word in command.split() if word.endswith(".py")) for command in commands]
    assert scripts == ["import_data", "check_data", "train", "train", "finetune", "compare", "report", "predict"]
    for command in commands[:2]:
        run_command(command, folder)
    for recipe, words in (("mine", SHORT), ("mine_loce", "train.epochs=2 train.drops=[1] train.clip_norm=0")):
        file = folder / f"{recipe}.yaml"
        values = load_yaml(file.read_text(), "recipe")
        for key, value in (word.split("=") for word in words.split()):
            *above, last = key.split(".")
            section = values
            for name in above:
                section = section.setdefault(name, {})
            section[last] = parse_value(value)
        file.write_text(dump_yaml(values))
    for command in commands[2:]:
        run_command(command, folder)
    names = [category["name"] for category in json.loads((folder / "mine/train.json").read_text())["categories"]]
    for run in ("mine", "mine_softmax", "mine_loce"):
        metrics = json.loads((folder / f"runs/{run}/eval/metrics.json").read_text())
        assert -1 <= metrics["segm"]["AP"] <= 1
        assert json.loads((folder / f"runs/{run}/eval/evaluation.json").read_text())["protocol"] == "coco"
        with (folder / f"runs/{run}/eval/per_category.csv").open() as file:
            assert {row["name"] for row in csv.DictReader(file)} == set(names)
    assert (folder / "mine.html").stat().st_size > 10_000
    found = json.loads((folder / "predictions/predictions.json").read_text())
    assert {record["name"] for record in found} <= set(names)
    photos = [file for file in before if file.suffix == ".jpg"]
    assert len(list((folder / "predictions").glob("*.png"))) == len(photos)
    assert {file: file.read_bytes() for file in before} == before
