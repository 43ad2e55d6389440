"""Inference and evaluation of a detector on a data set, on any number of ranks: detections on disk, then numbers."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from loce.checkpoint.load import Checkpoint, weights_hash
from loce.config import Config, HeadConfig, UserError, diff, raise_problems
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.annotations.requirements import compared_types, evaluation_problems
from loce.data.build import val_annotations, val_dataset
from loce.data.dataset import Sample
from loce.data.loader import eval_batches
from loce.engine.class_facts import calibrate, posthoc_text
from loce.engine.ranks import process_group
from loce.evaluation.annotations import FederatedFilter, load_annotations, only_images, with_training_groups
from loce.evaluation.lvis_ap import IOU_TYPES
from loce.evaluation.near_misses import near_misses_of_image
from loce.evaluation.report import RESULTS, evaluate_and_report
from loce.evaluation.stream import NEAR_MISSES, TRUE_BOXES, DetectionWriter, chunk_paths, read_detections, read_table
from loce.evaluation.thresholds import read_thresholds
from loce.evaluation.true_boxes import FILE as TRUE_BOXES_FILE
from loce.evaluation.true_boxes import TrueBoxes, inferred_true_boxes, mean_score_table
from loce.models.detection import UNCAPPED_LIMIT
from loce.models.mask_rcnn import MaskRCNN
from loce.models.roi_heads import Once
from loce.models.together import share_equal
from loce.utils import distributed
from loce.utils.classes import ClassStats
from loce.utils.files import file_hash, require_writable, write_text
from loce.utils.progress import progress
from loce.utils.yaml_text import show

ORIGIN = "origin.txt"  # beside the detections: the weights, data and options that they are of
MEAN_SCORES = "mean_scores.csv"  # the paper's Figures 1 and 4
OF_TRUE_BOXES = (MEAN_SCORES, TRUE_BOXES_FILE)
CHANGES_NOTHING = ("eval.batch_size", "eval.errors", "eval.slices", "eval.boundary")  # of the detections


class Evaluated(NamedTuple):
    """A detector to be evaluated into a folder; source: what made its detections, named beside the numbers.

    run: where class facts are kept; None: the folder that `output` is in.
    """

    model: MaskRCNN
    config: Config
    output: Path
    source: str
    run: Path | None = None


def evaluate_checkpoints(
    paths: Sequence[Path],
    output: Path | None,
    overrides: Sequence[str],
    device: str,
    **report: Any,
) -> list[Path]:
    """Evaluation of checkpoints by the options they hold; the folders of the results.

    Several go through the images together; UserError where their data, detectors or options of evaluation differ.
    path: run folder, checkpoint folder or file; output: None for RUN/eval, with what differs from the run in its name
    (RUN/eval_head.name=norcal); beside the file for a file; overrides: options that take the checkpoint's
    place, "section.key=value"; report: options of `evaluate_and_report`. A file of test images has no annotations:
    then save_json is needed, and the results for a server are all that is written.
    """
    with process_group(device) as chosen:
        found: list[Evaluated] = []
        for path in paths:
            checkpoint = Checkpoint.open(path)
            config = checkpoint.config_with(overrides)
            changes = diff(checkpoint.config, config)
            run = path if path.is_dir() else path.with_suffix("")
            folder = output or evaluation_folder(run, checkpoint.config, config, report)
            require_writable(folder)
            if not found:
                annotations = val_annotations(config, annotated=not report.get("save_json"))
            # Test images have no annotations: results for a server can be written all the same.
            if not len(annotations.annotation_ids):
                if not report.get("save_json"):
                    raise UserError(
                        f"{annotations.path}: has no annotations, so there are no numbers; save_json=true writes "
                        "results.json, for a server that evaluates it"
                    )
                # No class was verified in any image: all are kept, and what became of objects cannot be said.
                section = dataclasses.replace(config.eval, protocol="coco", errors=False)
                config = dataclasses.replace(config, eval=section)
            # Mistakes are found before the model is built, and detections go where the numbers will be.
            require_alike([*(one.config for one in found[:1]), config], str(checkpoint.path))
            owner = str(checkpoint.path)
            check_evaluation(config, annotations, checkpoint.classes, owner, report.get("iou_types", ()))
            model = checkpoint.detector(config).to(chosen)
            heads = [f"{key}={show(value)}" for key, value in changes.items() if key.startswith("head.")]
            source = f"{checkpoint.path} with {' '.join(heads)}" if heads else str(checkpoint.path)
            found.append(Evaluated(model, config, folder, source, run))
        share_equal([one.model for one in found])
        evaluate_models(found, annotations, **report)
        return [one.output for one in found]


def require_alike(configs: Sequence[Config], owner: str) -> None:
    """UserError where the last of them cannot go through the images with the first."""
    sections = ("data.", "model.", "eval.")
    keys = [key for key in diff(configs[0], configs[-1]) if key.startswith(sections) and key != "data.workers"]
    if keys:
        raise UserError(f"checkpoint {owner}: has another {', '.join(keys)} than the first; evaluate it by itself")


def evaluation_folder(run: Path, old: Config, new: Config, report: Mapping[str, Any]) -> Path:
    """RUN/eval, and what was changed that changes the numbers: eval_val2, eval_head.name=norcal_eval.nms=0.4.

    Another annotation file is named by the shortest end of its path that no other file of the run has, since exports
    call every split alike (eval_test-_annotations.coco). What would take numbers away from an evaluation that is there
    stands beside it, too (eval_resamples=0).
    """
    changes = diff(old, new)
    texts = {**changes, **({"eval.protocol": ",".join(new.eval.protocols)} if "eval.protocol" in changes else {})}
    parts = [f"{key}={value}" for key, value in texts.items() if key.startswith(("head.", "eval.", "train.ema"))]
    parts = [part for part in parts if not part.startswith(CHANGES_NOTHING)]
    parts += [f"max_detections={most}"] if (most := report.get("max_detections")) else []
    data = [old.data.val_annotations, old.data.train_annotations]
    mine, *others = (Path(os.path.abspath(file)).with_suffix("").parts for file in (new.data.val_annotations, *data))

    def folder(*words: str) -> Path:
        return run / "_".join(["eval", *(re.sub(r"[^\w.=+,-]+", "-", word) for word in (*words, *parts))])

    found = folder()
    if "data.val_annotations" in changes:
        for count in range(1, len(mine)):
            found, origin = folder("-".join(mine[-count:])), _text(folder("-".join(mine[-count:])) / ORIGIN)
            free = not origin or f" {new.data.val_annotations} (sha256" in origin
            if free and all(mine[-count:] != other[-count:] or mine == other for other in others):
                break
    return found.with_name("_".join([found.name, *_fewer(found, new, report)]))


def _fewer(folder: Path, config: Config, report: Mapping[str, Any]) -> list[str]:
    """What an evaluation with these options would not write again of that in `folder`."""
    there = json.loads(_text(folder / "evaluation.json") or "{}").get("intervals", {})
    had = {kind for key in there if (kind := key.partition("_")[0]) in IOU_TYPES}  # "segm_fixed": a further protocol
    kinds = report.get("iou_types") or list(had)
    return [
        *([f"iou_types={','.join(kinds)}"] if had - {*kinds} else []),
        *(["resamples=0"] if any(there.values()) and not report.get("resamples", 1) else []),
        *(["eval.errors=false"] if (folder / "errors.csv").is_file() and not config.eval.errors else []),
    ]


def check_evaluation(
    config: Config, annotations: LVISAnnotations, stats: ClassStats, owner: str, iou_types: Sequence[str] = ()
) -> None:
    """UserError, before any work, where the validation data or the protocol cannot be evaluated."""
    annotations.require_same_classes(stats, owner, more=config.data.drop_empty)
    if "segm" in iou_types and not config.model.masks:
        raise UserError(f"iou_types = {','.join(iou_types)}: {owner} is a detector of boxes (model.masks=false)")
    masks = "segm" in compared_types(annotations, config.data.without_mask, iou_types)
    if config.eval.boundary and not masks:
        raise UserError("eval.boundary: boundary AP is of masks, which are not evaluated here")
    raise_problems(evaluation_problems(annotations, masks, config.eval.protocols, config.data.allow_misplaced))


def evaluate_models(found: Sequence[Evaluated], annotations: LVISAnnotations, **report: Any) -> None:
    """Detect on the validation data, streaming to `output`/detections, and evaluate; rank 0 writes `output`.

    annotations: the validation data, the same for all; report: options of `evaluate_and_report`. What the models share
    (models/together.py) is computed once. Inference that was killed goes on where it stopped, finished inference is
    used as it is; detections of other weights, data or options are replaced.
    """
    config, stats = found[0].config, found[0].model.stats
    annotations = annotations.of_classes(stats.category_ids)
    # The ground truth: boxes for every rank, which filter classes by them; masks where they are evaluated.
    kinds = compared_types(annotations, config.data.without_mask, report.get("iou_types", ()))
    masks = "segm" in kinds and distributed.is_main()  # rank 0 evaluates in the end
    truth = load_annotations(annotations, masks, config.data.allow_misplaced)
    if len(annotations.absent):
        present = np.delete(annotations.image_ids, annotations.absent)
        fate = f"are missing in {config.data.val_images}" if config.data.allow_missing else "are left out"
        why = f"the others {fate}"
        if config.eval.images:
            of_these = f" that are in {config.data.val_images}" * config.data.allow_missing
            why = f"those of {config.eval.images}{of_these}"
        truth = only_images(truth, present, why)

    # Detections on disk are of these weights, data and options, or are deleted.
    origins = [_origin(one, annotations) for one in found]
    for one, origin in zip(found, origins, strict=True):
        if distributed.is_main() and not _is_of(one.output, origin):
            shutil.rmtree(one.output / "detections", ignore_errors=True)
            for name in (*OF_TRUE_BOXES, "metrics.json", ORIGIN):
                (one.output / name).unlink(missing_ok=True)
            _take_over(one.output, origin)
            write_text(one.output / ORIGIN, origin)
    distributed.barrier()
    for one in found:
        calibrate(one.model, one.config, one.run or one.output.parent)
    infer(found, annotations, FederatedFilter(truth, stats.category_ids), origins)
    distributed.barrier()
    if report.get("save_json") and not len(annotations.annotation_ids):
        for one in found if distributed.is_main() else ():
            read_detections(one.output / "detections", truth.image_ids.tolist()).save_json(one.output / RESULTS)
        distributed.barrier()
        return

    if distributed.is_main():
        truth = with_training_groups(truth, stats, more=config.data.drop_empty)
        for one, origin in zip(found, origins, strict=True):
            boxes = inferred_true_boxes(one.output / "detections", annotations.annotation_ids)
            if boxes is not None:  # else older versions have left what is made of them
                boxes.save(one.output / TRUE_BOXES_FILE)
                write_text(one.output / MEAN_SCORES, mean_score_table(boxes, one.model.stats))
            options: dict[str, Any] = {"protocol": config.eval.protocol, "errors": config.eval.errors}
            options |= {"origin": f"{one.source}, {origin}", "posthoc": posthoc_text(one.config)}
            options |= {"slices": config.eval.slices, "boundary": config.eval.boundary}
            evaluate_and_report(
                truth, one.output / "detections", one.output, **{**options, **report, "iou_types": kinds}
            )
    distributed.barrier()


def _is_of(output: Path, origin: str) -> bool:
    """Whether what an inference left in `output` is of this origin, and not of an older version that was stopped before
    it came to the true boxes."""
    if _text(output / ORIGIN) != origin:
        return False  # whatever lies there, and were it damaged
    chunks = output / "detections"
    scored = all((output / name).is_file() for name in OF_TRUE_BOXES)
    return scored or not chunk_paths(chunks) or read_table(chunks, TRUE_BOXES) is not None


def _take_over(output: Path, origin: str) -> None:
    """Detections and mean scores of the run's other evaluation of the same weights, data and options, if there is one;
    links, since none is ever changed."""
    for file in sorted(output.parent.glob(f"eval*/{ORIGIN}")):
        if _is_of(file.parent, origin):
            (output / "detections").mkdir(parents=True, exist_ok=True)
            for done in [
                *file.parent.glob("detections/*.npz"),
                *filter(Path.is_file, map(file.parent.joinpath, OF_TRUE_BOXES)),
            ]:
                place = output / done.relative_to(file.parent)
                try:
                    os.link(done, place)
                except OSError:  # a file system without links
                    shutil.copyfile(done, place)
            return


def is_evaluated(one: Evaluated, annotations: LVISAnnotations) -> bool:
    """Whether `output` holds the numbers of this very model on this data, the same on all ranks; all must call."""
    done = distributed.is_main() and (one.output / "metrics.json").is_file()
    done = done and _text(one.output / ORIGIN) == _origin(one, annotations)
    return bool(distributed.broadcast_text("done" if done else ""))


def _origin(one: Evaluated, annotations: LVISAnnotations) -> str:
    """What detections depend on."""
    config, evaluation, data = one.config, one.config.eval, one.config.data
    options = diff(HeadConfig(name=config.head.name, reset=config.head.reset), config.head)
    head = " ".join([config.head.name, *(f"{key}={show(value)}" for key, value in options.items())])
    return (
        f"weights {weights_hash(one.model)}, head {head}, "
        f"{annotations.path} (sha256 {file_hash(annotations.path)}), images {data.val_images} "
        f"at {data.test_short_edge} x {data.long_edge} px, score > {evaluation.score_threshold:g}, "
        f"NMS {evaluation.nms:g}, {evaluation.detections} detections an image, "
        f"{'all' if 'coco' in evaluation.protocols else 'verified'} categories"
        + (f", up to {UNCAPPED_LIMIT:,} of these" if evaluation.uncapped else "")
        + (
            f", {len(annotations.absent)} images are {'missing' if data.allow_missing else 'left out'}"
            if len(annotations.absent)
            else ""
        )
        + (f", images of {evaluation.images} (sha256 {file_hash(evaluation.images)})" if evaluation.images else "")
        + (f", post-hoc {text}" if (text := posthoc_text(config)) else "")
        + (", turned as EXIF asks" if data.exif == "apply" else "")
        + (", 16 bits by range" if data.scale_16bit == "range" else "")
    )


def stored_thresholds(
    checkpoint: Checkpoint, model: MaskRCNN, config: Config, otherwise: float
) -> tuple[np.ndarray | None, str]:
    """(C,) the score threshold of every class that an evaluation of these scores chose, and a line that says which.

    otherwise: of classes that nothing was found of. None where no evaluation of the run has any.
    """
    file, weights, text = checkpoint.path, f"weights {weights_hash(model)},", posthoc_text(config)
    for run in (file.with_suffix(""), *file.parents[:3]):
        for folder in sorted(run.glob("eval*")):  # RUN/eval first
            origin, found = _text(folder / ORIGIN), read_thresholds(folder, model.stats.category_ids, otherwise)
            calibrated = f", post-hoc {text}" in origin if text else ", post-hoc" not in origin
            if weights in origin and calibrated and found is not None:
                data = json.loads(_text(folder / "evaluation.json") or "{}").get("annotations", "its data")
                spread = f"{found.min():.2g} to {found.max():.2g}, median {np.median(found):.2g}"
                return found, f"threshold of each class: the best F1 on {data} ({folder}): {spread}"
    return None, f"threshold {otherwise:g} for every class: these weights have no evaluation that chose any"


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


@torch.no_grad()
def infer(
    found: Sequence[Evaluated],
    annotations: LVISAnnotations,
    federated: FederatedFilter,
    sources: Sequence[str],
) -> None:
    """Stream what this rank's images give to `output`/detections: detections, near misses and what the classifier makes
    of the true boxes, from the same pyramids; images that are there are skipped."""
    config = found[0].config
    dataset = val_dataset(config, annotations)
    category_ids = torch.from_numpy(annotations.stats.category_ids)
    with ExitStack() as stack:
        writers, finished = [], []
        for one, source in zip(found, sources, strict=True):
            one.model.eval()
            writer = DetectionWriter(one.output / "detections", distributed.rank(), source)
            writers.append(stack.enter_context(writer))
            finished.append(set(writer.finished().tolist()))
        distributed.barrier()  # all ranks see the same finished images before any adds one
        skip = [*set.intersection(*finished), *annotations.image_ids[list(annotations.absent)].tolist()]
        batches = eval_batches(dataset, config.eval.batch_size, config.data.workers, skip=skip)
        left = sum(map(len, batches.loader.batch_sampler or ()))
        for samples in progress(batches, left, "inference", "images", len):
            images, scales, sizes = ([s[key] for s in samples] for key in ("image", "scale", "size"))
            true_boxes = [(s["boxes"], s["labels"]) for s in samples]
            image_ids = [s["image_id"] for s in samples]
            allowed, objects = None, None
            if "coco" not in config.eval.protocols:
                allowed = [torch.from_numpy(federated.allowed(i)) for i in image_ids]
            if config.eval.errors:
                objects = [(torch.from_numpy(b), torch.from_numpy(c)) for b, c in map(federated.objects, image_ids)]
            once = Once()
            for one, writer, there in zip(found, writers, finished, strict=True):
                detections = one.model.detect(images, scales, sizes, allowed, objects, once, true_boxes=true_boxes)
                for sample, detected in zip(samples, detections, strict=True):
                    if sample["image_id"] not in there:
                        _write(writer, sample, detected, annotations, category_ids)


def _write(
    writer: DetectionWriter,
    sample: Sample,
    detected: Mapping[str, Any],
    annotations: LVISAnnotations,
    category_ids: torch.Tensor,
) -> None:
    """What a model found in an image, with category ids in place of labels."""
    rows, image_id = sample["rows"].numpy(), sample["image_id"]
    scores, best, best_scores = detected["class_scores"]
    boxes = TrueBoxes(
        image_ids=np.full(len(rows), image_id),
        annotation_ids=annotations.annotation_ids[rows],
        category_ids=category_ids[sample["labels"]].numpy(),
        best_ids=category_ids[best].numpy(),
        scores=scores.float().numpy(),
        best_scores=best_scores.float().numpy(),
    )
    tables = {TRUE_BOXES: vars(boxes)}
    if "near_misses" in detected:
        misses = {kind: (b, s, category_ids[own]) for kind, (b, s, own) in detected["near_misses"].items()}
        tables[NEAR_MISSES] = vars(near_misses_of_image(image_id, misses))
    found = (detected["boxes"], detected["scores"], category_ids[detected["labels"]], detected.get("rles"))
    writer.add(image_id, *found, sample["size"], tables, detected.get("ranks"))
