"""Long tail of Glyph-LVIS: which classes stand in which image, and how often, planned before anything is drawn.

What LVIS v1 looks like, and what version 1 of the set plans (version 2: scenes.py). C classes, N training images, k
class labels an image:

- 405 of 1203 classes are frequent (over 100 training images), 461 common (11-100), 337 rare (1-10). Over the rank, the
  image count falls by one decade through the common and by one through the rare classes, nearly evenly. Here: the same
  shares of C; rank by rank a geometric fall from 100 to 10 over the common and from 10 to 1 over the rare classes; the
  frequent ones follow Zipf's law from M images at rank 1 down to 100, and M makes the labels of all images add up to
  k N. Where N is too small for 100 images a class, all decades shrink alike.
- An image shows about 3.5 classes, some many more; frequent classes come in herds (12.8 instances an image), rare ones
  mostly alone; 0.8% of the images show nothing. Here: 1 + Poisson classes; 1 + geometric instances of each with mean
  1 + 0.55 log10(image count), at most `most_objects` an image; 1% of the images are empty.
- Some labels of LVIS are not exhaustive: objects of the class are in the image without annotation. Here: 5% of the
  labels with three objects or more leave out up to half of them.
- Validation must measure every class, so it is flatter: image counts go with the 10th root of the training counts
  (a factor 2 over three decades), and a class with fewer than 20 instances gets more in the images that show it.

Look-alikes are spread over the ranking, so that a rare class often has a common or frequent twin. All numbers are kept
exactly: every planned object is drawn and stays visible.
"""

from dataclasses import dataclass

import numpy as np

from loce.data.glyphs.characters import families

FREQUENT_SHARE, RARE_SHARE = 405 / 1203, 337 / 1203
EMPTY_SHARE = 0.01
TOP_SHARE = 0.6  # at most this share of the images shows the most frequent class
HERD = 0.55  # growth of the mean number of instances a label per decade of the image count
VALIDATION_INSTANCES = 20


