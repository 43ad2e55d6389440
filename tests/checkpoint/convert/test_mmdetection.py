"""MMDetection's checkpoints to ours and back, bit for bit, and what is refused."""

import pytest
import torch

import loce
from loce.checkpoint.convert import convert, to_mmdetection
from loce.checkpoint.load import Checkpoint, load_weights, stats_from_dict
from loce.config import EvalConfig, HeadConfig, IndicatorConfig, MemoryConfig, ModelConfig, UserError
from loce.models.mask_rcnn import MaskRCNN, build_roi_heads
from tests.parity import official, rule

CLASSES = 5


@pytest.mark.parametrize("wrap", ["state_dict", ""], ids=["wrapped", "bare"])
def test_there_and_back(written, theirs, tmp_path, wrap):
    content, report = convert(written(wrap=wrap))
    torch.save(content, tmp_path / "ours.pt")
    model = loce.load_model(tmp_path / "ours.pt")
    content["model"] = model.state_dict()  # what a strict load made of it
    torch.save(content, tmp_path / "again.pt")
    back, _ = to_mmdetection(tmp_path / "again.pt")
    assert set(back["state_dict"]) == set(theirs)
    for key, value in theirs.items():
        assert back["state_dict"][key].dtype == value.dtype and torch.equal(back["state_dict"][key], value), key
    assert f"{len(theirs)} tensors, all of them used" in report[0]
    assert ("dropped on purpose: meta, optimizer" in report) == bool(wrap)


def test_keys_of_a_model_that_was_wrapped_for_several_gpus(tmp_path, theirs):
    torch.save({f"module.{k}": v for k, v in theirs.items()}, tmp_path / "source.pth")
    content, _ = convert(tmp_path / "source.pth")
    assert torch.equal(content["model"]["roi_heads.classifier.fc_cls.bias"], theirs["roi_head.bbox_head.fc_cls.bias"])


def test_class_names(written, tmp_path, annotation_file):
    content, report = convert(written())
    assert content["classes"]["names"] == [f"class {label}" for label in range(CLASSES)]
    assert content["classes"]["category_ids"] == [1, 2, 3, 4, 5] and "placeholders" in report[1]
    names = ("cat", "dog", "ox", "ant", "bee")
    content, report = convert(written(meta={"CLASSES": names}))
    assert content["classes"]["names"] == list(names) and "as in the file" in report[1]
    annotations = annotation_file("a.json", list(names), [7, 3, 9, 11, 20])
    content, _ = convert(written(), annotations)
    stats = stats_from_dict(content["classes"])
    assert stats.names == names and stats.category_ids.tolist() == [7, 3, 9, 11, 20]
    assert stats.instance_counts.tolist() == [1, 0, 0, 0, 0]


def test_other_spellings_are_told_and_another_order_is_refused(written, tmp_path, annotation_file):
    source = written(meta={"CLASSES": ("cat", "dog", "ox", "ant", "bee")})
    same = annotation_file("a.json", ["cat", "Dog", "ox", "ant", "bee"])
    _, report = convert(source, same)
    assert any("1 class names are written differently in the annotations: dog -> Dog" in line for line in report)
    swapped = annotation_file("b.json", ["cat", "ox", "dog", "ant", "bee"])
    with pytest.raises(UserError, match=r"'dog' is class 1 in the checkpoint and class 2 in the annotations"):
        convert(source, swapped)


@pytest.mark.parametrize("key", ["classes", "CLASSES"])
def test_what_version_3_says_is_read(written, annotation_file, key):
    """Its names stand in meta.dataset_meta, its configuration in meta.cfg."""
    names = ["cat", "dog", "ox", "ant", "bee"]
    cfg = "model = dict(roi_head=dict(mask_head=dict(type='FCNMaskHead', predictor_cfg=dict(type='Conv'))))"
    source = written(meta={"dataset_meta": {key: tuple(names), "palette": [(0, 0, 0)]}, "cfg": cfg, "epoch": 12})
    content, report = convert(source)
    assert content["classes"]["names"] == names and "as in the file" in report[1]
    assert "mask predictor: linear, as the configuration in the file says" in report
    turned = annotation_file("turned.json", names[::-1])
    with pytest.raises(UserError, match=r"another order: 'cat' is class 0 in the checkpoint and class 4"):
        convert(source, turned)


