"""From a model and a data set to detections on disk and their evaluation, on any number of ranks."""

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loce import build, distributed
from loce.config import Config
from loce.data.loader import EvalDataset, TrainDataset, eval_batches
from loce.evaluation.annotations import FederatedFilter
from loce.evaluation.report import evaluate_and_report
from loce.evaluation.stream import DetectionWriter, read_detections
from loce.files import write_text
from loce.models.mask_rcnn import MaskRCNN
from loce.progress import progress


def evaluate_model(model: MaskRCNN, config: Config, folder: Path, source: str) -> dict[str, dict[str, float]] | None:
    """Detect on the validation data, streaming to `folder`/eval/detections, and evaluate; metrics on rank 0, else None.

    source: what made the detections, named beside the numbers. Inference that was killed goes on where it stopped.
    """
    annotations = build.val_annotations(config)
    dataset = build.val_dataset(config, annotations)
    federated = FederatedFilter(annotations.path) if config.eval.protocol == "lvis" else None
    detections = folder / "eval" / "detections"
    infer(model, dataset, federated, detections, source, config.eval.batch_size, config.data.workers)
    scores = ground_truth_scores(model, config, annotations)
    distributed.barrier()
    if not distributed.is_main():
        distributed.barrier()
        return None
    write_text(folder / "eval" / "mean_scores.csv", scores)
    found = read_detections(detections, annotations.image_ids.tolist())
    metrics = evaluate_and_report(
        annotations.path, found, folder / "eval", protocol=config.eval.protocol, source=source
    )
    distributed.barrier()
    return metrics


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
            allowed = [None if federated is None else torch.from_numpy(federated(s["image_id"])) for s in samples]
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
    stats = annotations.stats
    sums = np.zeros((3, len(stats)))  # boxes, scores, correct
    loader = torch.utils.data.DataLoader(
        dataset,
        sampler=keys,
        batch_size=1,
        collate_fn=list,
        num_workers=config.data.workers,  # type: ignore[arg-type]
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
