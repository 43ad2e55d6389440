"""scripts/tables.py on a tiny Glyph-LVIS: rows are trained once and printed beside the paper's; mistakes come first."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loce.data.glyphs.make import GlyphOptions, make_glyphs
from tests.tiny_runs import CONFIG

ROOT = Path(__file__).resolve().parents[2]
STAGE1 = CONFIG.format("glyphs").replace("epochs: 2, drops: [1]", "epochs: 1, drops: []")
LOCE = STAGE1.replace("train: {", "head: {name: equilibrium}\ntrain: {init: runs/tiny/stage1, freeze: trunk, ")
ROWS = """
recipes:
  glyphs:
    stages: [tiny/stage1.yaml]
    named: {baseline: tiny/stage1.yaml}
    methods: tiny
    note: small
table1:
  title: the last row cannot be trained
  rows:
    - {name: EBL, recipe: loce, paper: [24.0, 23.8, 8.3, 23.7, 30.7]}
    - {name: MFS, recipe: loce, words: [head.name=softmax, memory.enabled=true], paper: [26, 25.7, -1, 25, 29.8]}
    - {name: broken, recipe: loce, words: [data.train_images=nowhere], paper: [1, 2, 3, 4, 5]}
table2:
  title: the same rows again
  rows:
    - {name: one, recipe: loce, paper: [24.0, 23.8, 8.3, 23.7, 30.7]}
    - {name: two, recipe: loce, words: [head.name=softmax, memory.enabled=true], paper: [26, 25.7, -1, 25, 29.8]}
table3:
  title: mistakes
  rows:
    - {name: key, recipe: loce, words: [memory.enbled=true], paper: [1, 2, 3, 4, 5]}
    - {name: numbers, recipe: loce, paper: [1, 2]}
    - {name: recipe, recipe: sgd, paper: [1, 2, 3, 4, 5]}
table4:
  title: other options at test time
  rows:
    - {name: two detections, recipe: loce, post_hoc: [eval.detections=2], paper: [1, 2, 3, 4, 5]}
table6:
  title: processes of its own
  rows:
    - {name: two ranks, recipe: loce, processes: 2}
table7:
  title: other data
  data: [glyph1203, lvis]
  rows:
    - {name: EBL, recipe: loce}
table8:
  title: a row that starts from another
  rows:
    - {name: longer, recipe: stage1, words: [train.epochs=2]}
    - {name: from it, recipe: loce, start: longer}
table10:
  title: rows that share a pass
  rows:
    - {name: EBL, recipe: loce, words: [train.clip_norm=0]}
    - {name: MFS, recipe: loce, words: [head.name=softmax, memory.enabled=true, train.clip_norm=0]}
table11:
  title: of another table
  rows:
    - {name: EBL, recipe: loce, words: [train.clip_norm=0]}
    - {name: "alpha", recipe: loce, words: [indicator.momentum=0.8, train.clip_norm=0]}
    - {name: other, recipe: loce, words: [seed=3, train.clip_norm=0]}
