"""The report: numbers on the page are those in the files; what is missing is said; no name of a class gets out."""

import csv
import html
import importlib
import json
import math
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from loce.config import Config, UserError, dump
from loce.data.annotations.lvis import LVISAnnotations
from loce.engine.drawing import CROP, crop_object
from loce.evaluation.lost_objects import CAUSES
from loce.evaluation.report import READING
from loce.evaluation.true_boxes import TrueBoxes
from loce.report.crops import Crops, confusion_examples, miss_examples
from loce.report.page import Examples, page
from loce.report.panels import POINTS, accuracy, confusion_matrix, curve, most_lost
from loce.report.reading import ClassFacts, Run, Snapshot, read_run
from loce.report.states import draws, margins, over_time
from loce.utils.classes import GROUP_RGB

NAMES = ["</script><b>evil</b>", 'cup & "saucer" <x>', "it's"]
COUNTS, GROUPS, IDS = [3, 900, 40], ["r", "f", "c"], [7, 3, 20]
SCORES, MEMORY = [0.02, 0.8, 0.1], [10, 80, 0]


class Page(HTMLParser):
    """Ids, links and tags; cells of all tables by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.tags[tag] += 1
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[key] for key in ("src", "href") if key in values]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[-1][-1] += data


def write_run(folder: Path, evaluated: bool = True, lines: int = 2) -> Path:
    """A run folder with three classes, the last without objects in the validation data."""
    (folder / "eval").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(Config()))
    (folder / "env.txt").write_text("code: loce 0.1.0, commit abcdef\n\n")
    columns = ["id", "name", "group", "training_instances", "boxes", "mean_score", "accuracy"]
    rows = [*zip(IDS, NAMES, GROUPS, COUNTS, (2, 9, 0), (0.05, 0.7, 0), (0.5, 1, 0), strict=True)]
    with (folder / "eval/mean_scores.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    with (folder / "equilibrium.jsonl").open("w") as file:
        for number in range(1, lines + 1):
            scores = [s * number / lines for s in SCORES]
            file.write(json.dumps({"iteration": 10 * number, "mean_score": scores, "memory": MEMORY}) + "\n")
        file.write('{"iteration": 99, "me')  # the run goes on
    if evaluated:
        write_evaluation(folder)
    return folder


def write_evaluation(folder: Path) -> None:
    """Results of the end and of epoch 1."""
    for name, rare in (("eval_epoch_01", 0.0625), ("eval", 0.125)):
        (folder / name).mkdir(exist_ok=True)
        table = f"id,name,frequency,AP\n7,a,r,{rare}\n3,b,f,0.5\n20,c,c,-1\n"
        (folder / name / "per_category.csv").write_text(table)
    (folder / "eval/metrics.json").write_text(json.dumps({"segm": {"AP": 0.3125, "APr": 0.125, "APl": -1}}))
    facts = {"rules": "lvis <300>", "results": "weights 1234", "intervals": {"segm": {"AP": [0.25, 0.375]}}}
    (folder / "eval/evaluation.json").write_text(json.dumps(facts))
    causes = "found,outscored,taken,cut_by_cap,removed_by_nms,classified_as,badly_localised,score_too_low,no_proposal"
    values = "5,0,0,0,,7,0,0,0,,,0.25"
    (folder / "eval/errors.csv").write_text(
        f"level,id,name,frequency,objects,{causes},no_detection,back_outscored,back_classified_as,classified_as_what\n"
        f"group,,rare,r,12,{values},\ncategory,7,a,r,12,{values},<x> (7)\n"
    )
    (folder / "metrics.jsonl").write_text(
        '{"iteration": 5, "epoch": 0.5, "loss": 2.5, "loss_cls": null, "mean_score/r": 0.02}\n'
        '{"iteration": 10, "epoch": 1.0, "eval/segm_APr": 0.0625}\n'
        '{"iteration": 20, "epoch": 2.0, "loss": 1.5, "loss_cls": 1.0, "mean_score/r": 0.04}\n'
    )


def embedded(text: str) -> Any:
    """What the page's script gets."""
    return json.loads(re.findall(r'id="data">(.*?)</script>', text)[0])


