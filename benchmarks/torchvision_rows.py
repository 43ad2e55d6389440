"""Rows of torchvision's Faster R-CNN, written without loce: features, boxes and the classifier, for docs/rows.md.

    python benchmarks/torchvision_rows.py DATA OUT   # of OUT/model.pth: OUT/rows/train and OUT/rows/val

DATA and OUT are those of benchmarks/torchvision_maskrcnn.py ... boxes.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import clip_boxes_to_image
from torchvision_maskrcnn import Images, build


@torch.no_grad()
def rows_of(model, image, objects=None):
    """Columns of an image (3, H, W), of training with its objects (n, 4): a row for each proposal and object."""
    batch, _ = model.transform([image])
    (height, width), heads = batch.image_sizes[0], model.roi_heads
    scale = torch.tensor([image.shape[2] / width, image.shape[1] / height] * 2)
    maps = model.backbone(batch.tensors)
    boxes = model.rpn(batch, maps)[0][0]
    if objects is not None:
        boxes = torch.cat([objects / scale, boxes])
    features = heads.box_head(heads.box_roi_pool(maps, [boxes], batch.image_sizes))
    if objects is None:  # boxes of each class, as the detector moves them; its first class is the background
        boxes = heads.box_coder.decode(heads.box_predictor(features)[1], [boxes])[:, 1:]
        boxes = clip_boxes_to_image(boxes, (height, width))
    return {"boxes": boxes * scale, "features": features}


def export(folder, image_ids, rows, chunk=100):
    """Files of `chunk` images each in a folder; rows: the columns of an image by its id. What is there is kept."""
    for first in range(0, len(image_ids), chunk):
        file, ids = folder / f"regions_{first // chunk:06d}.npz", image_ids[first : first + chunk]
        if not file.exists():
            found = [rows(image_id) for image_id in ids]
            columns = {name: np.concatenate([own[name] for own in found]) for name in found[0]}
            np.savez(folder / "half.npz", image_ids=ids, regions=[len(own["boxes"]) for own in found], **columns)
            os.replace(folder / "half.npz", file)


def write(data: Path, out: Path) -> None:
    """The rows of both parts of a data set, and the classifier."""
    for split in ("train", "val"):
        images, folder = Images(data, split, keep_empty=split == "val"), out / "rows" / split
        folder.mkdir(parents=True, exist_ok=True)
        model = build(len(images.label_of), masks=False).eval()
        model.load_state_dict(torch.load(out / "model.pth", weights_only=True))
        place = {image_id: index for index, image_id in enumerate(images.ids)}

        def rows(image_id: int, images=images, model=model, place=place, split=split):
            image, target, _ = images[place[image_id]]
            return rows_of(model, image, target["boxes"] if split == "train" else None)

        export(folder, images.ids, rows)
    layer = model.roi_heads.box_predictor.cls_score  # background first; last in a file
    weight, bias = (value.detach().roll(-1, 0).numpy() for value in (layer.weight, layer.bias))
    np.savez(out / "rows/train/classifier.npz", weight=weight, bias=bias)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
