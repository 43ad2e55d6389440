"""LVIS's 1203 classes, and R-101: what can be said of them without stored arrays.

The same key and shape have the same weights by the rule, so with 1203 classes everything up to the last layers is that
of 20 classes. Of the official code's run with 1203 classes a few numbers are known.
"""

import pytest
import torch
from pycocotools import mask as coco_mask
from torchvision.models import resnet101
from torchvision.ops import nms

from loce.config import MemoryConfig
from loce.models.boxes import ROI_STDS, decode
from loce.models.roi_heads import Once, pool
from tests.parity import official, rule
from tests.parity.test_inference import FINEST
from tests.parity.test_training import CONTENT

pytestmark = pytest.mark.slow
# image -> candidates over 1e-4, pixels in the 300 masks, root mean square and maximum of the class logits of 32 RoIs
KNOWN = {0: (444808, 2489748, 2.97, 17.6), 1: (505763, 1186490, 2.49, 13.9)}


@pytest.fixture(scope="module")
def many_classes():
    return official.model(classes=1203).eval()


@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_1203_classes(many_classes, deviations, index):
    model, size, stored = many_classes, rule.SIZES[index], official.arrays("inference")
    candidates, pixels, rms, largest = KNOWN[index]
    features = model.features(torch.from_numpy(rule.image(index))[None])
    logits, deltas = model.rpn(features)
    proposals = model.rpn.proposals(logits, deltas, model.rpn.anchors(features), [size.content])[0]
    wanted = torch.from_numpy(stored[f"img{index}_proposals"])[:, :4]
    worst = torch.cdist(wanted, proposals, p=float("inf")).min(dim=1).values.max()
    deviations.within("1203 classes: proposals", float(worst), 2 * 2.9e-3, "px")

    roi = model.roi_heads
    rois = torch.from_numpy(stored[f"img{index}_rois"])[:, -4:]
    of_rois = roi.classifier(roi.box_head(pool(features, [rois], 7, FINEST)))
    deviations.within(
        "1203 classes: class logits, root mean square", abs(float(of_rois.square().mean().sqrt()) - rms), 6e-3
    )
    deviations.within("1203 classes: class logits, maximum", abs(float(of_rois.abs().max()) - largest), 6e-2)

    x = roi.box_head(pool(features, [proposals], 7, FINEST))
    scores = roi.classifier.scores(roi.classifier(x))
    count = int((scores > 1e-4).sum())
    deviations.within("1203 classes: candidates", abs(count / candidates - 1), 1e-4, "relative")

    found = model._detect_one(features, proposals, size.content, size.scale, size.original, None, None, Once(), 0)
    boxes = decode(proposals[:, None], roi.fc_reg(x).reshape(len(x), -1, 4), ROI_STDS, size.content)
    boxes = boxes / boxes.new_tensor(size.scale * 2)
    kept_boxes, kept_scores, kept_labels = [], [], []
    for label in range(1203):  # class by class, without the shortcut for the best ones
        rows = (scores[:, label] > 1e-4).nonzero()[:, 0]
        rows = rows[nms(boxes[rows, label].double(), scores[rows, label].double(), 0.5)]
        kept_boxes.append(boxes[rows, label])
        kept_scores.append(scores[rows, label])
        kept_labels.append(torch.full_like(rows, label))
    best = torch.cat(kept_scores).sort(descending=True, stable=True).indices[:300]
    assert torch.equal(found["scores"], torch.cat(kept_scores)[best])
    assert torch.equal(found["labels"], torch.cat(kept_labels)[best])
    assert torch.equal(found["boxes"], torch.cat(kept_boxes)[best])
    codes = [{"size": size.original, "counts": code} for code in found["rles"]]
    area = int(sum(coco_mask.area(code) for code in codes))
    deviations.within("1203 classes: pixels in the 300 masks", abs(area / pixels - 1), 1e-4, "relative")


@torch.no_grad()
def test_r101_body_is_torchvisions():
    """MMDetection's `backbone.*` keys are those of torchvision's own ResNet; both give the same maps."""
    model, image = official.model(backbone="ResNet-101").eval(), torch.from_numpy(rule.image(1))[None]
    weights = official.weights("ResNet-101")
    body = {k.removeprefix("backbone.body."): v for k, v in weights.items() if k.startswith("backbone.body.")}
    reference = resnet101().eval()
    assert reference.load_state_dict(body, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(image))))
    for name, own in model.backbone.body(image).items():
        x = getattr(reference, f"layer{int(name) + 1}")(x)
        torch.testing.assert_close(own, x)


@pytest.mark.parametrize("head", ["softmax", "equilibrium"])
def test_a_step_and_detections_of_r101(head):
    memory = MemoryConfig(enabled=head == "equilibrium")
    model = official.model(head, memory, backbone="ResNet-101").train()
    model.freeze("trunk" if memory.enabled else "none")
    features = model.features(torch.from_numpy(rule.batch()))
    truths, anchors = official.truths(), model.rpn.anchors(features)
    losses = official.rpn_losses(model.rpn, features, truths)
    with torch.no_grad():
        logits, deltas = model.rpn(features)
        proposals = model.rpn.proposals(logits, deltas, anchors, CONTENT)
    losses |= official.roi_losses(model.roi_heads, features, proposals, truths)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    model.eval()
    size = rule.SIZES[0]
    with torch.no_grad():
        features = model.features(torch.from_numpy(rule.image(0))[None])
        logits, deltas = model.rpn(features)
        boxes = model.rpn.proposals(logits, deltas, model.rpn.anchors(features), [size.content])[0]
        found = model._detect_one(features, boxes, size.content, size.scale, size.original, None, None, Once(), 0)
    assert len(found["boxes"]) == 300 and torch.isfinite(found["boxes"]).all()