def cells(text: str, name: str) -> list[str]:
    return next(row for row in Page(text).rows if row and row[0] == name)


def test_numbers_of_the_class_table(tmp_path: Path) -> None:
    text = page([read_run(write_run(tmp_path / "run"))], {}, [])
    assert cells(text, "class")[3:] == [
        *("mean score", "p(draw) %", "margin", "stored", "AP %", "val score", "accuracy %", "lost mostly")
    ]
    weights = [1 / (s + 1e-7) if n else 0 for s, n in zip(SCORES, MEMORY, strict=True)]
    for label, name in enumerate(NAMES):
        rival = max(s for other, s in enumerate(SCORES) if other != label)
        found = cells(text, name)
        assert found[1:3] == [GROUPS[label], str(COUNTS[label])]
        expected = [SCORES[label], 100 * weights[label] / sum(weights), math.log(rival / SCORES[label])]
        assert [float(cell) for cell in found[3:6]] == pytest.approx(expected, rel=5e-3)
        assert (
            found[6:10]
            == [
                ["10", "12.5", "0.05", "50.0"],
                ["80", "50.0", "0.7", "100.0"],
                ["0", "-", "-", "-"],
            ][label]
        )
    assert cells(text, NAMES[0])[10] == "7 of 12 localised, but as another category: <x> (7)"
    rows = [row[0] for row in Page(text).rows if row and row[0] in NAMES]
    assert rows == [NAMES[1], NAMES[2], NAMES[0]]  # most training instances first


def test_charts_get_the_numbers_of_every_snapshot(tmp_path: Path) -> None:
    text = page([read_run(write_run(tmp_path / "run"))], {}, [])
    entry = embedded(text)["runs"][0]
    assert entry["names"] == [NAMES[1], NAMES[2], NAMES[0]] and entry["counts"] == [900, 40, 3]
    assert entry["states"]["score"] == [[10, [0.4, 0.05, 0.01]], [20, [0.8, 0.1, 0.02]]]
    assert entry["states"]["memory"][1] == [20, [80, 0, 10]]
    assert entry["states"]["ap"] == [[10, [0.5, None, 0.0625]], [20, [0.5, None, 0.125]]]
    assert entry["states"]["tested"] == [[20, [0.7, None, 0.05]]]
    assert entry["curves"]["losses"] == {"at": [5, 20], "series": {"loss": [2.5, 1.5], "loss_cls": [None, 1.0]}}
    assert entry["curves"]["scores"]["series"] == {"rare": [0.02, 0.04]}
    assert entry["curves"]["aps"] == {"at": [10, 20], "series": {"all": [None, 0.3125], "rare": [0.0625, 0.125]}}
    assert 'id="time"' in text


