"""The long tail of Glyph-LVIS, and the characters that are its classes."""

import unicodedata
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from loce.data.glyphs.characters import CHARACTERS, LOOK_ALIKES, category_name, families
from loce.data.glyphs.drawing import faces_with, render_glyph
from loce.data.glyphs.plan import (
    FREQUENT_SHARE,
    RARE_SHARE,
    Plan,
    long_tail,
    plan_split,
    ranked_characters,
    validation_counts,
)
from loce.data.glyphs.scenes import VERSION_2, absent_shares, label_sides
from loce.utils.classes import frequency_groups


def group_sizes(counts: np.ndarray) -> tuple[int, ...]:
    found = Counter(frequency_groups(counts).tolist())
    return tuple(found[group] for group in "rcf")


@pytest.mark.parametrize(
    ("classes", "images", "labels", "groups"),
    [(50, 2000, 2.5, (14, 19, 17)), (1203, 15000, 6.0, (337, 461, 405)), (1203, 40000, 3.5, (337, 461, 405))],
)
def test_groups_have_the_shares_of_lvis(classes: int, images: int, labels: float, groups: tuple[int, ...]) -> None:
    counts = long_tail(classes, images, labels)
    assert group_sizes(counts) == groups
    assert counts.sum() == pytest.approx(labels * images, rel=0.005)
    assert (np.diff(counts) <= 0).all()
    assert counts[-1] == 1


def test_long_tail_falls_as_documented() -> None:
    """Loops: Zipf's law down to 100, a geometric fall from 100 to 10, another from 10 to 1."""
    classes = 1203
    counts = long_tail(classes, 15000, 6.0)
    frequent, rare = round(FREQUENT_SHARE * classes), round(RARE_SHARE * classes)
    common = classes - frequent - rare
    exponent = np.log(counts[0] / 100) / np.log(frequent + 0.5)
    for rank, count in enumerate(counts.tolist()):
        if rank < frequent:
            expected = max(101.0, counts[0] / (rank + 1) ** exponent)
        elif rank < frequent + common:
            expected = max(11.0, 100 * 10 ** (-(rank - frequent + 0.5) / common))
        else:
            expected = 10 * 10 ** (-(rank - frequent - common + 0.5) / rare)
        assert abs(count - expected) <= 0.51 + 0.001 * expected


@pytest.mark.parametrize(("classes", "images", "labels"), [(1, 5, 1.0), (5, 12, 1.5), (8, 40, 2.0), (300, 400, 3.0)])
def test_small_sets_keep_every_class(classes: int, images: int, labels: float) -> None:
    counts = long_tail(classes, images, labels)
    assert len(counts) == classes
    assert counts.min() >= 1
    assert counts.max() <= 0.6 * images
    assert counts.sum() <= 1.1 * labels * images


@pytest.fixture(scope="module")
def demo() -> dict[str, Plan]:
    """Both splits of the default set."""
    rng = np.random.default_rng(0)
    train = long_tail(50, 2000, 2.5)
    val = validation_counts(train, 400, 2.5)
    return {
        "train": plan_split(train, train, 2000, 12, 0, rng),
        "val": plan_split(val, train, 400, 12, 20, rng),
    }


