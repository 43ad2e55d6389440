"""Reader of run folders for the report; only config.yaml and the list of classes must be there."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loce.checkpoint.files import finished
from loce.checkpoint.load import Checkpoint, memory_of
from loce.evaluation.true_boxes import KEY, TrueBoxes, read_true_boxes
from loce.utils.errors import UserError
from loce.utils.files import read_csv
from loce.utils.yaml_text import load_yaml

EPOCHS = "eval_epoch_[0-9][0-9]"  # evaluations between epochs
Values = list[float | None]  # a number for each class, by label; None: not known


@dataclass
class ClassFacts:
    """C classes in the order of their labels: the file's ids, names, groups ("r", "c", "f"), training instances."""

    ids: list[int]
    names: list[str]
    groups: list[str]
    counts: list[int]

    @property
    def order(self) -> list[int]:
        """Labels, most training instances first."""
        return sorted(range(len(self.ids)), key=lambda label: (-self.counts[label], label))

    @property
    def trained(self) -> list[bool]:
        """Whether training has instances of each class; all, where the counts are not known."""
        return [count > 0 or not any(self.counts) for count in self.counts]


@dataclass
class Snapshot:
    """Every class at an iteration: mean score (Eq. 2), rows in the memory of rank 0 (None: there is no memory)."""

    iteration: int
    scores: Values
    memory: list[int] | None


@dataclass
class Run:
    """Contents of a run folder; empty where a file is missing, which is then in `missing`.

    snapshots, and evaluations (iteration, AP of each class): oldest first; tested, accuracy: mean score and accuracy of
    the classifier on the boxes of the validation data; metrics: lines of metrics.jsonl; aps, facts: metrics.json and
    evaluation.json of the last evaluation; others: the same of those that scripts/evaluate.py wrote beside it, by the
    names of their folders; errors, reliability, misses: rows of errors.csv, calibration.csv, misses.csv; boxes: what
    the classifier makes of the true boxes; texts: config.yaml, env.txt and log.txt.
    """

    folder: Path
    title: str
    config: dict[str, Any]
    classes: ClassFacts
    snapshots: list[Snapshot] = field(default_factory=list)
    evaluations: list[tuple[int, Values]] = field(default_factory=list)
    tested: Values = field(default_factory=list)
    accuracy: Values = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    aps: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    others: dict[str, tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=dict)
    errors: list[dict[str, str]] = field(default_factory=list)
    reliability: list[dict[str, str]] = field(default_factory=list)
    misses: list[dict[str, str]] = field(default_factory=list)
    boxes: TrueBoxes | None = None
    texts: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def option(self, section: str, key: str, default: Any = None) -> Any:
        """An option of config.yaml; the default for a run of a version that did not have it."""
        return (self.config.get(section) or {}).get(key, default)

    @property
    def last(self) -> int:
        """The last iteration of which anything is known."""
        known = [x["iteration"] for x in self.metrics[-1:]] + [x.iteration for x in self.snapshots[-1:]]
        return max(known, default=0)


