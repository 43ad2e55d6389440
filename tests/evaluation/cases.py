"""Random data sets full of traps, and the official evaluators as oracles."""

import contextlib
import copy
import io
import logging
import warnings
from typing import Any

import numpy as np
from lvis import LVIS, LVISEval, LVISResults
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Case = tuple[dict[str, Any], list[dict[str, Any]]]
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR@300", "ARs@300", "ARm@300", "ARl@300")


def random_case(seed: int, crowded: bool = False) -> Case:
    """A small LVIS data set and results for it; coarse coordinates and scores, so that ties are everywhere."""
    rng = np.random.default_rng(seed)
    step = int(rng.choice([1, 8, 32]))  # of coordinates
    side = int(rng.choice([64, 160, 320]))
    image_ids = rng.permutation(50)[: rng.integers(1, 7)] + 1
    category_ids = rng.permutation(40)[: rng.integers(1, 9)] + 1
    images, annotations = [], []
    for image_id in image_ids.tolist():
        split = rng.permutation(category_ids)
        present, negative = split[: rng.integers(0, 5)], split[4 : 4 + rng.integers(0, 3)]
        loose = rng.choice(category_ids, rng.integers(0, 3))
        images.append(
            {
                "id": image_id,
                "height": side,
                "width": side,
                "neg_category_ids": [int(c) for c in negative],
                "not_exhaustive_category_ids": [int(c) for c in loose],
            }
        )
        for category_id in present.tolist():
            for _ in range(rng.integers(1, 5)):
                annotations.append(_annotation(rng, image_id, category_id, side, step))
    order = rng.permutation(len(annotations))
    annotations = [{**annotations[i], "id": n + 1} for n, i in enumerate(order)]
    categories = [{"id": int(c), "name": f"c{c}", "frequency": str(rng.choice(list("rcf")))} for c in category_ids]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    count = 0 if rng.random() < 0.03 else int(rng.integers(1, 60))
    results = [_result(rng, truth, side, step) for _ in range(count)]
    if crowded and results:  # more than 300 in one image
        results += [_result(rng, truth, side, step, image_ids[0]) for _ in range(rng.integers(290, 420))]
    return truth, [results[i] for i in rng.permutation(len(results))]


def _box(rng: np.random.Generator, side: int, step: int) -> list[float]:
    limit = max(side // step, 2)
    x, y = rng.integers(0, limit, 2) * step
    width, height = rng.integers(0 if rng.random() < 0.1 else 1, limit, 2) * step
    width, height = min(width, side - x), min(height, side - y)
    return [float(v) for v in (x, y, width, height)]


def _rle(box: list[float], side: int) -> dict[str, Any]:
    x, y, w, h = (int(v) for v in box)
    mask = np.zeros((side, side), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = mask_utils.encode(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def _annotation(rng: np.random.Generator, image_id: int, category_id: int, side: int, step: int) -> dict[str, Any]:
    x, y, w, h = box = _box(rng, side, step)
    kind = rng.integers(3)
    shape: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if kind == 1:
        shape = _rle(box, side)
    elif kind == 2 and w * h > 0:
        shape = [[x, y, x + w, y, x + w / 2, y + h]] + ([[x, y, x + 1, y, x + 1, y + 1]] if rng.random() < 0.3 else [])
    entry = {"image_id": image_id, "category_id": category_id, "bbox": box, "area": w * h, "segmentation": shape}
    if rng.random() < 0.1:
        entry["ignore"] = int(rng.integers(2))
    if rng.random() < 0.1:
        entry["iscrowd"] = int(rng.integers(2))
    if rng.random() < 0.05:
        entry["area"] = float(rng.choice([0.0, 32.0**2, 96.0**2, 2e10]))  # on the bounds and beyond
    return entry


def _result(
    rng: np.random.Generator, truth: dict[str, Any], side: int, step: int, image_id: int | None = None
) -> dict[str, Any]:
    """Near an annotation, a copy of it, or anywhere."""
    score = float(rng.integers(0, 8)) / 7 if rng.random() < 0.7 else float(rng.random())
    near = truth["annotations"] and rng.random() < 0.7 and image_id is None
    if near:
        target = truth["annotations"][rng.integers(len(truth["annotations"]))]
        box, category_id, image_id = list(target["bbox"]), target["category_id"], target["image_id"]
        if rng.random() < 0.5:
            shift = rng.integers(-1, 2, 2) * min(step, 4)
            box = [
                float(np.clip(box[0] + shift[0], 0, side - 1)),
                float(np.clip(box[1] + shift[1], 0, side - 1)),
                *box[2:],
            ]
            box[2:] = [min(box[2], side - box[0]), min(box[3], side - box[1])]
        if rng.random() < 0.1:
            category_id = truth["categories"][rng.integers(len(truth["categories"]))]["id"]
    else:
        box = _box(rng, side, step)
        category_id = truth["categories"][rng.integers(len(truth["categories"]))]["id"]
        image_id = truth["images"][rng.integers(len(truth["images"]))]["id"] if image_id is None else int(image_id)
    return {
        "image_id": image_id,
        "category_id": category_id,
        "score": score,
        "bbox": box,
        "segmentation": _rle(box, side),
    }


def without(results: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Results lacking one key."""
    return [{k: v for k, v in entry.items() if k != key} for entry in results]


def official_lvis(truth: dict[str, Any], results: list[dict[str, Any]], iou_type: str, cap: int = 300) -> LVISEval:
    """The released LVIS evaluator; it needs `np.float` and trips over an empty list, which callers see to."""
    ground = LVIS.__new__(LVIS)
    ground.logger = logging.getLogger("lvis")
    ground.logger.setLevel(logging.ERROR)
    ground.dataset = copy.deepcopy(truth)
    ground._create_index()
    results = without(copy.deepcopy(results), "bbox" if iou_type == "segm" else "segmentation")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its logging
        evaluator = LVISEval(ground, LVISResults(ground, results, max_dets=cap), iou_type)
        evaluator.run()
    return evaluator


def official_coco(truth: dict[str, Any], results: list[dict[str, Any]], iou_type: str) -> COCOeval:
    """The COCO evaluator of pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = copy.deepcopy(truth)
        for annotation in ground.dataset["annotations"]:
            annotation.setdefault("iscrowd", 0)
        ground.createIndex()
        found = ground.loadRes(without(copy.deepcopy(results), "bbox" if iou_type == "segm" else "segmentation"))
        evaluator = COCOeval(ground, found, iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator
