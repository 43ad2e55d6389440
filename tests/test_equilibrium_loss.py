"""The equilibrium loss against plain loops written from Eq. 3 and 4."""

import math

import pytest
import torch
import torch.nn.functional as F

from loce.equilibrium_loss import equilibrium_loss, loss_margin
from loce.utils.classes import IGNORED


def row_loss_slow(z, y, s):
    """Eq. 3 with Eq. 4, term by term, of one row in Python floats."""
    total = 1.0
    for other in range(len(z)):
        if other != y:
            total += math.exp(z[other] - z[y] + math.log(s[other] / s[y]))
    return math.log(total)


def loss_slow(logits, labels, scores):
    rows = [0.0 if y == IGNORED else row_loss_slow(z, y, scores) for z, y in zip(logits, labels, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def random_case(rows, classes, generator):
    logits = 5 * torch.randn(rows, classes + 1, generator=generator)
    labels = torch.randint(classes + 1, (rows,), generator=generator)
    scores = torch.rand(classes + 1, generator=generator) ** 4 + 1e-4
    scores[-1] = 0.01
    return logits, labels, scores


def test_equals_the_equation(device):
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        logits, labels, scores = random_case(3 * trial + 1, 1 + 2 * trial, generator)
        labels[::3] = IGNORED
        want = loss_slow(logits.double().tolist(), labels.tolist(), scores.double().tolist())
        args = logits.to(device), labels.to(device), scores.to(device)
        counted = max(int((labels != IGNORED).sum()), 1)
        for reduction, expected in (("none", want), ("sum", want.sum()), ("mean", want.sum() / counted)):
            got = equilibrium_loss(*args, reduction=reduction)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_instance_counts_serve_as_the_indicator():
    logits, labels, _ = random_case(40, 4, torch.Generator().manual_seed(1))
    counts = torch.tensor([50552, 3, 1, 870, 1])  # the supplement's n, background 1
    want = loss_slow(logits.double().tolist(), labels.tolist(), counts.tolist())
    torch.testing.assert_close(equilibrium_loss(logits, labels, counts, "none").double(), want, rtol=1e-5, atol=1e-5)


def test_gradient_is_right_and_goes_to_the_logits_only():
    logits, labels, scores = random_case(7, 5, torch.Generator().manual_seed(2))
    labels[3] = IGNORED
    logits, scores = logits.double().requires_grad_(), scores.double().requires_grad_()
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(lambda z, how=reduction: equilibrium_loss(z, labels, scores, how), (logits,))
    equilibrium_loss(logits, labels, scores).backward()
    assert scores.grad is None
    assert torch.all(logits.grad[3] == 0)
    assert torch.all(logits.grad[:3].abs().sum(dim=1) > 0)


def test_equal_scores_give_the_plain_cross_entropy():
    logits, labels, _ = random_case(50, 9, torch.Generator().manual_seed(3))
    got = equilibrium_loss(logits, labels, torch.full((10,), 0.01))
    torch.testing.assert_close(got, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_for_huge_gaps(device, dtype):
    """A softmax followed by a log gives infinity beyond a gap of about 103 in fp32, 17 in fp16."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [-6e4, 6e4, 6e4]], dtype=dtype, device=device, requires_grad=True)
    scores = torch.tensor([1.0, 1e-30, 0.01], device=device)
    loss = equilibrium_loss(logits, torch.tensor([1, 0], device=device), scores, "none")
    assert loss.dtype == torch.float32
    want = loss_slow_stable(logits.detach().double().cpu(), [1, 0], scores.double().cpu())
    torch.testing.assert_close(loss.detach().cpu().double(), want, rtol=1e-6, atol=0)
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().max() == 1


def loss_slow_stable(logits, labels, scores):
    """log sum_j exp(x_j) = max + log sum_j exp(x_j - max) for gaps whose exponential no float64 can hold."""
    values = []
    for z, y in zip(logits.tolist(), labels, strict=True):
        x = [value + math.log(s) for value, s in zip(z, scores.tolist(), strict=True)]
        values.append(max(x) + math.log(sum(math.exp(value - max(x)) for value in x)) - x[y])
    return torch.tensor(values, dtype=torch.float64)


def test_a_score_that_has_decayed_to_zero_stays_finite(device):
    logits = torch.zeros(2, 3, device=device, requires_grad=True)
    scores = torch.tensor([0.0, 1e-42, 0.01], device=device)
    loss = equilibrium_loss(logits, torch.tensor([0, 2], device=device), scores)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("rows", [0, 4])
def test_no_row_that_counts_gives_zero(device, rows):
    logits = torch.randn(rows, 6, device=device, requires_grad=True)
    labels = torch.full((rows,), IGNORED, device=device)
    loss = equilibrium_loss(logits, labels, torch.full((6,), 0.1, device=device))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_autocast_does_not_lower_the_precision(device):
    logits, labels, scores = (x.to(device) for x in random_case(30, 12, torch.Generator().manual_seed(4)))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = equilibrium_loss(logits, labels, scores)
    assert got.dtype == torch.float32
    assert torch.equal(got, equilibrium_loss(logits, labels, scores))


def test_unknown_reduction():
    with pytest.raises(ValueError, match="'average'"):
        equilibrium_loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), torch.ones(2), "average")


def test_margin_equals_the_equation():
    scores = torch.tensor([0.8, 0.02, 0.3, 0.01])
    want = [[math.log(s_other / s) for s_other in scores.tolist()] for s in scores.tolist()]
    torch.testing.assert_close(loss_margin(scores).double(), torch.tensor(want, dtype=torch.float64))
    assert loss_margin(scores)[0, 3].item() == pytest.approx(-4.38, abs=0.01)  # background beside a strong class
    assert loss_margin(scores)[3, 0].item() == pytest.approx(+4.38, abs=0.01)
