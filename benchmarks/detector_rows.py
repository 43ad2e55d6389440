"""Rows of `bench.py` about the detector: steps, mask head, inference, NMS, the LOCE step and the feature memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectors import REGIONS, SIZES, Ours, Theirs, make_scenes, our_samples, their_targets
from loce_step import ROI_SHAPE, Loce, Loops, make_step, plain_step
from loce_step import Options as StepOptions
from lvis_like import CLASSES
from pycocotools import mask as coco_mask
from sides import MIB, Row, take_turns
from torch import Tensor, nn
from torchvision.ops import batched_nms

from loce.memory_bank import FeatureMemoryBank
from loce.models.detection import best_detections
from loce.models.mask_head import MaskHead
from loce.models.roi_heads import BOX_SIDE, MASK_SIDE

BATCH = 2
MASKS = 300  # detections an image
CALLS = 9  # in each round, of what takes milliseconds
GPU_PAIRS = (  # row, our precision, theirs, goal
    ("stage1", "fp32", "fp32", 1.5),
    ("stage1_bf16", "bf16", "bf16", 1.5),
    ("stage1_default", "bf16", "fp32", 2.5),
)


@dataclass(frozen=True)
class Setting:
    """What all rows are measured with."""

    device: torch.device
    size: str  # small | full
    rounds: int

    @property
    def regions(self) -> int:
        """Sampled in each image."""
        return REGIONS[self.size]

    @property
    def image(self) -> tuple[int, int]:
        """(height, width) of the images that the detector sees."""
        return SIZES[self.size]


def loce_step(setting: Setting) -> list[Row]:
    """Generator, enqueue, draw, tracker and loss of one step, with the loss of the RoIs alone taken off both sides."""
    options = StepOptions(classes=CLASSES)
    given = [make_step(options, seed, setting.device) for seed in range(5)]
    for each in given:
        each.logits.requires_grad_()
    rows = 2 * options.instances * 16
    vectors = torch.randn(rows, options.features, device=setting.device)
    maps = torch.randn(rows, *ROI_SHAPE, device=setting.device)

    def all_steps(step: Callable[[Any, Tensor], Tensor], features: Tensor) -> Callable[[], None]:
        def work() -> None:
            for each in given:
                each.logits.grad = None
                step(each, features)

        return work

    ours = all_steps(Loce(options, setting.device).step, vectors)
    theirs = all_steps(Loops(options, setting.device, ROI_SHAPE).step, maps)
    plain = all_steps(plain_step, vectors)
    what, against = "jitter, store, draw, mean score, EBL", "loops over classes and instances, memory on the host"
    goal = 50 if setting.device.type == "cuda" else 20
    whole = Row("loce_step", what, against, notes={"steps": len(given)})
    take_turns(whole, ours, theirs, setting.device, setting.rounds, CALLS)
    base = take_turns(Row("plain", "", ""), plain, plain, setting.device, setting.rounds, CALLS)
    over = Row("loce_step_over_ce", f"{what}; less the plain cross-entropy", against, goal)
    over.ours = [a - b for a, b in zip(whole.ours, base.ours, strict=True)]
    over.theirs = [a - b for a, b in zip(whole.theirs, base.ours, strict=True)]
    return [whole, over]


def memory_bank(setting: Setting) -> list[Row]:
    """Bytes of all buffers at LVIS v1's size; that both layouts give the same losses is a test."""
    official = CLASSES * 80 * 256 * 7 * 7 * 4 / MIB
    rows = []
    for dtype, most in ((torch.bfloat16, 190), (torch.float32, 380)):
        with torch.device("meta"):
            bank = FeatureMemoryBank(CLASSES, (1024,), 80, dtype)
        used = sum(x.numel() * x.element_size() for x in bank.buffers()) / MIB
        name = str(dtype).removeprefix("torch.")
        row = Row(f"memory_{name}", f"feature memory, {name}", "1203 x 80 x 256 x 7 x 7 fp32", most=most, unit="MiB")
        row.ours, row.theirs = [used], [official]
        rows.append(row)
    return rows


def loce_cost(setting: Setting) -> list[Row]:
    """A stage-2 step with and without equilibrium loss and feature memory."""
    scenes = make_scenes(BATCH, setting.image)
    samples = our_samples(scenes)
    sides = []
    for words in ((), ("memory.enabled=false", "head.name=softmax")):
        side = Ours("loce.yaml", setting.device, *words, regions=setting.regions)
        side.give_proposals(scenes)
        sides.append(side)
    goal = 1.03 if setting.device.type == "cuda" else 1.06
    row = Row("loce_cost", "stage-2 step with EBL and MFS", "the same without", goal, ratio="ours / theirs")
    return [take_turns(row, *[lambda s=s: s.step(samples) for s in sides], setting.device, setting.rounds)]


