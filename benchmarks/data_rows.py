"""Rows of `bench.py` about data: opening annotations, loading samples, mask targets; memory by processes of their own.

Started by itself it does one side's work in this process: data_rows.py KIND SIDE PATH, prints JSON.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from detector_rows import Setting
from lvis_like import FILE_SIZE, outline, random_boxes, write_annotations, write_images
from PIL import Image
from pycocotools import mask as coco_mask
from sides import MIB, Row, in_process, seconds, status_mib, take_turns
from torchvision.ops import roi_align

from loce.config import DataConfig
from loce.data.annotations.cache import open_annotations
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.annotations.run_lengths import decode_runs
from loce.data.dataset import TrainDataset
from loce.data.masks import CroppedMasks, cut_runs
from loce.models.mask_head import MASK_SIZE, mask_targets

POSITIVES = 128  # regions of an image that have a mask target
IMAGES = {"full": 100_170, "small": 4000}
CROWD, CROWD_SIZE = 300, (800, 1333)


def opening(setting: Setting) -> list[Row]:
    """Memory and time of reading an annotation file of LVIS v1 train's size, and of opening it again."""
    images = IMAGES[setting.size]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "annotations.json")
        number = write_annotations(path, images)
        notes = {"images": images, "annotations": number, "bytes": path.stat().st_size}
        what = f"{number} annotations, {path.stat().st_size / MIB:.0f} MiB of JSON"
        memory = Row("open_memory", f"first open of {what}: memory", "lvis.LVIS", 4.0, unit="MiB", notes=notes)
        first = Row("open_first", "first open: CPU time", "lvis.LVIS", notes=notes)
        again = Row("open_again", "opened again, from the cache", "lvis.LVIS", most=5, notes=notes)
        private = Row("open_worker", "private memory of a worker", "lvis.LVIS", most=190, unit="MiB", notes=notes)
        for turn in range(setting.rounds):
            cache = str(Path(name, f"cache{turn}"))
            ours = in_process(__file__, "opening", "ours", str(path), cache)
            theirs = in_process(__file__, "opening", "theirs", str(path))
            second = in_process(__file__, "opening", "ours", str(path), cache)
            for row, key, own in (
                (memory, "mib", ours),
                (first, "s", ours),
                (again, "s", second),
                (private, "worker_mib", second),
            ):
                row.ours.append(own[key])
                row.theirs.append(theirs[key])
    return [memory, first, again, private]


def loader(setting: Setting) -> list[Row]:
    """File to training sample with the mask targets of 128 regions, one process, no pool."""
    images = 24 if setting.size == "full" else 6
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_annotations(folder / "annotations.json", images)
        write_images(folder, images)
        config = DataConfig(short_edges=(800,))
        annotations = LVISAnnotations.open(folder / "annotations.json")
        dataset = TrainDataset(annotations, folder, config, 0)
        records = _records(folder / "annotations.json")
        regions = [_regions(dataset[i, 0]["boxes"]) for i in range(images)]
        row = Row(
            "loader", "image file to sample and 128 mask targets", "torchvision's transforms, full-size masks", 3.0
        )
        cpu = torch.device("cpu")
        for turn in range(setting.rounds + 1):
            ours = seconds(lambda: [_our_sample(dataset, i, *regions[i]) for i in range(images)], cpu)
            theirs = seconds(lambda: [_their_sample(folder, records[i], *regions[i]) for i in range(images)], cpu)
            if turn:
                row.ours.append(ours / images)
                row.theirs.append(theirs / images)
    return [row]


def augmentation(setting: Setting) -> list[Row]:
    """File to training sample with large-scale jitter and copy-paste, against short-edge jitter; one process."""
    images = 24 if setting.size == "full" else 6
    jitter = {"resize": "lsj", "canvas": 1024}
    ways = {"lsj": jitter, "copy_paste": {"copy_paste": 1.0}, "lsj_copy_paste": jitter | {"copy_paste": 1.0}}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_annotations(folder / "annotations.json", images)
        write_images(folder, images)
        annotations = LVISAnnotations.open(folder / "annotations.json")
        usual = TrainDataset(annotations, folder, DataConfig(), 0)
        for way, options in ways.items():
            dataset = TrainDataset(annotations, folder, DataConfig(**options), 0)  # type: ignore[arg-type]
            words = " ".join(f"{key}={value}" for key, value in options.items())
            row = Row(way, f"image file to sample with {words}", "short-edge jitter", ratio="ours / theirs")
            each = [lambda d=d: [d[i, e] for e in range(2) for i in range(images)] for d in (dataset, usual)]
            take_turns(row, *each, torch.device("cpu"), setting.rounds)
            row.ours, row.theirs = ([x / 2 / images for x in side] for side in (row.ours, row.theirs))
            rows.append(row)
    return rows


def _regions(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """128 boxes near the objects, and whose they are."""
    instances = torch.arange(POSITIVES) % len(boxes)
    side = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)[instances]
    noise = torch.randn(POSITIVES, 4, generator=torch.Generator().manual_seed(0)) * 0.08
    return instances, boxes[instances] + side * noise


