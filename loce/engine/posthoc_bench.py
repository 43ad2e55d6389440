"""Post-hoc bench: every calibration and a grid of its parameter, evaluated from stored regions of one inference.

Parameters are chosen on images of the training set, by box AP; the validation data sees one setting of each method.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from loce.checkpoint.load import Checkpoint, weights_hash
from loce.config import UNCAPPED, Config, UserError, has_sigmoids
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import train_annotations, val_annotations
from loce.data.samplers import memory_fill_images
from loce.engine.class_facts import FOLDER, class_facts
from loce.engine.inference import check_evaluation, with_training_groups
from loce.engine.ranks import process_group
from loce.engine.region_store import read_regions, store_regions
from loce.evaluation.annotations import FederatedFilter, GroundTruth, load_annotations, only_images
from loce.evaluation.bootstrap import METRICS, Tallies, tally
from loce.evaluation.calibration import NAMES as CALIBRATION
from loce.evaluation.comparison import compare
from loce.evaluation.detections import concatenate
from loce.evaluation.lvis_ap import Evaluation, choose_protocol, evaluate_loaded
from loce.evaluation.report import choose_protocols
from loce.models.mask_rcnn import MaskRCNN
from loce.posthoc import ClassFacts, calibration
from loce.utils import distributed
from loce.utils.files import csv_text, require_writable, write_text
from loce.utils.progress import progress
from loce.utils.yaml_text import parse_value, show

PLAIN = "plain"


class Grid(NamedTuple):
    """Settings of a method: the values of one option, beside words that are the same in all."""

    posthoc: str
    option: str
    values: tuple[Any, ...]
    fixed: tuple[str, ...] = ()

    @property
    def settings(self) -> list[tuple[str, ...]]:
        """The words of each."""
        chosen = (f"eval.posthoc={self.posthoc}", *self.fixed)
        return [(*chosen, f"{self.option}={show(value)}") for value in self.values]


GRIDS = {
    "norcal": Grid("norcal", "eval.norcal.gamma", (0.2, 0.4, 0.6, 0.8, 1.0)),
    "norcal_instances": Grid(
        "norcal", "eval.norcal.gamma", (0.2, 0.4, 0.6, 0.8, 1.0), ("eval.norcal.counts=instances",)
    ),
    "logit_adjustment": Grid("logit_adjustment", "eval.logit_adjustment.tau", (0.1, 0.2, 0.4, 0.7, 1.0)),
    "tau_norm": Grid("tau_norm", "eval.tau_norm.tau", (0.25, 0.5, 1.0, 1.5, 2.0)),
    "temperature": Grid("temperature", "eval.temperature.t", (0.5, 0.7, 1.5, 2.0, 3.0)),
    "iif": Grid("iif", "eval.iif.variant", ("raw", "smooth", "base2", "base10", "normit")),
    "logn": Grid("logn", "eval.logn.strength", (0.25, 0.5, 0.75, 1.0, 1.25)),
    "fracal": Grid("fracal", "eval.fracal.exponent", (0.0, 1.0, 2.0, 3.0, 4.0)),
}


def choose_grids(methods: Sequence[str], words: Sequence[str]) -> tuple[dict[str, Grid], list[str]]:
    """The grids of the methods (all where none is named) as `words` change them, and the words that are of no method.

    eval.norcal.gamma=[0.5, 0.7] takes the place of a grid's values, eval.logn.images=500 stands in all its settings.
    UserError for a method that there is not.
    """
    if unknown := [name for name in methods if name not in GRIDS]:
        raise UserError(f"methods: {', '.join(unknown)} not known; there are {', '.join(GRIDS)}")
    grids, others = {name: GRIDS[name] for name in methods or GRIDS}, []
    for word in words:
        key, _, text = word.partition("=")
        value, own = parse_value(text), [n for n, grid in grids.items() if key.startswith(f"eval.{grid.posthoc}.")]
        others += [] if own else [word]
        for name in own:
            grid = grids[name]
            if key == grid.option:
                grids[name] = grid._replace(values=tuple(value) if isinstance(value, list) else (value,))
            else:
                grids[name] = grid._replace(fixed=(*grid.fixed, word))
    return grids, others


class Data(NamedTuple):
    """Stored regions of a set of images, and what there is to find in them."""

    files: list[Path]
    truth: GroundTruth


def bench(
    path: Path,
    methods: Sequence[str] = (),
    words: Sequence[str] = (),
    tune: int = 10,
    most: tuple[int, int] = (300, 60),
    resamples: int = 1000,
    device: str = "auto",
) -> str:
    """Evaluate post-hoc methods on a run and choose their parameters; the table, also in RUN/posthoc/bench.

    words: options that take the checkpoint's place, and grids (`choose_grids`); tune: images of each class that the
    parameters are chosen on, of the training set; most: regions of an image and classes of a region that are stored.
    Every rank must call.
    """
    checkpoint, started = Checkpoint.open(path), time.monotonic()
    run = path if path.is_dir() else path.with_suffix("")
    grids, others = choose_grids(methods, words)
    settings = {name: grid.settings for name, grid in grids.items()}
    config, left_out = checkpoint.config_with(others), []
    configs = {PLAIN: [config]}
    # Every setting is built first: what is wrong with one is said before any work.
    for name, all_of in list(settings.items()):
        try:
            configs[name] = [checkpoint.config_with([*others, *words]) for words in all_of]
        except UserError as error:
            if methods:
                raise
            left_out.append(f"left out: {name}: {error}")
            del settings[name]
    if config.eval.posthoc != "none":
        raise UserError("eval.posthoc: this command compares methods with none; leave it out, and name methods=...")
    require_writable(run)
    with process_group(device) as chosen:
        model = checkpoint.detector(config).to(chosen).eval()
        facts = {name: class_facts(model, all_of[0], run, [all_of[0].eval.posthoc]) for name, all_of in configs.items()}
        train, val = train_annotations(config), val_annotations(config)
        check_evaluation(config, val, checkpoint.classes, str(checkpoint.path))
        train.require_same_classes(checkpoint.classes, str(checkpoint.path))
        val = val.of_classes(checkpoint.classes.category_ids)
        fills = memory_fill_images(train, tune, np.random.default_rng([config.seed, tune]))
        place = (model, config, run, most)
        tuning = _stored(*place, "train", train, config.data.train_images, sorted(index for index, _ in fills))
        there = np.setdiff1d(np.arange(len(val)), val.absent).tolist()
        testing = _stored(*place, "val", val, config.data.val_images, there)
        if not distributed.is_main():
            return ""
        stored, began, cpu = time.monotonic() - started, time.monotonic(), time.process_time()

        # Every setting on the training images, then the best of each method on the validation images.
        every = [(name, c) for name, all_of in configs.items() for c in all_of]
        protocols = [rules.name for rules in choose_protocols(config.eval.protocol, testing.truth)]
        found = _evaluate(tuning, [(c, facts[name]) for name, c in every], train, protocols[:1])
        aps = {name: [e.metrics for (n, _), (e,) in zip(every, found, strict=True) if n == name] for name in configs}
        best = {name: int(np.argmax([metrics["AP"] for metrics in all_of])) for name, all_of in aps.items()}
        swept, cpu = time.monotonic() - began, time.process_time() - cpu
        protocols += [name for name in UNCAPPED if testing.truth.federated and name not in protocols]
        final = _evaluate(testing, [(configs[name][n], facts[name]) for name, n in best.items()], val, protocols)
        tallies = {name: [tally(one) for one in of_all] for name, of_all in zip(best, final, strict=True)}

        # What was found, on paper.
        told = {name: " ".join(settings[name][n]) if name in settings else "" for name, n in best.items()}
        lines = [
            f"parameters: chosen by box AP on {len(tuning.truth.image_ids)} training images (up to {tune} of each "
            f"class, seed {config.seed}), which the detector was trained on",
            f"numbers: box AP on {len(testing.truth.image_ids)} validation images, protocol {protocols[0]}; in "
            "brackets the 95% interval of the difference to the plain scores, over images; a lower ECE is better",
            "",
            *table(tallies, told, resamples, protocols),
            "",
            *left_out,
            *_at_an_end(grids, best),
            f"{len(every)} settings on {len(tuning.truth.image_ids)} images: {swept:.1f} s ({cpu:.1f} of CPU); "
            f"before, regions and class facts: {stored:.1f} s",
            "masks: the same command line with scripts/evaluate.py gives them, for the detections that survive:",
            " ".join([f"python scripts/evaluate.py checkpoint={path}", *others, told[_winner(aps, best)]]).rstrip(),
        ]
        write_text(run / FOLDER / "bench" / "sweep.csv", _sweep(settings, aps))
        write_text(run / FOLDER / "bench" / "table.md", "\n".join(lines) + "\n")
        return "\n".join(lines)


def _at_an_end(grids: Mapping[str, Grid], best: Mapping[str, int]) -> list[str]:
    """A line where the best value of an option is the first or last of its grid, so that others may be better."""
    found = [
        f"{name} ({grid.option}={show(grid.values[best[name]])})"
        for name, grid in grids.items()
        if name in best and len(grid.values) > 1 and best[name] in (0, len(grid.values) - 1)
        if isinstance(grid.values[0], (int, float))
    ]
    return [f"best at an end of the grid, so try others (OPTION=[...]): {', '.join(found)}"] if found else []


def _winner(aps: Mapping[str, Sequence[Mapping[str, float]]], best: Mapping[str, int]) -> str:
    """The method with the highest AP on the training images."""
    return max(best, key=lambda name: aps[name][best[name]]["AP"])


def _stored(
    model: MaskRCNN,
    config: Config,
    run: Path,
    most: tuple[int, int],
    name: str,
    annotations: LVISAnnotations,
    images: str,
    indices: Sequence[int],
) -> Data:
    """Regions of some images, stored in RUN/posthoc/regions_NAME_HASH unless they are there, and their ground truth."""
    ids = annotations.image_ids[list(indices)]
    kept = f"at most {most[0]} regions and {most[1]} classes, images {hashlib.sha256(ids.tobytes()).hexdigest()[:12]}"
    data = config.data
    pixels = f"{data.test_short_edge} x {data.long_edge} px, exif {data.exif}, 16 bits {data.scale_16bit}"
    source = f"weights {weights_hash(model)}, images {images} at {pixels}, {kept}"
    folder = run / FOLDER / f"regions_{name}_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    sigmoid = has_sigmoids(config.head)
    files = store_regions(model, config, annotations, images, indices, folder, source, most, sigmoid)
    truth = load_annotations(annotations, False, config.data.allow_misplaced)
    if len(ids) < len(truth.image_ids):
        truth = only_images(truth, ids, "those that regions are stored of")
    return Data(files, with_training_groups(truth, model.stats, more=config.data.drop_empty))


def _evaluate(
    data: Data,
    settings: Sequence[tuple[Config, ClassFacts]],
    annotations: LVISAnnotations,
    protocols: Sequence[str],
) -> list[list[Evaluation]]:
    """The box evaluation of each setting by each protocol: all settings on one file of regions, then on the next."""
    chosen: list[Callable[[Tensor], Tensor]] = [calibration(c.eval, f, has_sigmoids(c.head)) for c, f in settings]
    rules = [choose_protocol(name) for name in protocols]
    uncapped = any(name in UNCAPPED for name in protocols)
    allowed = FederatedFilter(data.truth, annotations.stats.category_ids).allowed if uncapped else None
    parts: list[list[Any]] = [[] for _ in settings]
    for file in progress(data.files, len(data.files), "calibration", "files"):
        regions = read_regions(file, len(annotations.stats))
        for own, scores, (config, _) in zip(parts, chosen, settings, strict=True):
            own.append(regions.detections(regions.scores(scores), config.eval, annotations.stats.category_ids, allowed))
    works = progress(parts, len(parts), "evaluation", "settings")
    return [evaluate_loaded(data.truth, concatenate(own), "bbox", rules) for own in works]


def table(
    tallies: Mapping[str, Sequence[Tallies]],
    told: Mapping[str, str],
    resamples: int,
    protocols: Sequence[str],
) -> list[str]:
    """Rows of a Markdown table, in percent: AP and ECE, with those of groups, by the first protocol, AP by the others.

    Beside each value stands its difference to that of the plain scores.
    """
    columns = [(0, metric) for metric in METRICS]
    columns += [(n, metric) for n in range(1, len(protocols)) for metric in ("AP", "APr")]
    columns += [(0, name) for name in CALIBRATION if name.startswith("ECE")]
    names = [metric if not n else f"{metric} {protocols[n]}" for n, metric in columns]
    lines = [f"| method | {' | '.join(names)} | setting |", "|---" * (len(names) + 2) + "|"]
    for name, own in tallies.items():
        # The plain scores are compared with themselves for their values alone.
        times = 1 if name == PLAIN else resamples
        rows = [compare(plain, one, times) for plain, one in zip(tallies[PLAIN], own, strict=True)]
        cells = []
        for n, metric in columns:
            row = {key: 100 * value for key, value in rows[n][metric].items()}
            between = f" {row['difference']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"
            known = f"{row['second']:.1f}{between if name != PLAIN and np.isfinite(row['low']) else ''}"
            cells.append(known if np.isfinite(row["second"]) else "-")
        lines.append(f"| {name} | {' | '.join(cells)} | {told[name]} |")
    return lines


def _sweep(settings: Mapping[str, Sequence[Sequence[str]]], aps: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """CSV of every setting on the training images."""
    rows = [["method", "setting", *METRICS]]
    for name, found in aps.items():
        for words, metrics in zip(settings.get(name, [[]]), found, strict=True):
            rows.append([name, " ".join(words), *(f"{metrics[metric]:.6f}" for metric in METRICS)])
    return csv_text(rows)
