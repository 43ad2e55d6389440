"""Generator, memory and sampler as one step of training uses them."""

import pytest
import torch

from loce.box_generator import dense_boxes
from loce.config import MemoryConfig
from loce.models import memory_sampling
from loce.models.boxes import DRAWS, ROI_STDS, encode
from loce.models.memory_sampling import ImageSeed, MemoryRows, MemorySampling
from loce.utils.classes import IGNORED

TRUTHS = [torch.tensor([[10.0, 10, 50, 40], [60, 5, 90, 60], [20, 20, 22, 21]]), torch.tensor([[5.0, 5, 35, 35]])]
LABELS = [torch.tensor([2, 0, 1]), torch.tensor([3])]
SIZES = [(64, 96), (64, 80)]
TWO = [ImageSeed(None, 0), ImageSeed(None, 1)]  # images without a seed of their own


def make(**options) -> MemorySampling:
    return MemorySampling(4, (3,), MemoryConfig(enabled=True, **options))


def store_and_draw(sampling, features, labels, targets, indicator, images) -> MemoryRows:
    sampling.store(features, labels, targets)
    return sampling.draw(indicator, images)


def test_boxes_labels_and_targets_of_the_chosen_rows():
    sampling, rows = make(), [torch.tensor([1, 0]), torch.tensor([0])]
    torch.manual_seed(7)
    boxes, labels, targets = sampling.boxes(TRUTHS, LABELS, rows, SIZES)
    torch.manual_seed(7)
    expected = [
        dense_boxes(truth[row], size).reshape(-1, 4) for truth, row, size in zip(TRUTHS, rows, SIZES, strict=True)
    ]
    assert [len(b) for b in boxes] == [32, 16] and all(map(torch.equal, boxes, expected))
    assert labels.tolist() == [0] * 16 + [2] * 16 + [3] * 16
    sources = torch.cat([TRUTHS[0][[1] * 16 + [0] * 16], TRUTHS[1][[0] * 16]])
    torch.testing.assert_close(targets, encode(torch.cat(boxes), sources, ROI_STDS))


def test_boxes_thinner_than_a_pixel_are_left_out(monkeypatch):
    """The instance of 2 x 1 px: half of its boxes shrink below a pixel; they keep their place, unlabelled."""
    half = lambda boxes, size, **_: dense_boxes(boxes, size, torch.full((len(boxes), 16, 4), 0.5))  # noqa: E731
    monkeypatch.setattr(memory_sampling, "dense_boxes", half)
    none = torch.zeros(0, dtype=torch.long)
    boxes, labels, targets = make().boxes(TRUTHS, LABELS, [torch.tensor([2]), none], SIZES)
    sides = boxes[0][:, 2:] - boxes[0][:, :2]
    thin = (sides < 1).any(dim=1)
    assert len(boxes[0]) == 16 and 0 < int(thin.sum()) < 16
    assert (labels == torch.where(thin, IGNORED, 1)).all()
    assert torch.isfinite(targets).all() and (targets[thin] == 0).all() and (targets[~thin] != 0).any()


def test_degenerate_boxes_at_the_border_never_reach_the_memory():
    """An instance that ends at the border: a box may be clipped to nothing, whose target would be infinite."""
    truth = [torch.tensor([[95.5, 10.0, 96.0, 40.0]])]
    boxes, labels, targets = make().boxes(truth, [torch.tensor([1])], [torch.tensor([0])], [(64, 96)])
    assert (labels == IGNORED).all() and torch.isfinite(targets).all() and len(boxes[0]) == 16
    sampling = make()
    store_and_draw(sampling, torch.ones(16, 3), labels, targets, torch.ones(5), TWO)
    assert int(sampling.bank.counts.sum()) == 0


def test_no_instances():
    none = torch.zeros(0, dtype=torch.long)
    boxes, labels, targets = make().boxes([torch.zeros(0, 4)] * 2, [none] * 2, [none] * 2, SIZES)
    assert [b.shape for b in boxes] == [(0, 4)] * 2 and len(labels) == len(targets) == 0