def _our_sample(dataset: TrainDataset, index: int, instances: torch.Tensor, boxes: torch.Tensor) -> Any:
    sample = dataset[index, 0]
    return sample, mask_targets(sample["masks"], instances, boxes)


def _records(path: Path) -> list[tuple[str, list[Any], list[Any]]]:
    """(file, polygons, boxes) of each image."""
    content = json.loads(path.read_text())
    found: dict[int, tuple[str, list[Any], list[Any]]] = {
        image["id"]: ("/".join(image["coco_url"].split("/")[-2:]), [], []) for image in content["images"]
    }
    for annotation in content["annotations"]:
        found[annotation["image_id"]][1].append(annotation["segmentation"])
        found[annotation["image_id"]][2].append(annotation["bbox"])
    return list(found.values())


def _their_sample(
    folder: Path, record: tuple[str, list[Any], list[Any]], instances: torch.Tensor, boxes: torch.Tensor
) -> Any:
    """Decode, fill every mask at full size, flip, to float, resize image and masks, targets by RoIAlign over them."""
    name, polygons, xywh = record
    with Image.open(folder / name) as picture:
        image = F.pil_to_tensor(picture.convert("RGB"))
    masks = []
    for parts in polygons:
        dense = coco_mask.decode(coco_mask.frPyObjects(parts, *FILE_SIZE))
        masks.append(torch.as_tensor(dense, dtype=torch.uint8).any(dim=2))
    stacked = torch.stack(masks)
    image, stacked = F.horizontal_flip(image), F.horizontal_flip(stacked)
    pixels = F.to_dtype(image, torch.float, scale=True)
    size = (800, 1333)
    pixels = torch.nn.functional.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0]
    resized = torch.nn.functional.interpolate(stacked[:, None].float(), size=size)[:, 0].byte()
    target_boxes = torch.as_tensor(xywh, dtype=torch.float32) * (size[0] / FILE_SIZE[0])
    regions = torch.cat([instances[:, None].float(), boxes], dim=1)
    return pixels, target_boxes, roi_align(resized[:, None].float(), regions, MASK_SIZE, 1.0)[:, 0]


def mask_memory(setting: Setting) -> list[Row]:
    """Most memory that 300 masks of one image and the targets of 128 regions need, beyond what was there before."""
    row = Row("masks", "300 masks, 800 x 1333, and 128 targets: memory", "full-size masks", most=200, unit="MiB")
    for _ in range(setting.rounds):
        row.ours.append(in_process(__file__, "masks", "ours")["mib"])
        row.theirs.append(in_process(__file__, "masks", "theirs")["mib"])
    return [row]


def _open(side: str, path: str, cache: str = "") -> dict[str, float]:
    before, start = status_mib("VmRSS"), time.process_time()
    if side == "ours":
        opened: Any = open_annotations(path, folder=Path(cache), large=0)
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            import lvis

            opened = lvis.LVIS(path)
    spent = time.process_time() - start
    most = status_mib("VmHWM") - before
    return {"mib": most, "s": spent, "worker_mib": _worker(opened)}


def _worker(opened: Any) -> float:
    """Private memory of a forked process that has gone through the objects of all images once."""
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        with os.fdopen(read) as pipe:
            found = float(pipe.read())
        os.waitpid(pid, 0)
        return found
    if isinstance(opened, LVISAnnotations):
        total = sum(float(opened.clipped_boxes(opened.rows(i)).sum()) for i in range(len(opened)))
    else:
        total = sum(sum(opened.anns[a["id"]]["bbox"]) for i in opened.imgs for a in opened.img_ann_map[i])
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    private = sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))
    os.write(write, f"{private / 1024 + 0 * total}".encode())
    os._exit(0)


def _masks(side: str) -> dict[str, float]:
    rng = np.random.default_rng(0)
    xywh = random_boxes(rng, CROWD, CROWD_SIZE)
    codes = [coco_mask.frPyObjects([outline(rng, box)], *CROWD_SIZE)[0] for box in xywh]
    boxes = torch.from_numpy(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)).float()
    instances, regions = _regions(boxes)
    warm = CroppedMasks.pack([(np.ones((9, 9), np.uint8), (4, 4))], CROWD_SIZE)
    mask_targets(warm, instances[:1], regions[:1])
    before = status_mib("VmHWM")
    if side == "ours":
        crops = [cut_runs(decode_runs(code["counts"]), CROWD_SIZE[0]) for code in codes]
        mask_targets(CroppedMasks.pack(crops, CROWD_SIZE), instances, regions)
    else:
        full = torch.from_numpy(np.ascontiguousarray(coco_mask.decode(codes).transpose(2, 0, 1)))
        rois = torch.cat([instances[:, None].float(), regions], dim=1)
        roi_align(full[:, None].float(), rois, MASK_SIZE, 1.0)
    return {"mib": status_mib("VmHWM") - before}


if __name__ == "__main__":
    kind, side, *rest = sys.argv[1:]
    print(json.dumps(_open(side, *rest) if kind == "opening" else _masks(side)))
