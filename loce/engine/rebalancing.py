"""Rebalancing of any detector by its exported rows: a head is trained on some, and evaluated on others.

The training: row_training.py. The files: region_store.py, and classifier.npz, the detector's own classifier, beside
those of the training images.
"""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loce.checkpoint.load import require_finite
from loce.config import CONFLICTS, OPTION_OF, UNCAPPED, EvalConfig, UserError
from loce.data.annotations.lvis import LVISAnnotations
from loce.engine.region_store import PATTERN, read_regions
from loce.engine.row_training import RowOptions, image_ids, train_head
from loce.evaluation.annotations import FederatedFilter, load_annotations, only_images
from loce.evaluation.comparison import compare_folders
from loce.evaluation.detections import concatenate
from loce.evaluation.report import choose_protocols, evaluate_and_report
from loce.heads import HEADS, Head
from loce.utils import distributed
from loce.utils.classes import ClassStats
from loce.utils.errors import first_few, raise_problems
from loce.utils.files import atomic_write, json_text, require_writable, write_text
from loce.utils.options import Choice, Conflict, to_dict
from loce.utils.progress import progress

CLASSIFIER = "classifier.npz"  # weight (C+1, D) and bias (C+1,) of the detector's, background last
MORE_THAN_ROWS = ("forest", "simcal", "balms")  # heads that read other features, files or batches

ROW_CONFLICTS: tuple[Conflict, ...] = (
    (("train",), lambda o: not _holds_rows(o.train), f"must name a folder with {PATTERN}"),
    (("val",), lambda o: not _holds_rows(o.val), f"must name a folder with {PATTERN}"),
    (("annotations",), lambda o: not o.annotations, "must name a file"),
    (("val_annotations",), lambda o: not o.val_annotations, "must name a file"),
    (("drops", "epochs"), lambda o: any(d >= o.epochs for d in o.drops), "drops must stay below epochs"),
    (
        ("rows", "positive_fraction"),
        lambda o: o.rows * o.positive_fraction < 1,
        "their product, the positive rows of an image, must be at least 1",
    ),
    (
        ("head.name",),
        lambda o: o.head.name in MORE_THAN_ROWS,
        "this head reads more than rows: convert the detector (docs/rebalance.md) and train it in place",
    ),
    (
        ("head.name", "train"),
        lambda o: o.head.name == "disalign" and not Path(o.train, CLASSIFIER).is_file(),
        f"this head rescales a trained classifier; put {CLASSIFIER} there (docs/rows.md)",
    ),
    *(conflict for conflict in CONFLICTS if all(key.startswith("head.bags") for key in conflict[0])),
)
ROW_OPTION_OF: dict[str, Choice] = {
    **{key: choice for key, choice in OPTION_OF.items() if key.startswith(("head.", "indicator."))},
    "memory": ("memory.enabled", (True,)),
}


def _holds_rows(folder: str) -> bool:
    return bool(folder) and any(Path(folder).glob(PATTERN))


def rebalance(options: RowOptions) -> None:
    """Train a head on rows, OUTPUT/head.pt, and evaluate it, OUTPUT/eval, and the classifier as it was, OUTPUT/before.

    UserError for what is wrong with options, rows or annotations, before training.
    """
    # Everything is read and checked once, before any work.
    require_writable(options.output)
    device = distributed.setup(options.device)
    train = LVISAnnotations.open(options.annotations, masks=False, named=False)
    val = LVISAnnotations.open(options.val_annotations, masks=False, named=False)
    val.require_same_classes(train.stats, options.annotations)
    files = {name: sorted(Path(getattr(options, name)).glob(PATTERN)) for name in ("train", "val")}
    start = _classifier(Path(options.train, CLASSIFIER), len(train.stats))
    widths = {name: _check(files[name], own, name) for name, own in (("train", train), ("val", val))}
    widths |= {CLASSIFIER: start["weight"].shape[1]} if start else {}
    if (images := len(image_ids(files["train"]))) < options.batch_size:
        raise UserError(f"batch_size = {options.batch_size}: there are {images} training images")
    if len(set(widths.values())) > 1:
        raise UserError(f"features differ in width: {', '.join(f'{name} {width}' for name, width in widths.items())}")

    torch.manual_seed(options.seed)
    head = HEADS[options.head.name](widths["train"], train.stats, options.head)
    head = (_adopt(head, start) if start and not options.head.reset else head).to(device)

    # As exported, then the head, then what it did to the numbers.
    before, after = Path(options.output, "before"), Path(options.output, "eval")
    if start:
        plain = _adopt(HEADS["softmax"](widths["train"], train.stats), start)
        evaluate(plain.to(device), files["val"], val, train.stats, options, before)
    train_head(head, files["train"], train, options)
    write_text(Path(options.output, "options.json"), json_text(to_dict(options), indent=2) + "\n")
    with atomic_write(Path(options.output, "head.pt")) as temporary:
        torch.save(head.state_dict(), temporary)
    evaluate(head, files["val"], val, train.stats, options, after)
    if start:
        print("\n" + compare_folders(before, after, max(options.resamples, 1)), end="")
    print(f"the weights of the head are in {options.output}/head.pt, its numbers in {after}")


