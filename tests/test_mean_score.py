"""The mean score against plain loops written from Eq. 2."""

import math
import socket

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from loce.equilibrium_loss import equilibrium_loss
from loce.mean_score import MeanScoreTracker, instance_scores
from loce.utils.classes import IGNORED


def update_slow(scores, labels, probabilities, momentum, background_score):
    """Eq. 2 once for each entry of a class, in Python floats; every entry of the batch stands for their mean."""
    result = list(scores)
    for label in range(len(scores) - 1):
        entries = [p for y, p in zip(labels, probabilities, strict=True) if y == label]
        for _ in entries:
            result[label] = momentum * result[label] + (1 - momentum) * sum(entries) / len(entries)
    result[-1] = background_score
    return result


def entries_slow(probabilities, labels, instances, from_memory, classes):
    """One (label, mean) for each instance with a positive RoI, then for each class drawn from the memory."""
    groups = {}
    for p, y, i, memory in zip(probabilities, labels, instances, from_memory, strict=True):
        if 0 <= y < classes and (memory or i >= 0):
            groups.setdefault(("class", y) if memory else ("instance", i), []).append((y, p))
    return sorted((rows[0][0], sum(p for _, p in rows) / len(rows)) for rows in groups.values())


@pytest.mark.parametrize("momentum", [0.9, 0.5, 0.0])
def test_update_equals_the_equation(device, momentum):
    generator = torch.Generator().manual_seed(0)
    for classes in (1, 3, 40):
        tracker = MeanScoreTracker(classes, momentum, initial_score=0.02, background_score=0.03).to(device)
        want = [0.02] * classes + [0.03]
        for step in range(15):
            labels = torch.randint(-1, classes + 1, (step * 3,), generator=generator)  # also background and padding
            labels[labels < 0] = IGNORED
            probabilities = torch.rand(step * 3, generator=generator)
            tracker.update(labels.to(device), probabilities.to(device))
            want = update_slow(want, labels.tolist(), probabilities.double().tolist(), momentum, 0.03)
            assert tracker.scores.dtype == torch.float32
            torch.testing.assert_close(tracker.scores.cpu().double(), torch.tensor(want, dtype=torch.float64))


def test_start_and_defaults():
    assert MeanScoreTracker(2).scores.tolist() == pytest.approx([0.01, 0.01, 0.01])
    tracker = MeanScoreTracker(2, background_score=0.5)
    assert tracker.scores.tolist() == pytest.approx([0.01, 0.01, 0.5])
    tracker.update(torch.tensor([1]), torch.tensor([1.0]))
    assert tracker.scores.tolist() == pytest.approx([0.01, 0.9 * 0.01 + 0.1, 0.5])
    tracker.restart()
    assert tracker.scores.tolist() == pytest.approx([0.01, 0.01, 0.5])


def test_one_entry_at_a_time_or_all_together():
    """Equal entries in one update give what as many updates give."""
    together, apart = MeanScoreTracker(3), MeanScoreTracker(3)
    together.update(torch.tensor([1] * 6), torch.full((6,), 0.8))
    for _ in range(6):
        apart.update(torch.tensor([1]), torch.tensor([0.8]))
    torch.testing.assert_close(together.scores, apart.scores)


@pytest.mark.parametrize("labels", [[], [IGNORED, IGNORED], [4, 4, IGNORED]])
def test_an_update_with_nothing_does_nothing(device, labels):
    tracker = MeanScoreTracker(4).to(device)
    tracker.update(torch.tensor([0, 1], device=device), torch.tensor([0.3, 0.9], device=device))
    before = tracker.scores.clone()
    padding = torch.full((len(labels),), math.nan, device=device)  # whatever the padding holds
    tracker.update(torch.tensor(labels, dtype=torch.long, device=device), padding)
    assert torch.equal(tracker.scores, before)


def test_two_forward_passes_before_the_backward_pass():
    """Gradient accumulation: the first loss still knows the score it was computed with."""
    tracker = MeanScoreTracker(2)
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.tensor([0, 1, 2])
    seen, losses = [], []
    for probability in (0.9, 0.2):
        tracker.update(torch.tensor([0]), torch.tensor([probability]))
        seen.append(tracker.scores.clone())
        # A loss that keeps the scores themselves for its backward pass, and ours.
        losses.append(equilibrium_loss(logits, labels, tracker.scores) + (logits * tracker.scores).sum())
    sum(losses).backward()
    want = torch.zeros(3, 3)
    for scores in seen:
        z = logits.detach().clone().requires_grad_()
        (equilibrium_loss(z, labels, scores) + (z * scores).sum()).backward()
        want += z.grad
    torch.testing.assert_close(logits.grad, want)


