"""Second stage: what sampled regions learn, what the memory adds, and what each loss is divided by."""

import math

import pytest
import torch

from loce.config import IndicatorConfig, MemoryConfig
from loce.data.masks import CroppedMasks
from loce.models.boxes import ROI_STDS, encode
from loce.models.mask_head import mask_targets
from loce.models.roi_heads import Targets, pool
from loce.utils.classes import IGNORED

from .conftest import first, losses_and_rows

CLASSES = 6
SIZES = [(64, 96), (64, 80)]
MEMORY = MemoryConfig(enabled=True, capacity=40, classes_per_draw=3, features_per_class=2)


def run(roi_heads, features, proposals, truths):
    """Losses, and what they were computed from."""
    losses, rows = losses_and_rows(roi_heads, features, proposals, truths)
    return losses, rows.sampled, rows.x_ND, rows.box_targets_N4, rows.logits_NL, rows.rois


def scores_given_to(bank):
    """A list that gets the scores of every draw to come."""
    seen, draw = [], bank.draw

    def spy(score, *rest):
        seen.append(score.clone())
        return draw(score, *rest)

    bank.draw = spy
    return seen


@pytest.mark.parametrize("memory", [None, MEMORY], ids=["plain", "with memory"])
def test_losses_against_loops(make_model, features, proposals, truths, memory):
    roi_heads = make_model("softmax", memory).roi_heads
    losses, regions, x, targets, logits, rois = run(roi_heads, features, proposals, truths)
    sampled = sum(len(found.labels) for found in regions)
    assert len(rois.labels_N) == sampled + (6 if memory else 0)

    rows = logits.detach().double().tolist()
    deltas = roi_heads.fc_reg(x).detach().double().reshape(-1, CLASSES, 4)
    classification, boxes, count = 0.0, 0.0, 0
    for row, label in enumerate(rois.labels_N.tolist()):
        if label == IGNORED:
            continue
        count += 1
        largest = max(rows[row])
        classification += largest + math.log(sum(math.exp(z - largest) for z in rows[row])) - rows[row][label]
        if label < CLASSES:
            errors = [abs(float(d) - float(t)) for d, t in zip(deltas[row, label], targets[row], strict=True)]
            boxes += sum(errors)
    assert losses["loss_cls"].item() == pytest.approx(classification / count, rel=1e-5)
    assert losses["loss_box"].item() == pytest.approx(boxes / count, rel=1e-5)  # all rows, not the positives alone


def cross_entropies(logits, labels):
    """-log softmax of each row's own label, in float64."""
    rows = [(z, y) for z, y in zip(logits.detach().double().tolist(), labels.tolist(), strict=True) if y != IGNORED]
    return [max(z) + math.log(sum(math.exp(v - max(z)) for v in z)) - z[y] for z, y in rows]


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_losses_with_vectors_of_gaussians_against_loops(make_model, features, proposals, truths, weight):
    """They train no boxes, and with a weight their loss is a mean of its own."""
    memory = MemoryConfig(enabled=True, kind="gaussian", classes_per_draw=3, features_per_class=2, loss_weight=weight)
    roi_heads = make_model("softmax", memory).roi_heads
    losses, regions, x, targets, logits, rois = run(roi_heads, features, proposals, truths)
    sampled = sum(len(found.labels) for found in regions)
    own = cross_entropies(logits[:sampled], rois.labels_N[:sampled])
    drawn = cross_entropies(logits[sampled:], rois.labels_N[sampled:])
    assert len(drawn) == 6 and (rois.labels_N[sampled:] < CLASSES).all()
    together = (sum(own) + sum(drawn)) / (len(own) + len(drawn))
    expected = sum(own) / len(own) + weight * sum(drawn) / len(drawn) if weight else together
    assert losses["loss_cls"].item() == pytest.approx(expected, rel=1e-5)
    deltas = roi_heads.fc_reg(x).detach().double().reshape(-1, CLASSES, 4)
    errors = [
        sum(abs(float(d) - float(t)) for d, t in zip(deltas[row, label], targets[row], strict=True))
        for row, label in enumerate(rois.labels_N[:sampled].tolist())
        if 0 <= label < CLASSES
    ]
    assert losses["loss_box"].item() == pytest.approx(sum(errors) / len(own), rel=1e-5)


