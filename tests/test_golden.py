"""Twenty steps of every head on one fixed batch give the losses in tests/golden, to catch a change nobody meant.

`python -m tests.test_golden [HEAD ...]`, in the repository's root, writes the files of these heads (of all) anew.
The values say what a head did on the day it was checked against its equations (tests/heads); they are not those of
any other implementation. Everything runs in float64, from a start that no random generator has to repeat.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loce.adaptive_rates import groups
from loce.config import MemoryConfig
from loce.heads import HEADS, Head, RoIs
from loce.heads.base import META
from loce.models.memory_sampling import ImageSeed, MemorySampling
from loce.models.roi_heads import RoIHeads
from loce.utils.classes import IGNORED
from tests.conftest import stats_of

FOLDER = Path(__file__).parent / "golden"
CLASSES, FEATURES, ROWS, STEPS = 7, 12, 40, 20
GAUSSIAN = MemoryConfig(enabled=True, kind="gaussian")
MEMORIES = {  # with a Gaussian memory under a head
    "bacl": ("fcbl", replace(GAUSSIAN, draw="confusion", features_per_class=12)),
    "fasa": ("softmax", replace(GAUSSIAN, draw="adaptive", features_per_class=1, loss_weight=0.1)),
}


def waves(*shape: int) -> torch.Tensor:
    """Numbers in [-1, 1] that look like noise."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) ** 1.5).reshape(shape)


def make_head(name: str) -> Head:
    head = HEADS[name](FEATURES, stats_of(CLASSES)).double()
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim > 1:  # biases keep the initial values of the method
                parameter.copy_(0.1 * waves(*parameter.shape))
    return head


def batch(step: int) -> tuple[torch.Tensor, RoIs]:
    """Rows of all classes, most of them background; some ignored, some from the memory, two from a meta batch."""
    index = torch.arange(ROWS)
    labels = torch.where(index % 3 == 0, index // 3 % CLASSES, CLASSES)
    labels[5::16] = IGNORED
    from_memory = (index >= ROWS - 8) & (labels >= 0) & (labels < CLASSES)
    own = (labels >= 0) & (labels < CLASSES) & ~from_memory
    drawn = torch.where(own, labels, -1)
    drawn[:2] = META
    features = waves(ROWS, FEATURES)
    rois = RoIs(
        labels_N=labels,
        instances_N=torch.where(own, index, -1),
        from_memory_N=from_memory,
        indicator=torch.linspace(0.5, 0.01, CLASSES + 1, dtype=torch.float64),
        progress=step / STEPS,
        features_ND=features,
        sampled_class_N=drawn,
    )
    return features, rois


def losses(name: str) -> dict[str, list[float]]:
    """Each loss at each step of gradient descent."""
    torch.manual_seed(0)  # for what is drawn
    head_name, config = MEMORIES.get(name, (name, None))
    head = make_head(head_name)
    memory = None if config is None else MemorySampling(CLASSES, (FEATURES,), config, stats_of(CLASSES).instance_counts)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    history: dict[str, list[float]] = {}
    for step in range(STEPS):
        features, rois = batch(step)
        found = head.losses(head(features), rois) if memory is None else with_memory(memory, head, features, rois, step)
        optimiser.zero_grad()
        sum(found.values()).backward()
        optimiser.step()
        for key, value in found.items():
            history.setdefault(key, []).append(value.item())
    return history


def with_memory(
    memory: MemorySampling, head: Head, features: torch.Tensor, rois: RoIs, step: int
) -> dict[str, torch.Tensor]:
    """Losses of the batch's rows and of vectors drawn after them; rates move every 5 steps."""
    memory.store(features + 0.1 * step * waves(*features.shape), rois.labels_N, torch.zeros(ROWS, 4))
    if memory.rates is not None and step % 5 == 0:
        lost = (-head.scores(head(features)).log().mean(dim=0)).detach().numpy()
        memory.rates.adapt(lost, groups(memory.bank.mean.numpy()), step)
    share = head.own_share() if memory.config.draw == "confusion" else None
    drawn = memory.draw(torch.ones(CLASSES + 1), [ImageSeed(None, 0), ImageSeed(None, 1)], share)
    every = RoIs(
        labels_N=torch.cat([rois.labels_N, drawn.labels]),
        instances_N=torch.cat([rois.instances_N, torch.full_like(drawn.labels, -1)]),
        from_memory_N=torch.arange(ROWS + len(drawn.labels)) >= ROWS,
    )
    logits = head(torch.cat([features, drawn.features.double()]))
    if not memory.config.loss_weight:
        return head.losses(logits, every)
    parts = every.part(slice(ROWS), rois.count), every.part(slice(ROWS, None), torch.tensor(max(len(drawn.labels), 1)))
    return RoIHeads._losses_apart(SimpleNamespace(memory=memory, classifier=head), logits, *parts)


@pytest.mark.parametrize("name", [*HEADS, *MEMORIES])
def test_losses_are_the_recorded_ones(name: str):
    path = FOLDER / f"{name}.json"
    assert path.is_file(), f"no golden losses of {name}: python -m tests.test_golden {name}"
    recorded, found = json.loads(path.read_text()), losses(name)
    assert set(found) == set(recorded)
    for key, values in recorded.items():
        assert len(values) == STEPS and values[-1] < values[0]
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(values), rtol=1e-5, atol=1e-7)


def test_nothing_is_recorded_of_heads_that_are_gone():
    assert {path.stem for path in FOLDER.glob("*.json")} <= {*HEADS, *MEMORIES}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in sys.argv[1:] or [*HEADS, *MEMORIES]:
        (FOLDER / f"{each}.json").write_text(json.dumps(losses(each), indent=1) + "\n")
