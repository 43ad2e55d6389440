"""The softmax head against plain loops written from Eq. 1."""

import math

import torch

from loce.heads import HEADS, RoIs, SoftmaxHead
from loce.utils.classes import IGNORED


def loss_slow(logits, labels):
    """Eq. 1, -log(e^{z_y} / sum e^{z_y'}), averaged over the rows that are not ignored, in Python floats."""
    losses = [
        -math.log(math.exp(z[y]) / sum(math.exp(value) for value in z))
        for z, y in zip(logits, labels, strict=True)
        if y != IGNORED
    ]
    return sum(losses) / len(losses)


def rois_of(labels):
    return RoIs(labels_N=labels, instances_N=torch.full_like(labels, -1), from_memory_N=labels == IGNORED)


def test_loss_equals_the_equation(make_stats, device):
    generator = torch.Generator().manual_seed(0)
    head = SoftmaxHead(8, make_stats(5)).to(device)
    for rows in range(1, 20):
        logits = 4 * torch.randn(rows, 6, generator=generator)
        labels = torch.randint(6, (rows,), generator=generator)
        labels[1::4] = IGNORED
        losses = head.losses(logits.to(device), rois_of(labels.to(device)))
        assert list(losses) == ["loss_cls"]
        want = torch.tensor(loss_slow(logits.double().tolist(), labels.tolist()), dtype=torch.float64)
        torch.testing.assert_close(losses["loss_cls"].cpu().double(), want, rtol=1e-5, atol=1e-6)


def test_scores_are_the_softmax_without_background(make_stats):
    head = SoftmaxHead(8, make_stats(3))
    z = [0.5, -1.0, 2.0, 3.0]
    total = sum(math.exp(value) for value in z)
    want = torch.tensor([[math.exp(value) / total for value in z[:3]]])
    torch.testing.assert_close(head.scores(torch.tensor([z])), want)


def test_layer_and_initial_values(make_stats):
    torch.manual_seed(0)
    head = HEADS["softmax"](256, make_stats(40))
    assert {name: tuple(p.shape) for name, p in head.state_dict().items()} == {
        "fc_cls.weight": (41, 256),
        "fc_cls.bias": (41,),
    }
    assert abs(head.fc_cls.weight.std().item() - 0.01) < 3e-4  # 10,000 numbers: standard error 7e-5
    assert not head.fc_cls.bias.any()
    features = torch.randn(4, 256)
    torch.testing.assert_close(head(features), features @ head.fc_cls.weight.T)


def test_count_of_rows_that_take_part():
    assert rois_of(torch.tensor([3, IGNORED, 0, IGNORED])).count.item() == 2
    assert rois_of(torch.tensor([IGNORED])).count.item() == 1
    assert rois_of(torch.zeros(0, dtype=torch.long)).count.item() == 1
