"""Class facts for post-hoc calibration (loce/posthoc.py), from the training set; kept in RUN/posthoc and put to use.

box_dimension_HASH.npz: dimension (C,) float64, images (), of the training annotations whose SHA-256 begins with HASH.
logit_moments_HASH.npz: mean, variance (C,) float64, of the inputs that HASH is of; they stand in the file as text.
Counts are in every checkpoint. A file of other inputs has another name, so nothing stale is ever used.
"""

import hashlib
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from loce.checkpoint.load import weights_hash
from loce.config import Config, has_sigmoids, to_dict
from loce.data.annotations.cache import open_annotations
from loce.data.build import train_annotations, train_dataset
from loce.data.dataset import ShownImage
from loce.data.loader import Batches, training_plan
from loce.models.mask_rcnn import MaskRCNN
from loce.posthoc import ClassFacts, LogitMoments, box_counting_dimension, calibration
from loce.utils import distributed
from loce.utils.errors import UserError
from loce.utils.files import atomic_write, file_hash, json_text
from loce.utils.progress import print_line, progress
from loce.utils.yaml_text import show

FOLDER = "posthoc"  # in a run folder
IMAGES = 2  # of a batch of the pass for LogN, what a GPU gets in the usual training
COUNTED = ("norcal", "logit_adjustment", "iif", "fracal")  # methods that need the counts of the classes
FROM_FILES = ("fracal", "logn")  # methods that need more than a checkpoint holds
Arrays = dict[str, np.ndarray]


def calibrate(model: MaskRCNN, config: Config, run: Path) -> None:
    """Let `model` score as `config.eval.posthoc` says; "none": as its head does. Every rank must call.

    run: the run folder, where facts of the training set are kept. UserError where they cannot be had.
    """
    model.roi_heads.calibration = None
    if config.eval.posthoc != "none":
        facts = class_facts(model, config, run, [config.eval.posthoc])
        device = model.pixel_mean.device
        model.roi_heads.calibration = calibration(config.eval, facts, has_sigmoids(config.head), device)


def posthoc_text(config: Config) -> str:
    """The method and its options, and the training annotations where it needs them; "" for none."""
    name = config.eval.posthoc
    if name == "none":
        return ""
    options = to_dict(config.eval).get(name, {})
    text = " ".join([name, *(f"{key}={show(value)}" for key, value in options.items())])
    file = Path(config.data.train_annotations)
    known = f" (sha256 {file_hash(file)})" if file.is_file() else ""
    return f"{text} by {file}{known}" if name in FROM_FILES else text


def class_facts(model: MaskRCNN, config: Config, run: Path, methods: Collection[str]) -> ClassFacts:
    """What `methods` need to know of the classes; computed once, kept in `run`. Every rank must call."""
    stats, found = model.stats, {}
    if not stats.instance_counts.any() and (counted := sorted({*COUNTED} & {*methods})):
        raise UserError(
            f"eval.posthoc = {counted[0]}: needs to know how often each class is in the training data, which this "
            "checkpoint does not; convert it again with annotations=TRAIN.json (scripts/convert.py)"
        )
    images = stats.file_images or stats.image_total
    if "fracal" in methods:
        found = _dimension(model, config, run / FOLDER)
        images = int(found.pop("images"))
    if "logn" in methods:
        found |= _moments(model, config, run / FOLDER)
    if "tau_norm" in methods:
        layer = model.roi_heads.classifier.fc_cls
        weight_LD, bias_L = (layer.get_parameter(name).detach().double().cpu() for name in ("weight", "bias"))
        found |= {"norm": weight_LD.norm(dim=1)[:-1].numpy(), "bias": bias_L[:-1].numpy()}
    counts = {"image_counts": stats.image_counts, "instance_counts": stats.instance_counts}
    return ClassFacts(**counts, images=images, **found)


