"""One HTML file: style, script, data and pictures are in it, so it opens by double click, offline, on a phone."""

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from loce.report import panels
from loce.report.panels import each
from loce.report.reading import Run, Values, number
from loce.report.states import GROUPS, KINDS, order, over_time

POINTS = 300  # of a curve; longer ones are averaged over neighbours
HERE = Path(__file__).parent


def page(runs: Sequence[Run], pictures: Mapping[str, Mapping[str, str]], notes: Sequence[str]) -> str:
    """The report. pictures: image -> caption -> data URI; notes: on what could not be drawn."""
    title = f"Equilibrium report: {', '.join(run.title for run in runs)}"
    states = [over_time(run) for run in runs]
    sections: dict[str, Callable[[], str]] = {
        "Results": lambda: panels.results(runs),
        "Every class": lambda: panels.every_class(runs, states),
        "Curves": lambda: _curves(runs),
        "Why is AP low?": lambda: each(runs, panels.causes),
        "Predictions": lambda: panels.pictures(pictures, notes),
        "Class table": lambda: panels.table(runs, states),
        "What produced it": lambda: panels.differences(runs) + each(runs, panels.origin),
    }
    links = "".join(f'<a href="#part{place}">{name}</a>' for place, name in enumerate(sections))
    body = "".join(
        f'<section id="part{place}"><h2>{name}</h2>{make()}</section>'
        for place, (name, make) in enumerate(sections.items())
    )
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<style>\n{style}</style></head>\n<body><header><h1>{escape(title)}</h1>"
        f'<nav aria-label="sections">{links}</nav></header>\n<main>{body}</main>\n'
        "<noscript>The charts need JavaScript; their numbers are in the class table.</noscript>"
        f'<div id="tip" hidden></div>\n<script type="application/json" id="data">{_data(runs, states)}</script>\n'
        f"<script>\n{script}</script></body></html>\n"
    )


def _data(runs: Sequence[Run], states: Sequence[dict[str, list[tuple[int, Values]]]]) -> str:
    """For script.js. No `<` in it, so that no name of a class ends the element."""
    entries = []
    for run, found in zip(runs, states, strict=True):
        places = order(run)
        entries.append(
            {
                "title": run.title,
                "last": run.last,
                "memory": bool(run.option("memory", "enabled")),
                "names": [run.classes.names[label] for label in places],
                "groups": [run.classes.groups[label] for label in places],
                "counts": [run.classes.counts[label] for label in places],
                "states": {
                    kind: [[at, [_short(values[label]) for label in places]] for at, values in entries_of_kind]
                    for kind, entries_of_kind in found.items()
                },
                "curves": {name: _curve(run, series) for name, (_, series) in CURVES.items()},
            }
        )
    kinds = {name: {"title": kind.title, "percent": kind.percent} for name, kind in KINDS.items()}
    data = {"groups": GROUPS, "kinds": kinds, "runs": entries}
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


# Of metrics.jsonl: title -> prefix of the names and what the legend calls them.
CURVES: dict[str, tuple[str, Callable[[Run], dict[str, str]]]] = {
    "losses": (
        "Losses (logarithmic)",
        lambda run: {k: k for line in run.metrics for k in line if k.startswith("loss")},
    ),
    "scores": ("Mean score of the groups", lambda _: {f"mean_score/{g}": name for g, name in GROUPS.items()}),
    "memory": ("Memory fill of the groups", lambda _: {f"memory_fill/{g}": name for g, name in GROUPS.items()}),
    "aps": (
        "Mask AP of the groups, after epochs (train.evaluate_every) and at the end",
        lambda _: {"eval/segm_AP": "all"} | {f"eval/segm_AP{g}": name for g, name in GROUPS.items()},
    ),
}


def _curve(run: Run, names: Callable[[Run], dict[str, str]]) -> dict[str, Any]:
    """{"at": iterations, "series": {name: values}} of the lines that have such values."""
    chosen = names(run)
    last = {f"eval/segm_{name}": number(str(value)) for name, value in run.aps.get("segm", {}).items()}
    lines = [line for line in [*run.metrics, {"iteration": run.last, **last}] if any(name in line for name in chosen)]
    size = -(-len(lines) // POINTS) or 1
    parts = [lines[i : i + size] for i in range(0, len(lines), size)]
    series = {shown: [_mean([line.get(name) for line in part]) for part in parts] for name, shown in chosen.items()}
    known = {name: values for name, values in series.items() if any(v is not None for v in values)}
    return {"at": [part[-1]["iteration"] for part in parts], "series": known}


def _mean(values: Values) -> float | None:
    known = [value for value in values if value is not None]
    return _short(sum(known) / len(known)) if known else None


def _curves(runs: Sequence[Run]) -> str:
    parts = []
    for name, (title, names) in CURVES.items():
        if any(len(_curve(run, names)["at"]) > 1 for run in runs):
            shown = each(runs, lambda run, place: _figure(run, place, name, title))  # noqa: B023 - used at once
            parts.append(f"<h3>{escape(title)}</h3>{shown}")
    return "".join(parts) or '<p class="note">metrics.jsonl is not there</p>'


def _figure(run: Run, place: int, name: str, title: str) -> str:
    return panels.figure("curve", place, name, f"{title}, {run.title}")
