"""From a model and a data set to detections on disk and their evaluation, on any number of ranks."""

import csv
import dataclasses
import hashlib
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loce import build, checkpoint, distributed
from loce.classes import ClassStats
from loce.config import Config, UserError, from_dict
from loce.data.loader import Batches, EvalDataset, TrainDataset, eval_batches
from loce.data.lvis import LVISAnnotations
from loce.evaluation.annotations import FederatedFilter, GroundTruth, load_annotations
from loce.evaluation.report import evaluate_and_report
from loce.evaluation.stream import DetectionWriter, read_detections
from loce.files import file_hash, write_text
from loce.models.mask_rcnn import MaskRCNN
from loce.progress import progress

LVIS_CAP = 300  # detections an image in protocol lvis


def evaluate_checkpoint(
    path: Path, output: Path | None, data: dict[str, Any], evaluation: dict[str, Any], device: str, **report: Any
) -> Path:
    """Evaluate a checkpoint by the options it holds; the folder of the results.

    path: run folder, checkpoint folder or file; output: None for RUN/eval (RUN/eval_NAME on other annotations
    NAME.json; beside the file for a file); data and evaluation: options of `DataConfig` and `EvalConfig` that take the
    checkpoint's place; report: options of `evaluate_and_report`.
    """
    chosen = distributed.setup(device)
    try:
        file = checkpoint.main_file(path)
        stored = from_dict(checkpoint.read(file)["config"], str(file))
        config = dataclasses.replace(
            stored,
            data=dataclasses.replace(stored.data, **data),
            eval=dataclasses.replace(stored.eval, **evaluation),
        )
        name = f"eval_{Path(data['val_annotations']).stem}" if "val_annotations" in data else "eval"
        output = output or (path if path.is_dir() else file.with_suffix("")) / name
        annotations = build.val_annotations(config)
        check_evaluation(config, annotations, checkpoint.stats_of(file), str(file))
        model = checkpoint.load_model(file, chosen, config.eval)
        evaluate_model(model, config, output, str(file), **report)
        return output
    finally:
        distributed.teardown()


def check_evaluation(config: Config, annotations: LVISAnnotations, stats: ClassStats, owner: str) -> None:
    """UserError, before any work, where the validation data or the protocol cannot be evaluated."""
    annotations.require_same_classes(stats, owner)
    if config.eval.protocol in ("lvis", "fixed") and annotations.negatives is None:
        raise UserError(
            f"{annotations.path}: has no neg_category_ids, which protocol {config.eval.protocol} needs; "
            "set eval.protocol=coco (or auto)"
        )
    if config.eval.protocol == "fixed" and config.eval.detections <= LVIS_CAP:
        raise UserError(
            f"eval.detections = {config.eval.detections}: protocol fixed knows no cap per image, so keep more than "
            f"{LVIS_CAP} detections of one, 1000 or more"
        )


def evaluate_model(model: MaskRCNN, config: Config, output: Path, source: str, **report: Any) -> None:
    """Detect on the validation data, streaming to `output`/detections, and evaluate; rank 0 writes `output`.

    source: what made the detections, named beside the numbers; report: options of `evaluate_and_report`. Inference that
    was killed goes on where it stopped, finished inference is used as it is; detections of other weights, data or
    options are replaced.
    """
    annotations = build.val_annotations(config)
    origin = f"weights {weights_hash(model)}, {_inputs(config, annotations)}"
    if distributed.is_main() and _text(output / "origin.txt") != origin:
        shutil.rmtree(output / "detections", ignore_errors=True)
        (output / "mean_scores.csv").unlink(missing_ok=True)
        write_text(output / "origin.txt", origin)
    distributed.barrier()
    federated = None if config.eval.protocol == "coco" else FederatedFilter(annotations.path)
    dataset = build.val_dataset(config, annotations)
    infer(model, dataset, federated, output / "detections", origin, config.eval.batch_size, config.data.workers)
    scored = (output / "mean_scores.csv").exists()
    distributed.barrier()  # all ranks have looked before rank 0 writes it
    scores = "" if scored else ground_truth_scores(model, config, annotations)
    distributed.barrier()
    if distributed.is_main():
        if not scored:
            write_text(output / "mean_scores.csv", scores)
        found = read_detections(output / "detections", annotations.image_ids.tolist())
        truth = with_training_groups(load_annotations(annotations.path), model.stats)
        report = {"protocol": config.eval.protocol, "origin": f"{source}, {origin}", **report}
        evaluate_and_report(truth, found, output, **report)
    distributed.barrier()


