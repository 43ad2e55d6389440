"""The BALMS head: its loss and scores against plain loops, its meta step against autograd through the inner step."""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from loce.config import BALMSOptions, EQLOptions, HeadConfig
from loce.heads import HEADS
from loce.heads.eql import EQLHead
from loce.utils.classes import IGNORED, META
from tests.heads.cases import rois_of

FEATURES = 6


def head_of(stats, features=FEATURES, **options):
    torch.manual_seed(0)
    head = HEADS["balms"](features, stats, HeadConfig(name="balms", balms=BALMSOptions(**options))).double()
    torch.nn.init.normal_(head.fc_cls.weight, std=0.5)
    return head


def case(rows, classes, seed, meta=True):
    """Features (rows, FEATURES) and RoIs of training and meta rows, in float64: classes, background and ignored."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes + 1, (rows,), generator=generator)
    labels[3::7] = IGNORED
    labels[:2] = 0
    drawn = torch.where(torch.arange(rows) % 2 == 1, META if meta else -1, -1)
    return x, rois_of(labels, features_ND=x, sampled_class_N=drawn)


def shifted(z, y, stats):
    """z' = z - log((1 - f) / f) in foreground rows, in Python floats."""
    if y == len(stats):
        return z
    f = [min(max(m, 1), stats.image_total - 1) / stats.image_total for m in stats.image_counts.tolist()]
    return [value - math.log((1 - share) / share) for value, share in zip(z, f, strict=True)]


def loss_slow(logits, labels, weights, stats):
    """1/R sum_r w_r sum_c BCE(z'_rc, [y = c]), w_r the class's weight over its mean over foreground rows."""
    classes = len(stats)
    rows = [(z, y) for z, y in zip(logits, labels, strict=True) if y != IGNORED]
    own = [weights[y] for _, y in rows if y < classes]
    total = 0.0
    for z, y in rows:
        w = weights[y] / (sum(own) / len(own)) if y < classes else 1.0
        for c, value in enumerate(shifted(z, y, stats)):
            total += w * (math.log1p(math.exp(-value)) + (0 if y == c else value))
    return total / len(rows)


def meta_gradient_slow(head, stats, x, rois):
    """dmeta/da by autograd, through one differentiable step of SGD on weight and bias."""
    classes, weight, bias = len(stats), head.fc_cls.weight.detach().clone(), head.fc_cls.bias.detach().clone()
    a, weight, bias = head.reweighter.a.clone().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    takes_part = rois.labels_N != IGNORED
    training, meta = takes_part & (rois.sampled_class_N != META), takes_part & (rois.sampled_class_N == META)
    f = torch.tensor(stats.image_counts).clamp(1, stats.image_total - 1).double() / stats.image_total

    targets = torch.nn.functional.one_hot(rois.labels_N.clamp(min=0), classes + 1)[:, :classes].double()
    labels = rois.labels_N[training]
    foreground = labels < classes
    z = x[training] @ weight.T + bias
    z = torch.where(foreground[:, None], z - ((1 - f) / f).log(), z)
    v = a.sigmoid()[labels.clamp(max=classes - 1)]
    w = torch.where(foreground, v / v[foreground].mean(), 1.0)
    loss = (w[:, None] * bce(z, targets[training], reduction="none")).sum() / training.sum()
    steps = torch.autograd.grad(loss, (weight, bias), create_graph=True)
    eta = head.options.balms.inner_lr
    moved = x[meta] @ (weight - eta * steps[0]).T + (bias - eta * steps[1])
    outer = bce(moved, targets[meta], reduction="sum") / meta.sum()
    return torch.autograd.grad(outer, a)[0]


