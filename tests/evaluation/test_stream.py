"""Detections streamed to disk: any number of ranks, killed and resumed, every image once."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loce.data.loader import eval_batches
from loce.evaluation import Detections, DetectionWriter, evaluate_lvis, load_annotations, read_detections, read_results
from loce.evaluation.near_misses import near_misses_of_image, read_near_misses
from loce.evaluation.report import evaluate_and_report
from loce.evaluation.stream import NEAR_MISSES
from loce.utils.errors import UserError
from tests.evaluation.cases import random_case


def write(folder: Path, detections: Detections, images: list[int], rank: int = 0, **options: Any) -> None:
    """What inference does, one rank's images."""
    with DetectionWriter(folder, rank, **options) as writer:
        for image in images:
            rows = np.flatnonzero(detections.image_ids == image)
            assert detections.masks is not None
            writer.add(
                image,
                torch.from_numpy(detections.corners()[rows]),
                torch.from_numpy(detections.scores[rows]),
                torch.from_numpy(detections.category_ids[rows]),
                [rle["counts"] for rle in detections.masks.rles(rows)],
                (int(detections.masks.sizes[0, 0]), int(detections.masks.sizes[0, 1])),
            )


@pytest.fixture
def case() -> tuple[dict[str, Any], Detections]:
    """A case in which an image has no detections."""
    for seed in range(100):
        truth, results = random_case(seed, crowded=True)
        found = {d["image_id"] for d in results}
        if len(found) > 2 and len(truth["images"]) > len(found):
            return truth, read_results(results)
    raise AssertionError("no such case")


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_do_not_matter(tmp_path: Path, world: int, case: tuple[dict[str, Any], Detections]) -> None:
    """Also ranks without images (more ranks than images)."""
    truth, detections = case
    images = [image["id"] for image in truth["images"]]
    for rank in range(world):
        write(tmp_path, detections, images[rank::world], rank, chunk_images=2)
    for iou_type in ("bbox", "segm"):
        streamed = evaluate_lvis(truth, tmp_path, iou_type)
        direct = evaluate_lvis(truth, detections, iou_type)
        assert streamed.metrics == direct.metrics
        np.testing.assert_array_equal(streamed.precision, direct.precision)
    merged = read_detections(tmp_path, images)
    merged.save_json(tmp_path / f"{world}.json")
    assert evaluate_lvis(truth, tmp_path / f"{world}.json", "segm").metrics == streamed.metrics
    assert (np.diff(merged.image_ids) >= 0).all()
    assert merged.scores.dtype == np.float32


def test_resume_at_the_first_missing_image(tmp_path: Path, case: tuple[dict[str, Any], Detections]) -> None:
    """A kill loses the chunk that was not full; the rest is not done again, by however many ranks."""
    truth, detections = case
    images = [image["id"] for image in truth["images"]]
    killed = DetectionWriter(tmp_path, chunk_images=2)
    assert killed.finished().tolist() == []
    for image in images[:3]:
        killed.add(image, np.zeros((0, 4)), np.zeros(0), np.zeros(0), [], (8, 8))
    assert killed.finished().tolist() == sorted(images[:2])
    with pytest.raises(UserError, match=f"{len(images) - 2} of {len(images)} images have no predictions yet"):
        read_detections(tmp_path, images)
    left = [image for image in images if image not in DetectionWriter(tmp_path).finished()]
    assert left == images[2:]
    for rank in range(2):
        write(tmp_path, detections, left[rank::2], rank)
    merged = read_detections(tmp_path, images)
    assert set(merged.image_ids.tolist()) == set(detections.image_ids.tolist()) - set(images[:2])


class ManyImages:
    """As many images as LVIS val has, ids in no order; what `eval_batches` asks of a data set."""

    def __init__(self) -> None:
        self.annotations, self.image_ids = self, np.random.default_rng(0).permutation(500_000)[:19_809]

    def __len__(self) -> int:
        return len(self.image_ids)


def test_lvis_val_on_eight_ranks_counts_every_image_once(tmp_path: Path) -> None:
    """Killed when some ranks were further than others, gone on by eight, then by three; 19,809 is no multiple of 8."""
    images = ManyImages()
    ids = images.image_ids

    def infer(world: int, most: int | None = None) -> int:
        writers = [DetectionWriter(tmp_path, rank, chunk_images=1500) for rank in range(world)]
        skip = writers[0].finished().tolist()
        for rank, writer in enumerate(writers):
            batches = eval_batches(images, 4, skip=skip, rank=rank, world=world)  # type: ignore[arg-type]
            rows = [row for batch in batches.loader.batch_sampler for row in batch]  # type: ignore[union-attr]
            for row in rows[: None if most is None else most * (rank + 1)]:
                writer.add(int(ids[row]), [[0.0, 0.0, 1.0, 1.0]], [0.5], [1])
            writer.flush() if most is None else None
        return len(skip)

    assert infer(8, most=400) == 0
    done = infer(8, most=300)
    assert 0 < done < len(ids)
    assert infer(3) >= done
    merged = read_detections(tmp_path, ids.tolist())
    assert merged.image_ids.tolist() == sorted(ids.tolist())


