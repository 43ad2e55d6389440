"""Statistics of version 2 of Glyph-LVIS: shaped like LVIS where version 1 is not, and scenes.

Each number is one of LVIS's, fixed before any method was trained on the set: "100" marks what was measured on 100
validation images of LVIS v0.5, "v1" published image counts of LVIS v1. docs/benchmark.md has both sides and says where
they differ, and why.

- Scenes: an image draws a scene and shows classes of it. A frequent class belongs to half of the scenes, a common one
  to a quarter, a rare one to one or two: its objects always stand among the same frequent ones.
- Classes an image: geometric, whose mean, median and most are LVIS's (100: 3.0, 2.5 and 11 of 100 images; a Poisson
  number has too few images with many). So an object's image has more classes than images have on average.
- Objects a label: P(n or more) = n ** -1.25, for all classes alike (100: half of the labels have 1 object, a tenth 7 or
  more, mean 3.3).
- Frequent classes: image counts fall geometrically to 100, as v1's do (a tenth of them under 130, half under 650).
- Sizes: objects are 2.5 times as large as LVIS's, else nobody could read them: their middle falls with the number of
  objects in the image, 0.48 n ** -0.3 (100: 0.19 n ** -0.3), and those of a label are alike.
- Verified absent: per image that shows a class, 1.3 others say that it is absent where it is frequent, 14 where it is
  common, 161 where it is rare (100), as far as there are images. So false positives of rare classes cost more.
"""

import numpy as np

from loce.data.glyphs.plan import Plan, Statistics
from loce.utils.classes import frequency_groups

CLASSES_A_SCENE = 8  # scenes there are: one for so many classes
SCENES = {"f": 1 / 2, "c": 1 / 4}  # share of the scenes that a class of this group belongs to; rare ones: 1 or 2
MIDDLE, CROWDED, SPREAD = 0.48, -0.3, 0.5  # of a label's mean size; power of the number of objects; sd of the logarithm
ROOM = 0.8  # of the side of an object's share of the image, that its middle has at most
ALIKE = 1.3  # objects of a label are at most so many times as large or as small as its middle
VERIFIED_ABSENT = {"r": 161.0, "c": 14.0, "f": 1.3}


class SceneStatistics(Statistics):
    """What version 2 draws from."""

    not_exhaustive = 0.2  # 5% of all labels
    validation_power = 1 / 3  # flatter than LVIS, so that every class is measured, but rare ones stay among others

    def head(self, log_top: float, log_end: float, number: int) -> np.ndarray:
        """(number,) falling geometrically."""
        return log_top - (log_top - log_end) * (np.arange(number) + 0.5) / max(1, number)

    def labels(
        self,
        mean: float,
        images: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """(images,), geometric."""
        return rng.geometric(min(1.0, 1 / mean), images)

    def instances(self, train_counts_L: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(L,), P(n or more) = n ** -1.25; cut at 63, the most in 100 images of LVIS."""
        uniform_L = 1 - rng.random(len(train_counts_L))  # in (0, 1]
        return np.minimum(uniform_L ** (-1 / 1.25), 63).astype(np.int64)

    def scenes(self, train_counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(C, S) bool; the first scenes are asked for more often, with weights 1 / sqrt(rank)."""
        scenes = max(2, round(len(train_counts) / CLASSES_A_SCENE))
        weights = 1 / np.sqrt(np.arange(1, scenes + 1))
        belongs = np.zeros((len(train_counts), scenes), dtype=bool)
        for label, group in enumerate(frequency_groups(train_counts).tolist()):
            number = max(1, round(SCENES[group] * scenes)) if group in SCENES else int(rng.integers(1, 3))
            belongs[label, rng.choice(scenes, min(number, scenes), replace=False, p=weights / weights.sum())] = True
        return belongs


VERSION_2 = SceneStatistics()


def label_sides(
    plan: Plan,
    bounds: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """(L, 2) smallest and largest side of a label's objects, as shares of the image's side, within `bounds`."""
    objects = np.bincount(plan.images, plan.instances + plan.left_out)[plan.images]
    middle = MIDDLE * objects**CROWDED * np.exp(SPREAD * rng.normal(size=len(objects)))
    middle = np.minimum(middle, ROOM / np.sqrt(objects))  # else they would not fit
    return np.clip(np.stack([middle / ALIKE, middle * ALIKE], axis=1), *bounds)


def absent_shares(
    image_counts: np.ndarray,
    train_counts: np.ndarray,
    images: int,
) -> np.ndarray:
    """(C,) of the images without a class, the share that lists it as verified absent."""
    ratios = np.array([VERIFIED_ABSENT[group] for group in frequency_groups(train_counts).tolist()])
    return np.minimum(1.0, ratios * image_counts / np.maximum(1, images - image_counts))
