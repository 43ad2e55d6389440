"""Cost of LVIS evaluation: the official evaluator, others that are installed, and ours, on generated data.

python benchmarks/evaluation.py [sizes=[500,2000,5000]] [full=true] [rounds=1] [tools=...]
python benchmarks/evaluation.py 'tools=[ours,ours_json,hotcoco_json,vernier_json]' sizes=[2000] full=false
Each number is one process on one thread: CPU seconds from the moment the detections are in memory (ground truth is read
from its file), and the most memory the process ever held. Tools take turns. A tool called *_json reads the detections
from a JSON file, which is part of its time. "fixed" and "pool" are AP-fixed and AP-pool alone, "several" the protocols
lvis, fixed and pool from one matching, "boundary" boundary AP (segm). "resamples" is the bootstrap alone (1000
resamples of the images), without the evaluation before it, "resamples_pool" that of AP-pool, "calibration" the
calibration errors with theirs.
Results go to benchmarks/results/evaluation.json.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from loce.config import Count, UserError, read_options, run_script
from loce.evaluation import Detections, Masks, evaluate_lvis, load_annotations
from loce.evaluation.bootstrap import draw_weights, intervals, tally
from loce.evaluation.calibration import errors, reliability, weighted
from loce.evaluation.detections import check_detections
from loce.evaluation.lvis_ap import evaluate_loaded
from loce.evaluation.matching import PROTOCOLS
from loce.utils.files import write_text

HEIGHT, WIDTH, CATEGORIES = 480, 640, 1203
FULL = 19_809  # images of LVIS v1 val
TOOLS = ("official", "faster", "ours", "ours_json", "hotcoco_json", "vernier_json")
OF_MATCHES = ("resamples", "resamples_pool", "calibration")
MEASURES = ("fixed", "pool", "several", "boundary", *OF_MATCHES)
AT_FULL_SIZE = ("ours", *MEASURES)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    sizes: tuple[Count, ...] = (500, 2000, 5000)  # images
    types: tuple[str, ...] = ("bbox", "segm")
    tools: tuple[str, ...] = ("official", "faster", "ours", "ours_json")  # others: `pip install loce[bench]`
    full: bool = True  # also ours, and the bootstrap, at 19,809 images
    rounds: Count = 1
    faster_up_to: Count = 2000  # images; faster-coco-eval needs 8 GB for 5000
    output: str = "benchmarks/results/evaluation.json"


def draw_data(folder: Path, images: int, seed: int = 0) -> None:
    """LVIS-like ground truth (annotations.json) and up to 300 detections an image (detections.npz) with masks.

    As in LVIS val: 3 categories and 12 objects an image, 9 negative categories, 34 corners an object, 1203 categories
    with a long tail. A fifth of the detections lie near an object, most of them with the right category.
    """
    rng = np.random.default_rng(seed)
    tail = 1 / (np.arange(CATEGORIES) + 10.0)
    tail /= tail.sum()
    pool = [_shape(rng, *_random_box(rng)) for _ in range(2000)]
    pool_rles = [_rle(shape) for shape in pool]
    pool_boxes = np.array([mask_utils.toBbox([{"size": [HEIGHT, WIDTH], "counts": c}])[0] for c in pool_rles])
    truth: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": []}
    columns: dict[str, list[Any]] = {name: [] for name in ("image", "category", "score", "box", "rle")}
    for image_id in range(1, images + 1):
        chosen = rng.choice(CATEGORIES, 12, replace=False, p=tail) + 1
        present, negative = chosen[: rng.integers(1, 6)], chosen[5:]
        truth["images"].append(_image(rng, image_id, present, negative))
        objects = [(int(c), _random_box(rng)) for c in present for _ in range(rng.geometric(0.25))]
        for category, box in objects:
            truth["annotations"].append(_annotation(rng, len(truth["annotations"]) + 1, image_id, category, box))
            for _ in range(rng.integers(1, 7)):
                near = _jittered(rng, box)
                right = rng.random() < 0.7
                columns["category"].append(category if right else int(rng.choice(chosen)))
                columns["score"].append(rng.beta(2, 3) if right else rng.beta(1, 8))
                columns["box"].append(near)
                columns["rle"].append(_rle(_shape(rng, *near)))
        number = max(0, int(rng.integers(240, 301)) - (len(columns["box"]) - len(columns["image"])))
        picks = rng.integers(0, len(pool), number)
        known = rng.random(number) < 0.15
        columns["category"] += np.where(
            known, rng.choice(chosen, number), rng.choice(CATEGORIES, number, p=tail) + 1
        ).tolist()
        columns["score"] += rng.beta(1, 12, number).tolist()
        columns["box"] += pool_boxes[picks].tolist()
        columns["rle"] += [pool_rles[pick] for pick in picks]
        columns["image"] += [image_id] * (len(columns["box"]) - len(columns["image"]))
    truth["categories"] = [
        {"id": c + 1, "name": f"category {c + 1}", "frequency": "f" if c < 400 else "c" if c < 860 else "r"}
        for c in range(CATEGORIES)
    ]
    (folder / "annotations.json").write_text(json.dumps(truth))
    masks = Masks.from_counts(columns["rle"], np.tile([HEIGHT, WIDTH], (len(columns["rle"]), 1)))
    np.savez(
        folder / "detections.npz",
        image_ids=np.array(columns["image"]),
        category_ids=np.array(columns["category"]),
        scores=np.array(columns["score"], dtype=np.float32),
        boxes=np.array(columns["box"], dtype=np.float32),
        counts=masks.counts,
        offsets=masks.offsets,
    )


def _random_box(rng: np.random.Generator) -> list[float]:
    side = np.exp(rng.normal(3.4, 0.8))
    width, height = (float(np.clip(side * np.exp(rng.normal(0, 0.3)), 4, limit)) for limit in (WIDTH - 2, HEIGHT - 2))
    return [float(rng.random() * (WIDTH - width)), float(rng.random() * (HEIGHT - height)), width, height]


def _jittered(rng: np.random.Generator, box: list[float]) -> list[float]:
    x, y, width, height = box
    dx, dy, dw, dh = rng.normal(0, 0.12, 4)
    width, height = width * float(np.exp(dw)), height * float(np.exp(dh))
    return [max(0.0, x + width * float(dx)), max(0.0, y + height * float(dy)), width, height]


def _shape(rng: np.random.Generator, x: float, y: float, width: float, height: float) -> list[float]:
    """A star-shaped polygon in a box."""
    angles = np.linspace(0, 2 * np.pi, int(rng.integers(8, 61)), endpoint=False)
    radius = rng.uniform(0.7, 1.0, len(angles))
    corners = [x + width / 2 * (1 + radius * np.cos(angles)), y + height / 2 * (1 + radius * np.sin(angles))]
    return [round(v, 2) for v in np.stack(corners, axis=1).reshape(-1).tolist()]


def _rle(shape: list[float]) -> bytes:
    return mask_utils.frPyObjects([shape], HEIGHT, WIDTH)[0]["counts"]


def _image(rng: np.random.Generator, image_id: int, present: np.ndarray, negative: np.ndarray) -> dict[str, Any]:
    return {
        "id": image_id,
        "height": HEIGHT,
        "width": WIDTH,
        "coco_url": f"http://images.cocodataset.org/val2017/{image_id:012}.jpg",
        "neg_category_ids": negative.tolist(),
        "not_exhaustive_category_ids": present[:1].tolist() if rng.random() < 0.16 else [],
    }


def _annotation(
    rng: np.random.Generator, number: int, image_id: int, category: int, box: list[float]
) -> dict[str, Any]:
    shape = _shape(rng, *box)
    area = float(mask_utils.area([{"size": [HEIGHT, WIDTH], "counts": _rle(shape)}])[0])
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "segmentation": [shape],
        "bbox": [round(v, 2) for v in box],
        "area": area,
    }


def load(folder: Path, iou_type: str) -> Detections:
    """The generated detections, with what `iou_type` needs."""
    with np.load(folder / "detections.npz") as file:
        masks = None
        if iou_type == "segm":
            sizes = np.tile(np.array([HEIGHT, WIDTH], dtype=np.int32), (len(file["image_ids"]), 1))
            masks = Masks(counts=file["counts"], offsets=file["offsets"], sizes=sizes)
        return Detections(
            image_ids=file["image_ids"],
            category_ids=file["category_ids"],
            scores=file["scores"],
            boxes=file["boxes"] if iou_type == "bbox" else None,
            masks=masks,
        )


def measure(tool: str, iou_type: str, folder: Path) -> dict[str, float]:
    """Run one tool in this process; CPU seconds, peak memory and AP."""
    file = folder / f"{iou_type}.json"
    if tool.endswith("_json") and not file.is_file():
        load(folder, iou_type).save_json(file)
        return in_process(tool, iou_type, folder)  # writing has left its mark on the peak of memory
    detections: Any = str(file) if tool.endswith("_json") else load(folder, iou_type)
    if tool in ("official", "faster"):
        detections = list(detections._dicts(np.arange(len(detections))))
    annotations = str(folder / "annotations.json")
    if tool in OF_MATCHES:
        evaluation = evaluate_lvis(annotations, detections, iou_type, protocol="pool" if "pool" in tool else "lvis")
        tallies = tally(evaluation)
    start, wall = time.process_time(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        if tool.startswith("resamples"):
            ap = sum(intervals(replace(tallies, reliability=None), 1000)["AP"]) / 2
        elif tool == "calibration":
            sums = reliability(evaluation.matches)
            assert sums is not None
            errors(weighted(sums, draw_weights(len(sums), 1000, seed=0)))
            ap = evaluation.calibration["ECE"]
        else:
            run = {
                "official": _official,
                "faster": _faster,
                "ours": _ours,
                "ours_json": _ours,
                "fixed": partial(_ours, protocol="fixed"),
                "pool": partial(_ours, protocol="pool"),
                "several": _several,
                "boundary": _boundary,
                "hotcoco_json": _hotcoco,
                "vernier_json": _vernier,
            }[tool]
            ap = run(annotations, detections, iou_type)
    cpu = time.process_time() - start
    return {"cpu_seconds": cpu, "wall_seconds": time.perf_counter() - wall, "peak_mb": peak_mb(), "AP": ap}


def peak_mb() -> float:
    """Most memory of this process (ru_maxrss would count that of the process that started it)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _official(annotations: str, detections: list[dict[str, Any]], iou_type: str) -> float:
    np.float = float  # type: ignore[attr-defined]  # noqa: NPY001  # the released package asks numpy for it
    from lvis import LVIS, LVISEval, LVISResults

    truth = LVIS(annotations)
    evaluator = LVISEval(truth, LVISResults(truth, detections), iou_type)
    evaluator.run()
    return float(evaluator.results["AP"])


