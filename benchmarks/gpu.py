"""Everything that is to be known of a GPU, by one command of at most ten minutes: is it right, and how fast is it?

    python benchmarks/gpu.py [device=cpu size=small] [minutes=10] ...      or: make gpu

1. tests: `pytest -m gpu`, among them a step of every head and detections against the CPU's; the tolerances stand in
   tests/device/test_real_gpu.py. They are skipped on a CPU.
2. waits: PyTorch tells of every operation for which the host waits in a step of both stages; each line must give its
   reason. On a CPU the pretended device counts them.
3. speed: images a second (median of the rounds, by the clock) and most memory of training and inference, ours in fp32,
   bf16 and bf16 with a channels-last trunk, and torchvision's; what LOCE adds to a second stage.
4. demo: `make demo`; size=small: a dry run of its first stage on a dozen images.

What is not done when the time is over is named. All goes into one JSON file, and into a table beside it.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from detector_rows import _spread
from detectors import REGIONS, SIZES, Ours, Theirs, make_scenes, our_samples, their_targets
from launches import Options as LaunchOptions
from launches import count, step_of
from lvis_like import CLASSES
from pretend_device import ROOT, reason

from loce.config import read_options, run_script
from loce.utils.distributed import setup
from loce.utils.environment import environment
from loce.utils.files import write_text
from loce.utils.options import Count

MIB = 1 << 20
BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is run, and where the results go."""

    device: str = "auto"  # auto | cpu | cuda
    size: Literal["small", "full"] = "full"
    minutes: Count = 10
    rounds: Count = 10
    output: str = ""  # folder; "": benchmarks/results on a GPU, runs/gpu elsewhere


def tests(device: torch.device, left: float) -> dict[str, Any]:
    """The last line of pytest, and what failed."""
    words = ["-m", "pytest", "-m", "gpu", "-rf", "tests"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, timeout=left)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    return {
        "passed": done.returncode == 0 and device.type == "cuda",
        "summary": lines[-1] if lines else "",
        "failed": failed,
    }


def waits(device: torch.device, size: Literal["small", "full"]) -> dict[str, Any]:
    """Lines of a step of each stage at which the host waits, how often, and the reason that stands there."""
    found = {}
    for side in ("ours_stage1", "ours_loce"):
        if device.type == "cpu":
            lines = {
                line.partition("(")[2].rstrip(")"): n
                for line, n in count(side, LaunchOptions())["waits_by_line"].items()
            }
        else:
            lines = _told_waits(step_of(side, LaunchOptions(size=size), device))
        found[side] = {place: {"times": n, "reason": reason(place)} for place, n in lines.items()}
    explained = all(each["reason"] for lines in found.values() for each in lines.values())
    return {"passed": explained, **found}


def _told_waits(step: Callable[[], Any]) -> dict[str, int]:
    """Where PyTorch's own watch sees a wait, as "loce/models/rpn.py:148"; the benchmark's own lines are left out."""
    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines: dict[str, int] = {}
    for warning in told:
        if "synchronizing" in str(warning.message):
            path = Path(warning.filename)
            place = f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{warning.lineno}"
            lines[place] = lines.get(place, 0) + 1
    return {place: n for place, n in lines.items() if not place.startswith("benchmarks/")}


def training(
    recipe: str, device: torch.device, size: str, *words: str, precision: str = "fp32", last: bool = False
) -> Callable[[], Any]:
    """A step of ours; last: the trunk channels last."""
    scenes = make_scenes(BATCH, SIZES[size])
    samples = our_samples(scenes)
    if device.type == "cuda":
        samples = torch.utils.data._utils.pin_memory.pin_memory(samples)
    ours = Ours(recipe, device, *words, regions=REGIONS[size], precision=precision)
    if last:
        ours.model.backbone.to(memory_format=torch.channels_last)
    for scene in scenes:
        scene.near = scene.near.to(device)
    ours.give_proposals(scenes)
    return lambda: ours.step(samples)


