"""Report on a step that diverged: what was in it, and which layer made the first bad value (RUN/nan_report/).

The batch is run again with hooks on every layer, with the weights from before the step, so that the steps that go well
cost nothing. Only its memory rows may differ: the first run has stored its own already.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loce.engine.loop import PRECISION, Losses, Samples
from loce.models.mask_rcnn import MaskRCNN
from loce.utils import distributed
from loce.utils.errors import first_few
from loce.utils.files import json_text, write_text

FOLDER = "nan_report"


def report(
    run: Path,
    model: MaskRCNN,
    batches: list[Samples],
    losses: list[Losses],
    iteration: int,
    lr: float,
    precision: str,
    name_of: Callable[[int], str],
) -> str:
    """Write report.json and report.txt; a summary for the screen. Every rank must call, with what is its own.

    batches, losses: of each micro-step; iteration: steps done, had this one been taken; name_of: the file name of an
    image id.
    """
    own = {
        "losses": _numbers(losses),
        "images": [[_image(sample, model, name_of) for sample in batch] for batch in batches],
        **_again(model, batches, precision),
    }
    # Gradients, averaged over the ranks, of each part of the model.
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            path = name.split(".")
            parts.setdefault(".".join(path[: 2 if path[0] == "roi_heads" else 1]), []).append(parameter.grad)
    found = {
        "iteration": iteration,
        "learning_rate": lr,
        "gradient_norms": {part: float(nn.utils.get_total_norm(gradients)) for part, gradients in parts.items()},
        "bad_parameters": [name for name, p in model.named_parameters() if not p.isfinite().all()],
        "bad_buffers": [name for name, b in model.state_dict().items() if not b.isfinite().all()],
        "ranks": [json.loads(text) for text in distributed.gather_texts(json.dumps(own))],
    }
    summary = _summary(found, run)
    if distributed.is_main():
        write_text(run / FOLDER / "report.json", json_text(found, as_text=True, indent=1) + "\n")
        write_text(run / FOLDER / "report.txt", "\n".join([summary, "", *_details(found)]) + "\n")
    return summary


@contextmanager
def watch(model: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """Two lists that fill while the model runs in the block: layers that gave the first bad values, in order.

    The first list is of the forward pass; the second of the backward pass, by the gradient that came to their output.
    """
    forward: list[str] = []
    backward: list[str] = []
    names = {module: name for name, module in model.named_modules() if name}

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        title = f"{names[module]} ({type(module).__name__})"
        for x in _tensors(output):
            if x.requires_grad:
                x.register_hook(lambda gradient: backward.append(title) if _bad(gradient) else None)
        if bad := _bad(output):
            total = sum(x.numel() for x in _tensors(output))
            given = f"{_bad(inputs)} of its input are not" if _bad(inputs) else "its input is finite"
            weights = [n for n, p in module.named_parameters(recurse=False) if not p.isfinite().all()]
            given += f"; its {' and '.join(weights)} has some, too" if weights else ""
            forward.append(f"{title}: {bad} of {total} values are not finite; {given}")

    handles = [module.register_forward_hook(look) for module in names]
    try:
        yield forward, backward
    finally:
        for handle in handles:
            handle.remove()


def _again(model: MaskRCNN, batches: list[Samples], precision: str) -> dict[str, Any]:
    """The step once more on this rank alone: its losses, first bad layer, and parameters with a bad gradient."""
    device = model.pixel_mean.device
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.backbone.folded = None  # every layer runs
    with watch(model) as (forward, backward):
        with torch.autocast(device.type, PRECISION.get(precision), precision != "fp32"):
            losses = [model(batch) for batch in batches]
        total = torch.stack([loss.float() for each in losses for loss in each.values()]).sum()
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    layer = forward[0] if forward else f"{backward[0]}: the gradient of its output is not finite" if backward else ""
    bad = [name for name, g in zip(trained, gradients, strict=True) if g is not None and not g.isfinite().all()]
    return {"first_bad_layer": layer, "losses_again": _numbers(losses), "bad_gradients": bad}


def _numbers(losses: list[Losses]) -> list[dict[str, float]]:
    return [{name: float(loss.detach()) for name, loss in each.items()} for each in losses]


def _image(sample: dict[str, Any], model: MaskRCNN, name_of: Callable[[int], str]) -> dict[str, Any]:
    labels = sample["labels"].tolist()
    return {
        "image_id": sample["image_id"],
        "file": name_of(sample["image_id"]),
        "size": list(sample["image"].shape[1:]),
        "boxes": [[round(side, 2) for side in box] for box in sample["boxes"].tolist()],
        "classes": [model.class_names[label] for label in labels],
        **({"replaced": sample["replaced"]} if "replaced" in sample else {}),
    }


def _summary(found: dict[str, Any], run: Path) -> str:
    """A few lines for the screen: what was bad, where it came from, what can be done."""
    ranks = list(enumerate(found["ranks"]))
    losses = [
        (f"{n} = {x} on rank {rank}", x) for rank, own in ranks for each in own["losses"] for n, x in each.items()
    ]
    gradients = [(f"the gradient of {part}", norm) for part, norm in found["gradient_norms"].items()]
    bad = [text for text, value in losses + gradients if not math.isfinite(value)]
    layers = [f"rank {rank}: {own['first_bad_layer']}" for rank, own in ranks if own["first_bad_layer"]]
    return "\n".join(
        [
            f"training diverged at iteration {found['iteration']}: not finite: {', '.join(bad)}",
            f"  first bad layer: {'; '.join(layers) or 'none: run again, the batch gave finite values'}",
            "  nothing was learned from this step; the checkpoints before it are good",
            f"  images, boxes, losses and gradients: {run / FOLDER / 'report.txt'}",
            "  what helps most often: a lower train.lr, longer train.warmup_iterations, train.clip_norm=35, no fp16",
        ]
    )


def _details(found: dict[str, Any]) -> Iterator[str]:
    yield f"iteration {found['iteration']}, learning rate {found['learning_rate']:.6g}, {len(found['ranks'])} ranks"
    for part, norm in found["gradient_norms"].items():
        yield f"gradient norm of {part}: {norm:.6g}"
    for what in ("bad_parameters", "bad_buffers"):
        if found[what]:
            yield f"not finite before the step ({what}): {first_few(found[what]) or 'none'}"
    for rank, own in enumerate(found["ranks"]):
        for title in ("losses", "losses_again"):
            for each in own[title]:
                values = " ".join(f"{name} {value:.6g}" for name, value in each.items())
                yield f"rank {rank}: {title.replace('_', ' ')}: {values}"
        yield f"rank {rank}: first bad layer: {own['first_bad_layer'] or 'none'}"
        yield f"rank {rank}: parameters with a bad gradient, run again: {first_few(own['bad_gradients']) or 'none'}"
        for image in (image for batch in own["images"] for image in batch):
            height, width = image["size"]
            yield f"rank {rank}: image {image['image_id']} ({image['file']}), {width} x {height} px"
            yield from (f"  {c}: {box}" for c, box in zip(image["classes"], image["boxes"], strict=True))
            yield from (f"  in place of: {message}" for message in image.get("replaced", ()))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in nested containers."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _bad(value: Any) -> int:
    return sum(int((~x.isfinite()).sum()) for x in _tensors(value))
