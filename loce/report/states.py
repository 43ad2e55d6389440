"""Per-class curves of a run: mean score (Eq. 2), sampling probability (Eq. 7-8), margin (Eq. 4), memory fill, AP."""

import math
from dataclasses import dataclass

import torch

from loce.equilibrium_loss import loss_margin
from loce.memory_bank import sampling_probability
from loce.report.reading import Run, Snapshot, Values

GROUPS = {"f": "frequent", "c": "common", "r": "rare"}  # from left to right in the charts: by training frequency
States = dict[str, list[tuple[int, Values]]]  # kind -> (iteration, number of each class), oldest first


@dataclass(frozen=True)
class Kind:
    """A chart, and a column of the class table. percent: written times 100."""

    title: str
    short: str
    meaning: str
    percent: bool = False


KINDS = {
    "score": Kind(
        "Mean score", "mean score", "Eq. 2, during training: how sure the classifier is of a class's objects"
    ),
    "draw": Kind(
        "Sampling probability", "p(draw) %", "Eq. 7-8: how often a draw from the memory is of the class", True
    ),
    "margin": Kind(
        "EBL margin", "margin", "Eq. 4, against the strongest other class: log(s of that class / s of its own)"
    ),
    "memory": Kind("Memory fill", "stored", "rows in the feature memory (of rank 0)"),
    "ap": Kind("AP", "AP %", "on the validation data; of masks where there are any", True),
    "tested": Kind("Mean score on validation data", "val score", "softmax of the right class on the true boxes"),
    "accuracy": Kind("Accuracy", "accuracy %", "of the true boxes, those whose best class is the right one", True),
}


def over_time(run: Run) -> States:
    """What is known of every class over the training; a kind of which nothing is known is left out.

    What training made of a class that it had no instance of says nothing: None.
    """
    states: States = {kind: [] for kind in KINDS}
    trained = run.classes.trained
    for snapshot in run.snapshots:
        memory: Values = [None] * len(trained) if snapshot.memory is None else [float(n) for n in snapshot.memory]
        chances, gaps = draws(run, snapshot), margins(run, snapshot)
        for kind, values in (("score", snapshot.scores), ("draw", chances), ("margin", gaps), ("memory", memory)):
            shown = [value if seen else None for value, seen in zip(values, trained, strict=True)]
            states[kind].append((snapshot.iteration, shown))
    states["ap"] = run.evaluations
    states["tested"], states["accuracy"] = [(run.last, run.tested)], [(run.last, run.accuracy)]
    known = {kind: [entry for entry in found if any(v is not None for v in entry[1])] for kind, found in states.items()}
    return {kind: found for kind, found in known.items() if found}


def draws(run: Run, snapshot: Snapshot) -> Values:
    """Eq. 7-8: the probability that a draw from the memory is of each class. Without memory: if all that training
    has were stored. Unknown where classes are drawn by something else than the indicator."""
    if run.option("memory", "draw", "score") != "score":
        return [None] * len(run.classes.ids)
    stored = torch.tensor(snapshot.memory or [int(seen) for seen in run.classes.trained])
    return _known(sampling_probability(_indicator(run, snapshot), stored))


def margins(run: Run, snapshot: Snapshot) -> Values:
    """Eq. 4: the largest margin of each class against any other, log(s_other / s)."""
    margin_CC = loss_margin(_indicator(run, snapshot))
    return _known(margin_CC.fill_diagonal_(-math.inf).amax(dim=1))


def _indicator(run: Run, snapshot: Snapshot) -> torch.Tensor:
    """(C,) what margins and draws go by: mean scores, or training instances (`indicator.kind: prior`)."""
    counts = run.option("indicator", "kind", "score") == "prior"
    values = run.classes.counts if counts else [math.nan if s is None else s for s in snapshot.scores]
    return torch.tensor(values, dtype=torch.float64)


def _known(values: torch.Tensor) -> Values:
    return [value if math.isfinite(value) else None for value in values.tolist()]
