"""Re-weighting by class against plain loops written from its equations."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from loce.config import HeadConfig, ReweightedOptions
from loce.heads import SoftmaxHead
from loce.heads.reweighted import ReweightedHead, class_weights
from loce.utils.classes import IGNORED
from tests.heads.cases import random_case, rois_of

COUNTS = [5000, 300, 40, 3, 0]
WAYS = [{"by": "inverse_frequency"}, {"by": "effective_number"}, {"by": "effective_number", "beta": 0.9}]


def make(make_stats, **options):
    stats = dataclasses.replace(make_stats(len(COUNTS)), instance_counts=np.array(COUNTS))
    return ReweightedHead(8, stats, HeadConfig(name="reweighted", reweighted=ReweightedOptions(**options)))


def weights_slow(by, beta=0.9999):
    counts = [max(n, 1) for n in COUNTS]
    if by == "inverse_frequency":
        raw = [1 / n for n in counts]
    else:
        raw = [1 / sum(beta**k for k in range(n)) for n in counts]  # the effective number as the sum it comes from
    scale = sum(counts) / sum(n * w for n, w in zip(counts, raw, strict=True))
    return [scale * w for w in raw]


@pytest.mark.parametrize("options", WAYS)
def test_loss_equals_the_equation(make_stats, device, options):
    head, weights = make(make_stats, **options).to(device).double(), [*weights_slow(**options), 1.0]
    for seed in range(4):
        logits, labels = random_case(30, 5, 6, seed)
        total = 0.0
        for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
            if y != IGNORED:
                total -= weights[y] * math.log(math.exp(z[y]) / sum(math.exp(value) for value in z))
        found = head.losses(logits.to(device), rois_of(labels.to(device)))
        assert list(found) == ["loss_cls"]
        want = total / (labels != IGNORED).sum().item()
        assert found["loss_cls"].item() == pytest.approx(want, rel=1e-6)  # the weights are kept in fp32


@pytest.mark.parametrize("options", WAYS)
def test_weights(options):
    weights = class_weights(np.array(COUNTS), ReweightedOptions(**options))
    np.testing.assert_allclose(weights, weights_slow(**options), rtol=1e-9)
    assert (np.diff(weights) >= 0).all() and weights[-1] > weights[0]


def test_a_beta_of_zero_weighs_all_alike():
    np.testing.assert_allclose(class_weights(np.array(COUNTS), ReweightedOptions(beta=0.0)), 1)


def test_gradient(make_stats):
    head = make(make_stats)
    logits, labels = random_case(9, 5, 6, 0)
    assert torch.autograd.gradcheck(lambda z: head.losses(z, rois_of(labels))["loss_cls"], logits.requires_grad_())


def test_layer_and_scores_are_the_softmax_heads(make_stats):
    torch.manual_seed(0)
    head = make(make_stats)
    torch.manual_seed(0)
    plain = SoftmaxHead(8, make_stats(5))
    assert all(torch.equal(p, q) for p, q in zip(head.parameters(), plain.parameters(), strict=True))
    features = torch.randn(4, 8)
    assert torch.equal(head.scores(head(features)), plain.scores(plain(features)))
    assert head.weights.shape == (6,) and head.weights[5] == 1
