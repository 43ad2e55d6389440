"""Cost of several second stages in one pass: a training step of 1, 2, 5 and 20 arms, what they hold, inference of 5.

    python benchmarks/together.py [size=glyphs|small|full] [rounds=5]

glyphs: configs/glyphs/loce.yaml, 8 images of 128 x 128, 50 classes. small, full: configs/loce.yaml, 1203 classes, 2
images of 256 x 427 with 52 regions each, or of 800 x 1333 with 512. The arms are rows of Tables 1 to 6; the first is
LOCE. The sides take turns in one process; times are CPU seconds of the step that training takes (loop.py).
"""

import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from detectors import REGIONS, SIZES, class_stats, make_scenes, our_samples
from sides import MIB, seconds, status_mib

from loce.config import load_config, read_options, run_script
from loce.engine.loop import train_step
from loce.models.build import build_model, build_optimizer
from loce.models.roi_heads import Once
from loce.models.together import SHARED, Together, share
from loce.utils.distributed import setup
from loce.utils.environment import environment
from loce.utils.files import write_text
from loce.utils.options import Count

MFS, NONE = "memory.enabled=true", "memory.enabled=false"
NEW = "head.reset=true"
ARMS = (
    (),
    (NONE,),
    ("head.name=softmax",),
    ("head.name=softmax", NONE),
    ("indicator.kind=prior",),
    ("indicator.momentum=0.8",),
    ("indicator.momentum=0.95",),
    ("indicator.background_score=0.1",),
    ("indicator.background_score=0.001",),
    ("memory.classes_per_draw=2", "memory.features_per_class=2"),
    ("memory.classes_per_draw=4",),
    ("memory.classes_per_draw=4", "memory.features_per_class=8"),
    ("memory.features_per_class=8",),
    ("head.name=seesaw", NEW, NONE),
    ("head.name=seesaw", NEW),
    ("head.name=eqlv2", NEW, NONE),
    ("head.name=eqlv2", NEW),
    ("head.name=bags", NEW, NONE),
    ("head.name=bags", NEW),
    ("head.name=balanced_softmax", NONE),
)
COUNTS = (1, 2, 5, 20)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Cost of several second stages in one pass."""

    size: Literal["glyphs", "small", "full"] = "glyphs"
    rounds: Count = 5
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    threads: Count = 1  # of PyTorch, on the CPU
    output: str = "benchmarks/results/together.json"


def make_arms(options: Options, device: torch.device) -> list[Any]:
    """Model, optimiser and scaler of every arm; parts are shared, memories are full."""
    glyphs = options.size == "glyphs"
    recipe, classes = ("glyphs/loce.yaml", 50) if glyphs else ("loce.yaml", 1203)
    words = [] if glyphs else [f"model.roi.batch_per_image={REGIONS[options.size]}"]
    arms: list[Any] = []
    for own in ARMS:
        torch.manual_seed(0)
        config = load_config([recipe, *words, *own])
        model = build_model(config, class_stats(classes), pretrained=False).to(device).train()
        if arms:
            first = arms[0].model.state_dict()
            shared = (*SHARED, "roi_heads.box_head")
            model.load_state_dict({k: v for k, v in first.items() if k.startswith(shared)}, strict=False)
        memory = model.roi_heads.memory
        if memory is not None:
            rows, labels = memory.bank.spare_row, torch.arange(memory.bank.spare_row, device=device) % classes
            torch.manual_seed(0)
            stored = torch.rand(rows, *memory.bank.features.shape[1:], device=device)
            memory.bank.enqueue(stored, labels, torch.zeros(rows, 4, device=device))
        share(model, [arm.model for arm in arms])
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        optimizer = build_optimizer(model, config.train)
        arms.append(SimpleNamespace(model=model, optimizer=optimizer, scaler=scaler, config=config))
    return arms


def held(arms: list[Any]) -> int:
    """Bytes of weights, buffers and momentum, each once."""
    tensors = [x for arm in arms for x in (*arm.model.parameters(), *arm.model.buffers())]
    tensors += [x for arm in arms for s in arm.optimizer.state.values() for x in s.values() if torch.is_tensor(x)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    device = setup(options.device)
    torch.set_num_threads(options.threads)
    number, size = (8, (128, 128)) if options.size == "glyphs" else (2, SIZES[options.size])
    scenes = make_scenes(number, size, instances=5 if options.size == "glyphs" else None)
    for scene in scenes if options.size == "glyphs" else ():
        scene.labels %= 50
    samples = our_samples(scenes)
    arms = make_arms(options, device)

    def step(some: list[Any]) -> None:
        models = [arm.model for arm in some]
        train_step(Together(models) if len(models) > 1 else models[0], some, [samples], some[0].config.train, 1e-6)

    def detect(some: list[Any], together: bool) -> None:
        images = [sample["image"] for sample in samples]
        plain = ([(1.0, 1.0)] * number, [size] * number, None, None)
        once = Once()
        for arm in some:
            arm.model.eval().detect(images, *plain, once if together else None)

    # All sides once, to warm up, then in turns.
    sides = {"softmax": arms[3:4], **{f"{count} arms": arms[:count] for count in COUNTS}}
    memory = {}
    for name, some in sides.items():
        step(some)
        memory[name] = {"held_mib": held(some) / MIB, "peak_mib": status_mib("VmHWM")}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, some in sides.items():
            times[name].append(seconds(lambda some=some: step(some), device))  # type: ignore[misc]

    # Inference on these images, together and apart, of the first five arms.
    detect(arms[:1], False)
    inference: dict[str, list[float]] = {"together": [], "apart": []}
    for _ in range(max(1, options.rounds // 2)):
        for name, some in inference.items():
            some.append(seconds(lambda name=name: detect(arms[:5], name == "together"), device))  # type: ignore[misc]
    ratio = statistics.median(inference["apart"]) / statistics.median(inference["together"])
    print(f"inference of 5 arms: {ratio:.2f} times cheaper together")

    facts = dict(line.split(": ", 1) for line in environment(device).splitlines())
    rows = {}
    for name in sides:
        ratios = [a / b for a, b in zip(times[name], times["1 arms"], strict=True)]
        rows[name] = {"seconds": times[name], "ratio": statistics.median(ratios), **memory[name]}
        middle = statistics.median(times[name])
        print(f"{name}: {1000 * middle:.0f} ms, {rows[name]['ratio']:.2f} x 1, {memory[name]['held_mib']:.0f} MiB held")
    try:
        with open(options.output, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        content = {"benchmark": "together", "sizes": {}}
    content["sizes"][options.size] = {
        "rows": rows,
        "inference": inference,
        "options": dataclasses.asdict(options),
        "environment": facts,
    }
    write_text(options.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
