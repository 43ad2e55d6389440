"""Post-hoc calibration against its authors' numbers (tests/fixtures/newer) and against loops written from equations."""

import math

import numpy as np
import pytest
import torch

from loce import posthoc
from loce.config import (
    SIGMOID_HEADS,
    SOFTMAX_HEADS,
    EvalConfig,
    FRACALOptions,
    HeadConfig,
    IIFOptions,
    LogitAdjustmentOptions,
    LogNOptions,
    NorCalOptions,
    PosthocIIFOptions,
    TauNormOptions,
    TemperatureOptions,
)
from loce.heads import HEADS
from tests.fixtures.newer import Authors, rule

S = rule.PUBLIC
C, D = S["C"], S["D"]


def float32(array):
    return torch.from_numpy(np.ascontiguousarray(array)).float()


@pytest.fixture(scope="module")
def dimension() -> np.ndarray:
    data = rule.dataset(S)
    sizes = np.stack([data["width"], data["height"]], axis=1)[data["image"]]
    centres = (data["box"][:, :2] + data["box"][:, 2:] / 2) / sizes
    return posthoc.box_counting_dimension(centres, data["category"], C)


def test_box_counting_dimension(dimension):
    Authors("fracal").close("dimension", dimension)


def test_box_counting_dimension_of_known_shapes():
    """Points on a line have dimension 1, points all over the image 2; few points or one place 1."""
    grid = (np.stack(np.meshgrid(np.arange(64), np.arange(64)), -1).reshape(-1, 2) + 0.5) / 64
    line = np.stack([np.linspace(0, 1, 4096, endpoint=False)] * 2, axis=1)
    centres = np.concatenate([grid, line, np.full((100, 2), 0.3), np.random.default_rng(0).random((3, 2))])
    labels = np.repeat([0, 1, 2, 3], [len(grid), len(line), 100, 3])
    found = posthoc.box_counting_dimension(centres, labels, 5)
    assert found[0] == pytest.approx(2) and found[1] == pytest.approx(1)
    assert found[2:].tolist() == [1, 1, 1]


def counts(variant):
    images, instances = rule.image_counts(S), rule.instance_counts(S)
    return (instances, int(instances.sum())) if variant.endswith("_obj") else (images, S["images"])


@pytest.mark.parametrize("variant", ["base10", "raw", "smooth", "prob", "normit", "gombit", "base2", "base10_obj"])
def test_fracal(dimension, variant):
    wanted = Authors("fracal")
    name = variant.removesuffix("_obj")
    wanted.close(f"frequency/{variant}", posthoc.inverse_frequency(*counts(variant), name))
    weight = posthoc.fracal_weights(*counts(variant), name)
    wanted.close(f"softmax/{variant}/weights", weight)
    logits = float32(rule.logits(S, "fracal/softmax", C + 1))
    keys = [key for key in wanted if key.startswith(f"softmax/{variant}/lambda")]
    for key in keys:
        exponent = float(key.split("lambda")[1].split("/")[0])
        wanted.close(key, posthoc.fracal(logits, float32(weight), float32(dimension), exponent))


def test_fracal_without_weights_and_for_sigmoids(dimension):
    wanted, phi = Authors("fracal"), float32(dimension)
    logits = float32(rule.logits(S, "fracal/softmax", C + 1))
    wanted.close("softmax/None/lambda2/scores_head", posthoc.fracal(logits, torch.zeros(C), phi))
    logits, weight = float32(rule.logits(S, "fracal/sigmoid", C)), float32(posthoc.fracal_weights(*counts("base10")))
    for exponent, key in ((2, "scores"), (1, "scores_head")):
        found = posthoc.fracal_sigmoid(logits, weight, phi, exponent)
        wanted.close(f"sigmoid/base10/lambda{exponent}/{key}", found)


def test_a_class_without_images_is_calibrated_as_one_with_one():
    weight = posthoc.fracal_weights(np.array([0, 1, 50]), 100)
    assert weight[0] == weight[1] == pytest.approx(2 - math.log10(3))


def logn_batch(name):
    centre = rule.normal(S, "logn/centre", C + 1, scale=2)
    spread = np.exp(rule.normal(S, "logn/spread", C + 1, scale=0.5))
    return float32(centre + spread * rule.logits(S, f"logn/{name}", C + 1, scale=1))


def test_logn():
    wanted = Authors("logn")
    mean, variance = (float32(wanted[f"momentum0.1/step4/{key}"][:C]) for key in ("mean", "variance"))
    found = posthoc.logn(logn_batch("test"), mean, variance)
    wanted.close("momentum0.1/calibrated", found)