def test_at_most_a_few_instances_of_a_class_and_image():
    sampling, labels = make(instances_per_class=2), torch.tensor([0, 1, 0, 0, 1, 0])
    chosen = torch.zeros(6)
    for _ in range(2000):
        rows = sampling.choose_rows(labels)
        assert [int((labels[rows] == c).sum()) for c in (0, 1)] == [2, 2] and (rows.diff() > 0).all()
        chosen[rows] += 1
    assert (chosen[labels == 1] == 2000).all()  # two of two
    assert (chosen[labels == 0] - 1000).abs().max() < 5 * 22.4  # two of four; sqrt(2000 / 4) = 22.4


def test_a_batch_can_be_drawn_from_right_after_it_was_stored():
    sampling = make(classes_per_draw=8, features_per_class=4)
    features = torch.arange(6.0)[:, None].expand(6, 3)
    labels, targets = torch.tensor([2, 2, IGNORED, 1, 4, 2]), torch.arange(24.0).reshape(6, 4)
    drawn, drawn_labels, drawn_targets = store_and_draw(sampling, features, labels, targets, torch.ones(5), TWO)
    assert drawn.shape == (32, 3) and sampling.bank.counts.tolist() == [0, 1, 3, 0]
    source = drawn[:, 0].long()
    assert set(source.tolist()) <= {0, 1, 3, 5}  # neither the ignored row nor the background's
    assert (labels[source] == drawn_labels).all() and (targets[source] == drawn_targets).all()


@pytest.mark.parametrize(("images", "draws"), [(1, 4), (2, 8), (4, 16), (8, 32)])
def test_draws_grow_with_the_images(images, draws):
    sampling = make(classes_per_draw=8, features_per_class=4)
    _, labels, _ = store_and_draw(
        sampling,
        torch.ones(1, 3),
        torch.tensor([0]),
        torch.zeros(1, 4),
        torch.ones(5),
        [ImageSeed(None, index) for index in range(images)],
    )
    assert len(labels) == draws * 4


def test_at_least_one_class_is_drawn():
    sampling = make(classes_per_draw=1, features_per_class=2)
    _, labels, _ = store_and_draw(
        sampling, torch.ones(1, 3), torch.tensor([0]), torch.zeros(1, 4), torch.ones(5), TWO[:1]
    )
    assert len(labels) == 2


def test_weak_classes_are_drawn_more_often():
    """Eq. 7-8: classes with scores 0.1 and 0.4 are drawn four to one; an empty class never."""
    sampling = make(classes_per_draw=4000, features_per_class=1)
    labels, score = torch.tensor([1, 3]), torch.tensor([0.01, 0.1, 0.01, 0.4, 0.01])
    _, drawn, _ = store_and_draw(sampling, torch.ones(2, 3), labels, torch.zeros(2, 4), score, TWO)
    counts = torch.bincount(drawn, minlength=4)
    assert counts[0] == counts[2] == 0
    assert abs(int(counts[1]) - 3200) < 5 * 25.3  # sqrt(4000 * 0.8 * 0.2) = 25.3


def test_an_empty_memory_gives_ignored_rows():
    none = torch.zeros(0, dtype=torch.long)
    drawn, labels, targets = store_and_draw(make(), torch.zeros(0, 3), none, torch.zeros(0, 4), torch.ones(5), TWO)
    assert (labels == IGNORED).all() and (drawn == 0).all() and (targets == 0).all() and len(labels) == 32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_come_back_in_the_precision_of_the_bank(dtype):
    sampling = make(dtype=dtype)
    features = torch.randn(2, 3)
    drawn, _, _ = store_and_draw(sampling, features, torch.tensor([0, 0]), torch.zeros(2, 4), torch.ones(5), TWO)
    assert sampling.bank.features.dtype == drawn.dtype == getattr(torch, dtype)
    stored = features.to(getattr(torch, dtype))
    assert all(any(torch.equal(row, kept) for kept in stored) for row in drawn)


