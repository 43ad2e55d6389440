"""Boxes only (`model.masks=false`): a Faster R-CNN on annotations without segmentation, up to the report.

The same runs have a class in the middle of the list that training has no instance of (`data.drop_empty`).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import loce
from loce.checkpoint.load import Checkpoint
from loce.config import Config, UserError, load_config
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import train_annotations, train_dataset, val_annotations
from loce.engine import dry_run
from loce.engine.arm import Arm
from loce.engine.inference import check_evaluation
from loce.engine.train import train
from loce.evaluation.report import evaluate_and_report
from loce.evaluation.true_boxes import read_true_boxes
from loce.report.page import predictions
from loce.report.panels import curve
from loce.report.reading import read_run
from loce.utils import signals
from loce.utils.files import read_csv
from tests.tiny_runs import CONFIG, metrics, run, weights

BOXES = "model.masks=false"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def boxes(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for `glyphs` whose annotations have no key `segmentation`; 2 steps.

    Category 0 stands between others; only validation has an object of it.
    """
    folder = tmp_path_factory.mktemp("boxes")
    for split in ("train", "val"):
        made = json.loads((glyphs / f"annotations/{split}.json").read_text())
        for row in made["annotations"]:
            del row["segmentation"]
        made["categories"].insert(3, {"id": 0, "name": "things", "frequency": "r", "image_count": 0})
        if split == "val":
            made["annotations"].append({**made["annotations"][0], "id": 10**6, "category_id": 0})
        (folder / f"{split}.json").write_text(json.dumps(made))
    text = CONFIG.format(glyphs).replace(f"{glyphs}/annotations", str(folder))
    text = text.replace("workers: 0", "workers: 0, drop_empty: true")
    text = text.replace("mask_channels: 8, mask_convs: 1", "masks: false").replace(
        "epochs: 2, drops: [1]", "epochs: 1, drops: []"
    )
    (folder / "boxes.yaml").write_text(text)
    return folder / "boxes.yaml"


def trained(*configs: Config) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "listen", lambda: None)
        train(*configs)
    return Path(configs[0].output)


@pytest.fixture(scope="module")
def runs(boxes: Path) -> Path:
    """stage1, then loce and softmax in one pass."""
    folder = boxes.parent / "runs"
    first = trained(load_config([str(boxes), f"output={folder / 'stage1'}", "eval.errors=false"]))
    words = [f"train.init={first}", "train.freeze=trunk", "train.clip_norm=0", "eval.errors=false"]
    trained(
        load_config([str(boxes), *words, f"output={folder / 'loce'}", "head.name=equilibrium", "memory.enabled=true"]),
        load_config([str(boxes), *words, f"output={folder / 'softmax'}"]),
    )
    return folder


def test_nothing_of_masks_is_built_stored_trained_or_evaluated(runs: Path) -> None:
    for name in ("stage1", "loce", "softmax"):
        assert not [key for key in weights(runs / name) if "mask" in key]
        assert all("loss_box" in line and "loss_mask" not in line for line in metrics(runs / name))
        assert list(json.loads((runs / name / "eval/metrics.json").read_text())) == ["bbox", "true_boxes"]
        assert {row["iou_type"] for row in read_csv(runs / name / "eval/per_category.csv")} == {"bbox"}
        log = (runs / name / "log.txt").read_text()
        assert "model: tiny, boxes only, " in log and "left out" not in log
    found = loce.load_model(runs / "loce")([torch.full((3, 60, 80), 90, dtype=torch.uint8)])[0]
    assert set(found) == {"boxes", "labels", "scores"}