@pytest.mark.parametrize("momentum", [1e-4, 5e-5, 0.1])
def test_running_moments(momentum):
    wanted, moments = Authors("logn"), posthoc.LogitMoments(C, momentum)
    name = f"momentum{momentum:g}"
    for step in range(5):
        moments.update(logn_batch(step))
        if f"{name}/step{step}/mean" in wanted:
            wanted.close(f"{name}/step{step}/mean", moments.mean)
            wanted.close(f"{name}/step{step}/variance", moments.variance)


def test_exact_moments():
    wanted, moments = Authors("logn"), posthoc.LogitMoments(C)
    for step in range(5):
        moments.update(logn_batch(step))
    wanted.close("exact/mean", moments.mean)
    wanted.close("exact/variance", moments.variance)
    wanted.close(
        "exact/calibrated_head", posthoc.logn(logn_batch("test"), moments.mean.float(), moments.variance.float())
    )


# Methods without released numbers, against loops from their equations.


def logits(rows=9, columns=6, seed=0):
    return 4 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


COUNTS = [900, 40, 3, 0, 7]


def test_norcal_equals_its_equation():
    """p_c = (e^{z_c} / n_c^gamma) / (e^{z_bg} + sum_j e^{z_j} / n_j^gamma)."""
    shift = torch.from_numpy(posthoc.norcal_shift(np.array(COUNTS), 0.6))
    for z, found in zip(logits().tolist(), posthoc.norcal(logits(), shift).softmax(dim=1).tolist(), strict=True):
        terms = [math.exp(value) / max(n, 1) ** 0.6 for value, n in zip(z[:-1], COUNTS, strict=True)]
        total = math.exp(z[-1]) + sum(terms)
        assert found == pytest.approx([term / total for term in [*terms, math.exp(z[-1])]], rel=1e-12)


def test_logit_adjustment_equals_its_equation():
    """z_c - tau log pi_c, pi_c = n_c / (n_1 ... n_C)^(1/C)."""
    prior = torch.from_numpy(posthoc.log_prior(np.array(COUNTS)))
    n = [max(count, 1) for count in COUNTS]
    mean = math.prod(n) ** (1 / len(n))
    for z, found in zip(logits().tolist(), posthoc.logit_adjustment(logits(), prior, 0.7).tolist(), strict=True):
        wanted = [value - 0.7 * math.log(count / mean) for value, count in zip(z[:-1], n, strict=True)]
        assert found == pytest.approx([*wanted, z[-1]], rel=1e-12)


def test_tau_norm_is_a_classifier_with_shorter_weights():
    """(w_c . x) / (|w_c| / geometric mean)^tau + b_c, from the weights."""
    generator = torch.Generator().manual_seed(1)
    x, bias = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((9, 4), (6,)))
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64) * torch.arange(1, 7)[:, None]
    norm = weight.norm(dim=1)[:-1]
    found = posthoc.tau_norm(x @ weight.T + bias, norm, bias[:-1], 0.8)
    mean = math.prod(norm.tolist()) ** (1 / 5)
    for row, z in zip(x.tolist(), found.tolist(), strict=True):
        for c in range(6):
            length = (norm[c].item() / mean) ** 0.8 if c < 5 else 1.0
            product = sum(a * b for a, b in zip(row, weight[c].tolist(), strict=True))
            assert z[c] == pytest.approx(product / length + bias[c].item(), rel=1e-9)


def test_temperature_and_logn_strength():
    assert torch.equal(posthoc.temperature(logits(), 2.0), logits() / 2)
    mean, variance = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0]).double(), torch.tensor([4.0, 1.0, 9.0, 0.0, 2.0]).double()
    for z, found in zip(logits().tolist(), posthoc.logn(logits(), mean, variance, 0.5).tolist(), strict=True):
        moments = list(zip(z[:-1], mean.tolist(), variance.tolist(), strict=True))
        wanted = [(value - 0.5 * (m + 2.0)) / math.sqrt(max(v, 1e-11)) ** 0.5 for value, m, v in moments]
        assert found == pytest.approx([*wanted, z[-1]], rel=1e-9)


# The method that options choose.


def facts(classes=5):
    draw = np.random.default_rng(0).random
    images = np.geomspace(200, 1, classes).round().astype(int)
    columns = {name: 0.5 + draw(classes) for name in ("mean", "variance", "norm", "bias")}
    return posthoc.ClassFacts(
        image_counts=images, instance_counts=3 * images, images=300, dimension=1 + draw(classes), **columns
    )