def test_long_curves_are_averaged(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    lines = [json.dumps({"iteration": i, "loss": float(i)}) for i in range(1, 3 * POINTS - 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    curve = embedded(page([read_run(folder)], {}, []))["runs"][0]["curves"]["losses"]
    assert len(curve["at"]) == POINTS and curve["at"][:2] == [3, 6] and curve["series"]["loss"][:2] == [2.0, 5.0]


def test_results_causes_and_origin(tmp_path: Path) -> None:
    text = page([read_run(write_run(tmp_path / "run"))], {}, [])
    results = next(row for row in Page(text).rows if row[:2] == ["run", "mask"])
    assert results[2:] == ["31.2 [25.0, 37.5]", "12.5", "-", "-", "-", "-"]
    assert cells(text, "localised, but as another category")[1:] == ["7 +25.0"]
    assert "rare: 7 of 12 localised, but as another category (58.3%)" in text
    for what in ("lvis &lt;300&gt;", "weights 1234", "commit abcdef", "momentum: 0.9"):
        assert what in text
    assert most_lost({"objects": "3", "found": "3", **dict.fromkeys(list(CAUSES)[1:], "0")}) == "-"


def test_calibration_of_the_groups(tmp_path: Path) -> None:
    """Of groups with detections: errors, Eq. 2's mean score beside them, a point for each bin that has detections."""
    folder = write_run(tmp_path / "run")
    assert "calibration.csv is not there" not in page([read_run(folder)], {}, [])  # a run of before: no such part
    (folder / "eval/calibration.csv").write_text(
        "group,from,to,detections,mean_score,precision,of\n"
        "r,0,0.05,8,0.02,0.25,segm\nr,0.05,0.1,0,,,segm\nf,0.9,0.95,4,0.92,0.5,segm\n"
    )
    (folder / "eval/metrics.json").write_text(json.dumps({"segm": {"AP": 0.5, "ECEr": 0.125, "MCEr": -1}}))
    text = page([read_run(folder)], {}, [])
    assert cells(text, "rare") == ["rare", "12.5", "-", "5.0", "2.0"]
    assert cells(text, "frequent") == ["frequent", "-", "-", "70.0", "80.0"]
    assert '<path class="line r" d="M4.0 150.0"/>' in text and "rare: 8 detections of mean score 0.020" in text
    assert READING in html.unescape(text)


def test_undefined_numbers_are_not_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 25, "epoch": 2.5, "eval/segm_APr": -1.0, "eval/segm_AP": 0.25}\n')
    assert curve(read_run(folder), "aps")["series"]["rare"] == [0.0625, None, 0.125]


def test_groups_of_other_classes_are_not_shown_beside_each_other(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name)) for name in ("one", "two")]
    assert "other groups than" not in page(runs, {}, [])
    runs[1].classes.groups[0] = "c"
    text = page(runs, {}, [])
    assert "two (1 classes) put classes into other groups than one" in text
    assert [row[2:4] for row in Page(text).rows if row[1:2] == ["mask"]] == [["31.2 [25.0, 37.5]", "-"]] * 2


def test_evaluations_that_the_script_left_in_the_run(tmp_path: Path) -> None:
    """Not those between epochs, which are curves."""
    folder = write_run(tmp_path / "run")
    (folder / "eval_epoch_01/metrics.json").write_text('{"segm": {"AP": 0.5}}')
    (folder / "eval_test").mkdir()
    (folder / "eval_test/metrics.json").write_text('{"bbox": {"AP": 0.25}}')
    (folder / "eval_test/evaluation.json").write_text('{"annotations": "mine/test.json", "protocol": "coco"}')
    rows = Page(page([read_run(folder)], {}, [])).rows
    found = [row[:3] for row in rows if len(row) > 1 and row[1] in ("mask", "box")]
    beside = ["run, eval_test: mine/test.json, coco", "box", "25.0"]
    assert found == [["run", "mask", "31.2 [25.0, 37.5]"], beside]


def test_classes_that_training_does_not_have_are_drawn_as_nothing() -> None:
    """They can never be drawn from a memory, and a score that only fell says nothing of the others."""
    facts = ClassFacts([*IDS, 9], [*NAMES, "none"], [*GROUPS, "r"], [*COUNTS, 0])
    snapshot = Snapshot(1, [*SCORES, 1e-4], None)
    found = over_time(Run(Path("x"), "x", {}, facts, [snapshot]))
    assert set(found) == {"score", "draw", "margin"} and all(values[0][1][3] is None for values in found.values())
    assert sum(v for v in found["draw"][0][1] if v) == pytest.approx(1)


def test_several_runs_beside_each_other(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, lines=lines) for name, lines in (("a", 2), ("b", 3), ("c", 1))]
    config = (folders[1] / "config.yaml").read_text()
    (folders[1] / "config.yaml").write_text(config.replace("seed: 0", "seed: 5"))
    text = page([read_run(folder) for folder in folders], {"<i>": {"truth": "data:image/png;base64,AA=="}}, ["a & b"])
    assert len(cells(text, NAMES[0])) == 3 + 8 * 3
    assert [len(entry["states"]["score"]) for entry in embedded(text)["runs"]] == [2, 3, 1]
    assert cells(text, "seed") == ["seed", "0", "5", "0"]
    assert "a &amp; b" in text and 'alt="&lt;i&gt;, truth"' in text and Page(text).tags["img"] == 1