@pytest.mark.parametrize("level", ["fc", "roi"])
@pytest.mark.parametrize("kind", ["ring", "gaussian"])
def test_regions_are_stored_in_place_of_boxes(make_model, features, proposals, truths, kind, level):
    """All positives of the batch; in filling, those of the instances to store."""
    roi_heads = make_model("softmax", MemoryConfig(enabled=True, kind=kind, source="regions", level=level)).roi_heads
    stored, store = [], roi_heads.memory.store
    roi_heads.memory.store = lambda *rows: (stored.append(rows), store(*rows))
    _, _, x, targets, _, rois = run(roi_heads, features, proposals, truths)
    found, labels, box_targets = stored[0]
    kept, positive = labels >= 0, rois.instances_N >= 0
    assert torch.equal(labels[kept], rois.labels_N[positive]) and kept.sum() > 4
    assert torch.equal(box_targets[kept], targets[positive]) and not found.requires_grad
    if level == "fc":
        torch.testing.assert_close(found[kept], x[positive].detach(), rtol=0, atol=0)
    assert (roi_heads.memory.bank.counts > 0).nonzero()[:, 0].tolist() == sorted(set(labels[kept].tolist()))
    truths[0].store_rows, truths[1].store_rows = torch.tensor([1]), torch.zeros(0, dtype=torch.long)
    run(roi_heads, features, proposals, truths)
    assert set(stored[1][1].tolist()) == {int(truths[0].labels[1]), IGNORED}


def test_nothing_is_drawn_before_the_memory_starts(make_model, features, proposals, truths):
    roi_heads = make_model("softmax", MemoryConfig(enabled=True, kind="gaussian", start=0.3)).roi_heads
    for progress, drawn in ((0.0, 0), (0.29, 0), (0.3, 32)):
        roi_heads.progress = progress
        losses, *_, rois = run(roi_heads, features, proposals, truths)
        assert int(rois.from_memory_N.sum()) == drawn and losses["loss_cls"] > 0
    assert roi_heads.memory.bank.used.any()


def test_box_targets(make_model, features, proposals, truths):
    _, regions, _, targets, _, _ = run(make_model().roi_heads, features, proposals, truths)
    row = 0
    for found, truth in zip(regions, truths, strict=True):
        for box, instance in zip(found.boxes, found.instances.tolist(), strict=True):
            if instance < 0:
                assert (targets[row] == 0).all()
            else:
                expected = encode(box[None], truth.boxes[instance][None], ROI_STDS)[0]
                torch.testing.assert_close(targets[row], expected)
            row += 1


def test_mask_loss_against_loops(make_model, features, proposals, truths):
    """Over the positives of the sampled regions and 28 x 28 pixels; memory rows have no mask."""
    roi_heads = make_model("softmax", MEMORY).roi_heads
    losses, regions, *_ = run(roi_heads, features, proposals, truths)
    total, count = 0.0, 0
    for image, (found, truth) in enumerate(zip(regions, truths, strict=True)):
        for box, label, instance in zip(found.boxes, found.labels, found.instances, strict=True):
            if instance < 0:
                continue
            target = mask_targets(truth.masks, instance[None], box[None])[0].double()
            own = [x[image : image + 1] for x in features]
            logits = roi_heads.mask_head(pool(own, [box[None]], 14, 56.0), label[None])[0].detach().double()
            total += float((torch.log1p(logits.exp()) - logits * target).sum())
            count += 28 * 28
    assert losses["loss_mask"].item() == pytest.approx(total / count, rel=1e-5)