def _inputs(config: Config, annotations: LVISAnnotations) -> str:
    """What detections depend on besides the weights."""
    evaluation, data = config.eval, config.data
    return (
        f"{annotations.path} (sha256 {file_hash(annotations.path)}), images {data.val_images} "
        f"at {data.test_short_edge} x {data.long_edge} px, score > {evaluation.score_threshold:g}, "
        f"NMS {evaluation.nms:g}, {evaluation.detections} detections an image, "
        f"{'all' if evaluation.protocol == 'coco' else 'verified'} categories"
    )


def with_training_groups(truth: GroundTruth, stats: ClassStats) -> GroundTruth:
    """Rare, common and frequent are facts of the training set, also where the validation file says nothing of it.

    A converted checkpoint may know no training set (all counts 0): then the file's own groups stay.
    """
    if not stats.instance_counts.any():
        return truth
    group_of = dict(zip(stats.category_ids.tolist(), stats.groups.tolist(), strict=True))
    groups = np.array([group_of[c] for c in truth.category_ids.tolist()])
    notes = [note for note in truth.notes if not note.startswith("no frequency")]
    return dataclasses.replace(truth, frequency=groups, notes=notes)


def weights_hash(model: MaskRCNN) -> str:
    """First 12 digits of the SHA-256 of the weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not name.startswith(checkpoint.METHOD_STATE):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


@torch.no_grad()
def infer(
    model: MaskRCNN,
    dataset: EvalDataset,
    federated: FederatedFilter | None,
    folder: Path,
    source: str,
    batch_size: int,
    workers: int,
) -> None:
    """Stream this rank's detections of the data set to `folder`; images that are there already are skipped."""
    model.eval()
    category_ids = torch.from_numpy(dataset.annotations.stats.category_ids)
    with DetectionWriter(folder, distributed.rank(), source) as writer:
        finished = writer.finished().tolist()
        distributed.barrier()  # all ranks see the same finished images before any adds one
        batches = eval_batches(dataset, batch_size, workers, skip=finished)
        for samples in progress(batches, len(batches), "inference"):
            allowed = [
                None if federated is None else torch.from_numpy(federated.allowed(s["image_id"])) for s in samples
            ]
            detections = model.detect(
                [s["image"] for s in samples], [s["scale"] for s in samples], [s["size"] for s in samples], allowed
            )
            for sample, found in zip(samples, detections, strict=True):
                ids = category_ids[found["labels"]]
                writer.add(sample["image_id"], found["boxes"], found["scores"], ids, found["rles"], sample["size"])


@torch.no_grad()
def ground_truth_scores(model: MaskRCNN, config: Config, annotations: LVISAnnotations) -> str:
    """The paper's Figures 1 and 4 as CSV: per class the mean score and the accuracy on its ground-truth boxes.

    Columns: id, name, group, training_instances (0 where unknown), boxes, mean_score, accuracy. Ranks share the images.
    """
    model.eval()
    still = dataclasses.replace(config.data, short_edges=(config.data.test_short_edge,), flip=0.0)
    dataset = TrainDataset(annotations, Path(config.data.val_images), still, 0)
    mine = annotations.train_images[distributed.rank() :: distributed.world_size()]
    batches = Batches(dataset, [[(int(i), 0)] for i in mine], len(mine), config.data.workers)
    stats = model.stats  # of the training set
    sums = np.zeros((3, len(stats)))  # boxes, scores, correct
    for samples in progress(batches, len(batches), "scores of ground-truth boxes"):
        whole = [sample for sample in samples if "replaced" not in sample]
        if not whole:
            continue
        labels, scores, correct = (x.numpy() for x in model.class_scores(whole))
        for row, values in zip(sums, (np.ones(len(labels)), scores, correct), strict=True):
            np.add.at(row, labels, values)
    total = distributed.all_reduce_sum(torch.from_numpy(sums).to(model.pixel_mean.device))
    count, score, correct = total.cpu().numpy()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["id", "name", "group", "training_instances", "boxes", "mean_score", "accuracy"])
    for c, name in enumerate(stats.names):
        boxes = max(count[c], 1)
        facts = (int(stats.category_ids[c]), name, str(stats.groups[c]), int(stats.instance_counts[c]), int(count[c]))
        writer.writerow([*facts, f"{score[c] / boxes:.6f}", f"{correct[c] / boxes:.6f}"])
    return table.getvalue()