def test_plan_keeps_the_image_counts(demo: dict[str, Plan]) -> None:
    train = long_tail(50, 2000, 2.5)
    for plan, counts in ((demo["train"], train), (demo["val"], validation_counts(train, 400, 2.5))):
        pairs = list(zip(plan.images.tolist(), plan.labels.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        assert pairs == sorted(pairs)
        assert Counter(label for _, label in pairs) == dict(enumerate(counts.tolist()))


def test_plan_herds_and_empty_images(demo: dict[str, Plan]) -> None:
    for plan, images in ((demo["train"], 2000), (demo["val"], 400)):
        objects = np.bincount(plan.images, plan.instances + plan.left_out, minlength=images)
        assert objects.max() <= 12
        assert (objects == 0).sum() == images // 100
        assert plan.instances.min() == 1
    plan = demo["train"]
    per_label = [plan.instances[plan.labels == label].mean() for label in range(50)]
    assert np.mean(per_label[:17]) > 1.2 * np.mean(per_label[36:])
    assert 4.5 < plan.instances.sum() / 2000 < 6.5
    assert 0.001 < (plan.left_out > 0).mean() < 0.05
    assert (plan.left_out <= plan.instances).all()


def test_validation_measures_every_class(demo: dict[str, Plan]) -> None:
    plan = demo["val"]
    instances = np.bincount(plan.labels, plan.instances, minlength=50)
    assert instances.min() >= 20
    assert instances[:17].mean() > 1.5 * instances[36:].mean()


def test_characters_are_1203_different_ones() -> None:
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 1203
    names = [category_name(character) for character in CHARACTERS]
    assert len(set(names)) == 1203
    assert all(name.isascii() and " " not in name for name in names)
    assert category_name("O") == "latin_capital_letter_o"
    assert all(unicodedata.normalize("NFC", character) == character for character in CHARACTERS)


def test_look_alikes_are_among_the_50_classes() -> None:
    first = set(CHARACTERS[:50])
    assert {"O", "0", "Q", "B", "8", "Σ", "∑", "S", "5"} <= first
    assert set("".join("".join(family) for family in LOOK_ALIKES)) < first
    for classes in (1, 2, 7, 50, 51, 1203):
        assert "".join(families(classes)) == CHARACTERS[:classes]
    for skipped, classes in ((1, 1), (2, 7), (50, 50), (100, 300), (1202, 1)):  # sets that share no character
        assert "".join(families(classes, skipped)) == CHARACTERS[skipped : skipped + classes]


@pytest.mark.parametrize("seed", range(5))
def test_rare_classes_have_common_or_frequent_twins(seed: int) -> None:
    ranked = ranked_characters(50, np.random.default_rng(seed))
    assert sorted(ranked) == sorted(CHARACTERS[:50])
    groups = dict(zip(ranked, frequency_groups(long_tail(50, 2000, 2.5)), strict=True))
    twins = defaultdict(set)
    for family in LOOK_ALIKES:
        for member in family:
            twins[member] = {groups[other] for other in family if other != member}
    rare = [character for character in ranked if groups[character] == "r"]
    assert sum("f" in twins[character] for character in rare) >= 3
    assert sum(bool(twins[character] & {"c", "f"}) for character in rare) >= 6


def picture(character: str, face: str) -> np.ndarray:
    """(24 * 24,) the glyph scaled to one box size, in the middle."""
    glyph = Image.fromarray(render_glyph(character, face, 64))
    scale = min(16 / np.sqrt(glyph.width * glyph.height), 24 / max(glyph.size))
    small = glyph.resize([max(1, round(scale * side)) for side in glyph.size], Image.Resampling.BOX)
    canvas = Image.new("L", (24, 24))
    canvas.paste(small, ((24 - small.width) // 2, (24 - small.height) // 2))
    return np.asarray(canvas, dtype=np.float32).ravel() / 255


def differences(characters: str, face: str) -> np.ndarray:
    """(n, n) squared differences of the pictures, as shares of the smaller ink."""
    pictures = np.stack([picture(character, face) for character in characters])
    ink = (pictures**2).sum(1)
    squared = ink[:, None] + ink[None] - 2 * pictures @ pictures.T
    return squared / np.minimum(ink[:, None], ink[None])


def test_difference_finds_letters_that_look_the_same() -> None:
    """The Latin, Greek and Cyrillic A are one shape: the measure of the next test must say so."""
    assert differences("AΑА", "DejaVuSans").max() < 0.01
    assert differences("OΟО", "DejaVuSerif").max() < 0.01
    assert not set("ΑАΟО") & set(CHARACTERS)


@pytest.mark.parametrize("face", ["DejaVuSans", "DejaVuSerif-Bold", "DejaVuSansMono-Oblique"])
def test_no_two_classes_look_the_same(face: str) -> None:
    characters = "".join(character for character in CHARACTERS if face in faces_with(character))
    assert len(characters) > 400
    found = differences(characters, face)
    np.fill_diagonal(found, np.inf)
    family_of = {member: family for family in LOOK_ALIKES for member in family}
    for row, column in zip(*np.nonzero(found < 0.15), strict=True):
        first, second = characters[row], characters[column]
        assert family_of.get(first) == family_of.get(second) != None, (first, second)  # noqa: E711
    assert found.min() > 0.04


def test_every_class_has_at_least_four_faces() -> None:
    assert min(len(faces_with(character)) for character in CHARACTERS) >= 4
    assert all(len(faces_with(character)) == 12 for character in CHARACTERS[:50] if character != "★")


def test_version_2_has_scenes_and_the_spread_of_lvis() -> None:
    """Image counts exact; rare classes in one or two scenes and among frequent ones; heavy tails of objects."""
    rng = np.random.default_rng(0)
    train = long_tail(100, 3000, 3.5, VERSION_2)
    assert group_sizes(train) == (28, 38, 34) and train.sum() == pytest.approx(10500, rel=0.005)
    scenes = VERSION_2.scenes(train, rng)
    assert scenes.shape == (100, 12)
    members = scenes.sum(axis=1)
    assert set(members[:34]) == {6} and set(members[34:72]) == {3} and set(members[72:]) == {1, 2}
    plan = plan_split(train, train, 3000, 20, 0, rng, VERSION_2, scenes)
    assert (plan.image_counts(100) == train).all()
    labels = np.bincount(plan.images, minlength=3000)
    objects = np.bincount(plan.images, plan.instances + plan.left_out, minlength=3000)
    assert objects.max() == 20 and 7 < objects.mean() < 9 and (plan.instances == 1).mean() > 0.5
    assert np.quantile(labels, [0.5, 0.9]).tolist() == [3, 7] and labels.max() >= 12
    shown = [set(plan.labels[plan.images == image].tolist()) for image in plan.images[plan.labels >= 72]]
    assert np.mean([min(classes) < 34 for classes in shown]) > 0.85
    # Frequent classes of no common scene are met with a rare one where an image had no room in its scene only.
    met = [bool((scenes[72:] & scenes[other])[rare - 72].any()) for classes in shown for rare in classes
           for other in classes if rare >= 72 > 34 > other]  # fmt: skip
    assert np.mean(met) > 0.9
    sides = label_sides(plan, (0.125, 0.6), rng)
    assert sides.min() == 0.125 and sides.max() <= 0.6 and (sides[:, 0] <= sides[:, 1]).all()
    crowded = objects[plan.images] > 12
    assert sides[crowded].mean() < 0.8 * sides[~crowded].mean()


def test_version_2_lists_absent_classes_as_often_as_lvis() -> None:
    train, val = np.array([500, 50, 5]), np.array([40, 20, 8])
    found = absent_shares(val, train, 500)
    expected = [1.3 * 40 / 460, 14 * 20 / 480, 1.0]
    assert found.tolist() == pytest.approx(expected)
