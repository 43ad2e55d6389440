"""Image samplers: uniform, repeat-factor, class-balanced and bi-level sampling, and the batches of an epoch.

Repeat-factor sampling: Gupta et al., LVIS (arXiv 1908.03195); by images and instances: Yaman et al., IRFS (arXiv
2305.08069); exponentially: Ahmed et al., E-IRFS (arXiv 2503.21893). Class-balanced sampling: Kang et al., Decoupling
(arXiv 1910.09217), Sec. 3. Bi-level sampling, its first level: Wang et al., SimCal (arXiv 2007.11978), Sec. 4. The meta
batch: Ren et al., Balanced Meta-Softmax (arXiv 2007.10740). An epoch is a pure function of (data, options, seed,
epoch), the same on every rank. Shapes: T training images, P (image, label) pairs, C classes, E images shown in an
epoch, B batch size.
"""

from dataclasses import dataclass

import numpy as np

from loce.config import SamplerConfig
from loce.data.annotations.lvis import LVISAnnotations
from loce.utils.classes import META

_STREAM = 0x5A3B  # keeps these random numbers apart from those of the transforms
_LISTS = 0x5A3C  # and the lists of class-balanced sampling from both
_ENOUGH = 100  # instances; classes that have more are alike in SimCal


@dataclass(frozen=True)
class ImageLabels:
    """Which classes each training image shows.

    images: (T,) int64 image indices. labels: (P,) the distinct labels, image by image. first: (T+1,) into labels;
    images without objects have none (`data.keep_empty`). instances: (C,) how many of each class they show together.
    """

    images: np.ndarray
    labels: np.ndarray
    first: np.ndarray
    instances: np.ndarray

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.instances)

    @property
    def image_counts(self) -> np.ndarray:
        """(C,) images that show each class."""
        return np.bincount(self.labels, minlength=self.num_classes)

    @property
    def owner(self) -> np.ndarray:
        """(P,) the image, as a position 0..T-1, of each pair."""
        return np.repeat(np.arange(len(self.images)), np.diff(self.first))