def their_training(device: torch.device, size: str, precision: str) -> Callable[[], Any]:
    """A step of torchvision's detector."""
    scenes = make_scenes(BATCH, SIZES[size])
    images, targets = their_targets(scenes)
    theirs = Theirs(Ours("stage1.yaml", device, regions=REGIONS[size]), SIZES[size], precision=precision)
    theirs.give_proposals(scenes)
    return lambda: theirs.step(images, targets)


def inference(
    device: torch.device, size: str, precision: str = "fp32", last: bool = False, ours: bool = True
) -> Callable[[], Any]:
    """Detections of one image; ours with masks as run-length codes, torchvision's as it gives them."""
    scene = make_scenes(1, SIZES[size])[0]
    own = Ours("stage1.yaml", device)
    own.model.test_edges = SIZES[size]
    other = None if ours else Theirs(own, SIZES[size]).model.eval()
    if other is None:
        _spread(own.model.roi_heads.classifier.fc_cls, background=CLASSES)  # type: ignore[arg-type]
        own.model.eval()
        if last:
            own.model.backbone.to(memory_format=torch.channels_last)
    else:
        _spread(other.roi_heads.box_predictor.cls_score, background=0)  # type: ignore[arg-type, union-attr]

    @torch.no_grad()
    def work() -> Any:
        with torch.autocast(device.type, torch.bfloat16, precision != "fp32"):
            if other is None:
                return own.model.detect_images([scene.image])
            return other([scene.image.to(device).float() / 255])

    return work


def rows(device: torch.device, size: str) -> Iterator[tuple[str, int, Callable[[], Callable[[], Any]]]]:
    """Name, images a call, and what makes the call."""
    for recipe, name in (("stage1.yaml", "stage 1"), ("loce.yaml", "LOCE")):
        for precision, last in (("fp32", False), ("bf16", False), ("bf16", True)):
            title = f"{name}, {precision}{', channels last' if last else ''}"
            yield title, BATCH, lambda r=recipe, p=precision, c=last: training(r, device, size, precision=p, last=c)  # type: ignore[misc]
    without = ("memory.enabled=false", "head.name=softmax")
    yield "stage 2 without LOCE, fp32", BATCH, lambda: training("loce.yaml", device, size, *without)
    for precision in ("fp32", "bf16"):
        yield f"torchvision's stage 1, {precision}", BATCH, lambda p=precision: their_training(device, size, p)  # type: ignore[misc]
    for precision, last in (("fp32", False), ("bf16", False), ("bf16", True)):
        title = f"inference, {precision}{', channels last' if last else ''}"
        yield title, 1, lambda p=precision, c=last: inference(device, size, p, c)  # type: ignore[misc]
    yield "torchvision's inference, fp32", 1, lambda: inference(device, size, ours=False)


def speed(device: torch.device, options: Options, deadline: float) -> dict[str, Any]:
    """Images a second and most memory of each row, until the deadline."""
    found: dict[str, Any] = {}
    for title, images, make in rows(device, options.size):
        if time.monotonic() > deadline:
            found[title] = {"not measured": "the time was over"}
            continue
        try:
            work = make()
            found[title] = measure(work, images, device, 1 if device.type == "cpu" else options.rounds)
        except Exception as error:  # one that fails is named, and the others are measured
            found[title] = {"not measured": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(f"{title}: {found[title]}", flush=True)
    return found


def measure(work: Callable[[], Any], images: int, device: torch.device, rounds: int) -> dict[str, float]:
    """After two calls (one on a CPU): median, and most memory of the device in MiB."""
    on_gpu = device.type == "cuda"
    for _ in range(2 if on_gpu else 1):
        work()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    memory = torch.cuda.max_memory_allocated() / MIB if on_gpu else float("nan")
    low, high = images / max(seconds), images / min(seconds)
    return {"images_per_second": images / statistics.median(seconds), "slowest": low, "fastest": high, "MiB": memory}


def demo(device: torch.device, size: str, left: float) -> dict[str, Any]:
    """Minutes of the demo, and its table; size=small: whether a dry run of its first stage passes."""
    started = time.monotonic()
    if size == "full":
        done = subprocess.run(
            [sys.executable, "scripts/demo.py"], cwd=ROOT, capture_output=True, text=True, timeout=left
        )
        table = Path(ROOT, "runs/glyphs/table.md")
        shown = table.read_text(encoding="utf-8") if done.returncode == 0 else done.stdout[-500:] + done.stderr[-500:]
    else:
        with tempfile.TemporaryDirectory() as folder:
            words = (
                f"out={folder}/glyphs",
                "classes=6",
                "train_images=12",
                "val_images=6",
                "size=64",
                "smallest=0.26",
                "largest=0.4",
            )
            subprocess.run(
                [sys.executable, "scripts/make_glyphs.py", *words], cwd=ROOT, check=True, capture_output=True
            )
            files = [f"data.{part}_annotations={folder}/glyphs/annotations/{part}.json" for part in ("train", "val")]
            files += [f"data.{part}_images={folder}/glyphs" for part in ("train", "val")]
            line = [
                "scripts/train.py",
                "glyphs/stage1.yaml",
                *files,
                f"output={folder}/run",
                f"device={device.type}",
                "train.dry_run=true",
            ]
            done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True, timeout=left)
            shown = (done.stdout + done.stderr)[-300:]
    return {"passed": done.returncode == 0, "minutes": (time.monotonic() - started) / 60, "shown": shown}


