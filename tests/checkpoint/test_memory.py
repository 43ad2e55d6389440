"""The feature memory in a checkpoint: only what is filled, back slot for slot; resharded, the newest stay."""

import pytest
import torch

from loce.checkpoint.memory import merge, pack, reshard, unpack
from loce.gaussian_memory import GaussianMemory
from loce.memory_bank import FeatureMemoryBank

CLASSES, CAPACITY = 5, 4


def filled(counts: list[int], seed: int = 0, dtype: torch.dtype = torch.float32, rank: int = 0) -> FeatureMemoryBank:
    """A bank that has been given so many rows of each class; row t of class c on rank r is (r, c, t)."""
    bank = FeatureMemoryBank(CLASSES, (3,), CAPACITY, dtype)
    rows = torch.tensor([(rank, label, t) for label, count in enumerate(counts) for t in range(count)]).reshape(-1, 3)
    targets = torch.rand(len(rows), 4, generator=torch.Generator().manual_seed(seed))
    for row, target in zip(rows, targets, strict=True):
        bank.enqueue(row[None].to(dtype), row[None, 1], target[None])
    return bank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_back_slot_for_slot(dtype: torch.dtype, device: torch.device) -> None:
    bank = filled([0, 1, 4, 6, 11], dtype=dtype).to(device)
    packed = pack(bank)
    assert packed["features"].shape == (0 + 1 + 4 + 4 + 4, 3) and packed["features"].dtype == dtype
    other = filled([9, 9, 9, 9, 9], seed=1, dtype=dtype).to(device)  # whatever was there is gone
    unpack(packed, other)
    for name, expected in bank.state_dict().items():
        assert torch.equal(other.state_dict()[name], expected), name


def test_a_packed_memory_holds_nothing_but_its_rows() -> None:
    packed = pack(filled([0, 1, 0, 0, 0]))
    assert all(value.untyped_storage().nbytes() == value.numel() * value.element_size() for value in packed.values())


def lines(packs: list[dict[str, torch.Tensor]], label: int) -> list[tuple[int, ...]]:
    """All rows of a class, newest first, the ranks taking turns: what `reshard` deals out, by plain loops."""
    own = []
    for packed in packs:
        bank = FeatureMemoryBank(CLASSES, (3,), CAPACITY)
        unpack(packed, bank)
        own.append([tuple(int(x) for x in row) for row in bank.contents(label)[0].flip(0)])
    return [rows[age] for age in range(CAPACITY) for rows in own if age < len(rows)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("before", [1, 2, 3])
def test_resharded(before: int, world: int) -> None:
    counts = torch.randint(0, 9, (before, CLASSES), generator=torch.Generator().manual_seed(before)).tolist()
    packs = [pack(filled(counts[rank], seed=rank, rank=rank)) for rank in range(before)]
    found = [reshard(packs, CAPACITY, rank, world) for rank in range(world)]
    lost_in_all = 0
    for label in range(CLASSES):
        line = lines(packs, label)
        hands: list[list[tuple[int, ...]]] = [[] for _ in range(world)]
        for place, row in enumerate(line):
            hand = hands[(place + label) % world]
            if len(hand) < CAPACITY:
                hand.append(row)
            else:
                lost_in_all += 1
        for rank in range(world):
            bank = FeatureMemoryBank(CLASSES, (3,), CAPACITY)
            unpack(found[rank][0], bank)
            features, targets = bank.contents(label)
            assert [tuple(int(x) for x in row) for row in features.flip(0)] == hands[rank]
            for row, target in zip(features, targets, strict=True):  # each row still has its own box targets
                source = packs[int(row[0])]
                place = (source["features"] == row).all(1).nonzero()[0, 0]
                assert torch.equal(target, source["box_targets"][place])
    assert {lost for _, lost in found} == {lost_in_all}
    if world >= before:
        assert lost_in_all == 0


def test_nothing_to_reshard() -> None:
    packs = [pack(filled([0] * CLASSES))] * 2
    packed, lost = reshard(packs, CAPACITY, 0, 1)
    assert lost == 0 and packed["features"].shape == (0, 3) and not packed["written"].any()


def test_gaussians_come_back_and_merge() -> None:
    """Of two ranks: the mean and variance of their equal mixture; what one has alone stays as it is."""
    memories = [GaussianMemory(3, (2,)) for _ in range(2)]
    memories[0].enqueue(torch.tensor([[1.0, 2], [3, 2], [5, 5]]), torch.tensor([0, 0, 1]))
    memories[1].enqueue(torch.tensor([[6.0, 2], [8, 4]]), torch.tensor([0, 0]))
    packs = [pack(memory) for memory in memories]
    other = GaussianMemory(3, (2,))
    unpack(packs[0], other)
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), memories[0].buffers(), strict=True))
    merged = merge(packs)
    assert merged["mean"].tolist() == [[4.5, 2.5], [5, 5], [0, 0]] and merged["used"].tolist() == [True, True, False]
    assert merged["variance"].tolist() == [[2 + 2.5**2, 1 + 0.5**2], [0, 0], [0, 0]]
    same = merge([packs[0], packs[0]])
    assert all(torch.equal(same[name], packs[0][name]) for name in same)