def test_names_of_other_classes_than_there_are(written, annotation_file):
    _, report = convert(written(meta={"dataset_meta": {"classes": ("cat", "dog")}}))
    assert "class names: the file names 2 of its 5 classes, so none are used" in report
    assert any("placeholders" in line for line in report)


def test_wrong_number_of_classes(written, tmp_path, annotation_file):
    annotations = annotation_file("a.json", ["cat", "dog"])
    with pytest.raises(UserError, match=r"has 5 classes \(6 outputs of fc_cls\), the annotations 2"):
        convert(written(), annotations)


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [
        ("mask_head=dict(type='FCNMaskHead', predictor_cfg=dict(type='NormedConv2d'))", "auto", "normalised"),
        ("mask_head=dict(type='FCNNormMaskHead')", "auto", "normalised"),
        ("mask_head=dict(type='FCNMaskHead', norm_cfg=None)", "auto", "linear"),
        ("", "auto", "normalised"),
        ("", "linear", "linear"),
        ("mask_head=dict(type='FCNMaskHead')", "normalised", "normalised"),
    ],
)
def test_mask_predictor(written, config, asked, expected):
    content, report = convert(written(meta={"config": config}), mask_predictor=asked)
    assert content["config"]["model"]["mask_predictor"] == expected
    assert any(line.startswith(f"mask predictor: {expected}") for line in report) == (asked == "auto")


def test_a_converted_file_starts_a_training(written, tmp_path, annotation_file):
    """`train.init` takes every weight, for a LOCE model too."""
    names = ["cat", "dog", "ox", "ant", "bee"]
    content, _ = convert(written(), annotation_file("a.json", names))
    torch.save(content, tmp_path / "ours.pt")
    stats = stats_from_dict(content["classes"])
    options = ModelConfig(weights="none", fpn_channels=16, fc_features=12, mask_channels=16)
    parts = build_roi_heads(
        options, HeadConfig(name="equilibrium"), IndicatorConfig(), MemoryConfig(enabled=True), stats
    )
    model = MaskRCNN(options, parts, EvalConfig(), (64, 96))
    report = load_weights(Checkpoint.open(tmp_path / "ours.pt"), model, stats)
    assert len(report["loaded"]) == 360 and report["new"] == report["dropped"] == []


def test_missing_extra_and_misshapen_keys_are_all_named(written):
    changes = {
        "roi_head.bbox_head.fc_reg.weight": torch.zeros(4, 12),  # regression that is the same for all classes
        "roi_head.bbox_head.fc_reg.bias": torch.zeros(4),
        "neck.fpn_convs.2.conv.bias": None,
        "backbone.fc.weight": torch.zeros(3),
    }
    with pytest.raises(UserError) as caught:
        convert(written(changes))
    message = str(caught.value)
    assert "missing: neck.fpn_convs.2.conv.bias" in message
    assert "not of the architecture that loce has: backbone.fc.weight" in message
    assert "roi_head.bbox_head.fc_reg.weight (4, 12), expected (20, 12)" in message