@pytest.mark.parametrize("classes", [2, 5, 20])
@pytest.mark.parametrize("inner_lr", [0.02, 5.0])
def test_several_steps_equal_autograd_and_torchs_adam(make_stats, classes, inner_lr):
    """a, and the loss with the new weights, over steps in which the classifier moves too."""
    stats = make_stats(classes)
    stats.image_counts[1] = 0  # never seen: counted as 1
    head = head_of(stats, inner_lr=inner_lr)
    a = torch.nn.Parameter(torch.zeros(classes, dtype=torch.float64))
    adam = torch.optim.Adam([a], lr=0.01)
    sgd = torch.optim.SGD(head.parameters(), lr=0.5)
    for step in range(5):
        x, rois = case(60, classes, step)
        a.grad = meta_gradient_slow(head, stats, x, rois)
        assert a.grad.abs().max() > 0
        adam.step()
        logits = head(x)
        losses = head.losses(logits, rois)
        state = adam.state[a]  # the moments show the size of the gradient, which a does not
        for name, value in (("a", a.detach()), ("first", state["exp_avg"]), ("second", state["exp_avg_sq"])):
            torch.testing.assert_close(getattr(head.reweighter, name), value, rtol=1e-6, atol=1e-14)
        training = rois.sampled_class_N != META
        want = loss_slow(
            logits[training].tolist(), rois.labels_N[training].tolist(), a.detach().sigmoid().tolist(), stats
        )
        assert list(losses) == ["loss_cls"]
        assert losses["loss_cls"].item() == pytest.approx(want, rel=1e-6)
        sgd.zero_grad()
        losses["loss_cls"].backward()
        sgd.step()
    assert head.reweighter.a.abs().max() > 0.01


def test_weights_move_to_what_helps_the_meta_batch(make_stats):
    """Classes 0 and 1 want opposite things of the same feature, and the meta batch shows class 1 only."""
    head = head_of(make_stats(2))
    x = torch.ones(4, FEATURES, dtype=torch.float64)
    rois = rois_of(torch.tensor([0, 1, 1, 1]), features_ND=x, sampled_class_N=torch.tensor([-1, -1, META, META]))
    for _ in range(20):
        head.losses(head(x), rois)
    assert head.reweighter.a[1] > 0.1 > -0.1 > head.reweighter.a[0]


def test_without_meta_rows_only_the_loss_is_left(make_stats):
    head, stats = head_of(make_stats(5)), make_stats(5)
    x, rois = case(30, 5, 0)
    head.losses(head(x), rois)
    before = {name: value.clone() for name, value in head.reweighter.named_buffers()}
    assert before["steps"] == 1
    x, rois = case(30, 5, 1, meta=False)
    for batch in (rois, dataclasses.replace(rois, sampled_class_N=None)):
        loss = head.losses(head(x), batch)["loss_cls"].item()
        want = loss_slow(head(x).tolist(), rois.labels_N.tolist(), before["a"].sigmoid().tolist(), stats)
        assert loss == pytest.approx(want, rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in head.reweighter.named_buffers())


@pytest.mark.parametrize("which", ["no training rows", "no foreground", "all ignored", "no rows"])
def test_edges_are_finite(make_stats, which):
    head = head_of(make_stats(5))
    x, rois = case(30, 5, 0)
    if which == "no training rows":
        rois.sampled_class_N[:] = META
    elif which == "no foreground":
        rois.labels_N[:] = 5
    elif which == "all ignored":
        rois.labels_N[:] = IGNORED
    else:
        x, rois = case(30, 5, 0)
        empty = {
            name: getattr(rois, name)[:0] for name in ("labels_N", "instances_N", "from_memory_N", "sampled_class_N")
        }
        x = x[:0]
        rois = dataclasses.replace(rois, features_ND=x, **empty)
    loss = head.losses(head(x), rois)["loss_cls"]
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(head.fc_cls.weight.grad).all()
    assert all(torch.isfinite(value).all() for value in head.reweighter.buffers())
    assert which == "no foreground" or loss == 0


def test_weights_far_from_the_start_are_finite(make_stats):
    head = head_of(make_stats(5)).float()
    head.reweighter.a += torch.tensor([200.0, -200.0, -400.0, 0.0, 50.0])
    x, rois = case(30, 5, 0)
    x = rois.features_ND = x.float()
    for labels in (rois.labels_N, torch.full_like(rois.labels_N, 2)):
        rois.labels_N = labels
        assert torch.isfinite(head.losses(head(x), rois)["loss_cls"])
        assert all(torch.isfinite(value).all() for value in head.reweighter.buffers())


