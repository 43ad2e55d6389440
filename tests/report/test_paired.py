"""Paired differences on the report's page: the numbers of scripts/compare.py, its refusals, and where 0 is left out."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loce.evaluation.bootstrap import load_tallies
from loce.evaluation.comparison import compare
from loce.report.page import page
from loce.report.paired import COLUMNS, cell, paired
from loce.report.reading import Run, read_run
from tests.evaluation.test_true_boxes import classified, evaluated, many_images
from tests.report.test_report import Page, write_run


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., Run]:
    """A run folder with an evaluation that loses every `lost`th object of so many images, of a classifier that is right
    so often; group: of its first class."""

    def made(name: str, lost: int, right: float, images: int = 30, group: str = "f") -> Run:
        case = many_images(images)
        case["categories"][0]["frequency"] = group
        folder = write_run(tmp_path / name, evaluated=False)
        evaluated(folder / "eval", case, classified(case, 1, right), lost=lost)
        return read_run(folder)

    return made


def test_the_page_has_the_differences_of_compare(run_of: Callable[..., Run]) -> None:
    runs = [run_of("plain", 2, 0.2), run_of("<ours>", 9, 0.9)]
    found = paired(runs, 1000)
    assert not found.notes and [row["run"] for row in found.aps + found.accuracies] == ["<ours>"] * 2
    tallies = [load_tallies(run.folder / "eval/tallies_bbox.npz") for run in runs]
    rows = compare(tallies[0], tallies[1], 1000)
    assert found.aps[0]["of"] == "box, lvis"
    assert found.aps[0]["cells"][:4] == [cell(rows[name]) for name in COLUMNS[:4]]
    halves = [json.loads((run.folder / "eval/metrics.json").read_text())["bbox"]["AP50"] for run in runs]
    assert found.aps[0]["cells"][4][0].startswith(f"{100 * (halves[1] - halves[0]):+.1f} [")
    text = page(runs, {}, [])
    assert [row[2:] for row in Page(text).rows if row[:2] == ["<ours>", "box, lvis"]] == [
        [words for words, _ in found.aps[0]["cells"]]
    ]
    accuracy, sure = found.accuracies[0]["cells"][0]
    assert sure and f"<td><b>{accuracy}</b></td>" in text and "Differences to plain" in text
    assert "Differences to" not in page(runs[:1], {}, [])


def test_what_does_not_compare_is_said(run_of: Callable[..., Run]) -> None:
    first = run_of("first", 2, 0.5)
    moved, other = run_of("moved", 2, 0.5, group="r"), run_of("other", 2, 0.5, images=5)
    bare = read_run(write_run(first.folder.parent / "bare"))
    found = paired([first, moved, other, bare], 20)
    assert [row["run"] for row in found.aps] == ["moved"] and [row["run"] for row in found.accuracies] == ["moved"]
    for row in found.aps + found.accuracies:  # all, and none of a group
        shown = [words != "-" for words, _ in row["cells"]]
        assert shown[0] and not any(shown[1:4])
    groups, images, nothing = found.notes
    assert groups.startswith("moved: 1 of ") and "are left out" in groups
    assert images.startswith("other: not compared: the two evaluations differ in image ids")
    assert nothing.startswith("bare: not compared: ") and "holds no tallies" in nothing
    assert images in page([first, other], {}, []).replace("&#39;", "'")


def test_a_cell_is_in_percentage_points() -> None:
    row = {"first": 0.2, "second": 0.25, "difference": 0.05, "low": 0.01, "high": 0.0912, "better": 0.99}
    assert cell(row) == ("+5.0 [+1.0, +9.1]", True) and cell(row | {"low": -0.01}) == ("+5.0 [-1.0, +9.1]", False)
    assert cell(row | {"low": np.nan, "high": np.nan}) == ("+5.0", False)
    assert cell(row | {"difference": np.nan}) == cell({}) == ("-", False)