def image_labels(annotations: LVISAnnotations) -> ImageLabels:
    """The classes of the images that training uses, from the annotations that it uses."""
    num_classes = len(annotations.stats)
    rows = annotations.train_rows
    rows = rows[np.isin(annotations.image_of[rows], annotations.train_images)]
    pairs = np.unique(annotations.image_of[rows].astype(np.int64) * num_classes + annotations.labels[rows])
    first = np.searchsorted(pairs // num_classes, annotations.train_images)
    instances = np.bincount(annotations.labels[rows], minlength=num_classes)
    return ImageLabels(annotations.train_images, pairs % num_classes, np.append(first, len(pairs)), instances)


def repeat_factors(labels: ImageLabels, threshold: float, by: str = "images", alpha: float = 2.0) -> np.ndarray:
    """(T,) how often an epoch shows each image on average: the largest factor of its classes, 1 without objects.

    With f_c the share of training images that show class c, b_c its share of all instances, and t the threshold:
    images: max(1, sqrt(t / f_c)) (LVIS); linear: max(1, t / f_c); both: max(1, sqrt(t / sqrt(f_c b_c))) (IRFS);
    exponential: exp(alpha sqrt(t / sqrt(f_c b_c))) (E-IRFS), as released with n_c / sum n in place of f_c, n at least
    1, and instances counted one too high.
    """
    images, instances = labels.image_counts, labels.instances
    share = np.maximum(images / len(labels.images), 1e-12)
    if by == "linear":
        factors = np.maximum(1.0, threshold / share)
    elif by == "both":
        both = np.sqrt(share * np.maximum(instances / max(instances.sum(), 1), 1e-12))
        factors = np.maximum(1.0, np.sqrt(threshold / both))
    elif by == "exponential":
        counted, boxes = np.maximum(images, 1), instances + 1
        both = np.sqrt(counted / counted.sum() * (boxes / boxes.sum()))
        factors = np.exp(alpha * np.sqrt(threshold / both))
    else:
        factors = np.maximum(1.0, np.sqrt(threshold / share))
    return _largest(labels, factors, 1.0)


def _largest(labels: ImageLabels, values: np.ndarray, otherwise: float) -> np.ndarray:
    """(T,) the largest of `values` (C,) over each image's classes; `otherwise` is below all and that of no class."""
    largest = np.full(len(labels.images), otherwise)
    np.maximum.at(largest, labels.owner, values[labels.labels])
    return largest


def epoch_images(
    labels: ImageLabels,
    sampler: SamplerConfig,
    generator: np.random.Generator,
    seed: int = 0,
    epoch: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(E,) image indices that one epoch shows, in no particular order, and (E,) the class each was drawn for or -1.

    generator: of this epoch; seed, epoch: for class-balanced sampling, which goes on from one epoch to the next.
    """
    if sampler.name == "bilevel":
        return _bilevel(labels, sampler.bilevel_tau, generator)
    if sampler.name == "uniform":
        images = labels.images
    elif sampler.name == "repeat_factor":
        factors = repeat_factors(labels, sampler.repeat_threshold, sampler.repeat_by, sampler.repeat_alpha)
        images = _repeated(labels, factors, sampler.repeat_rounding, generator)
    elif sampler.name == "class_balanced":
        images = _class_balanced(labels, seed, epoch)
    else:
        raise ValueError(f"no sampler is called {sampler.name}")
    return images, np.full(len(images), -1)


def _repeated(
    labels: ImageLabels,
    factors: np.ndarray,
    rounding: str,
    generator: np.random.Generator,
) -> np.ndarray:
    """Every image r_I times: rounded up, the same in all epochs (MMDetection's rule), or stochastic (detectron2's).

    Stochastic: the fraction is rounded up or down at random in each epoch, so that r_I is kept on average. Drawn: as
    many images as there are, with replacement and probability ~ r_I (E-IRFS's).
    """
    if rounding == "drawn":
        return generator.choice(labels.images, len(labels.images), p=factors / factors.sum())
    if rounding == "up":
        return np.repeat(labels.images, np.ceil(factors).astype(np.int64))
    whole = np.floor(factors)
    times = whole + (generator.random(len(factors)) < factors - whole)
    return np.repeat(labels.images, times.astype(np.int64))


def _class_balanced(labels: ImageLabels, seed: int, epoch: int) -> np.ndarray:
    """As many images as there are: round and round a shuffled list of classes.

    A class's turn shows the next image of the class's own shuffled list, with all annotations. The lists are those of
    the whole training: an epoch goes on where the one before ended, so that a frequent class shows all of its images
    before one comes again. Within an epoch images are shuffled anyway (`plan_batches`), so the lists need not be.
    """
    generator = np.random.default_rng([_LISTS, seed])
    order = np.lexsort((generator.random(len(labels.labels)), labels.labels))
    images = labels.images[labels.owner[order]]
    count = labels.image_counts
    first = np.cumsum(count) - count
    classes = generator.permutation(np.flatnonzero(count))
    position = epoch * len(labels.images) + np.arange(len(labels.images))  # over the whole training
    turn, index = np.divmod(position, len(classes))
    chosen = classes[index]
    return images[first[chosen] + turn % count[chosen]]


def _bilevel(labels: ImageLabels, tau: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As many images as there are: each time a class, then one of its images, both drawn with replacement.

    A class is drawn with probability ~ min(instances, 100)^tau: all alike where tau is 0. Classes without images never.
    """
    count = labels.image_counts
    weights = np.where(count > 0, np.minimum(labels.instances, _ENOUGH) ** float(tau), 0)
    classes = generator.choice(len(count), len(labels.images), p=weights / weights.sum())
    images = labels.images[labels.owner[np.argsort(labels.labels, kind="stable")]]  # class by class
    first = np.cumsum(count) - count
    return images[first[classes] + generator.integers(count[classes])], classes


def meta_images(labels: ImageLabels, amount: int, generator: np.random.Generator) -> np.ndarray:
    """(amount,) images of the meta batches: with replacement, probability ~ max over an image's classes of 1 / f_c."""
    rarity = 1 / np.maximum(labels.image_counts, 1)
    weights = _largest(labels, rarity, 0.0)
    return generator.choice(labels.images, amount, p=weights / weights.sum())


def plan_batches(
    indices: np.ndarray,
    wide: np.ndarray,
    batch_size: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """(iterations, B) positions in `indices`, every one at least once, in random order.

    indices: (E,) images; wide: (E,) bool, wider than high. Neighbours 2 i and 2 i + 1 of a batch have the same shape
    (with an odd batch size: no grouping), so that two images on a rank need little padding. What a group or the last
    batch lacks is drawn again from the epoch. The ranks only share a batch out, so it does not depend on their number.
    """
    unit = 1 if batch_size % 2 else 2
    groups = [np.arange(len(indices))] if unit == 1 else [np.flatnonzero(wide), np.flatnonzero(~wide)]
    units = []
    for group in groups:
        if len(group):
            shuffled = generator.permutation(group)
            filling = generator.choice(group, -len(group) % unit)
            units.append(np.concatenate([shuffled, filling]).reshape(-1, unit))
    pairs = generator.permutation(np.concatenate(units))
    filling = pairs[generator.integers(len(pairs), size=-len(pairs) % (batch_size // unit))]
    return np.concatenate([pairs, filling]).reshape(-1, batch_size)


def rank_slice(
    batch: np.ndarray,
    rank: int,
    world: int,
    accumulate: int,
) -> np.ndarray:
    """(accumulate, n, ...) what rank `rank` of `world` takes of a batch (B, ...) in each micro-step; n images at once.

    In micro-step a these are rows (a * world + rank) * n and the following, so the batch is the same for any `world`.
    """
    images, rest = divmod(len(batch), world * accumulate)
    if rest or not images:
        raise ValueError(f"a batch of {len(batch)} cannot be shared by {world} ranks and {accumulate} micro-steps")
    return batch.reshape(accumulate, world, images, *batch.shape[1:])[:, rank]


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Every batch of a training. wide: (I,) bool for all images of the file, or all false for no grouping.

    meta: every training image has an image of a meta batch beside it, which `batch_size`, B, does not count.
    """

    labels: ImageLabels
    wide: np.ndarray
    sampler: SamplerConfig
    batch_size: int
    seed: int
    meta: bool = False

    @property
    def rows(self) -> int:
        """Images that pass through the model in an iteration, over all ranks: B, or 2B with a meta batch."""
        return self.batch_size * (1 + self.meta)

    def epoch(self, epoch: int) -> np.ndarray:
        """(iterations, rows, 3) int64: image, how often this epoch has shown it before (0, 1, ...), sampled class.

        sampled class: that the image was drawn for by bi-level sampling, META for an image of the meta batch, else -1.
        With a meta batch the rows are training image, meta image, training image, ...: any share has as many of both.
        """
        generator = np.random.default_rng([_STREAM, self.seed, epoch])
        images, classes = epoch_images(self.labels, self.sampler, generator, self.seed, epoch)
        batches = plan_batches(images, self.wide[images], self.batch_size, generator)
        shown, classes = images[batches], classes[batches]
        if self.meta:
            images = meta_images(self.labels, shown.size, generator)
            batches = plan_batches(images, self.wide[images], self.batch_size, generator)[: len(shown)]
            shown = np.stack([shown, images[batches]], axis=2).reshape(len(shown), self.rows)
            classes = np.stack([classes, np.full_like(classes, META)], axis=2).reshape(shown.shape)
        return np.stack([shown, _occurrence(shown.ravel()).reshape(shown.shape), classes], axis=2)

    def iterations(self, epochs: int) -> list[int]:
        """The number of iterations of each epoch; they differ with repeat-factor sampling."""
        return [len(self.epoch(epoch)) for epoch in range(epochs)]


def _occurrence(values: np.ndarray) -> np.ndarray:
    """How often each value came before, in order: [7, 3, 7, 7] -> [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    new = np.append(True, ordered[1:] != ordered[:-1])
    positions = np.arange(len(values))
    start = np.maximum.accumulate(np.where(new, positions, 0))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = positions - start
    return result


def held_out_images(labels: ImageLabels, per_class: int, generator: np.random.Generator) -> np.ndarray:
    """(H,) int64 ascending: training images to hold out, so that the rates of memory.draw=adaptive have a loss.

    Of each class `per_class` where there are enough, from the rarest class on, at random; never more than a quarter of
    a class's images, so that classes with fewer than 4 have none.
    """
    most = labels.image_counts // 4
    wanted, held = np.minimum(per_class, most), np.zeros(labels.num_classes, np.int64)
    order = generator.permutation(len(labels.labels))  # of pairs
    order = order[np.argsort(labels.labels[order], kind="stable")]
    shown = np.split(labels.owner[order], np.cumsum(labels.image_counts)[:-1])  # images of each class, at random
    chosen = np.zeros(len(labels.images), bool)
    for c in np.argsort(labels.image_counts, kind="stable"):
        for image in shown[c]:
            if held[c] >= wanted[c]:
                break
            own = labels.labels[labels.first[image] : labels.first[image + 1]]
            if not chosen[image] and (held[own] < most[own]).all():
                chosen[image] = True
                held[own] += 1
    return labels.images[chosen]


def memory_fill_images(
    annotations: LVISAnnotations, per_class: int, generator: np.random.Generator
) -> list[tuple[int, np.ndarray]]:
    """Instances that fill the feature memory: up to `per_class` of every class, from distinct images, at random.

    Returns (image index, annotation rows to store, ascending), each image once, in random order.
    """
    rows = annotations.train_rows[np.isin(annotations.image_of[annotations.train_rows], annotations.train_images)]
    rows = generator.permutation(rows)
    labels, images = annotations.labels[rows].astype(np.int64), annotations.image_of[rows].astype(np.int64)
    _, one_per_image = np.unique(labels * len(annotations) + images, return_index=True)  # first of the shuffled rows
    rows = generator.permutation(rows[one_per_image])
    chosen = np.sort(rows[_occurrence(annotations.labels[rows]) < per_class])
    chosen = chosen[np.argsort(annotations.image_of[chosen], kind="stable")]
    images, first = np.unique(annotations.image_of[chosen], return_index=True)
    own = np.split(chosen, first[1:])
    return [(int(images[i]), own[i]) for i in generator.permutation(len(images))]
