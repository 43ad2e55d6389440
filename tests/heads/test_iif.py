"""The inverse image frequency head against plain loops written from its equation."""

import math

import pytest
import torch

from loce.config import HeadConfig, IIFOptions
from loce.heads import HEADS
from loce.heads.base import NormalisedLinear
from loce.utils.classes import IGNORED
from tests.heads.cases import random_case, rois_of


def loss_slow(logits, labels, weights):
    """-log softmax(w z)[y], averaged over the rows that take part."""
    losses = []
    for z, y in zip(logits, labels, strict=True):
        if y != IGNORED:
            scaled = [w * value for w, value in zip(weights, z, strict=True)]
            losses.append(math.log(sum(math.exp(value) for value in scaled)) - scaled[y])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("classes", [2, 5, 50])
def test_loss_equals_the_equation(make_stats, device, classes):
    stats = make_stats(classes)
    logits, labels = random_case(30, classes, classes + 1, seed=classes, scale=0.7)
    head = HEADS["iif"](8, stats).to(device)
    weights = [math.log10(stats.image_total / count) for count in stats.image_counts] + [1.0]
    loss = head.losses(logits.float().to(device), rois_of(labels.to(device)))["loss_cls"]
    assert loss.item() == pytest.approx(loss_slow(logits.tolist(), labels.tolist(), weights), rel=1e-5)


def test_instances_in_place_of_images(make_stats):
    stats = make_stats(5)
    head = HEADS["iif"](8, stats, HeadConfig(iif=IIFOptions(counts="instances", variant="raw")))
    total = int(stats.instance_counts.sum())
    assert head.weight_C.tolist() == pytest.approx([math.log(total / n) for n in stats.instance_counts])


def test_layers(make_stats):
    plain = HEADS["iif"](8, make_stats(4))
    cosine = HEADS["iif"](8, make_stats(4), HeadConfig(iif=IIFOptions(normalised=True)))
    assert (plain.fc_cls.weight == 0.001).all() and isinstance(cosine.fc_cls, NormalisedLinear)
    assert cosine.fc_cls.temperature == 8


def test_scores_are_those_of_the_scaled_logits(make_stats):
    head, z = HEADS["iif"](8, make_stats(4)), torch.randn(6, 5)
    torch.testing.assert_close(head.scores(z), (z * torch.tensor([*head.weight_C, 1.0])).softmax(dim=1)[:, :4])


def test_gradient(make_stats):
    logits, labels = random_case(9, 4, 5, seed=0)
    head = HEADS["iif"](8, make_stats(4)).double()
    assert torch.autograd.gradcheck(lambda z: head.losses(z, rois_of(labels))["loss_cls"], logits.requires_grad_(True))
