"""The NorCal head: the softmax head in training, its scores against plain loops written from the equation."""

import math

import pytest
import torch

from loce.config import HeadConfig, NorCalOptions
from loce.heads import HEADS, RoIs, SoftmaxHead


def head_of(stats, **options):
    return HEADS["norcal"](8, stats, HeadConfig(name="norcal", norcal=NorCalOptions(**options))).eval()


def scores_slow(z, counts, gamma):
    """p_c = (e^{z_c} / n_c^gamma) / (e^{z_bg} + sum_j e^{z_j} / n_j^gamma)."""
    terms = [math.exp(value) / max(n, 1) ** gamma for value, n in zip(z[:-1], counts, strict=True)]
    return [term / (math.exp(z[-1]) + sum(terms)) for term in terms]


@pytest.mark.parametrize("counts", ["images", "instances"])
@pytest.mark.parametrize(("classes", "gamma"), [(2, 0.6), (5, 1.0), (50, 0.3), (1203, 0.6)])
def test_scores_equal_the_equation(make_stats, device, classes, gamma, counts):
    stats = make_stats(classes)
    n = stats.image_counts if counts == "images" else stats.instance_counts
    n[1] = 0  # never seen: counted as 1
    head = head_of(stats, gamma=gamma, counts=counts).to(device)
    logits = 4 * torch.randn(7, classes + 1, generator=torch.Generator().manual_seed(0))
    want = [scores_slow(z, n.tolist(), gamma) for z in logits.tolist()]
    torch.testing.assert_close(head.scores(logits.to(device)).cpu(), torch.tensor(want), rtol=1e-4, atol=1e-9)


def test_a_finished_softmax_checkpoint_fits_and_training_is_the_same(make_stats):
    torch.manual_seed(0)
    plain, calibrated = SoftmaxHead(8, make_stats(4)), head_of(make_stats(4))
    calibrated.load_state_dict(plain.state_dict(), strict=True)
    x, labels = torch.randn(9, 8), torch.randint(5, (9,))
    assert not torch.allclose(plain.scores(plain(x)), calibrated.scores(calibrated(x)))
    calibrated.train()
    assert torch.equal(plain.scores(plain(x)), calibrated.scores(calibrated(x)))  # the mean score of the memory
    rois = RoIs(labels, torch.full_like(labels, -1), torch.zeros_like(labels, dtype=torch.bool))
    assert torch.equal(plain.losses(plain(x), rois)["loss_cls"], calibrated.losses(calibrated(x), rois)["loss_cls"])


def test_gamma_0_changes_nothing(make_stats):
    logits = torch.randn(9, 5)
    plain = SoftmaxHead(8, make_stats(4))
    torch.testing.assert_close(head_of(make_stats(4), gamma=0.0).scores(logits), plain.scores(logits))


def test_logits_of_any_size_give_finite_scores(make_stats):
    logits = torch.tensor([[1e4, -1e4, 0.0, 0.0, 1e4], [-1e4] * 5])
    assert torch.isfinite(head_of(make_stats(4)).scores(logits)).all()
