"""The calibrated head against plain loops, and its two classifiers: which one trains, what they start from."""

import math

import pytest
import torch

from loce.config import HeadConfig, SimCalOptions
from loce.heads.simcal import SimCalHead
from loce.utils.classes import IGNORED, META
from tests.heads.cases import random_case, rois_of

CLASSES, FEATURES, WIDTH = 5, 12, 8


def make_head(make_stats, layers="3fc_ft", threshold=100) -> SimCalHead:
    options = HeadConfig(simcal=SimCalOptions(layers=layers, threshold=threshold))
    return SimCalHead(FEATURES, make_stats(CLASSES), options, WIDTH)


def softmax_slow(z):
    total = sum(math.exp(value) for value in z)
    return [math.exp(value) / total for value in z]


def drawn_for(labels, seed):
    """Most rows are of images drawn for their class, some for another, some for none."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.where(torch.rand(labels.shape, generator=generator) < 0.6, labels, (labels + 1).clamp(0, CLASSES))
    drawn[2::9] = -1
    drawn[4::9] = META
    return drawn


def test_rows_of_the_drawn_class_and_as_many_of_the_background_at_random(make_stats, device):
    head = make_head(make_stats).to(device)
    times = torch.zeros(60)
    for seed in range(200):
        _, labels = random_case(60, CLASSES, 1, 0)
        labels[::2] = CLASSES
        drawn = drawn_for(labels, 0)
        torch.manual_seed(seed)
        rois = rois_of(labels.to(device), sampled_class_N=drawn.to(device))
        rois.from_memory_N[-5:] = True
        kept = head.second_level(rois).tolist()
        positives = background = 0
        for n, (y, d) in enumerate(zip(labels.tolist(), drawn.tolist(), strict=True)):
            foreground = 0 <= y < CLASSES
            if foreground:
                assert kept[n] == (d == y or n >= 55)
                positives += kept[n]
            elif y == CLASSES:
                background += kept[n]
                times[n] += kept[n]
            else:
                assert y == IGNORED and not kept[n]
        assert background == positives > 0
    candidates = times[labels == CLASSES]
    share = background / len(candidates)
    assert share < 0.7
    assert (candidates - 200 * share).abs().max() < 5 * math.sqrt(200 * share * (1 - share))  # all are drawn alike


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_loss_equals_the_equation(make_stats, device, share):
    """Where objects outnumber the background all of it is kept, so that nothing is random; else with the rows drawn."""
    head = make_head(make_stats).double().to(device)
    for seed in range(5):
        logits, labels = random_case(40, CLASSES, 2 * (CLASSES + 1), seed)
        generator = torch.Generator().manual_seed(seed)
        labels[torch.rand(40, generator=generator) < share] = CLASSES
        rois = rois_of(labels.to(device), sampled_class_N=labels.to(device))
        torch.manual_seed(seed)
        kept = head.second_level(rois).tolist()
        terms = [
            -math.log(softmax_slow(z[CLASSES + 1 :])[y])
            for z, y, k in zip(logits.tolist(), labels.tolist(), kept, strict=True)
            if k
        ]
        torch.manual_seed(seed)
        losses = head.losses(logits.to(device), rois)
        assert list(losses) == ["loss_cls"]
        want = sum(terms) / len(terms) if terms else 0.0
        torch.testing.assert_close(losses["loss_cls"].item(), want, rtol=1e-10, atol=0)


def test_gradient(make_stats):
    head = make_head(make_stats)
    logits, labels = random_case(12, CLASSES, 2 * (CLASSES + 1), 3)
    labels[:3] = torch.tensor([0, 1, CLASSES])
    rois = rois_of(labels, sampled_class_N=labels)
    torch.manual_seed(0)
    assert head.second_level(rois)[:2].all()

    def loss(z):
        torch.manual_seed(0)
        return head.losses(z, rois)["loss_cls"]

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    loss(logits).backward()
    assert not logits.grad[:, : CLASSES + 1].any()  # the original classifier's logits


def test_scores_are_the_calibrated_ones_for_classes_of_few_instances(make_stats):
    stats = make_stats(CLASSES)
    head = make_head(make_stats, threshold=30)
    assert 0 < sum(stats.instance_counts < 30) < CLASSES
    logits, _ = random_case(20, CLASSES, 2 * (CLASSES + 1), 0)
    want = []
    for z in logits.tolist():
        original, calibrated = softmax_slow(z[: CLASSES + 1]), softmax_slow(z[CLASSES + 1 :])
        want.append([calibrated[c] if stats.instance_counts[c] < 30 else original[c] for c in range(CLASSES)])
    torch.testing.assert_close(head.scores(logits), torch.tensor(want, dtype=torch.float64))
    assert head.scores(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("layers", "shared"), [("3fc_ft", 2), ("3fc_rand", 2), ("2fc_rand", 1)])
def test_layers_and_initial_values(make_stats, layers, shared):
    torch.manual_seed(0)
    head = SimCalHead(200, make_stats(40), HeadConfig(simcal=SimCalOptions(layers=layers)), 100)
    shapes = {name: tuple(p.shape) for name, p in head.calibrated.named_parameters()}
    assert shapes == {
        "fc1.weight": (100, 200),
        "fc1.bias": (100,),
        "fc_cls.weight": (41, 100),
        "fc_cls.bias": (41,),
        **({"fc2.weight": (100, 100), "fc2.bias": (100,)} if shared == 2 else {}),
    }
    if layers == "3fc_ft":  # as the detector's own layers, whose values it gets
        assert abs(head.calibrated.fc_cls.weight.std().item() - 0.01) < 5e-4
        bound = math.sqrt(6 / 300)  # Xavier
        assert 0.99 * bound < head.calibrated.fc1.weight.abs().max() <= bound
        assert not any(p.any() for name, p in head.calibrated.named_parameters() if name.endswith("bias"))
    else:  # as released: every weight and bias from U(-1/sqrt(inputs), 1/sqrt(inputs))
        for name, parameter in head.calibrated.named_parameters():
            bound = 1 / math.sqrt(200 if name.startswith("fc1") else 100)
            assert 0.9 * bound < parameter.abs().max() <= bound, name
            assert abs(parameter.mean()) < 5 * bound / math.sqrt(3 * parameter.numel()), name


@pytest.mark.parametrize("layers", ["3fc_ft", "3fc_rand", "2fc_rand"])
def test_only_the_calibrated_classifier_ever_trains(make_stats, layers):
    head = make_head(make_stats, layers)
    for _ in range(2):
        assert {n.split(".")[0] for n, p in head.named_parameters() if p.requires_grad} == {"calibrated"}
        head.requires_grad_(False)
        head.requires_grad_(True)
    labels = torch.arange(CLASSES + 1)
    head.losses(head(torch.randn(CLASSES + 1, FEATURES)), rois_of(labels, sampled_class_N=labels))[
        "loss_cls"
    ].backward()
    for name, parameter in head.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == name.startswith("calibrated"), name


@pytest.mark.parametrize("layers", ["3fc_ft", "3fc_rand", "2fc_rand"])
def test_takes_over_the_detectors_own_layers(make_stats, layers):
    head = make_head(make_stats, layers)
    shapes = {
        "roi_heads.box_head.fc1.weight": (WIDTH, FEATURES),
        "roi_heads.box_head.fc1.bias": (WIDTH,),
        "roi_heads.box_head.fc2.weight": (WIDTH, WIDTH),
        "roi_heads.box_head.fc2.bias": (WIDTH,),
        "roi_heads.classifier.fc_cls.weight": (CLASSES + 1, WIDTH),
        "roi_heads.classifier.fc_cls.bias": (CLASSES + 1,),
        "roi_heads.fc_reg.bias": (4 * CLASSES,),
    }
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    adopted = head.adopt(weights)
    assert {name: adopted[name] for name in weights if "classifier.fc_cls" not in name}.keys() < adopted.keys()
    own = {
        n.removeprefix("roi_heads.classifier."): t for n, t in adopted.items() if n.startswith("roi_heads.classifier.")
    }
    missing = head.load_state_dict(own, strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == ({"tail"} if layers == "3fc_ft" else {"tail", "calibrated"})
    x = torch.randn(7, FEATURES)
    z = x
    for layer in ("box_head.fc1", "box_head.fc2", "classifier.fc_cls"):
        z = z @ weights[f"roi_heads.{layer}.weight"].T + weights[f"roi_heads.{layer}.bias"]
        z = z if layer == "classifier.fc_cls" else z.relu()
    logits = head(x)
    torch.testing.assert_close(logits[:, : CLASSES + 1], z)
    assert torch.allclose(logits[:, CLASSES + 1 :], z) == (layers == "3fc_ft")
    again = {f"roi_heads.classifier.{name}": tensor for name, tensor in head.state_dict().items()}
    assert head.adopt(again) == again  # a checkpoint of this head
