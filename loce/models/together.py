"""Detectors that differ in their classification heads only, trained in one pass: what they have in common is one.

Each is a complete model. Parts with the same weights and the same future (trunk, RPN, mask head, frozen FCs, a memory
that stores the same, box regressors that see no memory) are the same module objects, and `Once` computes for all what
such a module makes of a batch.
Nothing of a head flows back into them: the trunk is frozen, proposals have no gradient, and random numbers are keyed by
image. So each model comes out as if it had been trained by itself.
"""

import copy
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from loce.config import UserError
from loce.models.mask_rcnn import MaskRCNN
from loce.models.memory_sampling import MemorySampling
from loce.models.roi_heads import Once, RoIHeads
from loce.utils.distributed import all_reduce_sums

SHARED = ("backbone", "rpn", "roi_heads.mask_head")  # the last where the model has one
# Options of the memory that storing does not depend on.
DRAWING = ("draw", "classes_per_draw", "features_per_class", "start", "loss_weight", "adaptive")


class Together(nn.Module):
    """Models that share parts, see `share`."""

    def __init__(self, models: Sequence[MaskRCNN]) -> None:
        super().__init__()
        self.models, self.registered = tuple(models), nn.ModuleList(models)

    def forward(self, samples: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """The losses of each model, as of `MaskRCNN.forward`; a loss that all have is one tensor."""
        rpn, batch = self.models[0].first_stage(samples)
        once = Once()
        rows = [model.roi_heads.forward_rows(batch, once) for model in self.models]
        anchors, *sums = all_reduce_sums([rpn.number, *(own.sums for own in rows)])
        shared = rpn.divided(anchors)
        each = zip(self.models, rows, sums, strict=True)
        return [shared | model.roi_heads.losses(own, total, once) for model, own, total in each]

    @torch.no_grad()
    def fill_memory(self, samples: list[dict[str, Any]]) -> None:
        """As `MaskRCNN.fill_memory`, of each model."""
        _, batch = self.models[0].first_stage(samples, learns=False)
        once = Once()
        for model in self.models:
            model.roi_heads.fill_memory(batch, once)


def share(model: MaskRCNN, others: Sequence[MaskRCNN]) -> None:
    """Give `model` the parts that it has in common with models that share theirs.

    UserError where the weights of a part that trains alike in all, or of the trunk, are not the same.
    """
    for other in others[:1]:
        for name in _parts(model, *SHARED):
            if not _equal(model.get_submodule(name), other.get_submodule(name)):
                raise UserError(f"{name}: its weights are not the same in all, so that they cannot train in one pass")
            parent, _, part = name.rpartition(".")
            setattr(model.get_submodule(parent), part, other.get_submodule(name))
    roi = model.roi_heads
    for other in others:
        theirs = other.roi_heads
        if _frozen(roi.box_head) and _frozen(theirs.box_head) and _equal(roi.box_head, theirs.box_head):
            roi.box_head = theirs.box_head
        if _regress_alike(roi, theirs) and _equal(roi.fc_reg, theirs.fc_reg):
            roi.fc_reg = theirs.fc_reg
        if roi.memory is not None and theirs.memory is not None and _stored(model) == _stored(other):
            if not _equal(roi.memory.bank, theirs.memory.bank):
                raise UserError("feature memory: what it holds is not the same in all with the same memory options")
            roi.memory.bank = theirs.memory.bank


def share_equal(models: Sequence[MaskRCNN]) -> None:
    """Make those parts one module that hold the same bits, for inference."""
    for number, model in enumerate(models):
        for name in _parts(model, *SHARED, "roi_heads.box_head", "roi_heads.fc_reg"):
            parent, _, part = name.rpartition(".")
            for other in models[:number]:
                if _equal(model.get_submodule(name), other.get_submodule(name)):
                    setattr(model.get_submodule(parent), part, other.get_submodule(name))
                    break


def unshare_memory(model: MaskRCNN) -> None:
    """Give `model` a feature memory of its own again, so that it can run without changing that of others."""
    if model.roi_heads.memory is not None:
        model.roi_heads.memory.bank = copy.deepcopy(model.roi_heads.memory.bank)


def _stored(model: MaskRCNN) -> tuple[Any, ...]:
    """What a memory's content depends on."""
    memory = model.roi_heads.memory
    assert isinstance(memory, MemorySampling)
    options = {name: value for name, value in vars(memory.config).items() if name not in DRAWING}
    roi = model.roi_heads
    reads = (roi.classifier.depth, id(roi.box_head)) if memory.config.level == "fc" else ()  # FCs that train are an own
    return *options.items(), *reads


def _parts(model: MaskRCNN, *names: str) -> list[str]:
    """Those parts of a model that it has."""
    return [name for name in names if attrgetter(name)(model) is not None]


def _regress_alike(one: RoIHeads, other: RoIHeads) -> bool:
    """Whether two box regressors learn from the same: without a memory, its rows are the sampled regions alone."""
    same = one.box_head is other.box_head and one.classifier.depth == other.classifier.depth
    return same and one.memory is None and other.memory is None


def _frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters())


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same bits."""
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(x, theirs[name]) for name, x in ours.items())
