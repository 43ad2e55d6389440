"""Pictures: which numbers they show, and that they are made where data are missing."""

import csv
import math
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

from loce.report import figures as plots
from loce.report.figures import class_values, equilibrium_figure, group_means
from loce.utils.errors import UserError

SCORES: list[tuple] = [  # id, group, training_instances, boxes, mean_score, accuracy
    (7, "r", 3, 2, 0.1, 0.0),
    (3, "f", 900, 9, 0.8, 0.9),
    (20, "c", 40, 0, "", ""),  # no boxes in the validation data
    (1, "f", 500, 4, 0.6, 0.7),
    (5, "r", 1, 1, 0.0, 0.0),  # has one, and is never found
    (9, "c", 30, 3, 0.5, 0.6),
]
AP = {7: "0.2", 3: "0.5", 20: "", 1: "-1", 5: "0", 9: "0.3"}


def write_table(path: Path, header: list[str], rows: list[tuple]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def write_evaluation(tmp_path):
    """A folder with the two tables of an evaluation."""

    def write(name: str, scores: list[tuple] = SCORES, ap: dict[int, str] = AP) -> Path:
        columns = ["id", "group", "training_instances", "boxes", "mean_score", "accuracy"]
        write_table(tmp_path / name / "mean_scores.csv", columns, scores)
        facts = {row[0]: (row[1], row[3]) for row in scores}
        table = [(number, *facts[number], value) for number, value in ap.items()]
        write_table(tmp_path / name / "per_category.csv", ["id", "frequency", "instances", "AP"], table)
        return tmp_path / name

    return write


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, still open after they were written."""
    drawn, save = [], plots.save_figure

    def keep(figure, output):
        drawn.append(figure)
        save(figure, output)

    monkeypatch.setattr(plots, "save_figure", keep)
    return drawn


def written(path: Path) -> bool:
    return cv2.imread(str(path)) is not None and [p.name for p in path.parent.glob(".*")] == []


def test_classes_without_objects_have_no_value(write_evaluation):
    values, groups, counts, names = class_values(write_evaluation("run"))
    np.testing.assert_array_equal(values["score"], [0.8, 0.6, math.nan, 0.5, 0.1, 0.0])  # most training instances first
    np.testing.assert_array_equal(values["accuracy"], [0.9, 0.7, math.nan, 0.6, 0.0, 0.0])
    np.testing.assert_array_equal(values["ap"], [0.5, math.nan, math.nan, 0.3, 0.2, 0.0])
    assert "".join(groups) == "ffccrr" and counts is not None and counts.tolist() == [900, 500, 40, 30, 3, 1]
    assert names == ["3", "1", "20", "9", "7", "5"]  # the ids, where a table of another program has no names


def test_results_of_another_program_have_ap_only(write_evaluation, tmp_path, figures):
    folder = write_evaluation("run")
    (folder / "mean_scores.csv").unlink()
    values, groups, counts, names = class_values(folder)
    np.testing.assert_array_equal(values["ap"], [0.5, math.nan, 0.3, math.nan, 0.2, 0.0])  # most objects first
    assert list(values) == ["ap"] and "".join(groups) == "ffccrr" and counts is None and len(names) == 6
    equilibrium_figure({"a": folder}, tmp_path / "figure.pdf", ["ap"])
    assert (tmp_path / "figure.pdf").read_bytes()[:4] == b"%PDF"
    assert [bar.get_height() for bar in figures[0].axes[0].patches][:1] == [0.5] and len(figures[0].axes) == 1


def test_means_are_over_classes_with_a_value(write_evaluation):
    values, groups, *_ = class_values(write_evaluation("run"))
    assert group_means(values["score"], groups) == pytest.approx({"f": 0.7, "c": 0.5, "r": 0.05})
    assert group_means(values["ap"], groups) == pytest.approx({"f": 0.5, "c": 0.3, "r": 0.1})
    assert group_means(np.array([math.nan, 1.0]), np.array(["r", "f"])) == {"f": 1.0}


def test_the_figure_shows_these_numbers(write_evaluation, tmp_path, figures):
    equilibrium_figure({"a": write_evaluation("a"), "b": write_evaluation("b")}, tmp_path / "out/figure.png")
    assert written(tmp_path / "out/figure.png")
    panels = figures[0].axes
    assert [panel.get_title() for panel in panels] == ["a", "b", "", ""]
    assert [tick.get_text() for tick in panels[2].get_xticklabels()][:2] == ["3 (900)", "1 (500)"]
    heights = [bar.get_height() for bar in panels[0].patches]
    np.testing.assert_array_equal(heights, [0.8, 0.6, math.nan, 0.5, 0.1, 0.0])  # the gap keeps its place
    assert sorted(text.get_text().strip() for text in panels[0].texts) == ["0.05", "0.50", "0.70"]
    assert sorted(text.get_text().strip() for text in panels[2].texts) == ["0.10", "0.30", "0.50"]
    assert panels[0].get_ylim() == pytest.approx((0, 0.88)) and panels[2].get_ylim() == pytest.approx((0, 0.55))


def test_an_evaluation_without_any_value(write_evaluation, tmp_path, figures):
    """Beside one that has some, on the same axis; and alone."""
    nothing = write_evaluation("none", [(*row[:3], 0, 0.0, 0.0) for row in SCORES], dict.fromkeys(AP, ""))
    for name, runs in {"both": {"a": nothing, "b": write_evaluation("b")}, "alone": {"a": nothing}}.items():
        equilibrium_figure(runs, tmp_path / f"{name}.png")
        assert written(tmp_path / f"{name}.png")
    assert figures[0].axes[0].get_ylim() == pytest.approx((0, 0.88))
    assert figures[1].axes[0].get_ylim() == pytest.approx((0, 1)) and not figures[1].axes[0].texts


def test_groups_of_different_classes_do_not_stand_beside_each_other(tmp_path, write_evaluation):
    other = [(number, {"r": "c"}.get(group, group), *rest) for number, group, *rest in SCORES]
    runs = {"a": write_evaluation("a"), "b": write_evaluation("b", other)}
    with pytest.raises(UserError, match=r"b: puts categories into other groups than a \(ids 7, 5\).* figures of their"):
        equilibrium_figure(runs, tmp_path / "figure.png")