def test_repeated_and_unexpected_images_are_errors(tmp_path: Path, case: tuple[dict[str, Any], Detections]) -> None:
    truth, detections = case
    images = [image["id"] for image in truth["images"]]
    write(tmp_path, detections, images, 0)
    with pytest.raises(ValueError, match=f"not in the data set: {min(images)}"):
        read_detections(tmp_path, sorted(images)[1:])
    write(tmp_path, detections, images[:1], 1)
    with pytest.raises(ValueError, match=f"more than once: {images[0]}"):
        read_detections(tmp_path, images)


def test_folder_of_another_model_is_refused(tmp_path: Path, case: tuple[dict[str, Any], Detections]) -> None:
    truth, detections = case
    write(tmp_path, detections, [truth["images"][0]["id"]], source="stage1")
    with pytest.raises(UserError, match="holds detections of 'stage1', not of 'stage2'; choose another output folder"):
        DetectionWriter(tmp_path, source="stage2")


def test_broken_chunk_is_named(tmp_path: Path) -> None:
    (tmp_path / "detections_0000_000000.npz").write_bytes(b"half a fi")
    with pytest.raises(UserError, match=r"detections_0000_000000.npz: cannot be read .*; delete it"):
        read_detections(tmp_path, [1])


def test_folder_of_detections_becomes_a_results_file(tmp_path: Path, case: tuple[dict[str, Any], Detections]) -> None:
    """What is submitted to a server: the official format, from what inference streamed."""
    truth, detections = case
    write(tmp_path / "detections", detections, [image["id"] for image in truth["images"]])
    streamed = evaluate_and_report(truth, tmp_path / "detections", tmp_path / "out", resamples=0, save_json=True)
    for iou_type, evaluation in streamed.items():
        assert evaluate_lvis(truth, tmp_path / "out" / "results.json", iou_type).metrics == evaluation.metrics


def test_no_detections_at_all(tmp_path: Path, small: dict[str, Any]) -> None:
    with DetectionWriter(tmp_path) as writer:
        for image in load_annotations(small).image_ids:
            writer.add(int(image), np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    assert evaluate_lvis(small, tmp_path).metrics["AP"] == 0.0


def test_wrong_calls_are_loud(tmp_path: Path) -> None:
    writer = DetectionWriter(tmp_path)
    box, score, category = np.ones((1, 4)), np.ones(1), np.ones(1)
    with pytest.raises(ValueError, match="2 boxes, 1 scores"):
        writer.add(1, np.ones((2, 4)), score, category)
    with pytest.raises(ValueError, match="masks need the size"):
        writer.add(1, box, score, category, [b"1"])
    writer.add(1, box, score, category)
    writer.add(2, box, score, category, [b"1"], (2, 2))
    with pytest.raises(ValueError, match="some images were added with masks"):
        writer.flush()


def test_near_misses_are_kept_beside_the_detections(tmp_path: Path, case: tuple[dict[str, Any], Detections]) -> None:
    """In the order of images, from every rank; a folder in which some chunks have none has none."""
    truth, _ = case
    images = [image["id"] for image in truth["images"]]
    empty = np.zeros((0, 4)), np.zeros(0), np.zeros(0)
    missed = ([[1.0, 2.0, 4.0, 6.0]], [0.5], [truth["categories"][0]["id"]])
    for rank in range(2):
        with DetectionWriter(tmp_path, rank, chunk_images=2) as writer:
            for image in images[rank::2]:
                found = near_misses_of_image(image, {"proposed": missed} if image != images[0] else {})
                writer.add(image, *empty, tables={NEAR_MISSES: vars(found)})
    near_misses = read_near_misses(tmp_path)
    assert near_misses is not None
    assert sorted(near_misses.image_ids.tolist()) == sorted(images[1:])
    assert (near_misses.boxes == [1.0, 2.0, 3.0, 4.0]).all() and set(near_misses.kinds.tolist()) == {3}
    evaluate_and_report(truth, tmp_path, tmp_path / "out", resamples=0)
    assert "no_proposal" in (tmp_path / "out" / "errors.csv").read_text()
    writer = DetectionWriter(tmp_path, 2)
    writer.add(images[0], *empty, tables={NEAR_MISSES: vars(found)})
    writer.add(images[1], *empty)
    with pytest.raises(ValueError, match="some images were added with near misses"):
        writer.flush()
    writer = DetectionWriter(tmp_path, 3)
    writer.add(images[0], *empty)
    writer.flush()
    assert read_near_misses(tmp_path) is None


def test_a_folder_of_somebody_else(tmp_path):
    """What may be meant is named: a results file in it, or the folder of detections below."""
    with pytest.raises(UserError, match=r"is no folder of detections of loce \(no detections_\*\.npz in it\)$"):
        read_detections(tmp_path, [1])
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference/segm.json").write_text('\n [{"image_id": 1}]')
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "others.json").write_text('[{"name": "a.jpg", "category_id": 1}]')
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "gone.json").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match=rf"; did you mean results={tmp_path}/inference/segm\.json\?$"):
        read_detections(tmp_path, [1])
    with DetectionWriter(tmp_path / "eval/detections") as writer:
        writer.add(1, [], [], [])
    with pytest.raises(UserError, match=rf"did you mean results={tmp_path}/eval/detections or results=.*segm\.json\?$"):
        read_detections(tmp_path, [1])
