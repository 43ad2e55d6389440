"""Report page: page.html filled with the contents of its sections; style, script, data and pictures are in the file.

So it opens by double click, offline, on a phone. Whatever comes from data or options is escaped by the template.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from loce.data.annotations.lvis import LVISAnnotations
from loce.engine.pictures import RULE, comparisons
from loce.evaluation.report import READING
from loce.report import panels
from loce.report.crops import Crops, confusion_examples, miss_examples
from loce.report.paired import COLUMNS, paired
from loce.report.reading import Run
from loce.report.states import GROUPS, KINDS, States, over_time
from loce.utils.classes import GROUP_RGB
from loce.utils.errors import UserError

HERE = Path(__file__).parent
QUALITY = 85  # of JPEG
Pictures = dict[str, dict[str, str]]  # image -> caption -> data URI


class Examples(NamedTuple):
    """What crops.py gives of a run, with data URIs in place of pictures."""

    confusions: Sequence[dict[str, Any]] = ()
    misses: Sequence[dict[str, Any]] = ()


def page(
    runs: Sequence[Run],
    pictures: Mapping[str, Mapping[str, str]],
    notes: Sequence[str],
    examples: Mapping[str, Examples] = MappingProxyType({}),
) -> str:
    """The report as HTML. pictures: image -> caption -> data URI; notes: on what could not be drawn; examples: of the
    runs by their titles."""
    states = [over_time(run) for run in runs]
    # Whatever is put into the template is escaped, but for what it calls safe: style, script and script_data.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    return environment.get_template("page.html").render(
        title=f"Equilibrium report: {', '.join(run.title for run in runs)}",
        runs=runs,
        colours=GROUP_RGB,
        subset=panels.subset,
        groups=GROUPS,
        style=style,
        script=script,
        data=script_data(runs, states),
        percent=panels.percent,
        metrics=panels.METRICS,
        results=[row for run in runs for row in panels.results(run, not panels.regrouped(runs))],
        regrouped=panels.regrouped(runs),
        paired=paired(runs),
        paired_columns=COLUMNS,
        rules=list(dict.fromkeys(str(run.facts["rules"]) for run in runs if "rules" in run.facts)),
        without_ebl=[run.title for run in runs if run.option("head", "name") != "equilibrium"],
        without_memory=[run.title for run in runs if not run.option("memory", "enabled")],
        over_time=any(len(found) > 1 for kinds in states for found in kinds.values()),
        kinds={name: kind for name, kind in KINDS.items() if any(name in kinds for kinds in states)},
        curves=panels.shown_curves(runs),
        accuracy={
            run.title + panels.subset(run): cells
            for run in runs
            if (cells := panels.accuracy(run, not panels.regrouped(runs)))
        },
        confusions=[panels.confusion_matrix(run) for run in runs],
        examples=[examples.get(run.title, Examples()) for run in runs],
        causes=[panels.causes(run) for run in runs],
        calibration=[panels.calibration(run) for run in runs],
        reading=READING,
        pictures=pictures,
        notes=notes,
        classes=panels.class_table(runs, states),
        options=panels.differences(runs),
        origins=[panels.origin(run) for run in runs],
    )


def script_data(runs: Sequence[Run], states: Sequence[States]) -> str:
    """JSON for script.js. No `<` in it, so that no name of a class ends the element."""
    entries = []
    for run, found in zip(runs, states, strict=True):
        places = run.classes.order
        entries.append(
            {
                "title": run.title,
                "last": run.last,
                "memory": bool(run.option("memory", "enabled")),
                "names": [run.classes.names[label] for label in places],
                "groups": [run.classes.groups[label] for label in places],
                "counts": [run.classes.counts[label] for label in places],
                "states": {
                    kind: [[at, [panels.short(values[label]) for label in places]] for at, values in entries_of_kind]
                    for kind, entries_of_kind in found.items()
                },
                "curves": {name: panels.curve(run, name) for name in panels.CURVES},
            }
        )
    kinds = {name: {"title": kind.title, "percent": kind.percent} for name, kind in KINDS.items()}
    data = {"groups": GROUPS, "kinds": kinds, "runs": entries}
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def predictions(runs: Sequence[Run], count: int) -> tuple[Pictures, list[str], dict[str, Examples]]:
    """At most `count` validation images with what they hold and what each run found, those with rare classes first.

    And notes on what is not drawn and why; and crops of single objects, by the titles of the runs.
    """
    if not count:
        return {}, [], {}
    # Runs with stored detections, on the same data as the first of them.
    able = [run for run in runs if any((run.folder / "eval/detections").glob("*.npz"))]
    notes = [f"{run.title}: no stored detections (eval/detections)" for run in runs if run not in able]
    if not able:
        return {}, notes, {}
    first = able[0]
    path, images = str(first.facts.get("annotations")), str(first.option("data", "val_images"))
    same = [run for run in able if run.facts.get("annotations") == path]
    notes += [f"{run.title}: was evaluated on other data" for run in able if run not in same]
    try:
        masks, box_masks = first.option("model", "masks", True), first.option("data", "without_mask") == "box"
        annotations = LVISAnnotations.open(path, keep_empty=True, box_masks=box_masks, masks=masks)
        found = {run.title: run.folder / "eval" for run in same}
        classes = dict(zip(first.classes.ids, zip(first.classes.names, first.classes.groups, strict=True), strict=True))
        drawn = comparisons(annotations, images, found, classes, count)
        pictures = {name: {k: _data_uri(picture) for k, picture in row.items()} for name, row in drawn}
        crops = Crops(annotations, images)
        return pictures, [*notes, RULE], {run.title: _examples(run, crops) for run in same}
    except UserError as error:
        here = "paths are relative to where the runs were started: start the report there, too"
        return {}, [*notes, f"Not drawn: {error} ({here})"], {}


def _examples(run: Run, crops: Crops) -> Examples:
    confused = [] if run.boxes is None else confusion_examples(run, run.boxes, crops)
    for one in confused:
        one["drawn"] = [(_data_uri(picture), caption) for picture, caption in one["drawn"]]
    missed = [{**one, "drawn": _data_uri(one["drawn"])} for one in miss_examples(run, crops)]
    return Examples(confused, missed)


def _data_uri(picture: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