@torch.no_grad()
def evaluate(
    head: Head,
    files: Sequence[Path],
    annotations: LVISAnnotations,
    training: ClassStats,
    options: RowOptions,
    output: Path,
) -> None:
    """What the head finds in the rows of files, evaluated into the folder `output` as any detector's results are."""
    settings = EvalConfig(**{name: getattr(options, name) for name in ("score_threshold", "nms", "detections")})
    truth = load_annotations(annotations, masks=False)
    protocols = [rules.name for rules in choose_protocols(options.protocol, truth)]
    allowed = FederatedFilter(truth).allowed if {*UNCAPPED} & {*protocols} else None
    parts, device = [], next(head.parameters()).device
    for file in progress(files, len(files), f"detections, {output.name}", "files"):
        regions = read_regions(file, len(training), "features")
        assert regions.features is not None
        scores_RK = head.eval().scores(head(regions.features.to(device))).cpu().gather(1, regions.classes)
        parts.append(regions.detections(scores_RK, settings, annotations.stats.category_ids, allowed))
    ids = image_ids(files)
    if len(ids) < len(truth.image_ids):
        truth = only_images(truth, ids, f"those of {options.val}")
    evaluate_and_report(
        truth,
        concatenate(parts),
        output,
        ["bbox"],
        protocols,
        resamples=options.resamples,
        origin=f"{type(head).__name__} on the rows of {options.val}",
        training=training,
    )


def _check(files: Sequence[Path], annotations: LVISAnnotations, name: str) -> int:
    """Columns of the features of files; UserError with all that is wrong with rows of training or validation images."""
    problems, seen, widths = [], np.zeros(0, np.int64), set()
    for file in progress(files, len(files), f"rows, {name}", "files"):
        try:
            regions = read_regions(file, len(annotations.stats), "features")
        except UserError as error:
            problems.append(str(error))
            continue
        assert regions.features is not None
        widths.add(regions.features.shape[1])
        by_class = name == "train" and regions.labels is None and regions.boxes.dim() == 3
        if by_class:
            problems.append(f"{file}: needs labels, or one box of each row, by which it is matched with objects")
        seen = np.concatenate([seen, regions.image_ids])
    unknown = np.setdiff1d(seen, annotations.image_ids)
    numbers, counts = np.unique(seen, return_counts=True)
    if len(unknown):
        problems.append(f"{name}: images that are not in {annotations.path}: {first_few(unknown)}")
    if (counts > 1).any():
        problems.append(f"{name}: images that are there twice: {first_few(numbers[counts > 1])}")
    if len(widths) > 1:
        problems.append(f"{name}: files have features of different width: {', '.join(map(str, sorted(widths)))}")
    raise_problems(problems)
    return int(widths.pop())


def _classifier(file: Path, classes: int) -> dict[str, Tensor]:
    """The classifier that the detector had, background last; {} where it was not exported."""
    if not file.is_file():
        return {}
    try:
        with np.load(file, allow_pickle=False) as content:
            found = {name: torch.from_numpy(content[name]).float() for name in ("weight", "bias")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: must hold the columns weight and bias ({error}); docs/rows.md") from None
    if found["weight"].dim() != 2 or {len(found["weight"]), *found["bias"].shape} != {classes + 1}:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in found.items())
        raise UserError(f"{file}: {shapes}; {classes} classes and the background, which is last, are {classes + 1}")
    require_finite(found, str(file))
    return found


def _adopt(head: Head, start: Mapping[str, Tensor]) -> Head:
    """The head with the classifier of the detector in the place of its own; UserError where it has another shape."""
    layer = head.fc_cls.state_dict()
    if wrong := [name for name, value in start.items() if name not in layer or layer[name].shape != value.shape]:
        raise UserError(
            f"head.name = {head.options.name}: its layer has another {' and '.join(wrong)} than {CLASSIFIER}; "
            "head.reset=true starts it anew"
        )
    head.fc_cls.load_state_dict(start, strict=False)
    return head