class Statistics:
    """What version 1 draws from: a head by Zipf's law, 1 + Poisson classes an image, herds, one scene for all."""

    not_exhaustive = 0.05  # of the labels with three objects or more
    validation_power = 0.1  # validation images of a class go with this power of its training images

    def head(self, log_top: float, log_end: float, number: int) -> np.ndarray:
        """(number,) logarithms of the image counts of the frequent classes, from the first down to near log_end."""
        return log_top - (log_top - log_end) / np.log(number + 0.5) * np.log(np.arange(1, number + 1))

    def labels(
        self,
        mean: float,
        images: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """(images,) number of classes of each, at least 1."""
        return 1 + rng.poisson(max(0.0, mean - 1), images)

    def instances(self, train_counts_L: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(L,) number of objects of each label, at least 1, from the training images of its class."""
        return rng.geometric(1 / (1 + HERD * np.log10(train_counts_L)))

    def scenes(self, train_counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(C, S) bool, whether a class belongs to a scene."""
        return np.ones((len(train_counts), 1), dtype=bool)


VERSION_1 = Statistics()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Objects of one split; all arrays (L,) int64, one row per class label of an image, by image.

    Row i says: image `images[i]` (0..) shows `instances[i]` >= 1 annotated objects of class `labels[i]` (0 is the most
    frequent) and `left_out[i]` more that are not annotated.
    """

    images: np.ndarray
    labels: np.ndarray
    instances: np.ndarray
    left_out: np.ndarray

    def image_counts(self, classes: int) -> np.ndarray:
        """(C,) number of images per class."""
        return np.bincount(self.labels, minlength=classes)


def ranked_characters(classes: int, rng: np.random.Generator, skipped: int = 0) -> str:
    """The characters of `classes` classes, most frequent first; the members of a family lie evenly apart."""
    keyed = []
    for family in families(classes, skipped):
        members = rng.permutation(list(family))
        start = rng.random()
        keyed += [((start + j / len(family)) % 1, str(member)) for j, member in enumerate(members)]
    return "".join(character for _, character in sorted(keyed))


def long_tail(
    classes: int,
    images: int,
    labels_per_image: float,
    statistics: Statistics = VERSION_1,
) -> np.ndarray:
    """(C,) planned training images per class, falling, each at least 1; together close to labels_per_image * images.

    The groups have LVIS's shares when there are some 55 labels a class or more.
    """
    low, high = 0.0, np.log(max(1.0, TOP_SHARE * images))
    for _ in range(60):  # bisection over log M
        middle = (low + high) / 2
        if _tail_with_top(classes, middle, statistics).sum() < labels_per_image * images:
            low = middle
        else:
            high = middle
    return _tail_with_top(classes, low, statistics)


def _tail_with_top(classes: int, log_top: float, statistics: Statistics) -> np.ndarray:
    """(C,) image counts when the most frequent class has exp(log_top) images."""
    frequent, rare = round(FREQUENT_SHARE * classes), round(RARE_SHARE * classes)
    common = classes - frequent - rare
    decade = min(np.log(10), log_top / 2)  # shrinks where 100 images are too many
    steps = [(np.arange(number) + 0.5) / max(1, number) for number in (common, rare)]
    logs = [statistics.head(log_top, 2 * decade, frequent), 2 * decade - decade * steps[0], decade - decade * steps[1]]
    counts = [np.rint(np.exp(part)).astype(np.int64) for part in logs]
    if decade == np.log(10):  # rounding must not carry a class over a group's bound
        bounds = [(101, None), (11, 100), (1, 10)]
        counts = [np.clip(part, *bound) for part, bound in zip(counts, bounds, strict=True)]
    return np.maximum(np.concatenate(counts), 1)


def validation_counts(
    train_counts: np.ndarray,
    images: int,
    labels_per_image: float,
    statistics: Statistics = VERSION_1,
) -> np.ndarray:
    """(C,) planned validation images per class, each at least 1, in proportion to a power of train_counts."""
    weights = train_counts**statistics.validation_power
    counts = np.rint(weights * labels_per_image * images / weights.sum())
    return np.clip(counts, 1, max(1, int(TOP_SHARE * images))).astype(np.int64)


def plan_split(
    image_counts: np.ndarray,
    train_counts: np.ndarray,
    images: int,
    most_objects: int,
    fewest_instances: int,
    rng: np.random.Generator,
    statistics: Statistics = VERSION_1,
    scenes: np.ndarray | None = None,
) -> Plan:
    """Assign classes to images: class c gets image_counts[c] different images, in those of its scenes first.

    image_counts, train_counts: (C,), of this split and of training; scenes: (C, S) as `Statistics.scenes`, None for
    one that all classes belong to. A class with fewer than `fewest_instances` objects gets more where the images have
    room (`most_objects`).
    """
    if scenes is None:
        scenes = np.ones((len(image_counts), 1), dtype=bool)
    shown_on, labels = _assign(image_counts, images, most_objects, rng, statistics, scenes)
    instances = statistics.instances(train_counts[labels], rng)
    # In random order, labels get the objects that their image has room for.
    order = rng.permutation(len(labels))
    room = most_objects - np.bincount(shown_on, minlength=images)
    for row in order:
        instances[row] = 1 + min(instances[row] - 1, max(0, room[shown_on[row]]))
        room[shown_on[row]] -= instances[row] - 1
    # Some labels leave out up to half of their objects.
    not_exhaustive = (instances >= 3) & (rng.random(len(labels)) < statistics.not_exhaustive)
    left_out = np.where(not_exhaustive, rng.integers(1, np.maximum(2, instances // 2 + 1)), 0)
    instances -= left_out
    # Classes with too few objects get more, one an image and turn.
    missing = fewest_instances - np.bincount(labels, instances, minlength=len(image_counts))
    for row in np.tile(order, fewest_instances):
        if missing[labels[row]] > 0 and room[shown_on[row]] > 0:
            instances[row] += 1
            missing[labels[row]] -= 1
            room[shown_on[row]] -= 1
    return Plan(images=shown_on, labels=labels, instances=instances, left_out=left_out)


def _assign(
    image_counts: np.ndarray,
    images: int,
    most: int,
    rng: np.random.Generator,
    statistics: Statistics,
    scenes: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(L,) image and (L,) class of every label, sorted by image; each pair at most once."""
    room = _room(int(image_counts.sum()), images, min(most, len(image_counts)), rng, statistics)
    usable = np.flatnonzero(room)
    # Every image draws a scene, each as often as its classes ask for; of a single scene nothing is drawn.
    wanted = (scenes * (image_counts / scenes.sum(axis=1))[:, None]).sum(axis=0)
    scene = rng.choice(len(wanted), images, p=wanted / wanted.sum()) if len(wanted) > 1 else np.zeros(images, int)
    pairs = []
    for label in np.argsort(-image_counts, kind="stable"):
        weights = np.maximum(room[usable], 1e-6)  # a full image is taken only when there are not enough others
        weights = weights * np.where(scenes[label, scene[usable]], 1.0, 1e-12)  # and one of another scene last
        keys = np.log(rng.random(len(usable))) / weights  # the largest keys: a weighted draw without replacement
        chosen = usable[np.argsort(-keys, kind="stable")[: image_counts[label]]]
        room[chosen] -= 1
        pairs.append(np.stack([chosen, np.full(len(chosen), label)]))
    shown_on, labels = np.concatenate(pairs, axis=1)
    order = np.lexsort((labels, shown_on))
    return shown_on[order], labels[order]


def _room(
    total: int,
    images: int,
    most: int,
    rng: np.random.Generator,
    statistics: Statistics,
) -> np.ndarray:
    """(N,) number of classes each image is to show, `total` together: 1% empty, the others 1 to `most`."""
    filled = images - int(EMPTY_SHARE * images)
    room = np.minimum(statistics.labels(total / filled, filled, rng), most)
    while (gap := min(total, most * filled) - room.sum()) > 0:
        candidates = np.flatnonzero(room < most)
        room[rng.choice(candidates, min(gap, len(candidates)), replace=False)] += 1
    while gap < 0 and (room > 1).any():
        candidates = np.flatnonzero(room > 1)
        room[rng.choice(candidates, min(-gap, len(candidates)), replace=False)] -= 1
        gap = total - room.sum()
    return rng.permutation(np.concatenate([room, np.zeros(images - filled, np.int64)]))
