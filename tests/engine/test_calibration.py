"""Post-hoc calibration by an option: evaluation, prediction, refusals, and class facts that are kept beside the run."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from loce.checkpoint.load import Checkpoint
from loce.config import UserError, load_config
from loce.data.build import train_annotations, train_dataset, val_annotations, val_dataset
from loce.data.dataset import ShownImage
from loce.data.loader import training_plan
from loce.data.transforms import read_image
from loce.engine.class_facts import calibrate, class_facts
from loce.engine.inference import evaluate_checkpoints
from loce.posthoc import box_counting_dimension
from scripts import predict


@pytest.fixture
def copied(stage1: Path, tmp_path: Path) -> Path:
    """The run folder of `stage1`, a copy."""
    shutil.copytree(stage1 / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


def detections(folder: Path, *words: str) -> list[dict]:
    """What the run's model finds in the first validation images with options in their place."""
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config_with(["eval.score_threshold=0", *words])
    model = checkpoint.detector(config).eval()
    calibrate(model, config, folder)
    samples = [val_dataset(config, val_annotations(config))[index] for index in range(3)]
    return model.detect(*([s[key] for s in samples] for key in ("image", "scale", "size")))


def same(found: list[dict], wanted: list[dict]) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in ("boxes", "scores", "labels"))


def test_a_head_and_an_option_that_mean_the_same_detect_the_same(copied: Path) -> None:
    option = detections(copied, "eval.posthoc=norcal", "eval.norcal.gamma=0.9")
    assert same(option, detections(copied, "head.name=norcal", "head.norcal.gamma=0.9"))
    assert not same(option, detections(copied))
    nothing = detections(copied, "eval.posthoc=norcal", "eval.norcal.gamma=0")
    torch.testing.assert_close(nothing[0]["scores"], detections(copied)[0]["scores"])


@pytest.mark.parametrize("name", ["logit_adjustment", "tau_norm", "temperature", "iif", "logn", "fracal"])
def test_every_method_has_what_it_needs(copied: Path, name: str) -> None:
    found = detections(copied, f"eval.posthoc={name}", *(["eval.temperature.t=3"] if name == "temperature" else []))
    assert all(torch.isfinite(x["scores"]).all() for x in found) and not same(found, detections(copied))


def test_an_evaluation_says_that_it_was_calibrated(copied: Path) -> None:
    words = ["eval.posthoc=fracal", "eval.fracal.exponent=3"]
    (folder,) = evaluate_checkpoints([copied], None, words, "cpu", resamples=0)
    assert folder == copied / "eval_eval.posthoc=fracal_eval.fracal.exponent=3.0"
    told = json.loads((folder / "metrics.json").read_text())["posthoc"]
    assert told.startswith("fracal exponent=3.0 variant=base10 counts=images by ") and "sha256" in told
    facts = json.loads((folder / "evaluation.json").read_text())
    assert facts["posthoc"] == told and told in facts["results"] and told in (folder / "origin.txt").read_text()
    (plain,) = evaluate_checkpoints([copied], None, ["eval.nms=0.4"], "cpu", resamples=0)
    assert set(json.loads((plain / "metrics.json").read_text())) == {"bbox", "segm", "true_boxes"}


def facts_of(folder: Path, *words: str):
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config_with(words)
    return class_facts(checkpoint.detector(config), config, folder, ("fracal", "logn", "tau_norm"))


def test_facts_are_those_of_the_training_set(copied: Path) -> None:
    found = facts_of(copied, "eval.posthoc=logn", "eval.logn.images=6")
    checkpoint = Checkpoint.open(copied)
    data = json.loads(Path(checkpoint.config.data.train_annotations).read_text())
    # FRACAL's dimension, from the file.
    size = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    label = {category["id"]: place for place, category in enumerate(data["categories"])}
    centres = [
        [(a["bbox"][i] + a["bbox"][i + 2] / 2) / size[a["image_id"]][i] for i in (0, 1)] for a in data["annotations"]
    ]
    labels = np.array([label[a["category_id"]] for a in data["annotations"]])
    assert found.dimension == pytest.approx(box_counting_dimension(np.array(centres), labels, len(label)))
    assert found.images == len(data["images"])
    # LogN's moments, over all rows of six images at once.
    config = checkpoint.config
    annotations = train_annotations(config)
    dataset = train_dataset(config, annotations)
    shown = training_plan(dataset, config.sampler, config.data, 2, config.seed).epoch(0)[:3]
    model = checkpoint.detector().eval()
    model.rpn.train()
    samples = [[dataset[ShownImage(image, 0, repeat)] for image, repeat, _ in pair] for pair in shown.tolist()]
    rows = torch.cat([model.training_logits(pair) for pair in samples])[:, :-1].double()
    assert found.mean == pytest.approx(rows.mean(dim=0).numpy(), rel=1e-5, abs=1e-7)
    assert found.variance == pytest.approx(rows.var(dim=0).numpy(), rel=1e-5)
    # The classifier's lengths.
    weight = checkpoint.model["roi_heads.classifier.fc_cls.weight"].double()
    assert found.norm == pytest.approx(weight.norm(dim=1)[:-1].numpy())