def table(result: dict[str, Any]) -> str:
    """What was found, in Markdown."""
    facts = result["environment"]
    lines = [
        f"{facts['device']}, torch {facts['torch']}, {facts['code']}, size={result['options']['size']}.",
        "",
        "| part | passed | |",
        "|---|---|---|",
    ]
    for part in ("tests", "waits", "demo"):
        found = result[part]
        said = (
            found.get("not done")
            or found.get("summary")
            or (f"{found['minutes']:.1f} minutes" if "minutes" in found else "")
        )
        if part == "waits" and "ours_loce" in found:
            said = "; ".join(
                f"{side}: {sum(x['times'] for x in found[side].values())}" for side in ("ours_stage1", "ours_loce")
            )
        lines.append(f"| {part} | {'yes' if found.get('passed') else 'no'} | {said} |")
    lines += ["", "| row | images/s | slowest to fastest | MiB |", "|---|---:|---:|---:|"]
    for title, row in result["speed"].items():
        if "not measured" in row:
            lines.append(f"| {title} | not measured | {row['not measured']} | |")
        else:
            spread = f"{row['slowest']:.3g} to {row['fastest']:.3g}"
            memory = "" if row["MiB"] != row["MiB"] else f"{row['MiB']:.0f}"
            lines.append(f"| {title} | {row['images_per_second']:.3g} | {spread} | {memory} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    started, device = time.monotonic(), setup(options.device)
    end = started + 60 * options.minutes

    def part(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return work()
        except subprocess.TimeoutExpired:
            return {"passed": False, "not done": "the time was over"}

    # The demo takes what the others leave; training and inference two thirds of the rest after the tests.
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "environment": dict(line.split(": ", 1) for line in environment(device).splitlines()),
        "options": dataclasses.asdict(options),
        "load": os.getloadavg()[0],
    }
    result["tests"] = part(lambda: tests(device, 0.4 * (end - started)))
    print(f"tests: {result['tests']}", flush=True)
    result["waits"] = part(lambda: waits(device, options.size))
    now = time.monotonic()
    result["speed"] = speed(device, options, now + 0.6 * (end - now))
    result["demo"] = part(lambda: demo(device, options.size, max(1.0, end - time.monotonic())))
    result["minutes"] = (time.monotonic() - started) / 60

    folder = Path(options.output or ("benchmarks/results" if device.type == "cuda" else "runs/gpu"))
    folder.mkdir(parents=True, exist_ok=True)
    text = table(result)
    write_text(folder / "gpu.json", json.dumps(result, indent=1).replace("NaN", "null") + "\n")
    write_text(folder / "gpu.md", text)
    print(f"\n{text}\n{result['minutes']:.1f} minutes; wrote {folder}/gpu.json and gpu.md")


if __name__ == "__main__":
    run_script(main)
