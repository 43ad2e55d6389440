"""torchvision's checkpoints: the same outputs of the parts, classes by name, and what is refused."""

from pathlib import Path

import pytest
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn

import loce
from loce.checkpoint.convert import convert, mmdetection, torchvision
from loce.config import UserError


@pytest.fixture(scope="module")
def torchvision_model():
    torch.manual_seed(0)
    made = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return made


@pytest.fixture(scope="module")
def torchvision_file(torchvision_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("torchvision") / "source.pth"
    torch.save({"model": torchvision_model.state_dict(), "epoch": 12}, path)
    return path


def own_file(path: Path, model, classes: int) -> Path:
    """A torchvision checkpoint for so many classes; what is not of a class is a number in the file."""
    state = {}
    for key, value in model.state_dict().items():
        if "box_predictor" in key or "mask_fcn_logits" in key:
            state[key] = torch.randn(len(value) // 91 * (classes + 1), *value.shape[1:])
        else:
            state[key] = value.flatten()[0].clone().expand(value.shape)
    torch.save(state, path)
    return path


@torch.no_grad()
def test_outputs_of_the_heads(torchvision_model, torchvision_file, tmp_path):
    content, report = convert(torchvision_file)
    torch.save(content, tmp_path / "ours.pt")
    ours = loce.load_model(tmp_path / "ours.pt").roi_heads
    rows = torch.tensor(content["classes"]["category_ids"])
    assert len(rows) == 80 and content["classes"]["names"][:3] == ["person", "bicycle", "car"]
    pooled = torch.randn(6, 256, 7, 7)
    features = torchvision_model.roi_heads.box_head(pooled)
    logits, deltas = torchvision_model.roi_heads.box_predictor(features)
    x = ours.box_head(pooled)
    own = ours.classifier(x)
    torch.testing.assert_close(own, torch.cat([logits[:, rows], logits[:, :1]], dim=1))
    torch.testing.assert_close(ours.fc_reg(x).reshape(6, 80, 4), deltas.reshape(6, 91, 4)[:, rows])
    large, labels = torch.randn(6, 256, 14, 14), torch.tensor([0, 5, 79, 11, 30, 62])
    masks = torchvision_model.roi_heads.mask_predictor(torchvision_model.roi_heads.mask_head(large))
    torch.testing.assert_close(ours.mask_head(large, labels), masks[torch.arange(6), rows[labels]])
    assert "80 classes taken over by name: person, bicycle" in report[2] and "0 classes start anew" in report[3]
    assert "background: moved from the first output to the last" in report


def test_a_faster_r_cnn_is_a_detector_of_boxes(torchvision_model, torchvision_file, tmp_path):
    """`fasterrcnn_resnet50_fpn` has these names and shapes; what it shares with the Mask R-CNN becomes the same."""
    state = {key: value for key, value in torchvision_model.state_dict().items() if "mask" not in key}
    with torch.device("meta"):
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).state_dict()
    assert {key: value.shape for key, value in theirs.items()} == {key: value.shape for key, value in state.items()}
    torch.save(state, tmp_path / "faster.pth")
    content, report = convert(tmp_path / "faster.pth")
    assert "no mask head in it: a detector of boxes (model.masks=false)" in report
    assert any(line.startswith("to train from it: ") and "model.masks=false" in line for line in report)
    expected, _ = convert(torchvision_file)
    assert {key for key in expected["model"] if "mask_head" not in key} == set(content["model"])
    assert all(torch.equal(value, expected["model"][key]) for key, value in content["model"].items())
    assert content["config"]["model"] == {**expected["config"]["model"], "masks": False, "mask_predictor": "normalised"}


@torch.no_grad()
def test_pyramid_and_rpn(torchvision_model, torchvision_file, tmp_path):
    content, _ = convert(torchvision_file)
    torch.save(content, tmp_path / "ours.pt")
    # A loaded model has folded norms, which round otherwise: 1e-5 of maps whose standard deviation is 34 here.
    ours = loce.load_model(tmp_path / "ours.pt")
    image = torch.randn(1, 3, 64, 96)
    maps = list(torchvision_model.backbone(image).values())
    torch.testing.assert_close(ours.features(image), maps, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours.rpn.head(maps), torchvision_model.rpn.head(maps))


def test_classes_of_another_data_set(torchvision_file, tmp_path, annotation_file):
    """Taken over by name, whatever the case and underscores; the others start anew, as a new model does."""
    target = annotation_file("a.json", ["aardvark", "Traffic_Light", "dog", "zucchini"])
    content, report = convert(torchvision_file, target)
    weights, model = content["model"], torch.load(torchvision_file, weights_only=True)["model"]
    rows = {1: 10, 2: 18}  # COCO's ids of traffic light and dog
    cls, reg = weights["roi_heads.classifier.fc_cls.weight"], weights["roi_heads.fc_reg.weight"]
    assert cls.shape == (5, 1024) and reg.shape == (16, 1024)
    for label, row in rows.items():
        assert torch.equal(cls[label], model["roi_heads.box_predictor.cls_score.weight"][row])
        theirs = model["roi_heads.box_predictor.bbox_pred.weight"][4 * row : 4 * row + 4]
        assert torch.equal(reg[4 * label : 4 * label + 4], theirs)
        theirs = model["roi_heads.mask_predictor.mask_fcn_logits.weight"][row]
        assert torch.equal(weights["roi_heads.mask_head.predictor.weight"][label], theirs)
    assert torch.equal(cls[4], model["roi_heads.box_predictor.cls_score.weight"][0])
    assert 0.005 < float(cls[0].std()) < 0.02 and not torch.equal(cls[0], cls[3])
    assert (weights["roi_heads.classifier.fc_cls.bias"][[0, 3]] == 0).all()
    assert report[2].endswith("by name: Traffic_Light, dog") and report[3].endswith("anew: aardvark, zucchini")
    again, _ = convert(torchvision_file, target)
    assert all(torch.equal(value, again["model"][key]) for key, value in weights.items())


def test_names_of_older_files_and_no_batch_counters(torchvision_model, torchvision_file, tmp_path):
    old = {}
    for key, value in torchvision_model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        for new, older in (("_blocks.%d.0.", "_blocks.%d."), ("mask_head.%d.0.", "mask_head.mask_fcn%d.")):
            for i in range(4):
                shift = 1 if "fcn" in older else 0
                key = key.replace(new % i, older % (i + shift))
        old[key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = value
    torch.save(old, tmp_path / "old.pth")
    assert not set(old) & {"rpn.head.conv.0.0.weight", "roi_heads.mask_head.0.0.weight"}
    converted, report = convert(tmp_path / "old.pth")
    expected, _ = convert(torchvision_file)
    assert converted["model"].keys() == expected["model"].keys()
    assert all(torch.equal(value, expected["model"][key]) for key, value in converted["model"].items())
    assert any("53 num_batches_tracked" in line for line in report)


@pytest.mark.parametrize("kind", ["ids", "order", "neither"])
def test_a_users_own_classes(torchvision_model, tmp_path, kind, annotation_file):
    names = ["cat", "dog", "ox"]
    ids = {"ids": [3, 1, 2], "order": [30, 10, 20], "neither": [30, 10, 20]}[kind]
    source = own_file(tmp_path / "own.pth", torchvision_model, 4 if kind == "neither" else 3)
    file = annotation_file("own.json", names, ids)
    if kind == "neither":
        with pytest.raises(UserError, match=r"has 5 outputs; .*own.json has 3 categories with ids up to 30"):
            convert(source, source_classes=file)
        return
    content, _ = convert(source, file, file)
    rows = ids if kind == "ids" else [1, 2, 3]
    bias = torch.load(source, weights_only=True)["roi_heads.box_predictor.cls_score.bias"]
    assert torch.equal(content["model"]["roi_heads.classifier.fc_cls.bias"], bias[[*rows, 0]])
    if kind == "ids":  # for a training that drops the classes without an instance
        part, _ = convert(source, file, file, overrides=["data.drop_empty=true"])
        assert part["classes"]["category_ids"] == [3] and part["config"]["data"]["drop_empty"]
        assert torch.equal(part["model"]["roi_heads.classifier.fc_cls.bias"], bias[[3, 0]])


def test_outputs_without_names(torchvision_model, tmp_path, annotation_file):
    source = own_file(tmp_path / "own.pth", torchvision_model, 3)
    content, _ = convert(source)
    assert content["classes"]["names"] == ["class 1", "class 2", "class 3"]
    target = annotation_file("a.json", ["cat", "dog", "ox"])
    _, report = convert(source, target)
    assert "source_classes=B.json would name the outputs" in report[2] and report[3].startswith("3 classes")


def test_another_architecture(torchvision_model, tmp_path):
    state = dict(torchvision_model.state_dict())
    del state["roi_heads.mask_predictor.mask_fcn_logits.weight"]
    state["roi_heads.box_predictor.bbox_pred.bias"] = torch.zeros(12)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "x.pth")
    message = str(caught.value)
    assert "missing: roi_heads.mask_predictor.mask_fcn_logits.weight" in message
    assert "roi_heads.box_predictor.bbox_pred.bias (12,), expected (364,)" in message


def test_tables_are_one_to_one():
    """Every module of ours has exactly one name at MMDetection's, and at least one at torchvision's."""
    assert len(set(mmdetection.FORMAT.table.values())) == len(mmdetection.FORMAT.table)
    assert set(mmdetection.FORMAT.table.values()) == set(torchvision.FORMAT.table.values())
