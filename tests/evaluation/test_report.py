"""What people get: the folder, the table, and the two scripts with their exit codes."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loce.evaluation import evaluate_lvis
from loce.evaluation.calibration import NAMES
from loce.evaluation.comparison import compare_folders
from loce.evaluation.report import COLUMNS, describe, evaluate_and_report
from loce.utils.errors import UserError
from tests.evaluation.cases import METRICS, random_case, without

ROOT = Path(__file__).resolve().parents[2]


def script(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "scripts" / name), *words], capture_output=True, text=True)


def save(folder: Path, truth: dict[str, Any], results: list[dict[str, Any]]) -> tuple[str, str]:
    (folder / "a.json").write_text(json.dumps(truth))
    (folder / "r.json").write_text(json.dumps(results))
    return f"annotations={folder / 'a.json'}", f"results={folder / 'r.json'}"


def test_evaluate_script(tmp_path: Path) -> None:
    truth, results = random_case(10, crowded=True)
    words = save(tmp_path, truth, results)
    done = script("evaluate.py", *words, f"output={tmp_path / 'out'}", "resamples=20")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics) == ["bbox", "segm"]
    for iou_type, numbers in metrics.items():
        assert tuple(numbers) == METRICS + NAMES
        found = evaluate_lvis(truth, results, iou_type)
        assert numbers == pytest.approx(found.metrics | found.calibration)
        assert f"| {iou_type}, lvis | {100 * numbers['AP']:.2f} |" in done.stdout
    assert "protocol: lvis (at most 300 detections an image, federated LVIS rules)" in done.stdout
    assert "categories have no objects here and are in no mean" in done.stdout
    order = [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("AP", "AR"))]
    assert tuple(order) == METRICS * 2
    assert (tmp_path / "out" / "calibration.png").is_file()
    facts = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (facts["protocol"], facts["images"], facts["detections"]) == ("lvis", len(truth["images"]), len(results))
    assert set(facts["intervals"]["segm"]) == {"AP", "APr", "APc", "APf", *NAMES}
    assert not list((tmp_path / "out").glob(".*"))  # no temporary files


def test_table_of_categories(tmp_path: Path, small: dict[str, Any]) -> None:
    results = [{"image_id": 7, "category_id": 2, "score": 0.5, "bbox": [10.0, 10.0, 40.0, 40.0]}]
    small["categories"][1]["name"] = 'often, "so" to say'
    evaluations = evaluate_and_report(small, results, tmp_path, resamples=0, errors=False)
    assert list(evaluations) == ["bbox"]
    with (tmp_path / "per_category.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0])[: len(COLUMNS)] == COLUMNS
    assert [row["name"] for row in rows] == ['often, "so" to say', "loose", "none"]
    assert [row["AP"] for row in rows] == ["0.50495", "0", "-1"]
    assert [row["detection_score"] for row in rows] == ["0.5", "", ""]
    assert {row["iou_type"] for row in rows} == {"bbox"}
    assert list(json.loads((tmp_path / "metrics.json").read_text())) == ["bbox"]


def test_results_that_name_files(tmp_path: Path) -> None:
    """predictions.json of scripts/predict.py: the images are found by the ends of their paths."""
    truth, results = random_case(4)
    for image in truth["images"]:
        image["file_name"] = f"val/{image['id'] % 2}/{image['id']}.jpg"
    named = [{**{k: v for k, v in r.items() if k != "image_id"}, "file": f"/far/{r['image_id']}.jpg"} for r in results]
    for name, content in (("truth", truth), ("ids", results), ("files", named)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    ways = [
        evaluate_and_report(
            tmp_path / "truth.json", tmp_path / f"{way}.json", tmp_path / way, resamples=0, errors=False
        )
        for way in ("ids", "files")
    ]
    assert ways[0]["segm"].metrics == ways[1]["segm"].metrics
    named[1]["file"] = "x/none.jpg"
    (tmp_path / "files.json").write_text(json.dumps(named))
    with pytest.raises(
        UserError, match=r"1 results whose file is no image of the annotation file.*: row 1: x/none.jpg$"
    ):
        evaluate_and_report(tmp_path / "truth.json", tmp_path / "files.json", tmp_path / "x", resamples=0)


IMAGE = [{"id": 1, "height": 9, "width": 9, "file_name": "a.png"}]
OBJECT = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}]


def test_groups_of_the_training_file(tmp_path: Path, small: dict[str, Any]) -> None:
    """Of results of another program, too; bounds as in a run."""
    small = {**small, "categories": [{"id": c["id"], "name": c["name"]} for c in small["categories"]]}
    first = small["categories"][0]["id"]
    image = small["images"][0]["id"]
    box = {"bbox": [1, 1, 5, 5], "area": 25, "image_id": image, "iscrowd": 0}
    objects = [{**box, "id": i, "category_id": c["id"]} for i, c in enumerate(small["categories"]) if c["id"] != first]
    (tmp_path / "val.json").write_text(json.dumps(small))
    (tmp_path / "train.json").write_text(json.dumps({**small, "annotations": objects}))
    (tmp_path / "r.json").write_text("[]")
    words = [f"annotations={tmp_path}/val.json", f"results={tmp_path}/r.json", f"training={tmp_path}/train.json"]
    done = script("evaluate.py", *words, "rare_max=0", f"output={tmp_path}/out", "iou_types=bbox")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out/per_category.csv").open(newline="") as file:
        assert {row["id"]: row["frequency"] for row in csv.DictReader(file)} == {
            str(c["id"]): "r" if c["id"] == first else "c" for c in small["categories"]
        }
    (tmp_path / "train.json").write_text(
        json.dumps({"annotations": OBJECT, "categories": [{"id": 1, "name": "other"}], "images": IMAGE})
    )
    assert "its categories are not those of the training data" in script("evaluate.py", *words).stderr
    assert "training: is for results" in script("evaluate.py", "training=x.json").stderr


def test_nothing_is_left_of_an_earlier_evaluation(tmp_path: Path) -> None:
    """Or compare.py would take old masks for new ones."""
    truth, results = random_case(10, crowded=True)
    evaluate_and_report(truth, results, tmp_path, resamples=0)
    both = {path.name for path in tmp_path.iterdir()}
    evaluate_and_report(truth, results, tmp_path, ["bbox"], resamples=0, errors=False)
    gone = {"tallies_segm.npz", "errors.csv", "errors.png", "misses.csv"}
    assert both - {path.name for path in tmp_path.iterdir()} == gone


def test_masks_lead_the_table_and_boxes_follow(tmp_path: Path) -> None:
    truth, results = random_case(10, crowded=True)
    evaluate_and_report(truth, results, tmp_path, resamples=0)
    with (tmp_path / "per_category.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, mask, box in zip(
        rows,
        evaluate_lvis(truth, results, "segm").per_category,
        evaluate_lvis(truth, results).per_category,
        strict=True,
    ):
        assert float(row["AP"]) == pytest.approx(mask["AP"], rel=1e-5)
        assert float(row["box_AP"]) == pytest.approx(box["AP"], rel=1e-5)


def test_coco_files_get_coco_rules_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, results = random_case(10, crowded=True)
    plain = {**truth, "images": [{k: i[k] for k in ("id", "height", "width")} for i in truth["images"]]}
    evaluations = evaluate_and_report(plain, results, tmp_path, ["bbox"], resamples=0)
    text = capsys.readouterr().out
    assert "protocol: coco (at most 100 detections an image and category, COCO rules)" in text
    assert "note: no neg_category_ids: not an LVIS file" in text
    expected = evaluate_lvis(truth, results, protocol="coco").metrics
    assert evaluations["bbox"].metrics == expected
    assert "AR@100" in expected


def test_empty_results_are_warned_about(
    tmp_path: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = evaluate_and_report(small, [], tmp_path)["segm"].metrics
    assert metrics["AP"] == 0.0
    assert "warning: there are no detections at all" in capsys.readouterr().out


def test_results_of_a_part_are_warned_about(
    tmp_path: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    small["images"] += [{**small["images"][0], "id": 100 + n} for n in range(5)]
    results = [{"image_id": i, "category_id": 2, "score": 0.5, "bbox": [1.0, 1.0, 2.0, 2.0]} for i in (3, 7)]
    evaluate_and_report(small, results, tmp_path, resamples=0)
    assert "warning: most images have no detections" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["results=r"], "annotations must be given"),
        (["annotations=a.json", "results=nowhere.json"], "nowhere.json: there is no such results file"),
        (["annotations=a.json", "results=r.json", "protocol=voc"], "protocol = voc"),
        (["annotations=a.json", "results=r.json", "iou_type=bbox"], "did you mean iou_types?"),
        (["annotations=a.json", "results=boxes.json", "iou_types=segm"], "the results have no segmentation"),
        (["annotations=a.json", "results=other.json"], "other.json: "),
        (["annotations=a.json", "results=other.json"], "use the annotation file of the split"),
        (["annotations=a.json", "results=nan.json"], "nan.json: scores that are NaN or infinite: row 0 (image "),
        (["annotations=a.json", "results=nan.json"], "in all); leave these rows out, or mend what made them"),
        (["annotations=a.json", "results=r.json", "eval.nms=0.4"], "head.* and eval.* are for checkpoints"),
        (["annotations=a.json", "results=r.json", "protocol=fixed", "max_detections=300"], "leave max_detections out"),
    ],
)
def test_mistakes_exit_with_2(tmp_path: Path, words: list[str], message: str) -> None:
    truth, results = random_case(10, crowded=True)
    save(tmp_path, truth, results)
    (tmp_path / "boxes.json").write_text(json.dumps(without(results, "segmentation")))
    (tmp_path / "other.json").write_text(json.dumps([{**d, "image_id": d["image_id"] + 999} for d in results]))
    (tmp_path / "nan.json").write_text(json.dumps([{**d, "score": float("nan")} for d in results]))
    words = [f"{w.split('=')[0]}={tmp_path / w.split('=')[1]}" if ".json" in w else w for w in words]
    done = script("evaluate.py", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    names = ["a.json", "boxes.json", "nan.json", "other.json", "r.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_compare_script(tmp_path: Path) -> None:
    truth, results = random_case(10, crowded=True)
    rng = np.random.default_rng(0)
    worse = [{**d, "score": float(rng.random())} for d in results]
    for name, found in (("a", results), ("eval_eval.nms=0.4", worse)):  # as evaluate.py names folders
        evaluate_and_report(truth, found, tmp_path / name, resamples=0)
    done = script("compare.py", str(tmp_path / "a"), str(tmp_path / "eval_eval.nms=0.4"), "resamples=50", "top=2")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("AP "))
    first, second, difference = (float(word) for word in line.split()[1:4])
    assert first == pytest.approx(evaluate_lvis(truth, results).metrics["AP"], abs=5e-4)
    assert difference == pytest.approx(second - first, abs=2e-3)
    assert "categories that gained most AP" in done.stdout
    for words in ([str(tmp_path / "a")], [str(tmp_path / "a"), str(tmp_path)]):
        done = script("compare.py", *words)
        assert done.returncode == 2
        assert "folder" in done.stderr


def test_several_protocols_and_what_compares_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first has the plain names; folders are compared in what both have."""
    truth, results = random_case(10, crowded=True)
    several = ["lvis", "fixed", "pool"]
    found = evaluate_and_report(truth, results, tmp_path / "a", ["bbox"], several, resamples=5, errors=False)
    assert list(found) == ["bbox", "bbox_fixed", "bbox_pool"]
    for name, evaluation in zip(several, found.values(), strict=True):
        assert evaluation.metrics == evaluate_lvis(truth, results, protocol=name).metrics
    assert list(json.loads((tmp_path / "a/metrics.json").read_text())) == list(found)
    facts = json.loads((tmp_path / "a/evaluation.json").read_text())
    assert facts["protocol"] == "lvis, fixed, pool" and list(facts["intervals"]) == list(found)
    assert "pool (at most 10,000 detections a category over all images, federated LVIS rules, all" in facts["rules"]
    assert capsys.readouterr().out.count("| type, protocol |") == 2  # the cap is in the names of the recalls
    evaluate_and_report(truth, results, tmp_path / "b", ["bbox"], "pool", resamples=0, errors=False)
    text = compare_folders(tmp_path / "a", tmp_path / "b", resamples=5)
    assert [line[:19] for line in text.splitlines() if ", protocol " in line] == ["bbox, protocol pool"]
    assert "ECE " in text
    evaluate_and_report(truth, results, tmp_path / "c", ["bbox"], "coco", resamples=0, errors=False)
    with pytest.raises(UserError, match=r"differ in protocol: .*/a is fixed .*, .*/c is coco"):
        compare_folders(tmp_path / "a", tmp_path / "c")


def test_every_metric_is_described() -> None:
    assert describe("AP50") == "average precision, IoU .50, all sizes, all categories"
    assert describe("ECEr") == "expected calibration error at IoU .50, rare categories"
    assert describe("APr") == "average precision, IoU .50:.95, all sizes, rare categories"
    assert describe("ARs@300") == "average recall, IoU .50:.95, small (< 32^2 px), all categories, cap 300"


def test_evaluation_imports_no_torch() -> None:
    """It costs seconds and 200 MB, and anybody's results can be evaluated without it."""
    code = "import sys, loce.evaluation.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