table9:
  title: a row that starts from none
  rows:
    - {name: from it, recipe: loce, start: longer}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, two recipes and a file of tables."""
    folder = tmp_path_factory.mktemp("tables")
    sizes = {"classes": 4, "train_images": 8, "val_images": 4, "size": 64, "smallest": 0.26, "largest": 0.4}
    make_glyphs(GlyphOptions(out=str(folder / "glyphs"), workers=1, **sizes))
    (folder / "configs/tiny").mkdir(parents=True)
    (folder / "configs/tables.yaml").write_text(ROWS)
    (folder / "configs/tiny/stage1.yaml").write_text(STAGE1)
    (folder / "configs/tiny/loce.yaml").write_text(LOCE)
    return folder


def run(folder: Path, *words: str, code: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts/tables.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def first(workplace: Path) -> str:
    """What the first call prints; stage 1 and two rows are trained after it, the third has failed."""
    return run(workplace, "table=1", code=2)


def commands(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("$ ")]


def cells(workplace: Path, table: int) -> list[list[str]]:
    """The rows of a written table, without its head."""
    lines = (workplace / f"runs/tables/glyphs/table{table}.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]


def test_stage_1_and_every_row_are_trained_until_one_fails(workplace: Path, first: str) -> None:
    below = "runs/tables/glyphs/loce"
    changes = ("head.name=softmax", "memory.enabled=true"), ("data.train_images=nowhere",)
    assert commands(first) == [
        "$ python scripts/train.py tiny/stage1.yaml",
        "$ python scripts/finetune.py tiny/loce.yaml",
        *(f"$ python scripts/finetune.py tiny/loce.yaml {' '.join(c)} output={'+'.join((below, *c))}" for c in changes),
    ]
    assert "8 of 8 images are missing" in first and "Traceback" not in first
    rows = cells(workplace, 1)
    assert [row[0] for row in rows] == ["EBL", "MFS", "broken"]
    start = "runs/tiny/stage1 + 1 epochs, all but trunk"
    costs = [row[-2] for row in rows]
    assert all(re.fullmatch(r"\d+ images/s, \d+\.\d GiB", cost) for cost in costs[:2]) and costs[2] == "-"
    assert [row[-8:] for row in rows[:2]] == [
        ["24.0", "23.8", "8.3", "23.7", "30.7", start, costs[0], "runs/tiny/loce"],
        ["26.0", "25.7", "-", "25.0", "29.8", start, costs[1], "+".join((below, *changes[0]))],
    ]
    for row in rows[:2]:
        metrics = json.loads((workplace / row[-1] / "eval/metrics.json").read_text())
        values = [metrics["bbox"]["AP"], *(metrics["segm"][name] for name in ("AP", "APr", "APc", "APf"))]
        assert values[3:] == [-1, -1]  # the tiny set has rare classes only
        values[3:] = (metrics["true_boxes"][name] for name in ("accuracy", "accuracy_r"))
        shown = [f"{100 * value:.1f}" for value in values]
        assert row[1:8] == [*shown[:3], "-", "-", *shown[3:]]
    assert rows[2][1:6] == ["not run"] * 5


def test_runs_of_another_table_are_not_trained_again(workplace: Path, first: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in (workplace / "runs").rglob("*") if path.is_file()}
    text = run(workplace, "table=2")
    assert commands(text) == [] and text.count("finished before") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [row[1:] for row in cells(workplace, 2)] == [row[1:] for row in cells(workplace, 1)[:2]]
    written = (workplace / "runs/tables/glyphs/table2.md").read_text()
    assert written in text and written.startswith("**Table 2: the same rows again**\n")
    assert "data: glyphs/annotations/val.json, 4 images, 4 categories\n" in written
    assert "protocol: lvis" in written and "code: loce " in written
    assert "\nsmall\n" in written


def test_a_finished_row_leaves_a_record_that_stands_for_its_run(workplace: Path, first: str) -> None:
    file = workplace / "runs/tables/records/glyphs/seed0/loce.json"
    record = json.loads(file.read_text())
    metrics = json.loads((workplace / "runs/tiny/loce/eval/metrics.json").read_text())
    assert record["values"]["AP"] == 100 * metrics["segm"]["AP"]
    assert record["values"]["box AP"] == 100 * metrics["bbox"]["AP"]
    assert set(record["resamples"]) == {
        *("box AP", "AP", "APr", "ECE", "ECEr", "accuracy", "accuracy r")  # the tiny set has rare classes only
    }
    assert all(len(values) == 400 and min(values) >= 0 for values in record["resamples"].values())
    assert record["classes"]["group"] == ["r"] * 4 and len(record["classes"]["AP"]) == 4
    assert record["seed"] == 0 and record["minutes"] > 0 and record["command"].startswith("finetune.py tiny/loce.yaml")
    log = [json.loads(line) for line in (workplace / "runs/tiny/loce/metrics.jsonl").read_text().splitlines()]
    assert record["peak_memory_gib"] == round(max(line["peak_memory_gib"] for line in log), 2)
    speeds = [line["images_per_second"] for line in log]
    assert min(speeds) - 0.1 < record["images_per_second"] < max(speeds) + 0.1
    assert record["options"]["head.name"] == "equilibrium" and record["options"]["init"] == "stage1"
    elsewhere = workplace / "elsewhere/glyphs/seed0"
    shutil.copytree(file.parent, elsewhere)
    words = ("table=2", "runs=runs/other", "records=elsewhere")
    text = run(workplace, *words)
    assert commands(text) == [] and text.count("finished before") == 2
    words = (*words, "words=[data.workers=3]")  # another machine's number of workers makes no other numbers
    assert commands(run(workplace, *words)) == []
    changed = {**record, "options": {**record["options"], "train.lr": 7}}
    (elsewhere / "loce.json").write_text(json.dumps(changed))
    text = run(workplace, "table=2", "runs=runs/other", "records=elsewhere", code=2)
    assert "elsewhere/glyphs/seed0/loce.json: is of a run with another train.lr; delete it" in text


def test_a_finished_run_of_other_options_is_no_row(workplace: Path, first: str) -> None:
    shutil.copytree(workplace / "runs/tiny/loce", workplace / "runs/seed1/glyphs/loce")
    text = run(workplace, "table=2", "runs=runs/seed1", "words=[seed=1]", code=2)
    assert "runs/seed1/glyphs/loce: holds another run" in text and "seed: 0 there, 1 now" in text


def test_mistakes_in_rows_are_all_found_before_anything_starts(workplace: Path) -> None:
    text = run(workplace, "table=3", code=2)
    assert "row 1: command line: memory.enbled = true: unknown key; did you mean memory.enabled?" in text
    assert "row 2: " in text and "must be 5 numbers: box AP, AP, APr, APc, APf" in text
    assert "row 3: " in text and "CONFIG tiny/sgd.yaml not found" in text
    assert commands(text) == [] and "Traceback" not in text


@pytest.mark.slow
def test_seeds_train_stage_1_and_the_row_anew(workplace: Path, first: str) -> None:
    text = run(workplace, "table=2", "rows=[one]", "seeds=2")
    folder = "runs/tables/glyphs/seed1"
    assert commands(text) == [
        f"$ python scripts/train.py tiny/stage1.yaml seed=1 output={folder}/stage1",
        f"$ python scripts/finetune.py tiny/loce.yaml seed=1 train.init={folder}/stage1 output={folder}/loce",
    ]
    values = [
        100 * json.loads((workplace / path / "eval/metrics.json").read_text())["segm"]["AP"]
        for path in ("runs/tiny/loce", f"{folder}/loce")
    ]
    low, high = sorted(values)
    assert cells(workplace, 2)[0][2] == f"{(low + high) / 2:.1f} ± {(high - low) / 2**0.5:.1f}"
    assert "Mean ± standard deviation over the seeds that are trained, at most 2." in text


def test_a_row_may_evaluate_another_rows_run_anew(workplace: Path, first: str) -> None:
    text = run(workplace, "table=4")
    assert [c.split(" ")[2] for c in commands(text)] == ["scripts/evaluate.py"]
    assert (workplace / "runs/tiny/loce/eval+eval.detections=2/metrics.json").exists()
    assert run(workplace, "table=4").count("finished before") == 1


@pytest.mark.slow
def test_a_row_may_have_processes_of_its_own(workplace: Path, first: str) -> None:
    text = run(workplace, "table=6")
    folder = "runs/tables/glyphs/loce+processes=2"
    assert commands(text) == [f"$ torchrun --nproc_per_node=2 scripts/finetune.py tiny/loce.yaml output={folder}"]
    assert cells(workplace, 6)[0][-8:-3] == ["-"] * 5
    assert (workplace / "runs/tables/records/glyphs/seed0/loce+processes=2.json").exists()


def test_rows_that_may_share_train_in_one_pass(workplace: Path, first: str) -> None:
    """Over tables, too; each has its record, with its share of the minutes."""
    text = run(workplace, "table=10", "also=[11]")
    assert "to train: 4 runs in 2 passes of 3, 1" in text
    together, single = commands(text)
    assert together.count("tiny/loce.yaml") == 3 and single.count("tiny/loce.yaml") == 1 and "seed=3" in single
    records = [
        json.loads((workplace / f"runs/tables/records/glyphs/seed0/loce+{words}.json").read_text())
        for words in ("train.clip_norm=0", "indicator.momentum=0.8+train.clip_norm=0")
    ]
    assert all(record["command"].startswith("finetune.py ") for record in records)
    minutes = [float(note.read_text()) for note in workplace.rglob("minutes.txt")]  # records have a digit of them
    assert len(minutes) >= 4 and min(minutes) > 0
    assert records[1]["options"]["indicator.momentum"] == 0.8
    assert all(row[1] != "not run" for table in (10, 11) for row in cells(workplace, table))
    assert commands(run(workplace, "table=11")) == []


def test_a_row_that_starts_from_an_untrained_row_says_what_is_missing(workplace: Path) -> None:
    text = run(workplace, "table=8", "rows=[from it]", code=2)
    start = "runs/tables/glyphs/stage1+train.epochs=2"
    words = f"train.init={start} output=runs/tables/glyphs/loce+init=stage1+train.epochs=2"
    assert commands(text) == [f"$ python scripts/finetune.py tiny/loce.yaml {words}"]
    assert f"train.init = {start}" in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("table=1", "rows=[none]"), "there is no 'none'; there are: EBL, MFS, broken"),
        (("table=5",), "has table1, table2, table3, table4, table6, table7, table8, table10, table11, table9"),
        (("table=9",), "table9, row 1: start = longer: no row above has this name"),
        (("table=7",), "data = glyphs: table 7 is of glyph1203 or lvis"),
        ((), "table is missing"),
        (("table=x",), "table = x: must be a whole number >= 1"),
        (("table=1", "words=[output=x]"), "every row has its own run folder; runs=... chooses where"),
        (("table=1", "gpus=3"), "train.batch_size = 4: must be divisible by processes"),
    ],
)
def test_wrong_words(workplace: Path, words: tuple[str, ...], message: str) -> None:
    text = run(workplace, *words, code=2)
    assert message in text and "Traceback" not in text
