"""What every head promises, whatever its method."""

import dataclasses

import pytest
import torch

from loce.config import ACSLOptions, HeadConfig, SimCalOptions
from loce.heads import HEADS, Head, RoIs
from loce.heads.disalign import DisAlignHead
from loce.utils.classes import IGNORED

CLASSES, FEATURES = 6, 10
OPTIONS = {
    "simcal": HeadConfig(simcal=SimCalOptions(threshold=1000)),  # every class takes the score that is learned
    "acsl": HeadConfig(acsl=ACSLOptions(common_share=1, rare_share=1)),  # one background row is enough
}


def batch(rows, device, seed=0, classes=CLASSES):
    """Features (rows, FEATURES) and RoIs: labels of every class, background and ignored, some of them from memory.

    Of bi-level sampling's images each row is of one that was drawn for it.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, classes + 1, (rows,), generator=generator)
    labels[labels < 0] = IGNORED
    from_memory = (torch.arange(rows) >= rows - 4) & (labels >= 0) & (labels < classes)
    rois = RoIs(
        labels_N=labels.to(device),
        instances_N=torch.where((labels >= 0) & (labels < classes) & ~from_memory, labels, -1).to(device),
        from_memory_N=from_memory.to(device),
        indicator=torch.linspace(0.5, 0.01, classes + 1).to(device),
        progress=0.5,
        sampled_class_N=torch.where((labels >= 0) & (labels < classes) & ~from_memory, labels, -1).to(device),
    )
    rois.features_ND = torch.randn(rows, FEATURES, generator=generator).to(device)
    return rois.features_ND, rois


@pytest.fixture(params=sorted(HEADS))
def head(request, make_stats, device) -> Head:
    torch.manual_seed(0)
    return HEADS[request.param](FEATURES, make_stats(CLASSES), OPTIONS.get(request.param)).to(device)


def test_shapes_and_types(head, device):
    features, rois = batch(20, device)
    logits = head(features)
    assert logits.shape[0] == 20
    scores = head.scores(logits.bfloat16())
    assert scores.shape == (20, CLASSES)
    assert scores.dtype == torch.float32
    assert ((scores >= 0) & (scores <= 1)).all()
    for name, loss in head.losses(logits.bfloat16(), rois).items():
        assert name.startswith("loss_")
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_learn_from_gives_no_loss_and_no_gradient(head, device, rows):
    features, rois = batch(rows, device)
    rois.labels_N.fill_(IGNORED)
    logits = head(features)
    assert head.scores(logits).shape == (rows, CLASSES)
    total = sum(head.losses(logits, rois).values())
    total.backward()
    assert total.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters() if p.requires_grad)


@pytest.mark.parametrize("classes", [2, 50, 830, 1203, 1230])
@pytest.mark.parametrize("name", sorted(HEADS))
def test_any_number_of_classes_some_never_seen(name, classes, make_stats, device):
    """Classes without a training image are finite everywhere, also where a row has their label."""
    stats = make_stats(classes)
    seen = (stats.image_counts > 1).astype(int)
    stats = dataclasses.replace(
        stats, image_counts=stats.image_counts * seen, instance_counts=stats.instance_counts * seen
    )
    head = HEADS[name](FEATURES, stats).to(device)
    features, rois = batch(60, device, classes=classes)
    rois.labels_N[:2] = classes - 1  # the last class is in one image of the made statistics
    assert stats.image_counts[-1] == 0
    for labels in (rois.labels_N, torch.full_like(rois.labels_N, classes)):
        rois.labels_N = labels
        loss = sum(head.losses(head(features), rois).values())
        head.zero_grad()
        loss.backward()
        assert torch.isfinite(loss)
        assert loss > 0 or (name == "simcal" and (labels == classes).all())  # as much background as objects: none
        trained = [p for p in head.parameters() if p.requires_grad]
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    scores = head.scores(head(features))
    assert scores.shape == (60, classes) and ((scores >= 0) & (scores <= 1)).all()


def test_state_survives_a_checkpoint(head, device, make_stats):
    """What a head has learned and counted is all in its state_dict: a copy goes on with the same losses."""
    features, rois = batch(40, device)
    for _ in range(2):
        head.losses(head(features), rois)
    copy = type(head)(FEATURES, make_stats(CLASSES), head.options).to(device)
    copy.load_state_dict(head.state_dict())
    found = []
    for other in (head, copy):
        torch.manual_seed(0)
        found.append([other.losses(other(features), rois) for _ in range(2)])
    assert found[0] == found[1]


def test_ignored_rows_change_nothing(head, device):
    features, rois = batch(30, device)
    keep = rois.labels_N != IGNORED
    assert 0 < keep.sum() < 30
    names = ("labels_N", "instances_N", "from_memory_N", "features_ND", "sampled_class_N")
    rows = {name: getattr(rois, name)[keep] for name in names}
    some = dataclasses.replace(rois, **rows)
    for name, loss in head.losses(head(features), rois).items():
        torch.testing.assert_close(loss, head.losses(head(features[keep]), some)[name])


def test_learns_a_few_points(head, device):
    """Gradient descent on one point of each class, all losses added up, ends with every point recognised."""
    features = torch.eye(CLASSES + 1, FEATURES, device=device)
    labels = torch.arange(CLASSES + 1, device=device)
    none = torch.full_like(labels, -1)
    indicator = torch.full((CLASSES + 1,), 0.1, device=device)
    rois = RoIs(labels, none, torch.zeros_like(labels, dtype=torch.bool), indicator, 0.0, features, labels)
    if isinstance(head, DisAlignHead):  # a first stage that has learned them
        head.fc_cls.weight.copy_(5 * torch.eye(CLASSES + 1, FEATURES))
    optimiser = torch.optim.SGD(head.parameters(), lr=2.0)
    for _ in range(400):
        optimiser.zero_grad()
        sum(head.losses(head(features), rois).values()).backward()
        optimiser.step()
    scores = head.scores(head(features))
    assert torch.equal(scores[:CLASSES].argmax(dim=1), labels[:CLASSES])
    assert (scores[CLASSES] < 0.5).all()