NOTHING = {
    "none": {},
    "norcal": {"norcal": NorCalOptions(gamma=0.0)},
    "tau_norm": {"tau_norm": TauNormOptions(tau=0.0)},
    "temperature": {"temperature": TemperatureOptions(t=1.0)},
    "logn": {"logn": LogNOptions(strength=0.0)},
}


@pytest.mark.parametrize("name", sorted(NOTHING))
def test_strength_0_changes_nothing(name):
    chosen = posthoc.calibration(EvalConfig(posthoc=name, **NOTHING[name]), facts())
    torch.testing.assert_close(chosen(logits().float()), logits().float().softmax(dim=1)[:, :5])


def test_a_method_that_is_a_head_too_is_the_same_there(make_stats):
    """NorCal and IIF by head and by option; logit adjustment undoes its loss's shift."""
    stats = make_stats(5)
    known = posthoc.ClassFacts(
        image_counts=stats.image_counts, instance_counts=stats.instance_counts, images=stats.image_total
    )
    z = logits().float()
    for by in ("images", "instances"):
        head = HEADS["norcal"](8, stats, HeadConfig(norcal=NorCalOptions(gamma=0.4, counts=by))).eval()
        options = EvalConfig(posthoc="norcal", norcal=NorCalOptions(gamma=0.4, counts=by))
        assert torch.equal(posthoc.calibration(options, known)(z), head.scores(z))
        head = HEADS["iif"](8, stats, HeadConfig(iif=IIFOptions(variant="smooth", counts=by)))
        options = EvalConfig(posthoc="iif", iif=PosthocIIFOptions(variant="smooth", counts=by))
        assert torch.equal(posthoc.calibration(options, known)(z), head.scores(z))
    adjusted = HEADS["logit_adjustment"](8, stats, HeadConfig(logit_adjustment=LogitAdjustmentOptions(tau=0.5)))
    options = EvalConfig(posthoc="logit_adjustment", logit_adjustment=LogitAdjustmentOptions(tau=0.5))
    shifted = posthoc.calibration(options, known)(z + adjusted.shift_L)
    torch.testing.assert_close(shifted, z.softmax(dim=1)[:, :5])


@pytest.mark.parametrize(
    ("variant", "by", "key"),
    [
        ("base10", "images", "base10/lambda2/scores"),
        ("smooth", "images", "smooth/lambda2/scores_head"),
        ("base10", "instances", "base10_obj/lambda2/scores_head"),
    ],
)
def test_fracal_by_options_is_the_authors(dimension, variant, by, key):
    wanted = Authors("fracal")
    known = posthoc.ClassFacts(
        image_counts=rule.image_counts(S),
        instance_counts=rule.instance_counts(S),
        images=S["images"],
        dimension=dimension,
    )
    options = EvalConfig(posthoc="fracal", fracal=FRACALOptions(variant=variant, counts=by))
    z = float32(rule.logits(S, "fracal/softmax", C + 1))
    wanted.close(f"softmax/{key}", posthoc.calibration(options, known)(z))
    if (variant, by) == ("base10", "images"):
        z = float32(rule.logits(S, "fracal/sigmoid", C))
        wanted.close("sigmoid/base10/lambda2/scores", posthoc.calibration(options, known, sigmoid=True)(z))


@pytest.mark.parametrize(
    "name", ["none", "norcal", "logit_adjustment", "tau_norm", "temperature", "iif", "logn", "fracal"]
)
def test_any_logits_give_scores(name):
    chosen = posthoc.calibration(EvalConfig(posthoc=name), facts())
    for z in (torch.empty(0, 6), torch.randn(7, 6).half(), torch.tensor([[1e4, -1e4, 0.0, 0.0, 0.0, 1e4], [-1e4] * 6])):
        scores = chosen(z)
        assert scores.shape == (len(z), 5) and scores.dtype == torch.float32
        assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("name", [*SOFTMAX_HEADS, *SIGMOID_HEADS])
def test_heads_whose_logits_can_be_changed_are_what_they_are_said_to_be(name, make_stats):
    torch.manual_seed(0)
    head = HEADS[name](8, make_stats(5)).eval()
    z = head(torch.randn(9, 8))
    plain = posthoc.calibration(EvalConfig(), facts(), sigmoid=name in SIGMOID_HEADS)
    torch.testing.assert_close(plain(z), head.scores(z))
    if name in SOFTMAX_HEADS:
        assert z.shape[1] == 6