def test_a_class_without_a_training_instance_has_no_output(boxes: Path, runs: Path, tmp_path: Path) -> None:
    files = {name: json.loads(boxes.with_name(f"{name}.json").read_text()) for name in ("train", "val")}
    known = {category["id"]: category["name"] for category in files["val"]["categories"] if category["id"]}
    note = "1 categories without a training instance have no output (data.drop_empty): things"
    lost = f"WARNING: {note}; 1 objects of theirs are in {boxes.with_name('val.json')}: they count as missed"
    true_id = {row["id"]: row["category_id"] for row in files["val"]["annotations"]}
    for name in ("stage1", "loce", "softmax"):
        classes = Checkpoint.open(runs / name).classes
        assert dict(zip(classes.category_ids.tolist(), classes.names, strict=True)) == known
        assert len(weights(runs / name)["roi_heads.classifier.fc_cls.weight"]) == len(known) + 1
        log = (runs / name / "log.txt").read_text()
        assert f"data: {note}\n" in log and f"data: {lost}\n" in log
        # The file's own ids, behind the gap, too; the object that has no output is missed.
        boxes_found = read_true_boxes(runs / name / "eval")
        assert boxes_found is not None and len(boxes_found) == len(true_id) - 1
        pairs = zip(boxes_found.annotation_ids.tolist(), boxes_found.category_ids.tolist(), strict=True)
        assert all(true_id[number] == category for number, category in pairs)
        rows = {int(row["id"]): row for row in read_csv(runs / name / "eval/per_category.csv")}
        assert set(rows) == {0, *known} and (rows[0]["instances"], float(rows[0]["AP"])) == ("1", 0)
        assert lost in json.loads((runs / name / "eval/evaluation.json").read_text())["notes"]
    # The same detections evaluated against the file alone.
    val, once = boxes.with_name("val.json"), {"resamples": 0, "errors": False, "save_json": True}
    evaluate_and_report(val, runs / "loce/eval/detections", tmp_path, ("bbox",), **once)
    ours, again = (json.loads((each / "metrics.json").read_text())["bbox"] for each in (runs / "loce/eval", tmp_path))
    assert ours == again
    assert {row["category_id"] for row in json.loads((tmp_path / "results.json").read_text())} <= set(known)
    # A stage that drops nothing does not go on from one that did.
    config = load_config([str(boxes), f"train.init={runs / 'stage1'}", "data.drop_empty=false"])
    with pytest.raises(UserError, match=r"has 6 classes, the training data has 7(.|\n)*its data\.drop_empty was true"):
        Arm(config, CPU, train_annotations(config))
    with pytest.raises(UserError, match="7 categories here, 6 there"):
        check_evaluation(config, val_annotations(config), train_annotations(load_config([str(boxes)])).stats, "it")


@pytest.mark.slow
def test_the_training_is_that_of_a_file_without_the_class(boxes: Path, runs: Path, tmp_path: Path) -> None:
    words = ["data.drop_empty=false", f"output={tmp_path / 'clean'}", "train.evaluate=false"]
    for split in ("train", "val"):
        made = json.loads(boxes.with_name(f"{split}.json").read_text())
        made["categories"] = [category for category in made["categories"] if category["id"]]
        made["annotations"] = [row for row in made["annotations"] if row["category_id"]]
        (tmp_path / f"{split}.json").write_text(json.dumps(made))
        words.append(f"data.{split}_annotations={tmp_path / split}.json")
    found, expected = weights(trained(load_config([str(boxes), *words]))), weights(runs / "stage1")
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def test_masks_of_the_file_are_not_read(boxes: Path, config: Path) -> None:
    """The same training images, boxes and samples whether the file has segmentations or not."""
    ours = train_annotations(load_config([str(boxes)]))
    theirs = train_annotations(load_config([str(config), BOXES]))
    whole = train_annotations(load_config([str(config)]))
    assert not theirs.has_mask.any() and whole.has_mask.all() and not theirs.bad_masks
    for found in (ours, theirs):
        np.testing.assert_array_equal(found.train_rows, whole.train_rows)
        sample = train_dataset(load_config([str(boxes)]), found)[0, 0]
        expected = train_dataset(load_config([str(boxes)]), whole)[0, 0]
        assert "masks" not in sample and all(torch.equal(sample[key], expected[key]) for key in ("image", "boxes"))


def test_losses_are_those_of_a_mask_r_cnn_but_for_the_mask_loss(config: Path, stage1: Path) -> None:
    with_masks, without = (
        Arm(
            load_config([str(config), f"train.init={stage1}", *words]),
            CPU,
            train_annotations(load_config([str(config)])),
        )
        for words in ([], [BOXES])
    )
    samples = [train_dataset(load_config([str(config)]), train_annotations(load_config([str(config)])))[0, 0]]
    losses, expected = (arm.model.train()(samples) for arm in (without, with_masks))
    assert set(expected) - set(losses) == {"loss_mask"} and all(torch.equal(losses[k], expected[k]) for k in losses)
    assert any("mask head of that checkpoint is left out" in line for line in without.notes)
    assert not any("WARNING" in line for line in without.notes)