def stage2(setting: Setting) -> list[Row]:
    """A step of LOCE against one of stage 1, same batch."""
    scenes = make_scenes(BATCH, setting.image)
    samples = our_samples(scenes)
    sides = [Ours(recipe, setting.device, regions=setting.regions) for recipe in ("loce.yaml", "stage1.yaml")]
    for side in sides:
        side.give_proposals(scenes)
    row = Row("stage2", "stage-2 step (LOCE)", "stage-1 step", 0.5, ratio="ours / theirs")
    return [take_turns(row, *[lambda s=s: s.step(samples) for s in sides], setting.device, setting.rounds)]


def boxes(setting: Setting) -> list[Row]:
    """A step without masks against the same with them, of both stages."""
    scenes = make_scenes(BATCH, setting.image)
    samples, rows = our_samples(scenes), []
    for recipe, name in (("stage1.yaml", "stage 1"), ("loce.yaml", "LOCE")):
        sides = [
            Ours(recipe, setting.device, *words, regions=setting.regions) for words in (("model.masks=false",), ())
        ]
        for side in sides:
            side.give_proposals(scenes)
        row = Row(f"boxes_{recipe[:-5]}", f"{name} step, boxes only", "the same with masks", ratio="ours / theirs")
        rows.append(take_turns(row, *[lambda s=s: s.step(samples) for s in sides], setting.device, setting.rounds))
    return rows


def stage1(setting: Setting) -> list[Row]:
    """A step of stage 1 against torchvision's; on a GPU also with bf16 on both sides, and with its defaults."""
    if setting.device.type == "cpu":
        return _stage1(setting, "stage1", "fp32", "fp32", 1.25)
    return [row for numbers in GPU_PAIRS for row in _stage1(setting, *numbers)]


def gpu_rows() -> list[Row]:
    """Rows of `stage1` that need a GPU, empty."""
    steps = [Row(name, _step(own), _torchvision(other), goal) for name, own, other, goal in GPU_PAIRS[1:]]
    return steps + [
        Row(f"{name}_memory", f"{_step(own)}: most memory", _torchvision(other), 1.0)
        for name, own, other, _ in GPU_PAIRS
    ]


def _step(precision: str) -> str:
    return f"stage-1 step, {precision}"


def _torchvision(precision: str) -> str:
    return f"torchvision's, 1204 outputs, {precision}"


def _stage1(setting: Setting, name: str, own: str, other: str, goal: float) -> list[Row]:
    scenes = make_scenes(BATCH, setting.image)
    samples, (images, targets) = our_samples(scenes), their_targets(scenes)
    ours = Ours("stage1.yaml", setting.device, regions=setting.regions, precision=own)
    theirs = Theirs(ours, setting.image, precision=other)
    sides: list[Callable[[], Any]] = [lambda: ours.step(samples), lambda: theirs.step(images, targets)]
    for side in (ours, theirs):
        side.give_proposals(scenes)
    row = Row(name, _step(own), _torchvision(other), goal)
    rows = [take_turns(row, *sides, setting.device, setting.rounds)]
    if setting.device.type == "cuda":
        most = Row(f"{name}_memory", f"{_step(own)}: most memory", _torchvision(other), 1.0, unit="MiB")
        for side, found in zip(sides, (most.ours, most.theirs), strict=True):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            side()
            found.append(torch.cuda.max_memory_allocated() / MIB)
        rows.append(most)
    return rows


def mask_head(setting: Setting) -> list[Row]:
    """The mask head after its convolutions, against layer by layer: forward alone, and with backward."""
    regions, width = (128, 256) if setting.size == "full" else (32, 64)
    head = MaskHead(width, width, 0, CLASSES).to(setting.device)
    labels = torch.arange(regions, device=setting.device) * 7 % CLASSES
    pooled = torch.randn(regions, width, MASK_SIDE, MASK_SIDE, device=setting.device, requires_grad=True)

    def layers(x: Tensor, labels: Tensor) -> Tensor:
        x = head.temperature * F.normalize(F.relu(head.upsample(x)), dim=1)
        weight = F.normalize(head.predictor.weight.flatten(1), dim=1)
        return torch.einsum("pdhw,pd->phw", x, weight[labels])

    rows = []
    for name, what, backward in (("mask_head", "forward", False), ("mask_head_step", "forward and backward", True)):

        def work(way: Callable[[Tensor, Tensor], Tensor], backward: bool = backward) -> None:
            with torch.set_grad_enabled(backward):
                logits = way(pooled, labels)
            if backward:
                torch.autograd.grad(logits.sum(), [pooled, head.upsample.weight, head.predictor.weight])

        row = Row(name, f"mask head after its convolutions, {what}", "deconvolution, normalised predictor", 1.8)
        sides = [lambda way=way: work(way) for way in (head, layers)]
        rows.append(take_turns(row, *sides, setting.device, setting.rounds))
    return rows


