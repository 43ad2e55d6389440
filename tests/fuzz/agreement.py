"""One annotation file through training's reader, check-data and evaluation, which agree, as the official codes do."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from loce.data.annotations.lvis import LVISAnnotations
from loce.data.annotations.requirements import evaluation_problems, training_problems
from loce.data.check import Report, check_set
from loce.evaluation import evaluate_lvis, load_annotations, read_results
from loce.utils.errors import UserError
from tests.evaluation.cases import official_coco, official_lvis
from tests.fuzz.harness import time_limit
from tests.fuzz.reader_cases import as_numpy, reader_case

LONGEST = 20  # seconds a case may take
NAMES = ("neither file_name nor coco_url", "file name is no text")  # of images, which only training needs


def refusal(attempt: Any) -> str:
    """The message of a UserError, "" for none."""
    try:
        attempt()
    except UserError as error:
        return str(error)
    return ""


def check_agreement(seed: int, folder: Path) -> str:
    """How the case of a seed ended: "refused", or what was evaluated."""
    made, found, raw, raw_found = reader_case(seed)
    path, results = folder / "a.json", folder / "r.json"
    path.write_bytes(raw)
    results.write_bytes(raw_found)
    with time_limit(LONGEST):
        training = refusal(lambda: LVISAnnotations.open(path))
        report = {use: Report() for use in ("training", "evaluation")}
        for use, lines in report.items():
            check_set(str(path), "", lines, 0, use=use)  # type: ignore[arg-type]
        masks = refusal(lambda: load_annotations(path))
        if training:
            # The three refuse in the same words; names of images are none of evaluation's business.
            assert report["training"].problems == report["evaluation"].problems == [training]
            assert masks == training or any(part in training for part in NAMES), (training, masks)
        else:
            annotations = LVISAnnotations.open(path)
            refused = {"training": training_problems(annotations), "evaluation": evaluation_problems(annotations)}
            for use, problems in refused.items():
                assert set(problems) <= set(report[use].problems)
            assert bool(masks) == bool(refused["evaluation"])
            assert all(problem in masks for problem in refused["evaluation"])
        detections = refusal(lambda: read_results(results))
        ended = [kind for kind in ("bbox", "segm") if evaluated(path, results, kind)]
        assert not (detections and ended), detections
        given_as_numpy(made, found, raw, raw_found, seed, ended)
    return " ".join(ended) or "refused"


def evaluated(path: Path, results: Path, kind: str) -> bool:
    """Whether our evaluation takes the files; then the official one has the same numbers."""
    text = path.read_bytes()
    try:
        federated = load_annotations(path, masks=False).federated
        ours = evaluate_lvis(path, results, kind, protocol="lvis" if federated else "coco")
    except UserError as error:
        assert len(str(error)) > 20
        return False
    truth, found = json.loads(text.decode("utf-8-sig")), json.loads(results.read_bytes().decode("utf-8-sig"))
    if not found or not truth["annotations"]:
        return True
    ground = load_annotations(path, masks=kind == "segm")
    areas = dict(zip(ground.rows.tolist(), ground.areas.tolist(), strict=True))
    for number, row in enumerate(truth["annotations"]):
        row |= {"id": number + 1, "area": areas[number]}  # official codes need areas, and take 0 for no id
    for image in truth["images"]:
        image["not_exhaustive_category_ids"] = image.get("not_exhaustive_category_ids") or []
    official: Any
    if federated:
        for category in truth["categories"]:
            category.setdefault("frequency", "f")
        official = official_lvis(truth, found, kind)
        theirs = official.eval["precision"], official.eval["recall"]
    else:
        official = official_coco(truth, found, kind)
        theirs = official.eval["precision"][..., -1], official.eval["recall"][..., -1]
    np.testing.assert_allclose(ours.precision, theirs[0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.recall, theirs[1], rtol=0, atol=1e-9)
    return True


def given_as_numpy(
    made: dict[str, Any], found: list[Any], raw: bytes, raw_found: bytes, seed: int, ended: list[str]
) -> None:
    """Dicts with NumPy's numbers and arrays are taken, or refused, as their file is."""
    try:
        same = json.loads(raw.decode("utf-8-sig")) == made and json.loads(raw_found.decode("utf-8-sig")) == found
    except (ValueError, RecursionError):
        same = False
    if not same:  # the bytes were changed
        return
    rng = np.random.default_rng(seed)
    truth, rows = as_numpy(made, rng), as_numpy(found, rng)
    if not isinstance(rows, list):
        return
    protocol = "coco"
    with contextlib.suppress(UserError):
        protocol = "lvis" if load_annotations(truth, masks=False).federated else "coco"
    for kind in ("bbox", "segm"):
        message = refusal(lambda: evaluate_lvis(truth, rows, kind, protocol=protocol))  # noqa: B023
        assert bool(message) == (kind not in ended), (kind, message)
