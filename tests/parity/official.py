"""Our model with the weights of the rule, and the deliberate differences of the official code, put in from outside."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loce.box_generator import dense_boxes
from loce.checkpoint.convert import mmdetection
from loce.checkpoint.convert.source import rename
from loce.config import EvalConfig, HeadConfig, IndicatorConfig, MemoryConfig, ModelConfig
from loce.data.masks import CroppedMasks
from loce.memory_bank import FeatureMemoryBank
from loce.models.mask_rcnn import MaskRCNN, build_roi_heads
from loce.models.roi_heads import FirstStage, RoIHeads, Targets
from loce.models.rpn import RPN
from loce.utils.classes import ClassStats, frequency_groups
from tests.parity import rule

FIXTURES = Path(__file__).parent.parent / "fixtures"


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """The stored numbers of tests/fixtures/official_NAME.npz."""
    with np.load(FIXTURES / f"official_{name}.npz") as file:
        return {key: file[key] for key in file.files}


def key_shapes(backbone: str, classes: int) -> dict[str, tuple[int, ...]]:
    """Every key of MMDetection's state dict, and its shape, for "ResNet-50" or "ResNet-101" and a number of classes."""
    sizes = {"C": classes, "C+1": classes + 1, "4*C": 4 * classes}
    shapes = json.loads((FIXTURES / "official_keys.json").read_text())[backbone]
    return {key: tuple(sizes.get(size, size) for size in shape) for key, shape in shapes.items()}


def stats(classes: int) -> ClassStats:
    """Facts about classes that no number here depends on."""
    ones = np.ones(classes, np.int64)
    return ClassStats(
        names=tuple(f"class {label}" for label in range(classes)),
        category_ids=np.arange(1, classes + 1),
        image_counts=ones,
        instance_counts=ones,
        groups=frequency_groups(ones),
        image_total=1,
    )


@cache
def weights(backbone: str = "ResNet-50", classes: int = 20) -> dict[str, Tensor]:
    """The rule's weights under our names."""
    theirs = {k: torch.from_numpy(rule.weight(k, s)) for k, s in key_shapes(backbone, classes).items()}
    ours, _, unknown = rename(theirs, mmdetection.FORMAT.table)
    assert not unknown
    return ours


def model(
    head: str = "softmax", memory: MemoryConfig | None = None, backbone: str = "ResNet-50", classes: int = 20
) -> MaskRCNN:
    """The paper's model with the rule's weights. What compares its losses puts `strided` in place of random choice."""
    options = ModelConfig(weights="none", backbone="resnet50" if backbone == "ResNet-50" else "resnet101")
    roi_heads = build_roi_heads(
        options, HeadConfig(name=head), IndicatorConfig(), memory or MemoryConfig(), stats(classes)
    )
    detector = MaskRCNN(options, roi_heads, EvalConfig(), (800, 1333))
    result = detector.load_state_dict(weights(backbone, classes), strict=False)
    assert not result.unexpected_keys
    assert all(key.startswith(("roi_heads.tracker.", "roi_heads.memory.")) for key in result.missing_keys)
    return detector


def strided(candidates_N: Tensor, limit: Tensor | int, slots: int, _: object = None) -> tuple[Tensor, Tensor]:
    """Instead of random choice: of n candidates number 0, n / k, 2 n / k, ..."""
    candidates = candidates_N.nonzero()[:, 0]
    count = min(int(limit), slots, len(candidates))
    chosen = torch.zeros(slots, dtype=torch.long)
    chosen[:count] = candidates[torch.arange(count) * len(candidates) // max(count, 1)]
    return chosen, torch.arange(slots) < count


def truths() -> list[Targets]:
    """Ground truth of both images."""
    stored, result = arrays("training"), []
    for index, size in enumerate(rule.SIZES):
        boxes, labels = stored[f"gt_boxes{index}"], stored[f"gt_labels{index}"]
        masks = CroppedMasks.pack([(bitmap, (0, 0)) for bitmap in rule.masks(index, boxes)], size.padded)
        rows = torch.arange(len(labels))  # fewer than 5 of a class in an image: the official code stores all
        result.append(Targets(torch.from_numpy(boxes), torch.from_numpy(labels), masks, rows))
    return result


def proposals() -> list[Tensor]:
    """The official proposals of the training batch: near-tied scores may come in another order elsewhere."""
    return [torch.from_numpy(arrays("training")[f"batch_proposals{index}"][:, :4]) for index in range(len(rule.SIZES))]


def rpn_losses(rpn: RPN, features: list[Tensor], targets: list[Targets]) -> dict[str, Tensor]:
    """The RPN's losses on one rank, of maps of the training batch."""
    sums = rpn.losses(features, rpn.anchors(features), [s.padded for s in rule.SIZES], [t.boxes for t in targets])
    return sums.divided(sums.number)


def roi_losses(
    roi_heads: RoIHeads, features: list[Tensor], proposals: list[Tensor], targets: list[Targets]
) -> dict[str, Tensor]:
    """The RoI heads' losses on one rank, of maps of the training batch."""
    rows = roi_heads.forward_rows(FirstStage(features, proposals, targets, [s.content for s in rule.SIZES]))
    return roi_heads.losses(rows, rows.sums)


def seed_memory(bank: FeatureMemoryBank) -> None:
    """Fill the bank as the rule says; slot 0 holds the oldest feature of a class."""
    for label in range(bank.num_classes):
        features, targets = rule.memory(label)
        first = label * bank.capacity
        bank.features[first : first + len(features)] = torch.from_numpy(features)
        bank.box_targets[first : first + len(targets)] = torch.from_numpy(targets)
        bank.written[label] = len(features)


class OfficialBoxes:
    """In place of `dense_boxes`: one set of uniforms for all instances of an image, and the last pixel as border."""

    def __init__(self, iteration: int) -> None:
        self.iteration, self.image = iteration, 0

    def __call__(self, boxes: Tensor, image_size: tuple[int, int], **_: object) -> Tensor:
        eta_164 = torch.from_numpy(rule.jitter(self.iteration, self.image)).T
        self.image += 1
        return dense_boxes(boxes, (image_size[0] - 1, image_size[1] - 1), eta_164.expand(len(boxes), 16, 4))


class OfficialDraw:
    """In place of `FeatureMemoryBank.draw`: the official uniforms, sorted, over all classes, stored or not.

    Ours draws over classes with something stored: the uniforms are moved to where it finds the same classes. (None of
    the stored numbers' draws met an empty class.)
    """

    def __init__(self, bank: FeatureMemoryBank, iteration: int) -> None:
        self.bank, self.iteration = bank, iteration

    def __call__(self, mean_score: Tensor, own_K: Tensor, own_KF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        classes, features = own_KF.shape
        weight = (1 / (mean_score[:-1] + 1e-7)).double()
        share = weight / weight.sum()
        stored = self.bank.counts > 0
        uniform = torch.from_numpy(np.sort(rule.class_draw(self.iteration)))
        label = torch.searchsorted(share.cumsum(0), uniform)
        assert len(uniform) == classes and stored[label].all()
        empty_below = torch.where(stored, 0, share).cumsum(0)[label]
        moved = (uniform - empty_below) / share[stored].sum()
        slots = torch.from_numpy(np.stack([rule.slot_draw(self.iteration, turn) for turn in range(classes)]))
        assert slots.shape[1] == features
        return FeatureMemoryBank.draw(self.bank, mean_score, moved, slots)
