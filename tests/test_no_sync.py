"""A training step of the method never waits for the device, and makes nothing whose shape depends on the data.

On the CPU every operation that would wait on a GPU is forbidden; on a GPU PyTorch itself watches.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loce.box_generator import dense_boxes, valid
from loce.config import HeadConfig, IndicatorConfig, MemoryConfig, ModelConfig, RoIConfig, RPNConfig
from loce.data.masks import CroppedMasks
from loce.heads import HEADS, EquilibriumHead, RoIs
from loce.mean_score import MeanScoreTracker, instance_scores
from loce.memory_bank import FeatureMemoryBank
from loce.models.boxes import ROI_STDS, RPN_STDS, decode, encode
from loce.models.mask_head import mask_targets
from loce.models.mask_rcnn import build_roi_heads
from loce.models.memory_sampling import ImageSeed, MemorySampling
from loce.models.roi_heads import Targets, pyramid_level
from loce.models.rpn import RPN
from loce.utils.classes import IGNORED

WAITING = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "multinomial"),
    # torch.tensor(...), x[[0, 1]] and, before torch 2.15, x[0] = 1.0: on a GPU a copy from the host, which waits.
    # x[:1] = 1.0 does not wait and is refused before 2.15, too; x[:1].fill_(1.0) says the same.
    "lift_fresh",
}
COPYING = ("tensor", "as_tensor", "from_numpy")  # of torch: from a list or an array on the host
READING = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class ForbiddenOperations(TorchDispatchMode):
    """Raises on operations that read values back or make shapes that depend on them, among them index by mask."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = "index" in name and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for part in args[1:]
            if isinstance(part, (list, tuple))
            for index in part
        )
        if name in WAITING or by_mask:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device):
    """Whatever would wait for the device raises in here."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return

    def refuse(*_, **__):
        raise AssertionError("a tensor was read on the host, or copied from it")

    with ExitStack() as stack:
        for name in (*READING, "new_tensor"):
            stack.enter_context(patch.object(torch.Tensor, name, refuse))
        for name in COPYING:
            stack.enter_context(patch.object(torch, name, refuse))
        stack.enter_context(ForbiddenOperations())
        yield


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x.sum() > 0),
        lambda x: [0, 1, 2][x.long().sum()],
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x.new_zeros(())),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.long().bincount(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x + torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x + x.new_tensor([1.0, 2.0]),
        lambda x: x + torch.as_tensor([1.0, 2.0], device=x.device),
    ],
)
def test_the_guard_notices(device, wait):
    x = torch.zeros(2, device=device)
    with pytest.raises((AssertionError, RuntimeError)), no_waiting(device):
        wait(x)


@pytest.mark.parametrize("drawn_before", [False, True])
def test_a_step_never_waits(device, make_stats, drawn_before):
    """Jitter, store, draw, classify, track and learn, from an empty memory and from one that holds something."""
    classes, width, instances, rois_n = 30, 16, 6, 40
    torch.manual_seed(0)
    bank = FeatureMemoryBank(classes, (width,), 8, torch.bfloat16).to(device)
    tracker = MeanScoreTracker(classes).to(device)
    head = EquilibriumHead(width, make_stats(classes)).to(device)
    boxes_N4 = torch.tensor([[10.0, 20.0, 90.0, 80.0]], device=device).repeat(instances, 1)
    truth_N = torch.randint(classes, (instances,), device=device)
    labels_R = torch.randint(classes + 1, (rois_n,), device=device)
    instances_R = torch.where(labels_R < classes, torch.randint(instances, (rois_n,), device=device), -1)
    x_RD = torch.randn(rois_n, width, device=device)
    features_BD = torch.randn(instances * 16, width, device=device)
    if drawn_before:
        bank.enqueue(features_BD, truth_N.repeat(16), features_BD[:, :4])
    generator = torch.Generator(device).manual_seed(0)

    with no_waiting(device):
        dense_N164 = dense_boxes(boxes_N4, (100, 100), generator=generator)
        stored_B = torch.where(valid(dense_N164), truth_N[:, None], IGNORED).flatten()
        bank.enqueue(features_BD, stored_B, dense_N164.flatten(0, 1))
        drawn_KD, drawn_K, _ = bank.sample(tracker.scores, generator=generator)
        labels_N = torch.cat([labels_R, drawn_K])
        from_memory_N = torch.arange(len(labels_N), device=device) >= rois_n
        instances_N = torch.cat([instances_R, torch.full_like(drawn_K, -1)])
        logits_NL = head(torch.cat([x_RD, drawn_KD.float()]))
        p_N = head.scores(logits_NL.detach()).gather(1, labels_N.clamp(0, classes - 1)[:, None])[:, 0]
        drawn = (torch.where(from_memory_N, labels_N, IGNORED), p_N)
        tracker.update(*instance_scores(p_N, labels_N, instances_N, instances), drawn)
        rois = RoIs(labels_N, instances_N, from_memory_N, tracker.scores)
        head.losses(logits_NL, rois)["loss_cls"].backward()
        bank.fill.mean()

    assert torch.isfinite(head.fc_cls.weight.grad).all()
    assert head.fc_cls.weight.grad.any()
    assert (bank.counts[truth_N] == 8).all()
    assert (drawn_K >= 0).all()
    assert (tracker.scores != 0.01).any()


@pytest.mark.parametrize("name", HEADS)
def test_no_head_waits(device, make_stats, name):
    """Losses, backward pass and scores of every method."""
    classes, width, rows = 6, 16, 40
    torch.manual_seed(0)
    head = HEADS[name](width, make_stats(classes)).to(device)
    labels_N = torch.arange(rows, device=device) % (classes + 2)
    labels_N = torch.where(labels_N > classes, IGNORED, labels_N)
    none_N = torch.full_like(labels_N, -1)
    x_ND = torch.randn(rows, width, device=device)
    indicator = torch.full((classes + 1,), 0.5, device=device)
    rois = RoIs(
        labels_N, none_N, none_N >= 0, indicator, features_ND=x_ND, sampled_class_N=labels_N.clamp(-1, classes - 1)
    )
    with no_waiting(device):
        logits_NL = head(x_ND)
        sum(head.losses(logits_NL, rois).values()).backward()
        head.scores(logits_NL.detach())
    assert all(p.grad is not None for p in head.parameters() if p.requires_grad)


SIZE = (64, 96)
TRUTHS = [[[4.0, 6.0, 40.0, 50.0], [30.0, 20.0, 90.0, 60.0]], []]  # the second image has no objects


@pytest.fixture
def truths(device):
    """Ground truth of two images where the model has it."""
    made = []
    for boxes in TRUTHS:
        square = (np.ones((30, 30), np.uint8), (5, 5))
        masks = CroppedMasks.pack([square] * len(boxes), SIZE).to(device)
        rows = torch.arange(len(boxes), device=device)  # also as labels
        crowd = torch.tensor([[0.0, 0.0, 30.0, 30.0]], device=device)
        made.append(Targets(torch.tensor(boxes, device=device).reshape(-1, 4), rows, masks, rows, ignored=crowd))
    return made


def test_box_arithmetic_never_waits(device):
    boxes_N4, deltas_N4 = torch.rand(5, 4, device=device) + 1, torch.randn(5, 4, device=device)
    with no_waiting(device):
        for stds in (RPN_STDS, ROI_STDS):
            encode(boxes_N4, boxes_N4, stds)
            decode(boxes_N4, deltas_N4, stds, SIZE)
        pyramid_level(boxes_N4, 56.0)


def test_losses_of_the_proposals_never_wait(device, truths):
    rpn = RPN(8, RPNConfig(batch_per_image=32)).to(device)
    maps = [torch.randn(2, 8, -(-SIZE[0] // s), -(-SIZE[1] // s), device=device) for s in (4, 8, 16, 32, 64)]
    with no_waiting(device):
        boxes, ignored = [t.boxes for t in truths], [t.ignored for t in truths]
        sums = rpn.losses(maps, rpn.anchors(maps), [SIZE] * 2, boxes, ignored=ignored)
        losses = sums.divided(sums.number)
    assert losses["loss_rpn_cls"] > 0 and losses["loss_rpn_box"] > 0


def test_sampling_of_regions_and_mask_targets_never_wait(device, truths, make_stats):
    model = ModelConfig(fpn_channels=8, fc_features=8, mask_channels=8, roi=RoIConfig(batch_per_image=16))
    options = (IndicatorConfig(), MemoryConfig())
    roi_heads = build_roi_heads(model, HeadConfig(name="equilibrium"), *options, make_stats(3)).to(device)
    proposals_N4 = torch.rand(40, 4, device=device) * 30
    proposals_N4[:, 2:] += proposals_N4[:, :2] + 5
    instances = torch.arange(2, device=device)
    with no_waiting(device):
        found = [roi_heads.select(proposals_N4, truth) for truth in truths]
        targets = mask_targets(truths[0].masks, instances, truths[0].boxes)
        labels_N, own_N = (torch.cat([getattr(f, name) for f in found]) for name in ("labels", "instances"))
        rois = RoIs(labels_N, own_N, own_N < -1)
        sums = roi_heads._sums(torch.zeros(len(labels_N), 4, device=device), rois, 2, 2 * 4)
        roi_heads._update_mean_score(sums)
    seen = torch.zeros(3, dtype=torch.bool, device=device).index_fill(0, truths[0].labels, True)
    # Each entry is the softmax of four equal logits, and each class has one instance (Eq. 2).
    wanted = torch.where(seen, 0.9 * 0.01 + 0.1 * 0.25, 0.01)
    torch.testing.assert_close(roi_heads.tracker.scores[:3], wanted)
    assert all((f.labels >= 0).all() for f in found) and (found[0].instances >= 0).any() and targets.any()


@pytest.mark.parametrize(("kind", "draw"), [("ring", "score"), ("gaussian", "score"), ("gaussian", "confusion")])
def test_memory_sampling_never_waits(device, truths, kind, draw):
    sampling = MemorySampling(3, (8,), MemoryConfig(enabled=True, kind=kind, draw=draw)).to(device)
    indicator = torch.full((4,), 0.5, device=device)
    features_BD = torch.randn(32, 8, device=device)
    rows = [t.store_rows for t in truths]
    with no_waiting(device):
        boxes, labels_B, targets_B4 = sampling.boxes(
            [t.boxes for t in truths], [t.labels for t in truths], rows, [SIZE] * 2
        )
        sampling.store(features_BD, labels_B, targets_B4)
        labels_K = sampling.draw(indicator, [ImageSeed(7, 0), ImageSeed(None, 1)], indicator[:3]).labels
    assert [len(b) for b in boxes] == [32, 0] and (labels_K >= 0).all()
    assert sampling.bank.counts[:2].all()
