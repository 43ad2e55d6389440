"""The feature memory in a checkpoint: a ring's filled slots only, or Gaussians; resharding from W ranks to V.

A packed ring: written (C,) long as in the bank; features (n, *feature_shape) in the bank's dtype and box_targets
(n, 4) fp32, on the host, class by class, each in the order of its slots. Packed Gaussians: mean, variance and used, on
the host. Suffixes: C classes, n filled slots of a bank, N those of all banks together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loce.gaussian_memory import GaussianMemory
from loce.memory_bank import FeatureMemoryBank

Packed = dict[str, Tensor]
Bank = FeatureMemoryBank | GaussianMemory


def _slots(written_C: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """(n,) class and (n,) slot of the filled slots, in the order of a packed memory."""
    count_C = written_C.clamp(max=capacity)
    class_n = torch.arange(len(count_C)).repeat_interleave(count_C)
    return class_n, torch.arange(len(class_n)) - (count_C.cumsum(0) - count_C)[class_n]


def pack(bank: Bank) -> Packed:
    """What `bank` holds, on the host."""
    if isinstance(bank, GaussianMemory):
        return {name: buffer.cpu().clone() for name, buffer in bank.named_buffers()}
    written_C = bank.written.cpu()
    class_n, slot_n = _slots(written_C, bank.capacity)
    row_n = (class_n * bank.capacity + slot_n).to(bank.written.device)
    return {
        "written": written_C.clone(),
        "features": bank.features[row_n].cpu(),
        "box_targets": bank.box_targets[row_n].cpu(),
    }


@torch.no_grad()
def unpack(packed: Packed, bank: Bank) -> None:
    """Make `bank` hold exactly what was packed, slot for slot."""
    if isinstance(bank, GaussianMemory):
        bank.load_state_dict(packed)
        return
    class_n, slot_n = _slots(packed["written"], bank.capacity)
    row_n = (class_n * bank.capacity + slot_n).to(bank.written.device)
    bank.written.copy_(packed["written"])
    for name in ("features", "box_targets"):
        buffer = getattr(bank, name)
        buffer.zero_()
        buffer[row_n] = packed[name].to(buffer.device)


def reshard(
    packs: Sequence[Packed],
    capacity: int,
    rank: int,
    world: int,
) -> tuple[Packed, int]:
    """The memory of rank `rank` of `world`, out of those of another number of ranks; and how many rows fit nowhere.

    A class's rows are put in one order, newest first and round robin over the old banks, and go round robin to the new
    ranks, class c beginning with rank c % world. Each rank keeps the newest `capacity` of its own: only where a class
    has more than world * capacity rows are some lost, the oldest. From 2 ranks to 3, class 0 (newest first):

        old bank 0: a b c     order: a d b e c     new rank 0: a e    1: d c    2: b
        old bank 1: d e
    """
    # All rows of all banks: from which bank, which row of it, of which class, how many newer ones its bank has.
    parts = [_slots(pack["written"], capacity) for pack in packs]
    bank_N = torch.arange(len(packs)).repeat_interleave(torch.tensor([len(class_n) for class_n, _ in parts]))
    row_N = torch.cat([torch.arange(len(class_n)) for class_n, _ in parts])
    class_N = torch.cat([class_n for class_n, _ in parts])
    newest_N = torch.cat([p["written"][class_n] - 1 for p, (class_n, _) in zip(packs, parts, strict=True)])
    age_N = (newest_N - torch.cat([slot_n for _, slot_n in parts])) % capacity  # 0: the newest of its bank

    # The place of each row in the order of its class.
    order_N = ((class_N * capacity + age_N) * len(packs) + bank_N).argsort()
    count_C = class_N.bincount(minlength=len(packs[0]["written"]))
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N)) - (count_C.cumsum(0) - count_C)[class_N[order_N]]

    # What this rank gets, as a bank holds it: class by class, oldest first.
    new_age_N = torch.div(place_N, world, rounding_mode="floor")
    fits_N = new_age_N < capacity
    mine = (fits_N & ((place_N + class_N) % world == rank)).nonzero()[:, 0]
    mine = mine[(class_N[mine] * capacity - new_age_N[mine]).argsort()]
    packed = {"written": class_N[mine].bincount(minlength=len(count_C))}
    for name in ("features", "box_targets"):
        packed[name] = packs[0][name].new_zeros(len(mine), *packs[0][name].shape[1:])
        for number, pack in enumerate(packs):
            from_it = (bank_N[mine] == number).nonzero()[:, 0]
            packed[name][from_it] = pack[name][row_N[mine[from_it]]]
    return packed, int((~fits_N).sum())


def merge(packs: Sequence[Packed]) -> Packed:
    """One Gaussian of each class out of those of several ranks: the moments of their equal mixture."""
    used = torch.stack([pack["used"] for pack in packs])
    share = used / used.sum(dim=0).clamp(min=1)
    share = share.reshape(*share.shape, *[1] * (packs[0]["mean"].dim() - 1))
    means = torch.stack([pack["mean"] for pack in packs])
    mean = (share * means).sum(dim=0)
    within = torch.stack([pack["variance"] for pack in packs])
    return {"mean": mean, "variance": (share * (within + (means - mean) ** 2)).sum(dim=0), "used": used.any(dim=0)}