def _kept(file: Path, inputs: str, compute: Callable[[], Arrays]) -> Arrays:
    """The arrays in `file`, which rank 0 computes and writes where they are not there or are of other inputs."""
    if distributed.is_main() and _read(file).get("inputs") != inputs:
        values = compute()
        with atomic_write(file) as temporary:
            np.savez(temporary, inputs=np.array(inputs), **values)  # type: ignore[arg-type]
        print_line(f"post-hoc: wrote {file}")
    distributed.barrier()
    return {name: values for name, values in _read(file).items() if name != "inputs"}


def _read(file: Path) -> Arrays:
    """The arrays in a file; {} where it is not there or cannot be read, as half a copy."""
    try:
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}


def _dimension(model: MaskRCNN, config: Config, folder: Path) -> Arrays:
    """FRACAL's box-counting dimension of each class, and the images of the training file."""
    path, data = Path(config.data.train_annotations), config.data
    there = sorted(folder.glob("box_dimension_*.npz"))
    if not path.is_file() and len(there) == 1:  # a run folder that was taken to another machine
        print_line(f"post-hoc: {path} is not here; {there[0]} is used, which was made of it elsewhere")
        return {name: values for name, values in _read(there[0]).items() if name != "inputs"}

    def compute() -> Arrays:
        annotations = open_annotations(path, data.rare_max, data.common_max)
        annotations.require_same_classes(model.stats, "the checkpoint", more=data.drop_empty)
        annotations = annotations.of_classes(model.stats.category_ids)
        rows = np.flatnonzero(~(annotations.crowd | annotations.ignore) & np.isfinite(annotations.xywh).all(axis=1))
        sizes = annotations.image_sizes[annotations.image_of[rows]][:, ::-1]  # width, height
        centres = (annotations.xywh[rows, :2] + annotations.xywh[rows, 2:] / 2) / sizes
        dimension = box_counting_dimension(centres, annotations.labels[rows], len(model.stats))
        return {"dimension": dimension, "images": np.array(len(annotations))}

    content = file_hash(path) if path.is_file() else ""
    return _kept(folder / f"box_dimension_{content}.npz", f"annotations {content}", compute)


def _moments(model: MaskRCNN, config: Config, folder: Path) -> Arrays:
    """LogN's moments of the logits over the training rows of an epoch, or of its first images."""
    options, path = config.eval.logn, Path(config.data.train_annotations)
    if not path.is_file():
        raise UserError(f"eval.posthoc = logn: needs the training set, and there is no {path}; data.train_annotations")
    plain = to_dict(config)
    inputs = {"weights": weights_hash(model), "annotations": file_hash(path), "seed": config.seed}
    inputs |= {"images": options.images, "momentum": options.momentum}
    inputs |= {key: plain[key] for key in ("sampler", "model")}
    seen = (
        *("resize", "short_edges", "long_edge", "canvas", "lsj_scale", "flip", "copy_paste", "paste_from"),
        *("exif", "scale_16bit", "keep_empty", "without_mask", "max_instances"),
    )
    text = json_text(inputs | {key: plain["data"][key] for key in seen})

    def compute() -> Arrays:
        annotations = train_annotations(config)
        annotations.require_same_classes(model.stats, "the checkpoint")
        dataset = train_dataset(config, annotations)
        # The images as training shows them in its first epoch, by the sampler of the run.
        plan = training_plan(dataset, config.sampler, config.data, IMAGES, config.seed)
        shown = plan.epoch(0)[: -(-options.images // IMAGES) or None]
        chosen = [[ShownImage(image, 0, repeat) for image, repeat, _ in batch.tolist()] for batch in shown]
        moments = LogitMoments(len(model.stats), options.momentum)
        model.eval()
        model.rpn.train()  # proposals as in training; nothing in it learns by itself
        batches = Batches(dataset, chosen, len(chosen), config.data.workers)
        for samples in progress(batches, len(batches), "logits of training rows"):
            moments.update(model.training_logits(samples))
        model.eval()
        return {"mean": moments.mean.numpy(), "variance": moments.variance.numpy()}

    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    return _kept(folder / f"logit_moments_{name}.npz", text, compute)