def read_run(folder: Path) -> Run:
    """Everything in a run folder. UserError where it is no run, or its classes are not known yet."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: is no folder of a run (it has no config.yaml)")
    config = load_yaml((folder / "config.yaml").read_text(encoding="utf-8"), str(folder / "config.yaml"))
    # Classes and the training over time; where one of them is not written down, from the newest checkpoint.
    scored = _table(folder / "eval/mean_scores.csv")
    snapshots = [
        Snapshot(line["iteration"], line["mean_score"], line.get("memory"))
        for line in _lines(folder / "equilibrium.jsonl")
    ]
    missing = [] if snapshots else ["equilibrium.jsonl (runs of newer versions write it): the training over time"]
    classes = _classes(scored) if scored else None
    if classes is None or not snapshots:
        classes, last = _of_checkpoint(folder, classes)
        missing += [] if snapshots or last else ["a finished checkpoint: mean scores of the training"]
        snapshots = snapshots or last
    run = Run(folder, folder.resolve().name, config, classes, snapshots, missing=missing)
    # The validation data may show only some of the classes.
    by_id = {int(row["id"]): row for row in scored if int(row["boxes"])}
    run.tested, run.accuracy = (
        [number(by_id.get(i, {}).get(column)) for i in classes.ids] for column in ("mean_score", "accuracy")
    )
    run.metrics = _lines(folder / "metrics.jsonl")
    run.aps, run.facts = _numbers(folder / "eval")
    beside = [path.parent for path in sorted(folder.glob("eval_*/metrics.json"))]
    run.others = {path.name: _numbers(path) for path in beside if not path.match(EPOCHS)}
    names = ("errors", "calibration", "misses")
    run.errors, run.reliability, run.misses = (_table(folder / f"eval/{name}.csv") for name in names)
    run.boxes = read_true_boxes(folder / "eval") if KEY in run.aps else None
    run.texts = {name: _text(folder / name) for name in ("config.yaml", "env.txt", "log.txt")}
    run.evaluations = _evaluations(run)
    # What is not there, so that nobody looks for it on the page.
    needed = {
        "eval/metrics.json": "AP of the whole",
        "eval/per_category.csv": "AP of the classes",
        "eval/mean_scores.csv": "mean score and accuracy on the validation data",
        "eval/errors.csv": "why AP is low (eval.errors=true writes it)",
        "metrics.jsonl": "losses",
    }
    run.missing += [f"{name}: {what}" for name, what in needed.items() if not (folder / name).is_file()]
    return run


def _numbers(evaluation: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """metrics.json and evaluation.json of an evaluation; empty where they are not there."""
    metrics, facts = (json.loads(_text(evaluation / name) or "{}") for name in ("metrics.json", "evaluation.json"))
    return metrics, facts


def _classes(rows: list[dict[str, str]]) -> ClassFacts:
    return ClassFacts(
        [int(row["id"]) for row in rows],
        [row["name"] for row in rows],
        [row["group"] for row in rows],
        [int(row["training_instances"]) for row in rows],
    )


def _of_checkpoint(folder: Path, classes: ClassFacts | None) -> tuple[ClassFacts, list[Snapshot]]:
    """Classes and state at the newest checkpoint."""
    newest = next(iter(finished(folder)), None)
    if newest is None:
        if classes is None:
            raise UserError(
                f"{folder}: has no finished checkpoint and no evaluation yet, so its classes are not known; "
                "try again after the first checkpoint (train.checkpoint_every)"
            )
        return classes, []
    checkpoint = Checkpoint.open(newest)
    stats = checkpoint.classes
    facts = ClassFacts(
        stats.category_ids.tolist(), list(stats.names), stats.groups.tolist(), stats.instance_counts.tolist()
    )
    bank = memory_of(checkpoint, 0)
    written = next((value for name, value in bank.items() if name.split(".")[-1] == "written"), None)
    capacity = int(checkpoint.options["memory"]["capacity"])
    memory = None if written is None else written.clamp(max=capacity).tolist()
    scores = checkpoint.model["roi_heads.tracker.scores"][:-1].tolist()
    return facts, [Snapshot(int(newest.name), scores, memory)]


def _evaluations(run: Run) -> list[tuple[int, Values]]:
    """(iteration, AP of each class) of every evaluation: those between epochs, then the last."""
    folders = [(path, f"epoch {int(path.name[-2:])}") for path in sorted(run.folder.glob(EPOCHS))]
    ends = {round(line["epoch"]): line["iteration"] for line in run.metrics if any("eval/" in name for name in line)}
    found = []
    for path, name in [*folders, (run.folder / "eval", "")]:
        rows = {int(row["id"]): row for row in _table(path / "per_category.csv")}
        at = ends.get(int(name.split()[1])) if name else run.last
        if rows and at is not None:
            found.append((at, [number(rows.get(i, {}).get("AP")) for i in run.classes.ids]))
    return found


def number(text: str | None) -> float | None:
    """A cell of a table as a number; None where it is empty, nan or the -1 of "no objects"."""
    value = float(text) if text else math.nan
    return None if math.isnan(value) or value < 0 else value


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _lines(path: Path) -> list[dict[str, Any]]:
    """Finished lines: of a run that goes on, the last may be half written."""
    return [json.loads(line) for line in _text(path).splitlines(keepends=True) if line.endswith("\n")]


def _table(path: Path) -> list[dict[str, str]]:
    return read_csv(path) if path.is_file() else []
