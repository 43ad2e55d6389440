"""Post-hoc calibration against its authors' numbers (tests/fixtures/newer) and against loops written from equations."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from loce import posthoc
from tests.fixtures.newer import rule

FOLDER = Path(__file__).resolve().parent / "fixtures" / "newer"
S = rule.PUBLIC
C, D = S["C"], S["D"]


def authors(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / f"{name}.npz"))


def close(found, wanted, tolerance=2e-5):
    values = np.asarray(found, np.float64)[: len(wanted)]
    assert values.shape == wanted.shape
    assert np.abs(values - wanted).max() <= tolerance * max(1, np.abs(wanted).max())


def float32(array):
    return torch.from_numpy(np.ascontiguousarray(array)).float()


@pytest.fixture(scope="module")
def dimension() -> np.ndarray:
    data = rule.dataset(S)
    sizes = np.stack([data["width"], data["height"]], axis=1)[data["image"]]
    centres = (data["box"][:, :2] + data["box"][:, 2:] / 2) / sizes
    return posthoc.box_counting_dimension(centres, data["category"], C)


def test_box_counting_dimension(dimension):
    close(dimension, authors("fracal")["dimension"])


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
    wanted = authors("fracal")
    name = variant.removesuffix("_obj")
    close(posthoc.inverse_frequency(*counts(variant), name), wanted[f"frequency/{variant}"])
    weight = posthoc.fracal_weights(*counts(variant), name)
    close(weight, wanted[f"softmax/{variant}/weights"][:C])
    logits = float32(rule.logits(S, "fracal/softmax", C + 1))
    keys = [key for key in wanted if key.startswith(f"softmax/{variant}/lambda")]
    for key in keys:
        exponent = float(key.split("lambda")[1].split("/")[0])
        close(posthoc.fracal(logits, float32(weight), float32(dimension), exponent), wanted[key][:, :C])


def test_fracal_without_weights_and_for_sigmoids(dimension):
    wanted, phi = authors("fracal"), float32(dimension)
    logits = float32(rule.logits(S, "fracal/softmax", C + 1))
    close(posthoc.fracal(logits, torch.zeros(C), phi), wanted["softmax/None/lambda2/scores_head"][:, :C])
    logits, weight = float32(rule.logits(S, "fracal/sigmoid", C)), float32(posthoc.fracal_weights(*counts("base10")))
    for exponent, key in ((2, "scores"), (1, "scores_head")):
        found = posthoc.fracal_sigmoid(logits, weight, phi, exponent)
        close(found, wanted[f"sigmoid/base10/lambda{exponent}/{key}"])


def test_a_class_without_images_is_calibrated_as_one_with_one():
    weight = posthoc.fracal_weights(np.array([0, 1, 50]), 100)
    assert weight[0] == weight[1] == pytest.approx(2 - math.log10(3))


def logn_batch(name):
    centre = rule.normal(S, "logn/centre", C + 1, scale=2)
    spread = np.exp(rule.normal(S, "logn/spread", C + 1, scale=0.5))
    return float32(centre + spread * rule.logits(S, f"logn/{name}", C + 1, scale=1))


def test_logn():
    wanted = authors("logn")
    mean, variance = (float32(wanted[f"momentum0.1/step4/{key}"][:C]) for key in ("mean", "variance"))
    found = posthoc.logn(logn_batch("test"), mean, variance)
    close(found, wanted["momentum0.1/calibrated"])


@pytest.mark.parametrize("momentum", [1e-4, 5e-5, 0.1])
def test_running_moments(momentum):
    wanted, moments = authors("logn"), posthoc.LogitMoments(C, momentum)
    name = f"momentum{momentum:g}".replace("e-0", "e-0")
    for step in range(5):
        moments.update(logn_batch(step))
        if f"{name}/step{step}/mean" in wanted:
            close(moments.mean, wanted[f"{name}/step{step}/mean"][:C])
            close(moments.variance, wanted[f"{name}/step{step}/variance"][:C])


def test_exact_moments():
    wanted, moments = authors("logn"), posthoc.LogitMoments(C)
    for step in range(5):
        moments.update(logn_batch(step))
    close(moments.mean, wanted["exact/mean"][:C])
    close(moments.variance, wanted["exact/variance"][:C])
    close(
        posthoc.logn(logn_batch("test"), moments.mean.float(), moments.variance.float()),
        wanted["exact/calibrated_head"],
    )