def _faster(annotations: str, detections: list[dict[str, Any]], iou_type: str) -> float:
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(annotations)
    evaluator = COCOeval_faster(truth, truth.loadRes(detections), iou_type, lvis_style=True)
    evaluator.params.maxDets = [300]
    evaluator.run()
    return float(evaluator.stats_as_dict["AP_all"])


def _hotcoco(annotations: str, detections: str, iou_type: str) -> float:
    from hotcoco import LVIS, LVISEval, LVISResults

    truth = LVIS(annotations)
    evaluator = LVISEval(truth, LVISResults(truth, detections), iou_type)
    evaluator.run()
    return float(evaluator.get_results()["AP"])


def _vernier(annotations: str, detections: str, iou_type: str) -> float:
    from vernier.instance import Bbox, CocoDataset, Evaluator, Segm

    truth = CocoDataset.from_lvis_json(Path(annotations).read_bytes())
    evaluator = Evaluator(iou=Bbox() if iou_type == "bbox" else Segm(), max_dets=(1, 10, 300))
    summary: Any = evaluator.evaluate(truth, Path(detections).read_bytes(), num_threads=1)
    return float(summary.stats[0])


def _ours(annotations: str, detections: Detections | str, iou_type: str, protocol: str = "lvis") -> float:
    return evaluate_lvis(annotations, detections, iou_type, protocol=protocol).metrics["AP"]