def test_mean_score_has_one_entry_per_instance(make_model, features, proposals, truths):
    """An instance's entry is the mean over its regions, whichever image it is in; classes are averaged over entries."""
    roi_heads = make_model().roi_heads
    _, regions, _, _, logits, rois = run(roi_heads, features, proposals, truths)
    probabilities = logits.detach().double().softmax(dim=1)
    entries: dict[tuple[int, int], list[float]] = {}
    row = 0
    for image, found in enumerate(regions):
        for label, instance in zip(found.labels.tolist(), found.instances.tolist(), strict=True):
            if instance >= 0:
                entries.setdefault((image, instance), []).append(float(probabilities[row, label]))
            row += 1
    expected = [0.01] * (CLASSES + 1)
    by_class: dict[int, list[float]] = {}
    for (image, instance), scores in entries.items():
        by_class.setdefault(int(truths[image].labels[instance]), []).append(sum(scores) / len(scores))
    for label, scores in by_class.items():
        for _ in scores:
            expected[label] = 0.9 * expected[label] + 0.1 * sum(scores) / len(scores)
    torch.testing.assert_close(roi_heads.tracker.scores, torch.tensor(expected), rtol=1e-5, atol=1e-7)
    assert len(by_class[3]) == 2  # class 3 has an instance in each image
    offsets = rois.instances_N[rois.instances_N >= 0]
    assert set(offsets.tolist()) <= {0, 1, 2, 3, 4} and offsets.max() >= 3  # counted over the batch


def test_memory_rows_give_one_entry_per_class(make_model, features, truths):
    """Without positives from the images the mean score moves by the drawn classes alone."""
    roi_heads = make_model("softmax", MEMORY).roi_heads
    bank = roi_heads.memory.bank
    bank.enqueue(torch.randn(3, 24), torch.tensor([1, 1, 4]), torch.zeros(3, 4))
    none = torch.zeros(0, dtype=torch.long)
    empty = [
        Targets(torch.zeros(0, 4), none, CroppedMasks.pack([], size), none, batch_index=i)
        for i, size in enumerate(SIZES)
    ]
    _, _, _, _, logits, rois = run(roi_heads, features, [torch.rand(30, 4).cumsum(1) * 20] * 2, empty)
    drawn = rois.labels_N[rois.from_memory_N]
    assert len(drawn) == 6 and set(drawn.tolist()) <= {1, 4}
    probabilities = logits.detach().double().softmax(dim=1)[rois.from_memory_N]
    for label in range(CLASSES):
        rows = (drawn == label).nonzero()[:, 0]
        mean = float(probabilities[rows, label].mean()) if len(rows) else 0.0
        expected = 0.9 * 0.01 + 0.1 * mean if len(rows) else 0.01
        assert float(roi_heads.tracker.scores[label]) == pytest.approx(expected, rel=1e-5)


def test_the_loss_sees_the_mean_score_of_after_its_update(make_model, features, proposals, truths):
    roi_heads = make_model("equilibrium").roi_heads
    before = roi_heads.tracker.scores.clone()
    losses, _, _, _, logits, rois = run(roi_heads, features, proposals, truths)
    after = roi_heads.tracker.scores
    assert not torch.equal(before, after) and torch.equal(rois.indicator, after)
    for score, same in ((after, True), (before, False)):
        shifted = logits.detach().double() + score.double().log()
        used = rois.labels_N != IGNORED
        plain = torch.nn.functional.cross_entropy(shifted[used], rois.labels_N[used])
        assert (losses["loss_cls"].item() == pytest.approx(float(plain), rel=1e-6)) == same


def test_drawing_uses_the_mean_score_of_before_its_update(make_model, features, proposals, truths):
    roi_heads = make_model("equilibrium", MEMORY).roi_heads
    before, seen = roi_heads.tracker.scores.clone(), scores_given_to(roi_heads.memory.bank)
    run(roi_heads, features, proposals, truths)
    assert torch.equal(seen[0], before) and not torch.equal(roi_heads.tracker.scores, before)