def inference(setting: Setting) -> list[Row]:
    """300 detections of one image with masks as run-length codes, from uint8 pixels on."""
    scene = make_scenes(1, setting.image)[0]
    ours = Ours("stage1.yaml", setting.device)
    ours.model.test_edges = setting.image  # neither side resizes
    theirs = Theirs(ours, setting.image)
    _spread(ours.model.roi_heads.classifier.fc_cls, background=CLASSES)  # type: ignore[arg-type]
    _spread(theirs.model.roi_heads.box_predictor.cls_score, background=0)
    ours.model.only_predict()
    theirs.model.eval()

    @torch.no_grad()
    def their_detections() -> int:
        image = scene.image.to(setting.device).float() / 255
        found = theirs.model([image])[0]
        masks = (found["masks"][:, 0] > 0.5).cpu().numpy()
        codes = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
        return len(codes)

    def our_detections() -> int:
        return len(ours.model.detect_images([scene.image])[0]["rles"])

    row = Row("inference", "image to 300 detections with RLE masks", "torchvision's", 2.2)
    row.notes = {"detections": [our_detections(), their_detections()]}
    return [take_turns(row, our_detections, their_detections, setting.device, setting.rounds)]


def evaluation(setting: Setting) -> list[Row]:
    """Detections of one image and the class scores of its true boxes: from one pyramid, and as it was, from two."""
    model, sample = Ours("stage1.yaml", setting.device).model, our_samples(make_scenes(1, setting.image))[0]
    _spread(model.roi_heads.classifier.fc_cls, background=CLASSES)  # type: ignore[arg-type]
    model.only_predict()
    images, true_boxes = [sample["image"]], [(sample["boxes"], sample["labels"])]

    def one_pass() -> Any:
        return model.detect(images, [(1.0, 1.0)], [setting.image], true_boxes=true_boxes)[0]["class_scores"]

    @torch.no_grad()
    def two_passes() -> Any:
        model.detect(images, [(1.0, 1.0)], [setting.image])
        roi, maps = model.roi_heads, model.features(model.batch_images(images)[0])
        pooled = roi.pool(maps, [sample["boxes"].to(setting.device)], BOX_SIDE)
        return roi.scores(roi.classifier(roi.features_of(pooled))).max(dim=1)

    torch.testing.assert_close(one_pass()[2], two_passes().values.cpu())
    row = Row("evaluation", "an image's detections and class scores of its true boxes", "in two passes")
    return [take_turns(row, one_pass, two_passes, setting.device, setting.rounds)]


def _spread(layer: nn.Linear, background: int) -> None:
    """Logits as of a trained classifier: the background is likely, some tens of classes reach 1e-4."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        layer.weight.copy_(0.05 * torch.randn(layer.weight.shape, generator=generator))
        layer.bias.copy_(1.5 * torch.randn(layer.bias.shape, generator=generator) - 3)
        layer.bias[background] = 6.0


def nms(setting: Setting) -> list[Row]:
    """The best 300 of 1000 proposals x 1203 classes; both sides must keep the same boxes."""
    proposals = 1000 if setting.size == "full" else 200
    generator = torch.Generator().manual_seed(0)
    corner = (
        torch.rand(proposals, CLASSES, 2, generator=generator) * 20
        + torch.rand(proposals, 1, 2, generator=generator) * 700
    )
    side = torch.rand(proposals, 1, 2, generator=generator) * 200 + 10
    boxes = torch.cat([corner, corner + side], dim=2).reshape(-1, 4).to(setting.device)
    scores = torch.randperm(len(boxes), generator=generator).div(len(boxes)).to(setting.device)  # no ties
    labels = torch.arange(CLASSES, device=setting.device).repeat(proposals)

    def ours() -> Tensor:
        return best_detections(boxes, scores, labels, 0.5, MASKS)

    def theirs() -> Tensor:
        return batched_nms(boxes, scores, labels, 0.5)[:MASKS]

    if not torch.equal(ours(), theirs()):
        raise RuntimeError("the two sides keep other boxes")
    row = Row("nms", f"best {MASKS} of {proposals} x {CLASSES} boxes", "torchvision's batched_nms", 5.0)
    return [take_turns(row, ours, theirs, setting.device, setting.rounds)]