def test_facts_are_computed_once_and_again_where_inputs_changed(copied: Path, tmp_path: Path) -> None:
    words = ["eval.posthoc=logn", "eval.logn.images=4"]
    first = facts_of(copied, *words)
    files = {file: file.stat().st_mtime_ns for file in (copied / "posthoc").iterdir()}
    assert sorted(file.name[:13] for file in files) == ["box_dimension", "logit_moments"]
    facts_of(copied, *words)
    assert {file: file.stat().st_mtime_ns for file in (copied / "posthoc").iterdir()} == files
    # A damaged file is written anew; other options and other annotations have files of their own.
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    again = facts_of(copied, *words)
    assert np.array_equal(again.mean, first.mean) and np.array_equal(again.dimension, first.dimension)
    facts_of(copied, "eval.posthoc=logn", "eval.logn.images=2")
    assert len(list((copied / "posthoc").glob("logit_moments_*"))) == 2
    data = json.loads(Path(Checkpoint.open(copied).config.data.train_annotations).read_text())
    data["annotations"] = data["annotations"][::2]
    (tmp_path / "half.json").write_text(json.dumps(data))
    facts_of(copied, *words, f"data.train_annotations={tmp_path}/half.json")
    assert len(list((copied / "posthoc").glob("box_dimension_*"))) == 2


def test_without_the_training_set(copied: Path, tmp_path: Path) -> None:
    """A run folder on another machine: counts and what was kept are enough; else it is said what is missing."""
    gone = f"data.train_annotations={tmp_path}/gone.json"
    assert detections(copied, gone, "eval.posthoc=norcal")
    with pytest.raises(UserError, match=r"gone\.json"):
        detections(copied, gone, "eval.posthoc=fracal")
    with pytest.raises(UserError, match="needs the training set"):
        detections(copied, gone, "eval.posthoc=logn")
    known = detections(copied, "eval.posthoc=fracal")
    assert same(detections(copied, gone, "eval.posthoc=fracal"), known)


def test_a_checkpoint_that_knows_no_counts(copied: Path) -> None:
    """As one that was converted without annotations: methods that need no counts work."""
    checkpoint = Checkpoint.open(copied)
    model, zeros = checkpoint.detector(), np.zeros(6, np.int64)
    model.stats = dataclasses.replace(model.stats, image_counts=zeros, instance_counts=zeros)
    with pytest.raises(UserError, match=r"norcal: needs to know how often"):
        class_facts(model, checkpoint.config, copied, ["norcal"])
    assert class_facts(model, checkpoint.config, copied, ["tau_norm"]).norm is not None


REFUSED = [
    ("eval.posthoc=fracal head.name=seesaw", "this head reads scores in its own way"),
    ("eval.posthoc=norcal head.name=norcal", "this head reads scores in its own way"),
    ("eval.posthoc=norcal head.name=fedloss", "this head has sigmoids"),
    ("eval.posthoc=logn head.name=gol head.gol.activation=sigmoid", "this head has sigmoids"),
    ("eval.posthoc=temperature head.name=gol", "this head reads scores in its own way"),
    ("eval.posthoc=logit_adjustment head.name=balanced_softmax", "use one of the two"),
    ("eval.posthoc=tau_norm head.name=ldam", "not those of one linear layer"),
    ("eval.posthoc=fracal eval.norcal.gamma=1", "an option of eval.posthoc=norcal"),
    ("eval.posthoc=fractal", "must be none | norcal"),
    ("eval.fracal.exponnt=1", "did you mean eval.fracal.exponent"),
]


@pytest.mark.parametrize(("words", "reason"), REFUSED)
def test_what_cannot_be_combined_is_refused(config: Path, words: str, reason: str) -> None:
    with pytest.raises(UserError) as error:
        load_config([str(config), *words.split()])
    assert reason in str(error.value)


@pytest.mark.parametrize("words", ["head.name=eql", "head.name=gol head.gol.activation=sigmoid", "head.name=acsl"])
@pytest.mark.parametrize("name", ["fracal", "temperature"])
def test_sigmoids_can_be_calibrated(config: Path, words: str, name: str) -> None:
    assert load_config([str(config), *words.split(), f"eval.posthoc={name}"]).eval.posthoc == name


def test_pictures_are_of_calibrated_scores(
    copied: Path, glyphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next((glyphs / "val2017").iterdir())
    words = [copied, image, f"output={tmp_path}/p", "device=cpu", "eval.posthoc=norcal", "eval.score_threshold=0"]
    monkeypatch.setattr("sys.argv", ["predict.py", *map(str, words)])
    predict.main()
    assert "scores: calibrated post hoc by norcal gamma=0.6 counts=images" in capsys.readouterr().out
    found = [record["score"] for record in json.loads((tmp_path / "p" / "predictions.json").read_text())]
    checkpoint = Checkpoint.open(copied)
    config = checkpoint.config_with(words[-2:])
    model = checkpoint.detector(config).eval()
    calibrate(model, config, copied)
    wanted = model.detect_images([torch.from_numpy(read_image(image, None)).permute(2, 0, 1)])[0]["scores"]
    assert found == pytest.approx(wanted.tolist(), abs=1e-5)