def test_probabilities_carry_no_gradient_into_the_scores():
    tracker = MeanScoreTracker(2)
    tracker.update(torch.tensor([0]), torch.tensor([0.5], requires_grad=True))
    assert not tracker.scores.requires_grad


def test_state_is_saved_and_loaded():
    tracker, other = MeanScoreTracker(3), MeanScoreTracker(3)
    tracker.update(torch.tensor([0, 2]), torch.tensor([0.3, 0.7]))
    other.load_state_dict(tracker.state_dict())
    assert list(tracker.state_dict()) == ["scores"]
    assert torch.equal(tracker.scores, other.scores)


def random_rows(rows, instances, classes, generator):
    """Probabilities, labels, instances, from_memory of so many rows; some instances without any row."""
    instance = (
        torch.randint(-1, max(instances, 1), (rows,), generator=generator) if instances else torch.full((rows,), -1)
    )
    of_instance = torch.randint(classes, (instances + 1,), generator=generator)
    labels = torch.where(instance >= 0, of_instance[instance], classes)
    from_memory = (instance < 0) & (torch.rand(rows, generator=generator) < 0.6)
    labels = torch.where(from_memory, torch.randint(classes, (rows,), generator=generator), labels)
    labels[torch.rand(rows, generator=generator) < 0.1] = IGNORED
    instance[torch.rand(rows, generator=generator) < 0.1] = -1  # positive, but of no instance
    return torch.rand(rows, generator=generator), labels, instance, from_memory


def test_entries_equal_plain_loops(device):
    generator = torch.Generator().manual_seed(2)
    for trial in range(60):
        instances, classes = trial % 7, 1 + trial % 11
        rows = random_rows(trial, instances, classes, generator)
        p, y, i, memory = (x.to(device) for x in rows)
        labels, scores = instance_scores(p, y, i, instances)
        assert labels.shape == scores.shape == (instances,)
        real = labels != IGNORED
        got = sorted(zip(labels[real].tolist(), scores[real].double().tolist(), strict=True))
        lists = (rows[0].double().tolist(), *(x.tolist() for x in rows[1:]))
        want = entries_slow(*lists[:3], [False] * trial, classes)
        assert [label for label, _ in got] == [label for label, _ in want]
        assert [score for _, score in got] == pytest.approx([score for _, score in want], abs=1e-6)
        assert not scores[~real].any()

        tracker = MeanScoreTracker(classes).to(device)
        tracker.update(labels, scores, (torch.where(memory, y, IGNORED), p))
        entries = entries_slow(*lists, classes)
        start = [0.01] * (classes + 1)
        after = update_slow(start, [label for label, _ in entries], [score for _, score in entries], 0.9, 0.01)
        assert tracker.scores.tolist() == pytest.approx(after, abs=1e-6)


def test_entries_of_a_batch_worked_by_hand():
    labels, scores = instance_scores(
        probabilities=torch.tensor([0.2, 0.4, 0.9, 0.5, 0.1, 0.3, 0.8]),
        labels=torch.tensor([1, 1, 0, 3, 2, 2, IGNORED]),  # the fourth row is background
        instances=torch.tensor([2, 2, 0, -1, -1, -1, 1]),  # instance 1 has only an ignored row
        num_instances=3,
    )
    assert labels.tolist() == [0, IGNORED, 1]
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.0, 0.3]))


def test_rows_from_the_memory_are_one_entry_a_class():
    tracker = MeanScoreTracker(3)
    drawn = (torch.tensor([2, 2, 0, IGNORED, 2]), torch.tensor([0.1, 0.3, 0.5, 0.9, 0.2]))
    tracker.update(torch.tensor([2]), torch.tensor([0.8]), drawn)
    twice = 0.81 * 0.01 + 0.19 * (0.2 + 0.8) / 2  # class 2: the mean of its drawn rows and its instance
    assert tracker.scores.tolist() == pytest.approx([0.9 * 0.01 + 0.1 * 0.5, 0.01, twice, 0.01])


def shares():
    """Two ranks' entries and drawn rows over three updates, of different lengths, one of them empty."""
    generator = torch.Generator().manual_seed(3)
    return [
        [
            [(torch.randint(-1, 6, (n,), generator=generator), torch.rand(n, generator=generator)) for n in (m, 2 * m)]
            for m in lengths
        ]
        for lengths in ((5, 9), (0, 4), (7, 7))
    ]


def follow_shares(rank, port, folder):
    """One of two processes: its share of the entries."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    tracker = MeanScoreTracker(5)
    for step in shares():
        entries, drawn = step[rank]
        tracker.update(*entries, drawn)
    torch.save(tracker.scores, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(follow_shares, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = MeanScoreTracker(5)
    for step in shares():
        entries, drawn = ([torch.cat(parts) for parts in zip(*kind, strict=True)] for kind in zip(*step, strict=True))
        alone.update(*entries, tuple(drawn))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone.scores)
