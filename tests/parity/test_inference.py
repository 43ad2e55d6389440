"""Inference of the whole model, stage by stage, against numbers of the official code (MMDetection 2.8, CPU, float32).

Each stage is fed by our own previous one. Both sides round, so tolerances are twice the difference between the
official code in float32 and itself in float64.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from loce.models.boxes import ROI_STDS, decode
from loce.models.roi_heads import Once, pool, pyramid_level
from tests.parity import official, rule

MAPS = {  # stage -> (channel step, position step of the stored part, tolerance)
    "C2": (16, 8, 2 * 6.7e-6),
    "C3": (16, 4, 2 * 9.2e-6),
    "C4": (32, 2, 2 * 1.9e-5),
    "C5": (32, 1, 2 * 2.1e-5),
    "P2": (16, 8, 2 * 4.3e-5),
    "P3": (16, 4, 2 * 8.7e-5),
    "P4": (16, 2, 2 * 1.2e-4),
    "P5": (16, 1, 2 * 1.2e-4),
    "P6": (4, 1, 2 * 1.1e-4),
}
RPN_STEPS = {"cls": (2, 2, 1, 1, 1), "reg": (4, 2, 1, 1, 1)}  # positions kept of each level
RPN_TOLERANCES = {"cls": 2 * 4.2e-5, "reg": 2 * 1.3e-5}
FINEST = 56.0


@dataclass
class Stages:
    """What the official code computed of one image, and what ours did."""

    index: int
    size: rule.ImageSize
    official: dict[str, np.ndarray]
    body: list[Tensor]
    features: list[Tensor]


@pytest.fixture(scope="module", params=[0, 1], ids=["image 0", "image 1"])
def stages(request, detector) -> Stages:
    index = request.param
    stored = official.arrays("inference")
    own = {key.removeprefix(f"img{index}_"): value for key, value in stored.items() if key.startswith(f"img{index}_")}
    shared = {key: value for key, value in stored.items() if not key.startswith("img")}
    with torch.no_grad():
        image = torch.from_numpy(rule.image(index))[None]
        body = list(detector.backbone.body(image).values())
        features = detector.features(image)
    return Stages(index, rule.SIZES[index], own | shared, body, features)


def test_backbone_and_pyramid(stages, deviations):
    for (name, (channels, positions, tolerance)), own in zip(MAPS.items(), stages.body + stages.features, strict=True):
        part = own[0, ::channels, ::positions, ::positions]
        deviations.close(name, part, stages.official[name], tolerance)
        deviations.close(
            f"{name}, mean of channels", own.mean(dim=(0, 2, 3)), stages.official[f"{name}_chanmean"], 3e-5
        )


def test_rpn_maps(stages, detector, deviations):
    with torch.no_grad():
        logits, deltas = detector.rpn.head(stages.features)
    for kind, maps in (("cls", logits), ("reg", deltas)):
        for level, (own, step) in enumerate(zip(maps, RPN_STEPS[kind], strict=True)):
            part = own[0, :, ::step, ::step]
            deviations.close(f"RPN {kind}", part, stages.official[f"rpn_{kind}{level}"], RPN_TOLERANCES[kind])
            sums = (own.double().sum(), own.double().abs().sum())
            wanted = stages.official[f"rpn_{kind}{level}_stats"][:2]
            for own_sum, official_sum in zip(sums, wanted, strict=True):
                error = abs(float(own_sum) - official_sum) / own.numel()
                deviations.within(f"RPN {kind}, mean of all positions", error, 2e-6)


def one_to_one(boxes: Tensor, others: Tensor, labels: Tensor | None = None, other_labels: Tensor | None = None):
    """For each of `others` the nearest of `boxes` (largest coordinate difference, same label): (index, distance).

    Fails unless they pair off: scores that tie nearly may come in another order.
    """
    distance = torch.cdist(others.double(), boxes.double(), p=float("inf"))
    if labels is not None:
        distance[other_labels[:, None] != labels[None, :]] = float("inf")
    nearest = distance.min(dim=1)
    assert nearest.indices.unique().numel() == len(boxes) == len(others)
    return nearest.indices, float(nearest.values.max())


@pytest.mark.parametrize(("mode", "stored"), [("test", "proposals"), ("training", "proposals_traincfg")])
def test_proposals(stages, detector, deviations, mode, stored):
    with torch.no_grad():
        logits, deltas = detector.rpn(stages.features)
        detector.rpn.training = mode == "training"
        own = detector.rpn.proposals(logits, deltas, detector.rpn.anchors(stages.features), [stages.size.content])[0]
        detector.rpn.training = False
    wanted = torch.from_numpy(stages.official[stored])
    # Boxes of no area are among them: nothing is removed for its size, and several may be the same.
    distance = torch.cdist(wanted[:, :4], own, p=float("inf"))
    worst = max(float(distance.min(dim=0).values.max()), float(distance.min(dim=1).values.max()))
    deviations.within(f"proposals, {mode}", worst, 2 * 2.9e-3, "px")
    areas = [((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) <= 0).sum() for x in (own, wanted)]
    deviations.equal("proposals: number, and number without area", [len(own), areas[0]], [len(wanted), areas[1]])


@pytest.fixture(scope="module")
def rois(stages) -> Tensor:
    """32 boxes, among them level boundaries, boxes out of the image and of no area."""
    return torch.from_numpy(stages.official["rois"][:, -4:])


@pytest.fixture(scope="module")
def pooled(stages, rois) -> Tensor:
    return pool(stages.features, [rois], 7, FINEST)


def test_levels_and_pooled_features(stages, rois, pooled, deviations):
    wanted = stages.official
    deviations.equal("pyramid level of a RoI", pyramid_level(rois, FINEST), wanted["roi_levels"])
    deviations.close("RoI features 7 x 7", pooled[:, wanted["roifeat_channels7"]], wanted["roifeat7"], 2 * 6.1e-5)
    large = pool(stages.features, [rois], 14, FINEST)
    deviations.close("RoI features 14 x 14", large[:, wanted["roifeat_channels14"]], wanted["roifeat14"], 2 * 8.5e-5)
    for own, side in ((pooled, 7), (large, 14)):
        mean = own.double().abs().mean(dim=(1, 2, 3))
        wanted_mean = wanted[f"roifeat{side}_abssum_per_roi"] / (256 * side**2)
        deviations.close("RoI features, mean magnitude of a RoI", mean, wanted_mean, 1e-5)


@torch.no_grad()
def test_heads(stages, rois, pooled, detector, deviations):
    wanted, roi = stages.official, detector.roi_heads
    fc1 = torch.relu(roi.box_head.fc1(pooled.flatten(1)))
    x = roi.box_head(pooled)
    deviations.close("first FC", fc1[:, ::16], wanted["fc1"], 2 * 6.2e-5)
    deviations.close("second FC", x[:, ::16], wanted["fc2"], 2 * 6.1e-5)
    deviations.close("class logits", roi.classifier(x), wanted["cls_logits"], 2 * 3.6e-5)
    deltas = roi.fc_reg(x)
    deviations.close("box deltas", deltas, wanted["bbox_deltas"], 2 * 1.1e-5)
    boxes = decode(rois[:, None], deltas.reshape(len(x), -1, 4), ROI_STDS, stages.size.content)
    boxes = boxes / boxes.new_tensor(stages.size.scale * 2)
    deviations.close("decoded boxes (px)", boxes.flatten(1), wanted["decoded_boxes_rescaled"], 2 * 6.8e-4)
    features = pool(stages.features, [rois], 14, FINEST)
    labels = torch.arange(len(rois)) % 20
    deviations.close("mask logits", roi.mask_head(features, labels), wanted["mask_logits_class_iMod20"], 2 * 4.7e-5)


@torch.no_grad()
def test_detections_and_masks(stages, detector, deviations):
    size, wanted = stages.size, stages.official
    logits, deltas = detector.rpn(stages.features)
    boxes = detector.rpn.proposals(logits, deltas, detector.rpn.anchors(stages.features), [size.content])[0]
    found = detector._detect_one(stages.features, boxes, size.content, size.scale, size.original, None, None, Once(), 0)

    official_boxes, official_labels = torch.from_numpy(wanted["det"]), torch.from_numpy(wanted["det_labels"])
    order, worst = one_to_one(found["boxes"], official_boxes[:, :4], found["labels"], official_labels)
    deviations.within("300 detections: boxes", worst, 0.02, "px")
    deviations.close("300 detections: scores", found["scores"][order], official_boxes[:, 4], 2e-4)

    masks = coco_mask.decode([{"size": size.original, "counts": found["rles"][i]} for i in order]).astype(bool)
    areas = masks.sum(axis=(0, 1))
    flips = np.abs(areas - wanted["mask_area_all"]).sum() / wanted["mask_area_all"].sum()
    deviations.within("300 masks: pixels more or fewer", flips, 2 * 108 / 1126255, "of the pixels")
    for axis, name in ((1, "x"), (0, "y")):
        position = np.arange(masks.shape[axis]).reshape((1, -1, 1) if axis else (-1, 1, 1))
        centre = (masks * position).sum(axis=(0, 1)) / np.maximum(areas, 1)
        official_centre = wanted[f"mask_{name}sum_all"] / np.maximum(wanted["mask_area_all"], 1)
        deviations.close("300 masks: centre (px)", centre, official_centre, 0.1)
    packed = wanted["pasted_masks_packed_top12"]
    bitmaps = np.unpackbits(packed, axis=1)[:, : masks[..., 0].size].reshape(len(packed), *size.original)
    different = (masks[..., : len(packed)].transpose(2, 0, 1) != bitmaps.astype(bool)).sum()
    deviations.within(
        "12 best masks: pixels that differ", different / bitmaps.sum(), 2 * 108 / 1126255, "of the pixels"
    )
