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
from loce.config import Config, from_dict
from loce.data.loader import EvalDataset, TrainDataset, eval_batches
from loce.evaluation.annotations import FederatedFilter, GroundTruth, load_annotations
from loce.evaluation.report import evaluate_and_report
from loce.evaluation.stream import DetectionWriter, read_detections
from loce.files import write_text
from loce.models.mask_rcnn import MaskRCNN
from loce.progress import progress


def evaluate_checkpoint(
    path: Path, output: Path | None, data: dict[str, Any], evaluation: dict[str, Any], device: str
) -> Path:
    """Evaluate a checkpoint by the options it holds; the folder of the results.

    path: run folder, checkpoint folder or file; output: None for the run folder, or one beside the file; data and
    evaluation: options of `DataConfig` and `EvalConfig` that take the checkpoint's place.
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
        model = checkpoint.load_model(file, chosen, config.eval)
        folder = output or (path if path.is_dir() else file.with_suffix(""))
        evaluate_model(model, config, folder, str(file))
        return folder
    finally:
        distributed.teardown()


def evaluate_model(model: MaskRCNN, config: Config, folder: Path, source: str) -> None:
    """Detect on the validation data, streaming to `folder`/eval/detections, and evaluate; rank 0 writes `folder`/eval.

    source: what made the detections, named beside the numbers. Inference that was killed goes on where it stopped;
    detections of other weights or options are replaced.
    """
    annotations = build.val_annotations(config)
    annotations.require_same_classes(model.stats, "the model")
    output = folder / "eval"
    origin = f"{source}, weights {weights_hash(model)}, {dataclasses.asdict(config.eval)}"
    if distributed.is_main() and _origin(output) != origin:
        shutil.rmtree(output / "detections", ignore_errors=True)
        write_text(output / "origin.txt", origin)
    distributed.barrier()
    federated = None if config.eval.protocol == "coco" else FederatedFilter(annotations.path)
    dataset = build.val_dataset(config, annotations)
    infer(model, dataset, federated, output / "detections", origin, config.eval.batch_size, config.data.workers)
    scores = ground_truth_scores(model, config, annotations)
    distributed.barrier()
    if distributed.is_main():
        write_text(output / "mean_scores.csv", scores)
        found = read_detections(output / "detections", annotations.image_ids.tolist())
        truth = with_training_groups(load_annotations(annotations.path), model.stats)
        evaluate_and_report(truth, found, output, protocol=config.eval.protocol, origin=origin)
    distributed.barrier()


def with_training_groups(truth: GroundTruth, stats: ClassStats) -> GroundTruth:
    """Rare, common and frequent are facts of the training set, also where the validation file says nothing of it."""
    group_of = dict(zip(stats.category_ids.tolist(), stats.groups.tolist(), strict=True))
    groups = np.array([group_of[c] for c in truth.category_ids.tolist()])
    notes = [note for note in truth.notes if not note.startswith("no frequency")]
    return dataclasses.replace(truth, frequency=groups, notes=notes)


def weights_hash(model: MaskRCNN) -> str:
    """First 12 digits of the SHA-256 of the weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _origin(output: Path) -> str:
    file = output / "origin.txt"
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
def ground_truth_scores(model: MaskRCNN, config: Config, annotations: Any) -> str:
    """The paper's Figures 1 and 4 as CSV: per class the mean score and the accuracy on its ground-truth boxes.

    Columns: id, name, group, training instances (-1 unknown), boxes, mean_score, accuracy. Ranks share the images.
    """
    model.eval()
    still = dataclasses.replace(config.data, short_edges=(config.data.test_short_edge,), flip=0.0)
    dataset = TrainDataset(annotations, Path(config.data.val_images), still, 0)
    keys = [(int(i), 0) for i in annotations.train_images[distributed.rank() :: distributed.world_size()]]
    stats = model.stats  # of the training set
    sums = np.zeros((3, len(stats)))  # boxes, scores, correct
    loader = torch.utils.data.DataLoader[Any](
        dataset,  # type: ignore[arg-type]
        sampler=keys,
        batch_size=1,
        collate_fn=list,
        num_workers=config.data.workers,
    )
    for samples in progress(loader, len(keys), "scores of ground-truth boxes"):
        labels, scores, correct = (x.numpy() for x in model.class_scores(samples))
        for row, values in zip(sums, (np.ones(len(labels)), scores, correct), strict=True):
            np.add.at(row, labels, values)
    count, score, correct = distributed.all_reduce_sum(torch.from_numpy(sums)).numpy()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["id", "name", "group", "training_instances", "boxes", "mean_score", "accuracy"])
    for c, name in enumerate(stats.names):
        boxes = max(count[c], 1)
        facts = (int(stats.category_ids[c]), name, str(stats.groups[c]), int(stats.instance_counts[c]), int(count[c]))
        writer.writerow([*facts, f"{score[c] / boxes:.6f}", f"{correct[c] / boxes:.6f}"])
    return table.getvalue()
