"""Mask R-CNN as torchvision's users write it, without loce: trained on a COCO-style set, and what it then detects.

    python benchmarks/torchvision_maskrcnn.py DATA OUT [EPOCHS=3 [boxes]]   # OUT/model.pth and OUT/results.json

boxes: a Faster R-CNN. DATA holds annotations/train.json, annotations/val.json and the images (train2017/, val2017/), as
Glyph-LVIS does. The parts are torchvision's, small enough for two CPU cores: ResNet-18 with FPN, trained from scratch.
It is the start of docs/rebalance.md.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import box_convert
from torchvision.transforms.functional import to_tensor

SIZE, CHANNELS, FEATURES = 64, 64, 256  # pixels of the images' short side; widths
STRIDES = (4, 8, 16, 32, 64)
BATCH, RATE, WARMUP = 8, 0.02, 100  # images a step; the rate's warm-up in steps
Target = dict[str, Tensor]


class Images(Dataset[tuple[Tensor, Target, int]]):
    """Images of a COCO-style file as torchvision's detectors want them; labels count from 1 in the file's order."""

    def __init__(self, root: Path, split: str, keep_empty: bool = False) -> None:
        self.root, self.coco = root, COCO(str(root / f"annotations/{split}.json"))
        self.label_of = {category: label for label, category in enumerate(self.coco.getCatIds(), start=1)}
        ids = self.coco.getImgIds()
        self.ids = [i for i in ids if keep_empty or self.coco.getAnnIds(i)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> tuple[Tensor, Target, int]:
        image_id = self.ids[place]
        info = self.coco.loadImgs(image_id)[0]
        name = info.get("file_name") or "/".join(info["coco_url"].split("/")[-2:])
        image = to_tensor(Image.open(self.root / name).convert("RGB"))
        found = self.coco.loadAnns(self.coco.getAnnIds(image_id))
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4)
        masks = np.array([self.coco.annToMask(a) for a in found], np.uint8).reshape(-1, info["height"], info["width"])
        labels = torch.tensor([self.label_of[a["category_id"]] for a in found], dtype=torch.long)
        boxes = box_convert(boxes, "xywh", "xyxy")
        return image, {"boxes": boxes, "labels": labels, "masks": torch.from_numpy(masks)}, image_id


def build(classes: int, size: int = SIZE, masks: bool = True) -> FasterRCNN:
    """torchvision's Mask R-CNN of small parts, or its Faster R-CNN; `classes` without the background, size: pixels of
    the short side."""
    widths = [64, 128, 256, 512]
    body, levels = resnet18(weights=None), {f"layer{i + 1}": str(i) for i in range(4)}
    of_masks = {
        "mask_head": MaskRCNNHeads(CHANNELS, (CHANNELS,) * 4, dilation=1),
        "mask_predictor": MaskRCNNPredictor(CHANNELS, CHANNELS, classes + 1),
    }
    return (MaskRCNN if masks else FasterRCNN)(
        BackboneWithFPN(body, levels, widths, CHANNELS),
        rpn_anchor_generator=AnchorGenerator(tuple((4 * s,) for s in STRIDES), ((0.5, 1.0, 2.0),) * len(STRIDES)),
        box_head=TwoMLPHead(CHANNELS * 7**2, FEATURES),
        box_predictor=FastRCNNPredictor(FEATURES, classes + 1),
        min_size=size,
        max_size=2 * size,
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=200,
        rpn_batch_size_per_image=64,
        box_batch_size_per_image=64,
        box_score_thresh=1e-4,  # as evaluations of long tails want it; torchvision's own is 0.05
        box_detections_per_img=300,
        **(of_masks if masks else {}),
    )


def train(model: FasterRCNN, images: Images, epochs: int) -> None:
    """SGD with warm-up and two drops of the rate."""
    loader = DataLoader(
        images, BATCH, shuffle=True, drop_last=True, collate_fn=lambda rows: list(zip(*rows, strict=True))
    )
    steps = epochs * len(loader)
    optimiser = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min(1, (i + 1) / WARMUP) * (1 if i < 0.75 * steps else 0.1 if i < 0.95 * steps else 0.01)
    )
    done = 0
    for epoch in range(epochs):
        model.train()
        for pictures, targets, _ in loader:
            losses = model(list(pictures), list(targets))
            optimiser.zero_grad()
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimiser.step()
            schedule.step()
            done += 1
            if done % 25 == 0:
                text = " ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
                print(f"epoch {epoch + 1}/{epochs}, step {done}/{steps}: {text}", flush=True)


@torch.no_grad()
def detect(model: FasterRCNN, images: Images) -> list[dict]:
    """COCO-style results of all images."""
    model.eval()
    category_of = {label: category for category, label in images.label_of.items()}
    results = []
    for image, _, image_id in images:
        found = model([image])[0]
        boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
        rows = [
            {"image_id": image_id, "category_id": category_of[int(label)], "bbox": box, "score": float(score)}
            for box, label, score in zip(boxes, found["labels"], found["scores"], strict=True)
        ]
        if "masks" in found:
            masks = np.asfortranarray((found["masks"][:, 0] > 0.5).permute(1, 2, 0).numpy().astype(np.uint8))
            for row, code in zip(rows, coco_mask.encode(masks), strict=True):
                row["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
        results += rows
    return results


def main() -> None:
    data, out, epochs = Path(sys.argv[1]), Path(sys.argv[2]), int((sys.argv[3:] or ["3"])[0])
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images, started = Images(data, "train"), time.monotonic()
    model = build(len(images.label_of), masks="boxes" not in sys.argv[4:])
    train(model, images, epochs)
    minutes = (time.monotonic() - started) / 60
    torch.save(model.state_dict(), out / "model.pth")
    results = detect(model, Images(data, "val", keep_empty=True))
    (out / "results.json").write_text(json.dumps(results))
    print(f"trained {minutes:.1f} minutes; wrote {out}/model.pth and {out}/results.json ({len(results)} detections)")


if __name__ == "__main__":
    main()
