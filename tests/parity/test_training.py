"""One training step of the plain model against numbers of the official code: what is sampled, losses, gradients.

Both images, samplers that take strided candidates, the official proposals. Both sides round, so tolerances are twice
the difference between the official code in float32 and itself in float64.
"""

import numpy as np
import pytest
import torch

from loce.checkpoint.convert import mmdetection
from loce.checkpoint.convert.source import rename
from loce.models.boxes import BETWEEN, RPN_STDS, encode, sample
from loce.models.mask_head import mask_targets
from loce.models.roi_heads import _box_targets, pool
from loce.models.rpn import level_validity
from tests.parity import official, rule

LOSSES = {
    "loss_rpn_cls": "loss_rpn_cls",
    "loss_rpn_box": "loss_rpn_bbox",
    "loss_cls": "loss_cls",
    "loss_box": "loss_bbox",
    "loss_mask": "loss_mask",
}
LOSS_TOLERANCE = 2 * 5.9e-7
GRADIENT_TOLERANCE = 2 * 4.1e-4
CONTENT, PADDED = ([getattr(size, name) for size in rule.SIZES] for name in ("content", "padded"))


@pytest.fixture(scope="module")
def wanted():
    return official.arrays("training")


@pytest.fixture(scope="module")
def model():
    return official.model().train()


@pytest.fixture(scope="module")
def truths():
    return official.truths()


@pytest.fixture(scope="module")
def features(model):
    return model.features(torch.from_numpy(rule.batch()))


@pytest.fixture(scope="module")
def regions(model, truths):
    selected = zip(official.proposals(), truths, strict=True)
    return [model.roi_heads.select(boxes, truth) for boxes, truth in selected]


@pytest.fixture(scope="module")
def losses(model, features, truths):
    found = official.rpn_losses(model.rpn, features, truths)
    return found | official.roi_losses(model.roi_heads, features, official.proposals(), truths)


def test_anchors_sampled_by_the_rpn(model, features, truths, wanted, deviations):
    anchors = torch.cat(model.rpn.anchors(features))
    for index, truth in enumerate(truths):
        maps = zip(features, (4, 8, 16, 32, 64), strict=True)
        valid = torch.cat([level_validity(*x.shape[2:4], stride, PADDED[index], x.device) for x, stride in maps])
        matched = model.rpn.match(anchors, truth.boxes).masked_fill(~valid, BETWEEN)
        positives, positive_valid, negatives, negative_valid = sample(matched, 256, 0.5)
        place = valid.cumsum(0) - 1  # the official indices count an image's valid anchors
        positives = positives[positive_valid]
        stored = [wanted[f"rpn_{name}{index}"] for name in ("pos_inds", "neg_inds", "pos_gt", "pos_targets")]
        deviations.equal("RPN: sampled positives", place[positives], stored[0])
        deviations.equal("RPN: sampled negatives", place[negatives[negative_valid]], stored[1])
        deviations.equal("RPN: ground truth of positives", matched[positives], stored[2])
        targets = encode(anchors[positives], truth.boxes[matched[positives]], RPN_STDS)
        deviations.close("RPN: box targets", targets, stored[3], 2e-6)


def test_regions_sampled_by_the_second_stage(regions, wanted, deviations):
    for index, found in enumerate(regions):
        positive = found.instances >= 0
        deviations.equal("RoIs: ground truth of positives", found.instances[positive], wanted[f"rcnn_pos_gt{index}"])
        deviations.equal("RoIs: sampled positives", found.boxes[positive], wanted[f"rcnn_pos_boxes{index}"])
        deviations.equal("RoIs: sampled negatives", found.boxes[~positive], wanted[f"rcnn_neg_boxes{index}"])
    deviations.equal("RoIs: labels", torch.cat([found.labels for found in regions]), wanted["rcnn_labels"])


def test_targets_of_the_second_stage(regions, truths, wanted, deviations):
    boxes, masks = [], []
    for found, truth in zip(regions, truths, strict=True):
        positive = found.instances >= 0
        boxes.append(_box_targets(found, truth)[positive])
        masks.append(mask_targets(truth.masks, found.instances[positive], found.boxes[positive]))
    deviations.close("RoIs: box targets", torch.cat(boxes), wanted["rcnn_pos_targets"], 1e-5)
    bits = np.unpackbits(wanted["mask_targets"], axis=1).reshape(-1, 28, 28)
    deviations.equal("mask targets", torch.cat(masks).int(), bits)


def test_class_logits(model, features, regions, wanted, deviations):
    with torch.no_grad():
        pooled = pool(features, [found.boxes for found in regions], 7, 56.0)
        logits = model.roi_heads.classifier(model.roi_heads.box_head(pooled))
    deviations.close("class logits of the sampled RoIs", logits[::8], wanted["rcnn_cls_score_every8"], 2 * 3.6e-5)
    sums = logits.double().sum(dim=1)
    deviations.close("class logits of the sampled RoIs, row sums", sums, wanted["rcnn_cls_score_rowsum"], 2e-4)


def test_losses(losses, wanted, deviations):
    for ours, theirs in LOSSES.items():
        deviations.close(f"{ours}, plain model", losses[ours], wanted[theirs], LOSS_TOLERANCE, relative=True)
    total = sum(losses.values())
    deviations.close("total loss, plain model", total, wanted["loss_total"], LOSS_TOLERANCE, relative=True)


def test_gradients_of_every_trainable_parameter(model, losses, wanted, deviations):
    model.zero_grad()
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    back = {ours: theirs for theirs, ours in mmdetection.FORMAT.table.items()}
    gradients, _, unknown = rename(gradients, back)
    names = [str(name) for name in wanted["grad_names"]]
    assert not unknown and set(gradients) == set(names)
    for name, (_, magnitude, norm) in zip(names, wanted["grad_sum_abssum_l2"], strict=True):
        own = gradients[name].double()
        for own_sum, official_sum in ((own.norm(), norm), (own.abs().sum(), magnitude)):
            error = abs(float(own_sum) / official_sum - 1)
            deviations.within("gradients: L2 and L1 norm", error, GRADIENT_TOLERANCE, "relative")