def test_nothing_of_the_data_becomes_markup_and_nothing_is_fetched(tmp_path: Path) -> None:
    text = page([read_run(write_run(tmp_path / "<b>run"))], {}, [])
    found = Page(text)
    assert found.tags["x"] == 0 and "<b>evil" not in text and "<b>run" not in text and found.tags["script"] == 2
    assert len(set(found.ids)) == len(found.ids)
    assert all(link.startswith("data:") or link[1:] in found.ids for link in found.links)
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp", text)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    text = page([read_run(write_run(tmp_path / "run", evaluated=False, lines=1))], {}, [])
    for what in ("eval/per_category.csv", "eval/metrics.json", "eval/errors.csv", "metrics.jsonl"):
        assert f"<li>run: {what}: " in text
    assert "No evaluation yet." in text and 'id="time"' not in text
    with pytest.raises(UserError, match="is no folder of a run"):
        read_run(tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.yaml").write_text(dump(Config()))
    with pytest.raises(UserError, match="its classes are not known"):
        read_run(tmp_path / "new")


def test_counts_in_the_place_of_scores() -> None:
    config = {"indicator": {"kind": "prior"}}
    snapshot = Snapshot(1, [0.5, 0.5, 0.5], None)
    found = Run(Path("x"), "x", config, ClassFacts(IDS, NAMES, GROUPS, COUNTS), [snapshot])
    assert margins(found, snapshot) == pytest.approx([math.log(900 / 3), math.log(40 / 900), math.log(900 / 40)])
    assert draws(found, snapshot) == pytest.approx([1 / n / sum(1 / m for m in COUNTS) for n in COUNTS], rel=1e-6)
    assert list(over_time(found)) == ["score", "draw", "margin"]


def call(monkeypatch: pytest.MonkeyPatch, script: str, *words: str | Path) -> None:
    """A script's `main` with a command line; in this process, since torch takes seconds to import."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    importlib.import_module(f"scripts.{script}").main()


def test_report_of_a_run_and_of_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data are not there, which the page says."""
    folder = write_run(tmp_path / "runs/one")
    (folder / "eval/detections").mkdir()
    (folder / "eval/detections/detections_0000_000000.npz").touch()
    call(monkeypatch, "report", folder)
    text = (folder / "report.html").read_text()
    assert cells(text, NAMES[1])[3] == "0.8" and "Not drawn: " in text
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run with a checkpoint below runs/"):
        call(monkeypatch, "report")
    (folder / "checkpoints/000000020").mkdir(parents=True)
    (folder / "checkpoints/000000020/main.pt").touch()
    (folder / "overfit/checkpoints/000000020").mkdir(parents=True)  # a later trial in the run folder
    (folder / "overfit/checkpoints/000000020/main.pt").touch()
    call(monkeypatch, "report", "output=out.html", "pictures=0")
    assert cells(Path("out.html").read_text(), NAMES[0]) == cells(text, NAMES[0])


def test_figures_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, "figures", write_run(tmp_path / "run"), f"output={tmp_path / 'figures'}")
    written = {path.name: path.read_bytes()[:4] for path in (tmp_path / "figures").iterdir()}
    assert written == {f"figure{n}.{s}": head for n in (1, 4) for s, head in (("png", b"\x89PNG"), ("pdf", b"%PDF"))}
    with pytest.raises(UserError, match="not evaluated"):
        call(monkeypatch, "figures", tmp_path / "nothing")