def test_a_shared_memory_is_the_own_one_with_a_single_process():
    results = []
    for shared in (False, True):
        sampling = make(shared=shared)
        torch.manual_seed(3)
        results.append(
            store_and_draw(sampling, torch.eye(3), torch.tensor([0, 1, 1]), torch.zeros(3, 4), torch.ones(5), TWO)
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Gaussians, and other ways to draw

FOUR = [ImageSeed(seed, index) for index, seed in enumerate((30, 10, 40, 20))]


def filled(**options) -> MemorySampling:
    """A memory with two rows of each of four classes."""
    sampling = make(**options)
    labels = torch.arange(8) % 4
    sampling.store(torch.arange(24.0).reshape(8, 3), labels, torch.zeros(8, 4))
    return sampling


@pytest.mark.parametrize("draw", ["score", "confusion", "adaptive"])
@pytest.mark.parametrize("kind", ["ring", "gaussian"])
def test_draws_do_not_depend_on_how_images_lie_on_ranks(kind, draw):
    if (kind, draw) == ("ring", "adaptive"):
        return
    sampling = filled(kind=kind, draw=draw, classes_per_draw=3, features_per_class=2)
    if sampling.rates is not None:
        sampling.rates.rates.fill_(0.6)
    shares = torch.tensor([0.0, 0.9, 0.5, 0.99])
    whole = sampling.draw(torch.ones(5), FOUR, shares)
    parts = [sampling.draw(torch.ones(5), FOUR[i : i + 2], shares) for i in (0, 2)]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*parts, strict=True), strict=True))
    assert len(whole.labels) > 0 and (whole.labels >= 0).all()


def test_vectors_of_gaussians_are_keyed_by_image():
    sampling = filled(kind="gaussian", classes_per_draw=4, features_per_class=2)
    found = sampling.draw(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.01]), FOUR[:2])
    generators = [torch.Generator().manual_seed(seed + DRAWS) for seed in (30, 10)]
    rows = []
    for generator in generators:
        u = torch.rand((2, 1), generator=generator, dtype=torch.float64)[:, 0]
        rows.append(
            sampling.bank.draw(torch.tensor([0.1, 0.2, 0.3, 0.4]), 1 - u, torch.randn((2, 2, 3), generator=generator))
        )
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(found, zip(*rows, strict=True), strict=True))
    assert len(found.labels) == 8 and not found.box_targets.any()


@pytest.mark.parametrize("kind", ["ring", "gaussian"])
def test_draws_by_confusion(kind):
    """1 - K_cc: 0.9 to 0.1; an empty class never."""
    sampling = make(kind=kind, draw="confusion", classes_per_draw=4000, features_per_class=1)
    sampling.store(torch.ones(2, 3), torch.tensor([1, 3]), torch.zeros(2, 4))
    drawn = sampling.draw(torch.ones(5), TWO, torch.tensor([0.0, 0.1, 0.0, 0.9])).labels
    counts = torch.bincount(drawn, minlength=4)
    assert counts[0] == counts[2] == 0 and abs(int(counts[1]) - 3600) < 5 * 19  # sqrt(4000 * 0.9 * 0.1) = 19


def test_adaptive_rates_draw_once_for_two_images():
    sampling = filled(kind="gaussian", draw="adaptive", features_per_class=1)
    sampling.rates.rates.copy_(torch.tensor([1.0, 0.0, 1.0, 0.0]))
    for images, drawn in ((FOUR[:1], [0, 2]), (FOUR[1:2], []), (FOUR[:2], [0, 2]), (FOUR, [0, 2, 0, 2]), ([], [])):
        rows = sampling.draw(torch.ones(5), images)
        assert rows.labels.tolist() == drawn
        assert rows.features.shape == (len(drawn), 3) and rows.box_targets.shape == (len(drawn), 4)
    empty = make(kind="gaussian", draw="adaptive")
    empty.rates.rates.fill_(1)
    assert empty.draw(torch.ones(5), TWO).labels.tolist() == []