def _several(annotations: str, detections: Detections, iou_type: str) -> float:
    truth = load_annotations(annotations, iou_type == "segm")
    check_detections(detections, truth, "generated")
    rules = [PROTOCOLS[name] for name in ("lvis", "fixed", "pool")]
    return evaluate_loaded(truth, detections, iou_type, rules)[0].metrics["AP"]


def _boundary(annotations: str, detections: Detections, iou_type: str) -> float:
    return evaluate_lvis(annotations, detections, "boundary").metrics["AP"]


def in_process(tool: str, iou_type: str, folder: Path) -> dict[str, Any]:
    """`measure` in a process of its own."""
    words = [sys.executable, __file__, "measure", tool, iou_type, str(folder)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=alone)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"killed, exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "loce/evaluation"], capture_output=True, text=True).stdout
    return {
        "commit": commit + ("+changes" if changed.strip() else ""),
        "cpu": model[0].partition(":")[2].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pycocotools": importlib.metadata.version("pycocotools"),
        "lvis": importlib.metadata.version("lvis"),
    }


def report(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = ["| images | type | tool | CPU s | peak MB | AP | CPU official / ours |", "|---" * 7 + "|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['images']} | {row['type']} | {row['tool']} | {row['error']} | | | |")
            continue
        same = [r for r in rows if (r["images"], r["type"]) == (row["images"], row["type"]) and "error" not in r]
        official = [r["cpu_seconds"] for r in same if r["tool"] == "official"]
        ratio = f"{min(official) / row['cpu_seconds']:.1f}" if official and row["tool"] == "ours" else ""
        numbers = f"{row['cpu_seconds']:.2f} | {row['peak_mb']:.0f} | {row['AP']:.6f} | {ratio}"
        lines.append(f"| {row['images']} | {row['type']} | {row['tool']} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    if unknown := set(options.tools) - {*TOOLS, *MEASURES}:
        raise UserError(f"tools: {', '.join(sorted(unknown))} not known; choose from {', '.join((*TOOLS, *MEASURES))}")
    rows: list[dict[str, Any]] = []
    machine = hardware()
    for images in (*options.sizes, *((FULL,) if options.full else ())):
        with tempfile.TemporaryDirectory() as name:
            draw_data(Path(name), images)
            for iou_type in options.types:
                for turn in range(options.rounds):
                    chosen = options.tools if images < FULL else AT_FULL_SIZE
                    tools = [t for t in chosen if t != "faster" or images <= options.faster_up_to]
                    tools = [t for t in tools if t != "boundary" or iou_type == "segm"]
                    for tool in tools if turn % 2 == 0 else tools[::-1]:
                        rows.append(
                            {"images": images, "type": iou_type, "tool": tool, **in_process(tool, iou_type, Path(name))}
                        )
                        print(json.dumps(rows[-1]), flush=True)
    write_text(options.output, json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    print(report(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], Path(sys.argv[4]))))
    else:
        run_script(main)
