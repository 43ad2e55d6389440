"""The sections of the report as HTML. Whatever comes from data or options is escaped."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

from loce.evaluation.lost_objects import CAUSES
from loce.report.reading import Run, Values
from loce.report.states import GROUPS, KINDS, order
from loce.utils.yaml_text import dotted, show

METRICS = ("AP", "APr", "APc", "APf", "AP50", "AP75")
NAMES = {"segm": "mask", "bbox": "box"}
COLOUR = {cause: f"s{place}" for place, cause in enumerate(CAUSES)}  # classes of style.css
STATES = Mapping[str, list[tuple[int, Values]]]


def each(runs: Sequence[Run], make: Callable[[Run, int], str]) -> str:
    """A panel for each run, side by side where there is room."""
    heads = [f"<h4>{escape(run.title)}</h4>" if len(runs) > 1 else "" for run in runs]
    panels = "".join(f"<article>{head}{make(run, i)}</article>" for i, (run, head) in enumerate(zip(runs, heads)))  # noqa: B905
    return f'<div class="grid">{panels}</div>'


def figure(kind: str, place: int, name: str, label: str) -> str:
    """Where script.js draws."""
    return f'<div class="{kind}" data-run="{place}" data-name="{name}" role="img" aria-label="{escape(label)}"></div>'


def results(runs: Sequence[Run]) -> str:
    """The numbers of the last evaluation with their intervals, and which files are missing."""
    rows = []
    for run in runs:
        for kind in (k for k in NAMES if k in run.aps):
            spans = (run.facts.get("intervals") or {}).get(kind) or {}
            cells = "".join(f"<td>{percent(run.aps[kind].get(m))}{_span(spans.get(m))}</td>" for m in METRICS)
            rows.append(f"<tr><th>{escape(run.title)}</th><td>{NAMES[kind]}</td>{cells}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("run", "of", *METRICS))
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    rules = dict.fromkeys(str(run.facts["rules"]) for run in runs if "rules" in run.facts)
    note = f"Percent; in brackets the 95% interval over images. Protocol: {'; '.join(rules)}."
    lacking = "".join(f"<li>{escape(run.title)}: {escape(what)}</li>" for run in runs for what in run.missing)
    shown = f'{table}<p class="note">{escape(note)}</p>' if rows else "<p>No evaluation yet.</p>"
    return shown + (f'<h3>What these runs lack</h3><ul class="note">{lacking}</ul>' if lacking else "")


def percent(value: float | None) -> str:
    """12.3; "-" of no classes."""
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"


def _span(bounds: Sequence[float] | None) -> str:
    known = bounds and "-" not in map(percent, bounds)
    return f" <small>[{percent(bounds[0])}, {percent(bounds[1])}]</small>" if bounds and known else ""


def every_class(runs: Sequence[Run], states: Sequence[STATES]) -> str:
    """The charts with a bar for each class, and the slider that moves them through time."""
    keys = "".join(f'<span class="key {group}">{name}</span>' for group, name in GROUPS.items())
    parts = [f'<p class="legend">{keys} most training instances on the left; line: mean of the group</p>']
    plain = [run.title for run in runs if run.option("head", "name") != "equilibrium"]
    forgetful = [run.title for run in runs if not run.option("memory", "enabled")]
    parts += [_note(f"Without EBL: {', '.join(plain)}. The margins are those that EBL would give.")] if plain else []
    parts += (
        [_note(f"Without feature memory: {', '.join(forgetful)}. The draws are those from one that holds every class.")]
        if forgetful
        else []
    )
    if any(len(found) > 1 for kinds in states for found in kinds.values()):
        parts.append(
            '<p class="slider"><button id="play" type="button" aria-label="play">&#9654;</button>'
            '<input id="time" type="range" min="0" max="1000" value="1000" aria-label="time in the training">'
            '<output id="at" for="time"></output></p>'
        )
    for name, kind in KINDS.items():
        if any(name in kinds for kinds in states):
            panel = each(runs, lambda run, i: figure("bars", i, name, f"{kind.title}, {run.title}"))  # noqa: B023 - used at once
            parts.append(f'<h3>{kind.title} <small class="note">{kind.meaning}</small></h3>{panel}')
    return "".join(parts)


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def causes(run: Run, _: int) -> str:
    """What became of the objects of each group, and the AP that every cause would give back."""
    groups = {row["name"]: row for row in run.errors if row["level"] == "group" and int(row["objects"])}
    groups = {name: groups[name] for name in ("rare", "common", "frequent", "all") if name in groups}
    if not groups:
        return _note("eval/errors.csv is not there (eval.errors=true writes it)")
    found = [cause for cause in CAUSES if any(int(row[cause] or 0) for row in groups.values())]
    bars = "".join(f"<b>{escape(name)}</b>{_shares(row, found)}" for name, row in groups.items())
    lines = []
    for cause in found:
        cells = "".join(f"<td>{int(row[cause] or 0)} {_gain(row.get(f'back_{cause}'))}</td>" for row in groups.values())
        lines.append(f'<tr><th><span class="key {COLOUR[cause]}"></span>{CAUSES[cause]}</th>{cells}</tr>')
    head = "".join(f"<th>{escape(name)}</th>" for name in groups)
    return (
        f'<div class="shares">{bars}</div><div class="wide"><table class="causes"><thead><tr><th>objects at IoU .5</th>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        + _note("Objects and, small, the AP in percent that the cause would give back.")
    )


def _gain(back: str | None) -> str:
    return f"<small>{100 * float(back):+.1f}</small>" if back else "<small></small>"


def _shares(row: Mapping[str, str], found: Sequence[str]) -> str:
    total, parts = int(row["objects"]), []
    for cause in (c for c in found if int(row[c] or 0)):
        share = int(row[cause]) / total
        words = f"{row['name']}: {row[cause]} of {total} {CAUSES[cause]} ({share:.1%})"
        parts.append(f'<i class="{COLOUR[cause]}" style="width:{100 * share:.2f}%" title="{escape(words)}"></i>')
    return f'<span class="share">{"".join(parts)}</span>'


def pictures(drawn: Mapping[str, Mapping[str, str]], notes: Sequence[str]) -> str:
    """Predictions beside ground truth: a line for each image."""
    rows = []
    for name, row in drawn.items():
        shown = "".join(
            f'<figure><img alt="{escape(f"{name}, {caption}")}" src="{uri}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for caption, uri in row.items()
        )
        rows.append(f'<h4>{escape(name)}</h4><div class="pictures">{shown}</div>')
    return "".join(rows) + "".join(_note(note) for note in notes)


def table(runs: Sequence[Run], states: Sequence[STATES]) -> str:
    """A row for each class of the first run; of the others the class of the same id beside it."""
    columns, heads = [], []
    for run, kinds in zip(runs, states, strict=True):
        known = [kind for kind in KINDS if kind in kinds]
        texts = [[_cell(value, kind) for value in kinds[kind][-1][1]] for kind in known]
        lost = {int(row["id"]): most_lost(row) for row in run.errors if row["level"] == "category"}
        by_id = dict(zip(run.classes.ids, zip(*texts, strict=True), strict=True)) if texts else {}
        heads.append([*(KINDS[kind].short for kind in known), *(["lost mostly"] if lost else [])])
        columns.append({i: [*cells, *([lost.get(i, "-")] if lost else [])] for i, cells in by_id.items()})
    rows, facts = [], runs[0].classes
    for label in order(runs[0]):
        entries = zip(columns, heads, strict=True)
        cells = [c for column, head in entries for c in column.get(facts.ids[label], ["-"] * len(head))]
        group = facts.groups[label]
        rows.append(
            f'<tr><th>{escape(facts.names[label])}</th><td class="key {group}">{group}</td>'
            f"<td>{facts.counts[label]}</td>{''.join(_td(cell) for cell in cells)}</tr>"
        )
    above = "".join(
        f'<th colspan="{len(head)}">{escape(run.title)}</th>' for run, head in zip(runs, heads, strict=True)
    )
    above = f'<tr><th colspan="3"></th>{above}</tr>' if len(runs) > 1 else ""
    names = ["class", "group", "instances", *(name for head in heads for name in head)]
    buttons = "".join(f'<th><button type="button">{name}</button></th>' for name in names)
    return (
        '<p><input id="search" type="search" placeholder="name of a class, or r, c, f" aria-label="search classes"> '
        f'<output id="found" for="search">{len(rows)} classes</output></p>'
        f'<div class="wide tall"><table id="classes"><thead>{above}<tr>{buttons}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        + _note("The last state that is known. Instances are those of the training data; a click on a head sorts.")
    )


def _td(text: str) -> str:
    shown = escape(text)
    return f"<td>{shown}</td>" if len(text) < 12 else f'<td class="long" title="{shown}">{shown}</td>'


def _cell(value: float | None, kind: str) -> str:
    """Three digits; percents from 10 on with one decimal, too; counts whole."""
    if value is None:
        return "-"
    value = 100 * value if KINDS[kind].percent else value
    if KINDS[kind].percent and value >= 10:
        return f"{value:.1f}"
    return f"{value:.0f}" if value % 1 == 0 else f"{value:.3g}"


def most_lost(row: Mapping[str, str]) -> str:
    """The cause that most objects of a class are lost to."""
    counts = {cause: int(row[cause] or 0) for cause in CAUSES if cause != "found"}
    cause = max(counts, key=lambda name: counts[name])
    what = f": {row['classified_as_what']}" if cause == "classified_as" and row["classified_as_what"] else ""
    return f"{counts[cause]} of {row['objects']} {CAUSES[cause]}{what}" if counts[cause] else "-"


def differences(runs: Sequence[Run]) -> str:
    """The options in which the runs differ."""
    flat = [{key: show(value) for key, value in dotted(run.config).items()} for run in runs]
    keys = [key for key in dict.fromkeys(key for options in flat for key in options) if key != "output"]
    differing = [key for key in keys if len({options.get(key, "-") for options in flat}) > 1]
    if not differing:
        return ""
    head = "".join(f"<th>{escape(run.title)}</th>" for run in runs)
    rows = "".join(
        f"<tr><th>{escape(key)}</th>{''.join(f'<td>{escape(o.get(key, chr(45)))}</td>' for o in flat)}</tr>"
        for key in differing
    )
    return f'<h3>Options that differ</h3><div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'


def origin(run: Run, _: int) -> str:
    """Config, data, commit, checkpoint, protocol."""
    started = [block for block in run.texts["env.txt"].split("\n\n") if block.strip()]
    told = ("method", "data", "model", "batch", "schedule")
    facts = {
        "run folder": str(run.folder),
        "state shown": f"iteration {run.last}",
        "evaluated": str(run.facts.get("results", "not yet")),
        "annotations": str(run.facts.get("annotations", "-")),
        "protocol": str(run.facts.get("rules", "-")),
    }
    texts = {
        "what it said at its start": "\n".join(
            dict.fromkeys(line for line in run.texts["log.txt"].splitlines() if line.split(":")[0] in told)
        ),
        "where it ran, the last time": started[-1] if started else "env.txt is not there",
        "config.yaml, all options": run.texts["config.yaml"],
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    blocks = "".join(
        f"<details{'' if 'config' in name else ' open'}><summary>{name}</summary><pre>{escape(text)}</pre></details>"
        for name, text in texts.items()
    )
    return f"<dl>{rows}</dl>{blocks}"