def test_another_architecture(written, tmp_path):
    with pytest.raises(UserError, match=r"not of the architecture that loce has: roi_head.bbox_head.0.fc_cls.weight"):
        convert(written({"roi_head.bbox_head.0.fc_cls.weight": torch.zeros(2, 2)}))
    with pytest.raises(UserError, match=r"36 blocks of 3 convolutions in layer3; loce has ResNet-18"):
        convert(written({f"backbone.layer3.{i}.conv1.weight": torch.zeros(1) for i in range(36)}))
    torch.save({"state_dict": {"backbone.conv1.weight": torch.zeros(1), "bbox_head.x": torch.zeros(1)}}, tmp_path / "r")
    with pytest.raises(
        UserError, match=r"no Mask or Faster R-CNN(.|\n)*tensors in it: backbone \(1\), bbox_head \(1\)"
    ):
        convert(tmp_path / "r")
    with pytest.raises(UserError, match=r"no classifier in it; roi_head.bbox_head.fc_cls.weight is missing"):
        convert(written({"roi_head.bbox_head.fc_cls.weight": None}))


def test_source_classes_is_not_for_them(written):
    with pytest.raises(UserError, match=r"source_classes is for torchvision"):
        convert(written(), source_classes="x.json")


def write_ours(path, written, change):
    content, _ = convert(written())
    change(content)
    torch.save(content, path)
    return path


def test_training_state_is_dropped_and_told(written, tmp_path):
    def add(content):
        content["model"]["roi_heads.memory.bank.features"] = torch.zeros(3)

    back, report = to_mmdetection(write_ours(tmp_path / "ours.pt", written, add))
    assert not any("tracker" in key or "memory" in key for key in back["state_dict"])
    assert "dropped on purpose: roi_heads.tracker (mean score, 1 tensors)" in report
    assert "dropped on purpose: roi_heads.memory.bank (feature memory, 1 tensors)" in report
    assert back["meta"]["CLASSES"] == tuple(f"class {label}" for label in range(CLASSES))


def test_a_run_folder(written, tmp_path):
    folder = tmp_path / "run/checkpoints/000000010"
    folder.mkdir(parents=True)
    write_ours(folder / "main.pt", written, lambda content: None)
    assert len(to_mmdetection(tmp_path / "run")[0]["state_dict"]) == 360


def test_other_models(written, tmp_path):
    def tiny(content):
        content["config"]["model"].update(backbone="tiny", norm="group")

    with pytest.raises(UserError, match=r"backbone=tiny with model.norm=group has no counterpart"):
        to_mmdetection(write_ours(tmp_path / "tiny.pt", written, tiny))

    def other_head(content):
        content["model"]["roi_heads.classifier.objectness.weight"] = torch.zeros(1)

    with pytest.raises(UserError, match=r"has no place for roi_heads.classifier.objectness.weight"):
        to_mmdetection(write_ours(tmp_path / "head.pt", written, other_head))
    with pytest.raises(UserError, match=r"not written by loce"):
        to_mmdetection(written())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "classes"), [("ResNet-50", 20), ("ResNet-50", 1203), ("ResNet-50", 1230), ("ResNet-101", 1203)]
)
def test_every_key_of_the_official_models_bit_for_bit(tmp_path, backbone, classes):
    """LVIS v1 and v0.5, R-50 and R-101, at full size: converted, loaded strictly, converted back."""
    theirs = {k: torch.from_numpy(rule.weight(k, s)) for k, s in official.key_shapes(backbone, classes).items()}
    assert len(theirs) == {"ResNet-50": 360, "ResNet-101": 666}[backbone]
    torch.save({"state_dict": theirs, "meta": {}}, tmp_path / "theirs.pth")
    content, _ = convert(tmp_path / "theirs.pth")
    torch.save(content, tmp_path / "ours.pt")
    content["model"] = loce.load_model(tmp_path / "ours.pt").state_dict()
    torch.save(content, tmp_path / "again.pt")
    back = to_mmdetection(tmp_path / "again.pt")[0]["state_dict"]
    assert set(back) == set(theirs)
    for key, value in theirs.items():
        assert back[key].dtype == value.dtype and torch.equal(back[key], value), key
    for path in tmp_path.iterdir():  # most of a gigabyte
        path.unlink()
