"""The forest head against plain loops written from its equations; which loss trains what; trees and their parents."""

import math

import numpy as np
import pytest
import torch

from loce.config import ForestOptions, HeadConfig
from loce.heads.forest import ForestHead
from loce.utils.classes import IGNORED
from loce.utils.errors import UserError
from tests.heads.cases import random_case, rois_of

CLASSES, FEATURES = 5, 8
TREES = {"visual": np.array([1, 0, 0, 1, 0]), "lexical": np.array([2, 0, 1, 1, 3])}
LOGITS = 6 + 3 + 5


def plant(head: ForestHead, trees) -> None:
    for name in head.sizes:
        head.get_buffer(f"tree_{name}").copy_(torch.from_numpy(trees[name]))


def make_head(make_stats) -> ForestHead:
    options = HeadConfig(forest=ForestOptions(visual=2, geometrical=0, lexical=4))
    head = ForestHead(FEATURES, make_stats(CLASSES), options)
    plant(head, TREES)
    return head


def softmax_slow(z):
    total = sum(math.exp(value) for value in z)
    return [math.exp(value) / total for value in z]


def split_slow(row):
    return row[:6], {"visual": row[6:9], "lexical": row[9:]}


def parent_slow(tree, label):
    return len(set(TREES[tree])) if label == CLASSES else int(TREES[tree][label])


def test_losses_equal_the_equation(make_stats, device):
    head = make_head(make_stats).double().to(device)
    for seed in range(5):
        logits, labels = random_case(20, CLASSES, LOGITS, seed)
        sums, count = {"loss_cls": 0.0, "loss_visual": 0.0, "loss_lexical": 0.0}, 0
        for row, y in zip(logits.tolist(), labels.tolist(), strict=True):
            if y == IGNORED:
                continue
            z, parents = split_slow(row)
            sums["loss_cls"] -= math.log(softmax_slow(z)[y])
            for tree, u in parents.items():
                sums[f"loss_{tree}"] -= math.log(softmax_slow(u)[parent_slow(tree, y)])
            count += 1
        losses = head.losses(logits.to(device), rois_of(labels.to(device)))
        assert set(losses) == set(sums)
        for name, total in sums.items():
            torch.testing.assert_close(losses[name].item(), total / count, rtol=1e-10, atol=0)


def test_gradient(make_stats):
    head = make_head(make_stats).double()
    logits, labels = random_case(10, CLASSES, LOGITS, 1)
    rois = rois_of(labels)
    assert torch.autograd.gradcheck(lambda z: sum(head.losses(z, rois).values()), logits.requires_grad_())


def test_scores_equal_the_equation(make_stats, device):
    head = make_head(make_stats).double().to(device)
    logits, _ = random_case(20, CLASSES, LOGITS, 0)
    want = []
    for row in logits.tolist():
        z, parents = split_slow(row)
        terms = []
        for c in range(CLASSES + 1):
            a = sum(softmax_slow(u)[parent_slow(tree, c)] for tree, u in parents.items()) / len(parents)
            terms.append(a * math.exp(z[c]))
        want.append([term / sum(terms) for term in terms[:CLASSES]])
    torch.testing.assert_close(head.scores(logits.to(device)).cpu(), torch.tensor(want, dtype=torch.float64))
    huge = head.float().scores(1e4 * logits.float().to(device))
    assert torch.isfinite(huge).all()


def test_only_the_fine_classifier_trains_what_is_below(make_stats):
    head = make_head(make_stats)
    labels = torch.arange(CLASSES + 1)
    for name in ("loss_cls", "loss_visual", "loss_lexical"):
        x = torch.randn(CLASSES + 1, FEATURES, requires_grad=True)
        head.zero_grad()
        head.losses(head(x), rois_of(labels))[name].backward()
        assert x.grad is not None and bool(x.grad.any()) == (name == "loss_cls")
        trained = {key.rpartition(".fc")[0] for key, p in head.named_parameters() if p.grad.any()}
        assert trained == {"fine" if name == "loss_cls" else f"parents.{name.removeprefix('loss_')}"}


def test_layers_and_initial_values(make_stats):
    torch.manual_seed(0)
    head = ForestHead(200, make_stats(120))
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "fine.fc.weight": (200, 200),
        "fine.fc_cls.weight": (121, 200),
        "parents.visual.fc.weight": (200, 200),
        "parents.visual.fc_cls.weight": (26, 200),
        "parents.geometrical.fc.weight": (200, 200),
        "parents.geometrical.fc_cls.weight": (51, 200),
    }
    for name, p in head.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "fc_cls" in name:
            assert abs(p.std().item() - 0.01) < 4e-4
        else:
            assert 0.99 * math.sqrt(6 / 400) < p.abs().max() <= math.sqrt(6 / 400)  # Xavier


def test_trees_are_part_of_the_checkpoint_and_must_be_those_of_the_weights(make_stats):
    head, other = make_head(make_stats), make_head(make_stats)
    plant(other, {**TREES, "visual": np.array([0, 0, 0, 0, 1])})
    weights = {f"roi_heads.classifier.{name}": tensor for name, tensor in head.state_dict().items()}
    assert {"roi_heads.classifier.tree_visual", "roi_heads.classifier.tree_lexical"} < set(weights)
    assert head.adopt(weights) == weights
    with pytest.raises(UserError, match="another visual tree"):
        other.adopt(weights)
    plain = {"roi_heads.classifier.fc_cls.weight": torch.zeros(6, FEATURES)}
    assert other.adopt(plain) == plain
    other.load_state_dict(head.state_dict())
    np.testing.assert_array_equal(other.get_buffer("tree_visual"), TREES["visual"])