def test_an_ignored_row_counts_for_nothing(make_model, features, truths, monkeypatch):
    """An image with few boxes beside one with many: slots that are not used change no loss."""
    roi_heads = make_model().roi_heads
    monkeypatch.setattr("loce.models.boxes.choose_random", first)
    few = [torch.tensor([[0.0, 0, 4, 4]]), torch.rand(40, 4).cumsum(1) * 15]
    losses, regions, x, targets, logits, rois = run(roi_heads, features, few, truths)
    used = rois.labels_N != IGNORED
    assert not used.all() and int(used[: len(regions[0].labels)].sum()) == 4
    expected = torch.nn.functional.cross_entropy(logits[used], rois.labels_N[used])
    torch.testing.assert_close(losses["loss_cls"], expected)
    positive = (used & (rois.labels_N < CLASSES)).nonzero()[:, 0]
    deltas = roi_heads.fc_reg(x).reshape(-1, CLASSES, 4)[positive, rois.labels_N[positive]]
    torch.testing.assert_close(losses["loss_box"], (deltas - targets[positive]).abs().sum() / used.sum())


@pytest.mark.parametrize("head", ["softmax", "equilibrium"])
def test_fc_and_roi_memories_train_alike_when_the_shared_fcs_are_frozen(make_model, features, proposals, truths, head):
    """Three steps with the same random numbers, the bank filling up. In fp32: losses to 1e-6, gradients to 1e-5."""
    results = []
    for level in ("fc", "roi"):
        memory = MemoryConfig(enabled=True, level=level, capacity=40, classes_per_draw=8, features_per_class=4)
        model = make_model(head, memory, freeze="trunk")
        torch.manual_seed(11)
        steps = []
        for _ in range(3):
            model.zero_grad()
            losses, _ = losses_and_rows(model.roi_heads, features, proposals, truths)
            sum(losses.values()).backward()
            grads = {n: p.grad.clone() for n, p in model.roi_heads.named_parameters() if p.grad is not None}
            steps.append((losses, grads, model.roi_heads.tracker.scores.clone()))
        assert bool(model.roi_heads.memory.bank.counts.sum() > 100)
        results.append(steps)
    for (losses_a, grads_a, score_a), (losses_b, grads_b, score_b) in zip(*results, strict=True):
        assert grads_a.keys() == grads_b.keys() and len(grads_a) >= 8
        torch.testing.assert_close(losses_a, losses_b, rtol=1e-6, atol=0)
        torch.testing.assert_close(grads_a, grads_b, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(score_a, score_b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", ["fc", "roi"])
def test_what_is_stored_carries_no_gradient(make_model, features, proposals, truths, level):
    roi_heads = make_model("softmax", MemoryConfig(enabled=True, level=level, capacity=40)).roi_heads
    losses_and_rows(roi_heads, features, proposals, truths)
    assert not roi_heads.memory.bank.features.requires_grad


class TestPrior:
    """Instance counts in place of the mean score (supplement, Sec. 1)."""

    PRIOR = IndicatorConfig(kind="prior", background_count=2.0)

    def test_margins_come_from_the_counts(self, make_model, features, proposals, truths, small_stats):
        roi_heads = make_model("equilibrium", None, self.PRIOR).roi_heads
        losses, _, _, _, logits, rois = run(roi_heads, features, proposals, truths)
        counts = torch.tensor([*small_stats.instance_counts, 2.0], dtype=torch.float64)
        expected = torch.nn.functional.cross_entropy(logits.detach().double() + counts.log(), rois.labels_N)
        assert losses["loss_cls"].item() == pytest.approx(float(expected), rel=1e-6)

    def test_the_sampler_uses_the_counts(self, make_model, features, proposals, truths, small_stats):
        roi_heads = make_model("softmax", MEMORY, self.PRIOR).roi_heads
        seen = scores_given_to(roi_heads.memory.bank)
        run(roi_heads, features, proposals, truths)
        assert seen[0].tolist() == [*small_stats.instance_counts.tolist(), 2.0]

    def test_the_mean_score_is_still_kept_for_the_log(self, make_model, features, proposals, truths):
        roi_heads = make_model("equilibrium", None, self.PRIOR).roi_heads
        run(roi_heads, features, proposals, truths)
        assert (roi_heads.tracker.scores[:-1] != 0.01).any()
