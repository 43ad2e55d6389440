"""Our detector and torchvision's, on the same images, with the same weights where both have them.

Neither is trained, so both are given what a trained one has: proposals near the objects (they take the place of the
worst ones) and scores of which some tens of a proposal are over 1e-4. Else the mask head and NMS would have no work.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from lvis_like import CLASSES, instance_counts, outline, random_boxes, random_classes
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import clip_boxes_to_image
from torchvision.ops.misc import FrozenBatchNorm2d

from loce.config import Config, load_config
from loce.data.masks import CroppedMasks, cut_runs
from loce.engine.loop import gradient_norm
from loce.models.build import build_model, build_optimizer
from loce.models.mask_rcnn import MaskRCNN
from loce.utils.classes import ClassStats, frequency_groups

NEAR = 300  # proposals of an image that lie near its objects, at most
SIZES = {"full": (800, 1333), "small": (256, 427)}
REGIONS = {"full": 512, "small": 52}  # sampled of an image, a quarter of them with a mask; as many a pixel in both


@dataclass
class Scene:
    """One image with its ground truth; boxes near its objects (K, 4), as a trained RPN finds them."""

    image: Tensor  # uint8 (3, H, W)
    boxes: Tensor
    labels: Tensor
    polygons: list[list[float]]
    near: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[1], self.image.shape[2]


def make_scenes(number: int, size: tuple[int, int], seed: int = 0, instances: int | None = None) -> list[Scene]:
    """Images of `size` (height, width); instances: of each, else with a heavy tail and a mean of 13."""
    rng = np.random.default_rng(seed)
    counts = instance_counts(np.random.default_rng(7), 1000) if instances is None else np.full(1000, instances)
    scenes = []
    middle = np.sort(counts)[np.linspace(500, 800, number).astype(int)]  # of 2 images 7 and 19: 13 as on average
    for count in counts[:number] if instances is not None else middle:
        xywh = random_boxes(rng, int(count), size)
        boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        copies = max(1, NEAR // int(count))
        moved = boxes[:, None] + rng.normal(0, 0.08, (int(count), copies, 4)) * np.tile(xywh[:, None, 2:], 2)
        near = clip_boxes_to_image(torch.from_numpy(moved.reshape(-1, 4)[:NEAR]).float(), size)
        coarse = rng.integers(0, 256, (size[0] // 16, size[1] // 16, 3), np.uint8)
        image = cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)
        scenes.append(
            Scene(
                torch.from_numpy(image).permute(2, 0, 1),
                torch.from_numpy(boxes).float(),
                torch.from_numpy(random_classes(rng, int(count))),
                [outline(rng, box) for box in xywh],
                near,
            )
        )
    return scenes


def class_stats(classes: int) -> ClassStats:
    """A long tail of so many classes."""
    images = np.geomspace(2000, 1, classes).round().astype(np.int64)
    names = tuple(f"category {c}" for c in range(classes))
    return ClassStats(
        names=names,
        category_ids=np.arange(classes) + 1,
        image_counts=images,
        instance_counts=images * 2,
        groups=frequency_groups(images),
        image_total=100_000,
    )


class Ours:
    """This package's detector for a recipe, with everything that a training step of it does."""

    def __init__(
        self,
        recipe: str,
        device: torch.device,
        *words: str,
        regions: int = 512,
        classes: int = CLASSES,
        precision: str = "fp32",
    ) -> None:
        torch.manual_seed(0)
        words = (f"train.precision={precision}", f"model.roi.batch_per_image={regions}", *words)
        self.config: Config = load_config([recipe, *words])
        self.model: MaskRCNN = build_model(self.config, class_stats(classes), pretrained=False).to(device)
        self.device = device
        _tame(self.model.backbone.body)
        self.optimizer = build_optimizer(self.model, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-5
        memory = self.model.roi_heads.memory
        if memory is not None:
            rows, labels = memory.bank.spare_row, torch.arange(memory.bank.spare_row, device=device) % classes
            shape = memory.bank.features.shape[1:]
            memory.bank.enqueue(torch.rand(rows, *shape, device=device), labels, torch.zeros(rows, 4, device=device))

    def give_proposals(self, scenes: list[Scene]) -> None:
        """Let the RPN's proposals of these scenes lie near their objects."""
        plain = self.model.rpn.proposals

        def proposals(*arguments: Any) -> list[Tensor]:
            return [_mixed(p, s.near, len(p)) for p, s in zip(plain(*arguments), scenes, strict=True)]

        self.model.rpn.proposals = proposals  # type: ignore[method-assign]

    def step(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One step of the optimiser, as engine.py takes it; the losses."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        on = self.config.train.precision != "fp32"
        with torch.autocast(self.device.type, torch.bfloat16, on):
            losses = self.model(samples)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        if not torch.stack([total, gradient_norm(self.optimizer)]).isfinite().all():
            raise RuntimeError(f"the benchmark diverged: {losses}")
        self.optimizer.step()
        return losses


class Theirs:
    """torchvision's maskrcnn_resnet50_fpn with frozen batch norms, and the step of its reference training loop."""

    def __init__(self, ours: Ours, size: tuple[int, int], classes: int = CLASSES, precision: str = "fp32") -> None:
        torch.manual_seed(0)
        body = resnet50(norm_layer=FrozenBatchNorm2d)
        backbone = _resnet_fpn_extractor(body, trainable_layers=3)
        regions = ours.config.model.roi.batch_per_image
        test = {"box_score_thresh": 1e-4, "box_detections_per_img": 300, "box_batch_size_per_image": regions}
        self.model = TorchvisionMaskRCNN(backbone, classes + 1, min_size=min(size), max_size=max(size), **test)
        self.model.backbone.body.load_state_dict(ours.model.backbone.body.state_dict(), strict=False)
        self.model.to(ours.device)
        self.device, self.precision = ours.device, precision
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-5, momentum=0.9, weight_decay=1e-4)

    def give_proposals(self, scenes: list[Scene]) -> None:
        """As with ours; in training it takes 2000 proposals where ours takes 1000."""
        plain = self.model.rpn.filter_proposals

        def proposals(*arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
            boxes, scores = plain(*arguments)
            return [_mixed(b, s.near, len(b)) for b, s in zip(boxes, scenes, strict=True)], scores

        self.model.rpn.filter_proposals = proposals

    def step(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One step of the optimiser."""
        self.model.train()
        images = [image.to(self.device) for image in images]
        targets = [{k: v.to(self.device) for k, v in target.items()} for target in targets]
        with torch.autocast(self.device.type, torch.bfloat16, self.precision != "fp32"):
            losses = self.model(images, targets)
            total = sum(losses.values())
        if not total.isfinite():
            raise RuntimeError(f"the benchmark diverged: {losses}")
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        return losses


def _tame(body: nn.Module) -> None:
    """Residual branches of random weights without batch statistics add up to infinity: let each add little."""
    for name, module in body.named_modules():
        if name.endswith("bn3"):
            nn.init.constant_(module.weight, 0.1)  # type: ignore[arg-type]


def _mixed(proposals_N4: Tensor, near_K4: Tensor, total: int) -> Tensor:
    near_K4 = near_K4.to(proposals_N4)
    return torch.cat([proposals_N4[: max(0, total - len(near_K4))], near_K4])[: max(total, len(near_K4))]


def our_samples(scenes: list[Scene]) -> list[dict[str, Any]]:
    """As our data set gives them."""
    samples = []
    for number, scene in enumerate(scenes):
        codes = coco_mask.frPyObjects(scene.polygons, *scene.size)
        crops = []
        for code in codes:
            dense = coco_mask.decode(code)
            runs = np.diff(np.flatnonzero(np.diff(dense.T.ravel(), prepend=0, append=0)), prepend=0)
            crops.append(cut_runs(np.append(runs, 0), scene.size[0]))
        masks = CroppedMasks.pack(crops, scene.size)
        truth = {"boxes": scene.boxes, "labels": scene.labels, "masks": masks}
        samples.append({"image": scene.image, **truth, "seed": 1000 + number, "batch_index": number})
    return samples


def their_targets(scenes: list[Scene]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """As torchvision's reference data set gives them: float images, labels from 1, full-size masks."""
    images = [scene.image.float().div(255).contiguous() for scene in scenes]
    targets = []
    for scene in scenes:
        masks = coco_mask.decode(coco_mask.frPyObjects(scene.polygons, *scene.size))
        targets.append(
            {
                "boxes": scene.boxes,
                "labels": scene.labels + 1,
                "masks": torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1))),
            }
        )
    return images, targets
