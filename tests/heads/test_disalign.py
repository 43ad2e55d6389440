"""DisAlign against plain loops written from its equations."""

import math

import pytest
import torch

from loce.heads import HEADS
from loce.utils.classes import IGNORED
from tests.heads.cases import random_case, rois_of

RHO = 0.8


def class_weights_slow(counts):
    n = [max(count, 1) for count in counts]
    raw = [(count / sum(n)) ** -RHO for count in n]
    return [value / (sum(raw) / len(raw)) for value in raw] + [1.0]


def loss_slow(logits, labels, weights):
    """Sum of the weighted cross-entropies over the sum of the rows' weights."""
    rows = [(z, y) for z, y in zip(logits, labels, strict=True) if y != IGNORED]
    total = sum(weights[y] * (math.log(sum(math.exp(v) for v in z)) - z[y]) for z, y in rows)
    return total / sum(weights[y] for _, y in rows)


@pytest.mark.parametrize("classes", [2, 5, 50])
def test_loss_equals_the_equation(make_stats, device, classes):
    stats = make_stats(classes)
    stats.instance_counts[1] = 0
    logits, labels = random_case(30, classes, classes + 1, seed=classes)
    head = HEADS["disalign"](8, stats).to(device)
    loss = head.losses(logits.float().to(device), rois_of(labels.to(device)))["loss_cls"]
    want = loss_slow(logits.tolist(), labels.tolist(), class_weights_slow(stats.instance_counts.tolist()))
    assert loss.item() == pytest.approx(want, rel=1e-5)


def test_logits_equal_the_equation(make_stats):
    torch.manual_seed(0)
    head, x = HEADS["disalign"](6, make_stats(3)).double(), torch.randn(5, 6, dtype=torch.float64)
    for tensor in (head.fc_cls.weight, head.fc_cls.bias, *head.parameters()):
        tensor.data.normal_()
    found = head(x).tolist()
    for row, features in enumerate(x.tolist()):
        gate = sum(u * v for u, v in zip(head.confidence.weight[0].tolist(), features, strict=True))
        kappa = 1 / (1 + math.exp(-gate - head.confidence.bias.item()))
        for c in range(4):
            z = sum(w * v for w, v in zip(head.fc_cls.weight[c].tolist(), features, strict=True))
            z += head.fc_cls.bias[c].item()
            if c < 3:
                z = kappa * (head.scale[c].item() * z + head.shift[c].item()) + (1 - kappa) * z
            assert found[row][c] == pytest.approx(z)


def test_it_starts_as_the_frozen_classifier(make_stats):
    head, x = HEADS["disalign"](6, make_stats(3)), torch.randn(5, 6)
    torch.testing.assert_close(head(x), head.fc_cls(x))


def test_only_scale_shift_and_gate_train(make_stats):
    """2 C + D + 1 numbers; the classifier is in the checkpoint under the names of the first stage's."""
    head = HEADS["disalign"](6, make_stats(3))
    assert sum(p.numel() for p in head.parameters()) == 2 * 3 + 6 + 1
    softmax = HEADS["softmax"](6, make_stats(3)).state_dict()
    missing = head.load_state_dict(softmax, strict=False).missing_keys
    assert set(missing) == {"scale", "shift", "confidence.weight", "confidence.bias"}
    head(torch.randn(2, 6)).sum().backward()
    assert not head.fc_cls.weight.requires_grad


def test_gradient(make_stats):
    torch.manual_seed(0)
    head = HEADS["disalign"](5, make_stats(4)).double()
    head.fc_cls.weight.normal_()
    x, labels = torch.randn(7, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 4, IGNORED])
    parameters = tuple(p.detach().requires_grad_(True) for p in head.parameters())
    names = [name for name, _ in head.named_parameters()]

    def loss(*values):
        logits = torch.func.functional_call(head, dict(zip(names, values, strict=True)), (x,))
        return head.losses(logits, rois_of(labels))["loss_cls"]

    assert torch.autograd.gradcheck(loss, parameters)
