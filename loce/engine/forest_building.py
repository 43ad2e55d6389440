"""Parent trees of Forest R-CNN (ACM MM 2020), Sec. 3.1, made from a data set: from looks, shapes or words.

visual: k-means of the classes' mean features, after the shared FCs of a trained detector, on ground-truth boxes.
geometrical: k-means of the classes' mean shapes: the mask in its box on an 8 x 8 grid, and log2(width / height).
lexical: a JSON file of the user, {class name: parent name}.
Means are over up to `instances` instances of a class, from distinct images. A class without instances goes to the
parent whose centre is nearest to the mean of all classes. Shapes: C classes, F numbers that describe a class.
"""

import json
from pathlib import Path

import numpy as np
import torch

from loce.checkpoint.load import load_model
from loce.config import Config, UserError, raise_problems
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import train_annotations
from loce.data.dataset import TrainDataset, unaugmented
from loce.data.loader import fill_batches
from loce.data.masks import cut_runs
from loce.data.samplers import memory_fill_images
from loce.heads.forest_trees import k_means, squared_distances, write_trees
from loce.models.mask_rcnn import MaskRCNN
from loce.models.roi_heads import BOX_SIDE
from loce.utils.errors import first_few
from loce.utils.progress import progress

GRID = 8
IMAGES = 2  # at once


def build_trees(
    config: Config,
    start: str,
    lexical: str,
    instances: int,
    device: torch.device,
) -> dict[str, int]:
    """Write the trees that `config` uses to its head.forest.trees: tree -> parents. UserError with all that is missing.

    start: checkpoint of a detector trained on these classes, for the visual tree; lexical: the user's file; instances:
    of a class that are looked at.
    """
    forest = config.head.forest
    annotations = train_annotations(config)
    names = annotations.stats.names
    seen = int((np.bincount(annotations.labels[annotations.train_rows], minlength=len(names)) > 0).sum())
    _check(config, start, lexical, seen)
    trees, made = {}, {}
    if forest.visual:
        model = load_model(start, device)
        annotations.require_same_classes(model.stats, start)
        means = class_features(model, config, annotations, instances)
        trees["visual"] = cluster(means, forest.visual, config.seed)
        made["visual"] = f"k-means of mean features of {start}, {instances} instances a class"
    if forest.geometrical:
        trees["geometrical"] = cluster(
            class_shapes(annotations, instances, config.seed), forest.geometrical, config.seed
        )
        made["geometrical"] = f"k-means of mean shapes, {instances} instances a class"
    if forest.lexical:
        trees["lexical"] = lexical_tree(Path(lexical), names, forest.lexical)
        made["lexical"] = lexical
    write_trees(Path(forest.trees), annotations.path, names, trees, made)
    return {tree: int(parents.max()) + 1 for tree, parents in trees.items()}


def _check(
    config: Config,
    start: str,
    lexical: str,
    seen: int,
) -> None:
    forest = config.head.forest
    problems = []
    if config.head.name != "forest":
        problems.append(f"head.name = {config.head.name}: only head.name=forest has trees")
    if forest.visual and not start:
        problems.append("checkpoint: must name a trained detector, whose features the visual tree is made of")
    if forest.lexical and not lexical:
        problems.append("lexical: must name a JSON file, {class name: parent name}, for the lexical tree")
    if forest.geometrical and not config.model.masks:
        problems.append("model.masks = false: the geometrical tree is made of masks; set head.forest.geometrical=0")
    for tree in ("visual", "geometrical"):
        if getattr(forest, tree) > seen:
            problems.append(
                f"head.forest.{tree} = {getattr(forest, tree)}: more parents than the {seen} classes with instances"
            )
    raise_problems(problems)


def cluster(means_CF: np.ndarray, parents: int, seed: int) -> np.ndarray:
    """(C,) the parent of each class, from (C, F) descriptions; nan in all of a row: a class without instances."""
    seen_C = np.isfinite(means_CF).all(axis=1)
    tree_C = np.zeros(len(means_CF), np.int64)
    tree_C[seen_C] = k_means(means_CF[seen_C], parents, seed)
    centres = np.stack([means_CF[seen_C & (tree_C == parent)].mean(axis=0) for parent in range(parents)])
    tree_C[~seen_C] = squared_distances(means_CF[seen_C].mean(axis=0)[None], centres)[0].argmin()
    return tree_C


