"""Does the pretended device notice anything? One deliberate mistake at a time, put into the running code."""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.pretend_device import CUDA, PretendDevice, reason
from loce import box_generator, memory_bank
from loce.checkpoint import load
from loce.config import UserError
from loce.engine import loop
from loce.heads import base
from loce.mean_score import MeanScoreTracker, instance_scores
from loce.memory_bank import FeatureMemoryBank
from loce.models import boxes, rpn
from loce.models.mask_rcnn import MaskRCNN
from loce.models.memory_sampling import MemorySampling
from loce.models.roi_heads import RoIHeads
from loce.models.rpn import RPN
from tests.device.steps import CPU, LOCE, build, detections, same, train


@dataclass(frozen=True)
class Mistake:
    """`old`, which must stand in the function exactly once, replaced by `new`."""

    name: str
    function: Callable[..., Any]
    old: str
    new: str

    def code(self) -> Any:
        """The function's code with the mistake in it."""
        function = inspect.unwrap(self.function)
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.old) == 1, f"{self.name}: {source.count(self.old)} times in {function.__qualname__}"
        source = source.replace(self.old, self.new)
        names, start = dict(function.__globals__), source.index("def ")  # without decorators
        line = function.__code__.co_firstlineno - 1 + source[:start].count("\n")
        exec(compile("\n" * line + source[start:], function.__code__.co_filename, "exec"), names)
        return names[function.__name__].__code__


MISTAKES = (
    Mistake(
        "anchors without a device", rpn._square_of_anchors, "torch.arange(side, device=device)", "torch.arange(side)"
    ),
    Mistake("constants without a device", boxes.constants, "dtype=dtype, device=device", "dtype=dtype"),
    Mistake(
        "random numbers without a device",
        boxes.choose_random,
        "generator=generator, device=candidates_N.device",
        "generator=None",
    ),
    Mistake("a generator of the host", boxes.generator_for, "torch.Generator(device)", "torch.Generator()"),
    Mistake("ranks of stored rows without a device", FeatureMemoryBank.enqueue, ", device=label_B.device", ""),
    Mistake(
        "signs of Eq. 5 without a device",
        box_generator._signs,
        "torch.arange(SIGN_PATTERNS, device=device)",
        "torch.arange(SIGN_PATTERNS)",
    ),
    Mistake(
        "uniform numbers drawn on the host",
        MemorySampling._random,
        "dtype=torch.float64, device=device",
        "dtype=torch.float64, device='cpu'",
    ),
    Mistake(
        "classes of one_hot without a device",
        base.one_hot,
        "torch.arange(columns, device=labels_N.device)",
        "torch.arange(columns)",
    ),
    Mistake("sums of the mean score on the host", MeanScoreTracker._sums, "self.scores.new_zeros(", "torch.zeros("),
    Mistake("labels left on the host", MaskRCNN.targets_of, "labels=labels,", "labels=sample['labels'],"),
    Mistake(
        "masks left on the host",
        MaskRCNN.targets_of,
        'sample["masks"].to(device, non_blocking=True)',
        'sample["masks"]',
    ),
    Mistake("a batch made on the host", MaskRCNN.batch_images, "self.pixel_mean.new_zeros(", "torch.zeros("),
    Mistake("an image copied while the host waits", MaskRCNN.batch_images, ", non_blocking=True", ""),
    Mistake("rows to store not page-locked", RoIHeads._choose, "rows.pin_memory()", "rows"),
    Mistake("a divisor read in the step", RoIHeads.losses, "divisor(counts)", "divisor(counts).tolist()"),
    Mistake("losses kept on the host", loop.train_step, "loss.detach() for", "loss.detach().cpu() for"),
    Mistake(
        "each loss read in the step",
        loop.train_step,
        "loss.detach() for",
        "loss.detach().mul(loss.item() / loss.item()) for",
    ),
    Mistake(
        "a mask as an index in the loss",
        RPN.losses,
        "torch.where(is_object_BP[..., None], errors_BP4, 0)",
        "errors_BP4[is_object_BP]",
    ),
    Mistake(
        "a condition on the device's numbers",
        instance_scores,
        "    scores_G = sum_G",
        "    assert count_G.sum() > 0\n    scores_G = sum_G",
    ),
    Mistake("autocast of the CPU", loop.train_step, "torch.autocast(device.type,", "torch.autocast('cpu',"),
    Mistake("classes of an image left on the host", MaskRCNN._detect_one, "allowed_C.to(labels_M.device)", "allowed_C"),
    Mistake(
        "scores kept on the device",
        MaskRCNN._detect_one,
        '"scores": scores_M.cpu()',
        '"scores": scores_M.cpu().to(boxes_M4.device).numpy()',
    ),
    Mistake("a checkpoint loaded where it was saved", load.load_file, 'map_location="cpu", ', ""),
    Mistake(
        "probabilities of classes on the host",
        memory_bank.sampling_probability,
        "weight_C.sum()",
        "weight_C.cpu().sum()[None]",
    ),
)


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    """What the host finds."""
    return [*steps(CPU), evaluation(CPU)]


def steps(device: torch.device) -> list[Any]:
    """Filling, a step of LOCE, and one of another head in bf16."""
    loce = train(build(device, "equilibrium", LOCE), 1, fill=True)
    return [loce["losses"], train(build(device, "seesaw"), 1, precision="bf16")["losses"]]


def evaluation(device: torch.device) -> list[Any]:
    return detections(build(device, "equilibrium", LOCE))


def look(expected: list[Any], folder: Path) -> None:
    """Fail where the pretended device shows a mistake."""
    with PretendDevice() as gpu:
        found = steps(CUDA)
        in_steps = [place for what, place in gpu.waits if not place.startswith("tests/")]
        assert all(map(reason, in_steps))
        assert not [place for place in gpu.pageable if not place.startswith("tests/")]
        same([*found, evaluation(CUDA)], expected)
        torch.save({"weight": torch.ones(2, device=CUDA)}, folder / "weights.pt")
        load.load_file(folder / "weights.pt")


def test_all_is_well_without_a_mistake(expected: list[Any], tmp_path: Path):
    look(expected, tmp_path)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_caught(
    expected: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Mistake
) -> None:
    monkeypatch.setattr(inspect.unwrap(mistake.function), "__code__", mistake.code())
    with pytest.raises((AssertionError, RuntimeError, TypeError, UserError)):
        look(expected, tmp_path)