def test_under_autocast_the_meta_step_is_fp32(make_stats, device):
    """The same rows in bfloat16 and, with the very same values, in float32 give the same weights."""
    x, rois = case(60, 5, 0)
    found = []
    for autocast in (True, False):
        head = head_of(make_stats(5)).float().to(device)
        rounded = x.bfloat16().to(device)
        on_device = {
            field.name: getattr(rois, field.name).to(device)
            for field in dataclasses.fields(rois)
            if isinstance(getattr(rois, field.name), torch.Tensor)
        }
        logits = head(rounded.float()).bfloat16().detach()
        batch = dataclasses.replace(rois, **{**on_device, "features_ND": rounded})
        with torch.autocast(device.type, torch.bfloat16, autocast):
            loss = head.losses(logits if autocast else logits.float(), batch)["loss_cls"]
        assert loss.dtype == torch.float32
        found.append((loss, head.reweighter.a))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_gradient(make_stats):
    head = head_of(make_stats(4))
    x, rois = case(12, 4, 0, meta=False)
    logits = head(x).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: head.losses(z, rois)["loss_cls"], logits)


def test_scores_are_unshifted_sigmoids(make_stats):
    head = head_of(make_stats(3))
    want = [[1 / (1 + math.exp(-value)) for value in (0.5, -2.0, 3.0)]]
    torch.testing.assert_close(head.scores(torch.tensor([[0.5, -2.0, 3.0]])), torch.tensor(want))


def test_goes_on_from_its_first_stage(make_stats):
    """A plain sigmoid detector is EQL that spares no class; its layer is taken over, the re-weighting starts anew."""
    stage1 = EQLHead(FEATURES, make_stats(5), HeadConfig(name="eql", eql=EQLOptions(threshold=0.0)))
    head = HEADS["balms"](FEATURES, make_stats(5))
    result = head.load_state_dict(stage1.state_dict(), strict=False)
    assert set(result.missing_keys) == {f"reweighter.{name}" for name in ("a", "first", "second", "steps")}
    assert set(result.unexpected_keys) <= {"tail"} and not stage1.tail.any()
    x = torch.randn(4, FEATURES)
    assert torch.equal(head.scores(head(x)), stage1.scores(stage1(x)))


def test_layer_and_initial_values(make_stats):
    torch.manual_seed(0)
    head = HEADS["balms"](256, make_stats(40))
    assert abs(head.fc_cls.weight.std().item() - 0.01) < 3e-4
    torch.testing.assert_close(head.fc_cls.bias.sigmoid(), torch.full((40,), 0.001))
    assert not any(value.any() for value in head.reweighter.buffers())


def test_without_a_learning_rate_of_the_weights_it_is_the_plain_shifted_loss(make_stats):
    """meta_lr = 0: weights 1, no meta batch is asked for, features are not needed and nothing is learned but W."""
    stats = make_stats(5)
    head = head_of(stats, meta_lr=0.0)
    assert not head.meta_batch and head_of(stats).meta_batch
    x, rois = case(40, 5, 0, meta=False)
    for batch in (dataclasses.replace(rois, features_ND=None), dataclasses.replace(rois, sampled_class_N=None)):
        loss = head.losses(head(x), batch)["loss_cls"].item()
        assert loss == pytest.approx(loss_slow(head(x).tolist(), rois.labels_N.tolist(), [1.0] * 5, stats), rel=1e-6)
    assert not any(value.any() for value in head.reweighter.buffers())
    assert head.state_dict().keys() == head_of(stats).state_dict().keys()


def test_needs_features(make_stats):
    with pytest.raises(ValueError, match=r"rois\.features_ND"):
        head_of(make_stats(2)).losses(torch.zeros(1, 2), rois_of(torch.tensor([0])))
