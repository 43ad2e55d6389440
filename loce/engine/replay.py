"""One iteration of a run again, for people: trained up to from the last checkpoint before it, then drawn.

The run is only read; what is found goes to RUN/replay/ITERATION. On the CPU, with the number of processes that the
run had, everything is as it was, bit for bit.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from loce.checkpoint import files
from loce.config import Config, UserError, from_dict
from loce.data.build import train_annotations
from loce.engine.drawing import draw_objects
from loce.engine.loop import BadStepError
from loce.engine.ranks import session
from loce.engine.trainer import Job, advance, fill, open_log, prepare, set_done
from loce.models.mask_rcnn import MaskRCNN
from loce.models.roi_heads import SampledRoIs
from loce.utils import distributed
from loce.utils.files import write_text
from loce.utils.progress import say
from loce.utils.yaml_text import load_yaml

TIMES = ("images_per_second", "data_share", "peak_memory_gib")  # of a line of the log, never the same twice
GREY = (128, 128, 128)


def replay(run: Path, iteration: int, output: Path | None = None, device: str = "auto") -> Path:
    """Run iteration `iteration` (1, 2, ..., as in metrics.jsonl) of a run folder again; the folder of what is found.

    There: the images of the batch with their boxes and with the regions that were drawn, and batch.json with both, the
    losses, and the rows drawn from the memory. UserError where the run has no such iteration.
    """
    with session(device) as chosen:
        config = _config(run)
        annotations = train_annotations(config)
        job = prepare(config, chosen, annotations, _checkpoint_before(run, iteration))
        if not 0 < iteration <= sum(job.lengths):
            raise UserError(f"iteration = {iteration}: {run} has the iterations 1 to {sum(job.lengths)}")
        if distributed.is_main():
            start = f"iteration {job.done}" if job.resumed else "the beginning: there is no checkpoint before"
            say(f"training {iteration - job.done} iterations from {start}")
        output = output or run / "replay" / str(iteration)
        seen, line = _advance(job, iteration)
        _draw(job, seen, output)
        ranks = [json.loads(text) for text in distributed.gather_texts(json.dumps(seen.plain(job)))]
        if distributed.is_main():
            verdict = _compare(run, iteration, line)
            found = {"iteration": iteration, "same": verdict, "line": line, "ranks": ranks}
            write_text(output / "batch.json", json.dumps(found, indent=1) + "\n")
            say(f"{verdict}\nwrote {output}")
        return output


def _config(run: Path) -> Config:
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run}: is no run folder (it has no config.yaml)")
    config = from_dict(load_yaml(file.read_text(encoding="utf-8"), str(file)), str(file))
    return dataclasses.replace(config, output=str(run))


def _checkpoint_before(run: Path, iteration: int) -> Path | None:
    """The last undamaged checkpoint of fewer iterations; rank 0 looks."""
    found = ""
    if distributed.is_main():
        before = [folder for folder in files.finished(run) if int(folder.name) < iteration and not files.damage(folder)]
        found = str(before[0]) if before else ""
    found = distributed.broadcast_text(found)
    return Path(found) if found else None


class _Seen:
    """Notes what the model does with a batch."""

    def __init__(self, model: MaskRCNN) -> None:
        self.model = model
        self.samples: list[dict[str, Any]] = []
        self.regions: list[SampledRoIs] = []
        self.drawn: list[tuple[Tensor, Tensor, Tensor]] = []
        self.losses: list[dict[str, float]] = []

    def begin(self) -> None:
        """Note everything from now on: the model's own methods are called, and what they take and give is kept."""
        model, roi = self.model, self.model.roi_heads
        losses, select = model.losses, roi.select

        def noted_losses(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
            self.samples += samples
            found = losses(samples)
            self.losses.append({name: float(loss.detach()) for name, loss in found.items()})
            return found

        def noted_select(*args: Any) -> SampledRoIs:
            self.regions.append(select(*args))
            return self.regions[-1]

        model.losses, roi.select = noted_losses, noted_select  # type: ignore
        if roi.memory is not None:
            exchange = roi.memory.exchange

            def noted_exchange(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
                self.drawn.append(exchange(*args))
                return self.drawn[-1]

            roi.memory.exchange = noted_exchange  # type: ignore

    def plain(self, job: Job) -> dict[str, Any]:
        """All of it in numbers and text."""
        names = [*self.model.class_names, "background"]
        images = []
        for sample, regions in zip(self.samples, self.regions, strict=True):
            used = regions.labels >= 0
            images.append(
                {
                    "image_id": sample["image_id"],
                    "file": job.image_name(sample["image_id"]),
                    "boxes": _rounded(sample["boxes"]),
                    "classes": [names[label] for label in sample["labels"].tolist()],
                    "replaced": sample.get("replaced", []),
                    "regions": [
                        {"box": box, "class": names[label], "instance": instance}
                        for box, label, instance in zip(
                            _rounded(regions.boxes[used]),
                            regions.labels[used].tolist(),
                            regions.instances[used].tolist(),
                            strict=True,
                        )
                    ],
                }
            )
        rows = [row for features, labels, _ in self.drawn for row in self._rows(features, labels)]
        return {"losses": self.losses, "images": images, "memory_rows": rows}

    def _rows(self, features: Tensor, labels: Tensor) -> list[dict[str, Any]]:
        """Which rows of the memory these are: the slots of their class that hold the same numbers."""
        assert self.model.roi_heads.memory is not None
        bank, rows = self.model.roi_heads.memory.bank, []
        for feature, label in zip(features, labels.tolist(), strict=True):
            if label >= 0:
                held = bank.features[label * bank.capacity : (label + 1) * bank.capacity].to(feature.dtype)
                slots = (held == feature).flatten(1).all(dim=1).nonzero()[:, 0].tolist()
                rows.append({"label": label, "class": self.model.class_names[label], "slots": slots})
        return rows


def _advance(job: Job, iteration: int) -> tuple[_Seen, dict[str, Any] | None]:
    """Train up to the iteration; what was seen in it, and the line that it writes to the log (rank 0)."""
    seen = _Seen(job.model)
    with tempfile.TemporaryDirectory() as folder:
        log = open_log(job, Path(folder))
        if job.config.memory.enabled and not job.resumed:
            fill(job)

        def after_step(done: int, _: bool) -> None:
            set_done(job, done)
            if done == iteration - 1:
                seen.begin()

        if job.done == iteration - 1:
            seen.begin()
        try:
            advance(job, log, iteration, after_step)
        except BadStepError as error:
            if error.step.iteration < iteration:
                raise
            if distributed.is_main():
                say(str(error))
        log.close()
        file = Path(folder) / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
    last = json.loads(lines[-1]) if lines else None
    return seen, last if last and last["iteration"] == iteration else None


def _compare(run: Path, iteration: int, line: dict[str, Any] | None) -> str:
    """Whether the run wrote the same line."""
    file = run / "metrics.jsonl"
    lines = [json.loads(text) for text in file.read_text().splitlines() if text.endswith("}")] if file.exists() else []
    recorded = next((old for old in lines if old["iteration"] == iteration), None)
    if recorded is None:
        return f"metrics.jsonl has no line of iteration {iteration} to compare with"
    if line is None:
        return f"iteration {iteration} diverged here, but not in the run"
    keys = [key for key in {**recorded, **line} if key not in TIMES and recorded.get(key) != line.get(key)]
    if not keys:
        return f"the losses equal those in metrics.jsonl: loss {line['loss']:.6g}"
    return "not as in metrics.jsonl: " + ", ".join(f"{k} {line.get(k)} for {recorded.get(k)}" for k in keys)


def _draw(job: Job, seen: _Seen, output: Path) -> None:
    """RANK_NUMBER_imageID_boxes.png and _regions.png: positives by name, negatives grey, as the model was shown it."""
    output.mkdir(parents=True, exist_ok=True)
    names, groups = job.stats.names, job.stats.groups
    for number, (sample, regions) in enumerate(zip(seen.samples, seen.regions, strict=True)):
        image = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())
        positive = regions.instances >= 0
        negative = (regions.labels >= 0) & ~positive
        shown = {"boxes": (image, sample["boxes"], sample["labels"])}
        grey = image.copy()
        for x1, y1, x2, y2 in regions.boxes[negative].round().int().tolist():
            cv2.rectangle(grey, (x1, y1), (x2, y2), GREY, 1)
        shown["regions"] = (grey, regions.boxes[positive].cpu(), regions.labels[positive].cpu())
        for what, (canvas, boxes, labels) in shown.items():
            texts = [names[label] for label in labels.tolist()]
            drawn = draw_objects(canvas, boxes.numpy(), [], texts, [str(groups[label]) for label in labels.tolist()])
            file = output / f"rank{distributed.rank()}_{number}_image{sample['image_id']}_{what}.png"
            cv2.imwrite(str(file), drawn[:, :, ::-1])


def _rounded(boxes: Tensor) -> list[list[float]]:
    return [[round(side, 2) for side in box] for box in boxes.tolist()]