@torch.no_grad()
def class_features(
    model: MaskRCNN,
    config: Config,
    annotations: LVISAnnotations,
    instances: int,
) -> np.ndarray:
    """(C, F) mean over instances of the vector after the shared FCs, on ground-truth boxes of images at test size."""
    still = unaugmented(config.data)
    dataset = TrainDataset(annotations, Path(config.data.train_images), still, config.seed)
    batches = fill_batches(dataset, instances, True, config.seed, IMAGES, config.data.workers, rank=0, world=1)
    roi, device = model.roi_heads, model.pixel_mean.device
    sums_CF = torch.zeros(len(annotations.stats), roi.box_head.fc2.out_features, dtype=torch.float64, device=device)
    counts_C = sums_CF.new_zeros(len(sums_CF))
    for samples in progress(batches, len(batches), "features of classes"):
        batch, _, _ = model.batch_images([sample["image"] for sample in samples])
        boxes = [sample["boxes"][sample["store_rows"]].to(device) for sample in samples]
        labels_N = torch.cat([sample["labels"][sample["store_rows"]] for sample in samples]).to(device)
        x_NF = roi.box_head(roi.pool(model.features(batch), boxes, BOX_SIDE))
        sums_CF.index_add_(0, labels_N, x_NF.double())
        counts_C.index_add_(0, labels_N, torch.ones_like(labels_N, dtype=torch.float64))
    return (sums_CF / counts_C[:, None]).cpu().numpy()  # no instances: 0 / 0 = nan


def class_shapes(annotations: LVISAnnotations, instances: int, seed: int) -> np.ndarray:
    """(C, 65) mean shape of each class: covered share of the box's 8 x 8 cells, each / 8, and log2(width / height).

    So squared distances are mean squared differences of coverage plus squared differences of doublings of the ratio.
    """
    chosen = memory_fill_images(annotations, instances, np.random.default_rng(seed))
    sums_CF = np.zeros((len(annotations.stats), GRID * GRID + 1))
    counts_C = np.zeros(len(sums_CF))
    for image, rows in progress(chosen, len(chosen), "shapes of classes", "images"):
        height, width = (int(side) for side in annotations.image_sizes[image])
        for row, runs in zip(rows, annotations.segmentations.runs(rows, height, width), strict=True):
            bits, _ = cut_runs(runs, height)
            if bits.size:
                sums_CF[annotations.labels[row]] += shape_of(bits)
                counts_C[annotations.labels[row]] += 1
    with np.errstate(invalid="ignore"):
        return sums_CF / counts_C[:, None]  # no instances: nan


def shape_of(bits: np.ndarray) -> np.ndarray:
    """(65,) description of one mask, cut to its box: bits (h, w) uint8."""
    height, width = bits.shape
    cells = _shares(height) @ bits @ _shares(width).T
    return np.append(cells.ravel() / GRID, np.log2(width / height))


def _shares(side: int) -> np.ndarray:
    """(8, side) share of each of 8 equal cells that each pixel covers; rows add up to 1."""
    edges, pixels = np.linspace(0, side, GRID + 1), np.arange(side)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return overlap.clip(min=0) * GRID / side


def lexical_tree(path: Path, names: tuple[str, ...], parents: int) -> np.ndarray:
    """(C,) from the user's {class name: parent name}; UserError for missing or unknown classes, or another number."""
    try:
        parent_of = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"lexical = {path}: cannot be read ({error})") from error
    if not isinstance(parent_of, dict) or not all(isinstance(parent, str) for parent in parent_of.values()):
        raise UserError(f"lexical = {path}: must be an object of texts, {{class name: parent name}}")
    problems = []
    for what, wrong in (("without a parent", set(names) - set(parent_of)), ("unknown", set(parent_of) - set(names))):
        if wrong:
            problems.append(f"lexical = {path}: classes: {len(wrong)} {what}: {first_few(sorted(wrong))}")
    used = list(dict.fromkeys(parent_of[name] for name in names if name in parent_of))
    if len(used) != parents:
        problems.append(f"lexical = {path}: has {len(used)} parents, head.forest.lexical says {parents}")
    raise_problems(problems)
    return np.array([used.index(parent_of[name]) for name in names])