def test_a_mask_head_that_the_checkpoint_lacks_starts_anew_or_is_refused(config: Path, runs: Path) -> None:
    annotations = train_annotations(load_config([str(config)]))
    words = [str(config), f"train.init={runs / 'stage1'}"]
    arm = Arm(load_config(words), CPU, annotations)
    assert any("is a detector of boxes: the mask head starts anew" in line for line in arm.notes)
    with pytest.raises(UserError, match=r"they are frozen; a detector of boxes goes on with model\.masks=false"):
        Arm(load_config([*words, "train.freeze=detector"]), CPU, annotations)


def test_what_needs_masks_is_refused(boxes: Path, runs: Path) -> None:
    config = load_config([str(boxes)])
    annotations = train_annotations(config)
    with pytest.raises(UserError, match=r"iou_types = bbox,segm: it is a detector of boxes \(model\.masks=false\)"):
        check_evaluation(config, annotations, annotations.stats, "it", ("bbox", "segm"))
    with pytest.raises(UserError, match=r"mask_convs = 3.*: an option of model\.masks=true, which is not chosen"):
        load_config([str(boxes), "model.mask_convs=3"])


def test_the_report_reads_boxes(runs: Path) -> None:
    run_folder = read_run(runs / "loce")
    ap = json.loads((runs / "loce/eval/metrics.json").read_text())["bbox"]["AP"]
    assert curve(run_folder, "aps")["series"]["all"] == [pytest.approx(ap, rel=1e-3)]
    drawn, _, examples = predictions([run_folder], 2)
    assert [list(row) for row in drawn.values()] == [["ground truth", "loce"]] * 2
    crops = [one["drawn"] for one in examples["loce"].misses]
    crops += [uri for one in examples["loce"].confusions for uri, _ in one["drawn"]]
    assert crops and all(uri.startswith("data:image/jpeg;base64,") for uri in crops)


def test_overfit_names_the_ap_of_boxes(boxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "OVERFIT_STEPS", 1)
    dry_run.overfit(load_config([str(boxes), f"output={tmp_path}", "train.overfit=4"]), CPU)
    last = (tmp_path / "overfit/log.txt").read_text()
    assert "on these 4 images box AP " in last and "mask AP" not in last


def test_a_box_that_stands_for_a_mask_is_not_said_to_be_left_out(glyphs: Path, boxes: Path) -> None:
    found = LVISAnnotations.open(boxes.with_name("train.json"), box_masks=True)
    assert found.dropped == {} and sum(found.bad_masks.values()) == len(found.train_rows)
    assert any(f"{len(found.train_rows)} annotations have no mask that can be used" in note for note in found.notes)


@pytest.mark.slow
def test_the_commands(boxes: Path, runs: Path, glyphs: Path, tmp_path: Path) -> None:
    """check_data, dry run, two ranks, evaluate, compare, report, figures and predict, as users type them."""
    for words in (
        ["decode=none", boxes],
        [f"annotations={boxes.with_name('val.json')}", BOXES, "data.keep_empty=true"],
    ):
        text = run("check_data.py", *words)
        assert "nothing to mend" in text and "left out" not in text
    assert "passed" in run("train.py", boxes, f"output={tmp_path / 'dry'}", "train.dry_run=true")
    run("train.py", boxes, f"output={tmp_path / 'two'}", processes=2)
    assert metrics(tmp_path / "two")[-1]["loss"] == pytest.approx(metrics(runs / "stage1")[-1]["loss"], rel=1e-3)
    text = run("evaluate.py", f"checkpoint={runs / 'loce'}", "iou_types=segm", code=2)
    assert "is a detector of boxes" in text
    run("evaluate.py", f"checkpoint=[{runs / 'loce'},{runs / 'softmax'}]", "eval.nms=0.6")
    assert "bbox, protocol" in run("compare.py", runs / "softmax/eval", runs / "loce/eval")
    run("figures.py", runs / "loce", f"output={tmp_path / 'figures'}")
    run("report.py", runs / "loce", runs / "softmax", f"output={tmp_path / 'report.html'}")
    run("predict.py", runs / "loce", glyphs / "val2017", f"output={tmp_path / 'drawn'}", "threshold=0")
    records = json.loads((tmp_path / "drawn/predictions.json").read_text())
    assert records and all("segmentation" not in record and "bbox" in record for record in records)
    known = {(c["id"], c["name"]) for c in json.loads(boxes.with_name("train.json").read_text())["categories"]}
    assert {(record["category_id"], record["name"]) for record in records} <= known