def test_accuracy_confusions_and_misses(tmp_path: Path) -> None:
    """Of true boxes: two of class 7, one taken for 3; nine of class 3, all right."""
    folder = write_run(tmp_path / "run")
    assert "eval/true_boxes.npz is not there" in page([read_run(folder)], {}, [])
    own = np.array([7, 7, *[3] * 9])
    best, scores = np.where(np.arange(11) == 1, 3, own), np.linspace(0.5, 0.9, 11, dtype=np.float32)
    ids = {"image_ids": np.full(11, 1), "annotation_ids": np.arange(11), "category_ids": own, "best_ids": best}
    boxes = TrueBoxes(**ids, scores=np.where(best == own, scores, 0.25).astype(np.float32), best_scores=scores)
    boxes.save(folder / "eval/true_boxes.npz")
    numbers = {"segm": {"AP": 0.5}, "true_boxes": {"accuracy": 0.75, "accuracy_r": 0.5, "accuracy_c": -1}}
    (folder / "eval/metrics.json").write_text(json.dumps(numbers))
    spans = {"intervals": {"true_boxes": {"accuracy": [0.5, 1.0]}}}
    (folder / "eval/evaluation.json").write_text(json.dumps(spans))
    (folder / "eval/misses.csv").write_text(
        "image_id,annotation_id,id,name,frequency,area_share,cause,taken_for,own_score,best,best_score\n"
        "1,5,3,b,f,0.5,no_proposal,,0.2,b,0.2\n1,0,7,a,r,0.1,classified_as,<x>,0.2,<y>,0.4\n"
    )
    run = read_run(folder)
    assert accuracy(run)[:2] == [(0.75, 0.5, 1.0), (0.5, None, None)] and accuracy(run, groups=False)[1][0] is None
    assert confusion_matrix(run) == {
        "heads": [NAMES[0], NAMES[1], "any other"],
        "rows": [
            {"name": NAMES[0], "group": "r", "boxes": 2, "cells": [(1, 0.5), (1, 0.5), (0, 0)]},
            {"name": NAMES[1], "group": "f", "boxes": 9, "cells": [(0, 0), (9, 1), (0, 0)]},
        ],
    }

    class Drawn(Crops):
        def __init__(self) -> None: ...

        def of(self, annotation_id: int, group: str) -> Any:
            return annotation_id, group

    (one,) = confusion_examples(run, boxes, Drawn())
    assert one["title"] == f"{NAMES[0]} taken for {NAMES[1]}" and one["share"] == "1 of 2 boxes"
    assert one["drawn"] == [((1, "r"), "0.54, own 0.25"), ((10, "f"), "0.90, right")]
    first, second = miss_examples(run, Drawn())  # fewest training instances first
    assert first["drawn"] == (0, "r") and second["drawn"] == (5, "f")
    assert first["what"] == ("localised, but as another category: <x>; classifier at the true box: own 0.2, <y> 0.4")
    uri = "data:,"
    missed = [{**first, "drawn": uri}]
    text = page([run], {}, [], {"run": Examples([{**one, "drawn": [(uri, "0.54, own 0.25")]}], missed)})
    assert ["run", "all", "rare", "common", "frequent"] in Page(text).rows
    assert [row for row in Page(text).rows if row[:2] == ["run", "75.0 [50.0, 100.0]"]] == [
        ["run", "75.0 [50.0, 100.0]", "50.0", "-"]
    ]
    assert 'style="--share:50%"' in text and "&lt;y&gt; 0.4" in text and "<y>" not in text


def test_a_crop_of_an_object_at_the_border() -> None:
    image = np.full((40, 60, 3), 200, np.uint8)
    mask = np.zeros((40, 60), np.uint8, order="F")
    mask[0:20, 0:10] = 1
    box = np.array([0.0, 0.0, 10.0, 20.0])
    for code in (coco_mask.encode(mask), None):
        drawn = crop_object(image, box, code, "r")
        assert drawn.shape == (CROP, CROP, 3)
        assert (drawn[0, 0] == 128).all() and (drawn[-1, -1] == 200).all()  # grey beyond the image
        assert (drawn == GROUP_RGB["r"]).all(axis=2).sum() > 100


@pytest.mark.parametrize("masks", [True, False])
def test_crops_of_a_data_set(glyphs: Path, masks: bool) -> None:
    annotations = LVISAnnotations.open(glyphs / "annotations/val.json", masks=masks)
    crops = Crops(annotations, str(glyphs))
    for number in annotations.annotation_ids[:3].tolist():
        drawn = crops.of(number, "c")
        assert drawn.shape == (CROP, CROP, 3) and (drawn == GROUP_RGB["c"]).all(axis=2).sum() > 50
