"""Steps of small detectors give the losses in tests/golden/detector, to catch a change nobody meant.

`python -m tests.models.test_detector_golden [CASE ...]`, in the repository's root, writes the files of these cases (of
all) anew. A case is a stage 1 of three steps, then three steps of LOCE on what came out, on the CPU.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loce.config import Config, EvalConfig, HeadConfig, MemoryConfig, ModelConfig, TrainConfig
from loce.models.backbone import TRUNKS
from loce.models.build import build_model, build_optimizer
from tests.conftest import stats_of
from tests.models.conftest import CLASSES, SMALL
from tests.models.small_trunks import SMALL_TRUNKS, small

FOLDER = Path(__file__).resolve().parent.parent / "golden" / "detector"
CASES: dict[str, ModelConfig] = {
    "boxes_only": replace(SMALL, masks=False),
    **{name: small(name, masks=False) for name in SMALL_TRUNKS},
}
STEPS = 3


def samples(step: int) -> list[dict[str, Any]]:
    """Two images of waves with three objects each."""
    found = []
    for number in range(2):
        pixels = torch.arange(3 * 64 * 96).reshape(3, 64, 96)
        corner = torch.tensor([[4.0, 6.0], [30.0, 12.0], [50.0, 24.0]]) + step + 2 * number
        side = torch.tensor([[22.0, 30.0], [14.0, 18.0], [36.0, 28.0]])
        found.append(
            {
                "image": ((torch.sin(pixels * (0.11 + 0.07 * number)) + 1) * 127).to(torch.uint8),
                "boxes": torch.cat([corner, corner + side], dim=1),
                "labels": torch.tensor([step, 3, 5 - number]),
                "seed": 10 * step + number,
                "batch_index": number,
            }
        )
    return found


def fill(model: torch.nn.Module) -> None:
    """Matrices and kernels by a rule of ours, as every version of torch and torchvision draws others; biases 0."""
    with torch.no_grad():
        for bias in (p for name, p in model.named_parameters() if name.endswith("bias")):
            bias.zero_()
        for number, weight in enumerate(weight for weight in model.parameters() if weight.dim() > 1):
            waves = torch.sin(torch.arange(weight.numel()) * (1 + 0.618 * number)).reshape(weight.shape)
            weight.copy_(waves * weight[0].numel() ** -0.5)


def losses(case: str) -> dict[str, list[float]]:
    """Each loss at each step, of stage 1 and then of LOCE."""
    with pytest.MonkeyPatch.context() as patch:
        for name, trunk in SMALL_TRUNKS.items():
            patch.setitem(TRUNKS, name, trunk)
        return _losses(CASES[case])


def _losses(model_config: ModelConfig) -> dict[str, list[float]]:
    train = TrainConfig(lr=0.01)
    first = Config(model=model_config, eval=EvalConfig(), train=train)
    second = replace(
        first,
        head=HeadConfig(name="equilibrium"),
        memory=MemoryConfig(enabled=True),
        train=replace(train, freeze="trunk", init="stage 1"),
    )
    weights: dict[str, torch.Tensor] = {}
    history: dict[str, list[float]] = {}
    for stage, config in {"stage 1": first, "LOCE": second}.items():
        model = build_model(config, stats_of(CLASSES), pretrained=False)
        if stage == "stage 1":
            fill(model)
        model.load_state_dict(weights, strict=False)
        torch.manual_seed(0)
        optimizer = build_optimizer(model.train(), config.train)
        for step in range(STEPS):
            found = model(samples(step))
            optimizer.zero_grad()
            sum(found.values()).backward()
            optimizer.step()
            for name, value in found.items():
                history.setdefault(f"{stage} {name}", []).append(value.item())
        weights = model.state_dict()
    return history


@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_recorded_ones(case: str) -> None:
    recorded, found = json.loads((FOLDER / f"{case}.json").read_text()), losses(case)
    assert list(found) == list(recorded)
    for name, values in recorded.items():
        # The sums of another maker's CPU differ: by 1.6e-3 after six steps of a Swin v2.
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(values), rtol=3e-3, atol=1e-5)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        (FOLDER / f"{name}.json").write_text(json.dumps(losses(name), indent=1) + "\n")
