"""What our deliberate differences from the official code do to one LOCE iteration, one at a time.

python tests/parity/differences.py     (from anywhere; half a minute)

Image batch, weights and seeded memory are those of the official numbers; each line replaces one official way by ours
and gives the change of the losses and of the mean score. Random ones are drawn 20 times: mean and standard deviation.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from loce.box_generator import dense_boxes
from loce.config import MemoryConfig
from loce.models import boxes as box_rules
from loce.models import memory_sampling
from loce.models.boxes import box_iou
from tests.parity import official, rule

DRAWS = 20


@dataclass
class Result:
    """Of one iteration: the losses that LOCE changes, and the mean score after it."""

    loss_cls: float
    loss_box: float
    score: Tensor


def ours(boxes: Tensor, size: tuple[int, int], **_: object) -> Tensor:
    """Own uniforms for every box, cut at the image's border."""
    return dense_boxes(boxes, size)


class FullWidth(official.OfficialBoxes):
    """The official uniforms, cut at the image's border instead of one pixel before it."""

    def __call__(self, boxes: Tensor, image_size: tuple[int, int], **_: object) -> Tensor:
        return super().__call__(boxes, (image_size[0] + 1, image_size[1] + 1))


@torch.no_grad()
def iteration(features: list[Tensor], make_boxes: Callable, level: str = "roi", own_draw: bool = False) -> Result:
    """Iteration 0 from the seeded memory."""
    model = official.model("equilibrium", MemoryConfig(enabled=True, level="roi")).train()
    roi, bank = model.roi_heads, model.roi_heads.memory.bank
    official.seed_memory(bank)
    if level == "fc":
        vectors = roi.box_head(bank.features)
        model = official.model("equilibrium", MemoryConfig(enabled=True, level="fc")).train()
        roi, full = model.roi_heads, bank
        bank = roi.memory.bank
        bank.features.copy_(vectors)
        bank.box_targets.copy_(full.box_targets)
        bank.written.copy_(full.written)
    roi.tracker.scores = torch.from_numpy(official.arrays("loce")["mean_score_init"].copy())
    if not own_draw:
        bank.draw = official.OfficialDraw(bank, 0)
    memory_sampling.dense_boxes, box_rules.choose_random = make_boxes, official.strided
    losses = official.roi_losses(roi, features, official.proposals(), official.truths())
    return Result(losses["loss_cls"].item(), losses["loss_box"].item(), roi.tracker.scores)


def change(result: Result, base: Result) -> tuple[float, float, float]:
    """Relative change of both losses; largest absolute change of the mean score."""
    score = (result.score - base.score).abs().max().item()
    return result.loss_cls / base.loss_cls - 1, result.loss_box / base.loss_box - 1, score


def main() -> None:
    with torch.no_grad():
        features = official.model().eval().features(torch.from_numpy(rule.batch()))
    base = iteration(features, official.OfficialBoxes(0))
    print("| ours instead of the official way | loss_cls | loss_box | mean score |\n|---|---|---|---|")

    def line(name: str, changes: list[tuple[float, float, float]]) -> None:
        mean, deviation = np.mean(changes, axis=0), np.std(changes, axis=0)
        cells = [
            f"{m:+.1e}" + (f" ± {d:.1e}" if len(changes) > 1 else "") for m, d in zip(mean, deviation, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |")

    line("boxes cut at the border", [change(iteration(features, FullWidth(0)), base)])
    line("memory after the shared FCs", [change(iteration(features, official.OfficialBoxes(0), "fc"), base)])
    torch.manual_seed(0)
    line("own eta for each box", [change(iteration(features, ours), base) for _ in range(DRAWS)])
    drawn = [change(iteration(features, official.OfficialBoxes(0), own_draw=True), base) for _ in range(DRAWS)]
    line("own draws of classes and features (noise of any draw)", drawn)

    share = 1 / (base.score[:-1].double() + 1e-7)
    empty = torch.tensor([len(rule.memory(label)[0]) == 0 for label in range(20)])
    print(f"\nofficial draws that meet an empty class here: {float(share[empty].sum() / share.sum()):.1%}")
    boxes = torch.tensor([[100.0, 100, 200, 180]]).repeat(20000, 1)
    iou = box_iou(boxes[:1], dense_boxes(boxes, (1000, 1000)).reshape(-1, 4))[0]
    below = (iou < 0.5).double().mean()
    print(f"IoU of generated boxes: mean {iou.mean():.3f}, least {iou.min():.3f}, below 0.5: {below:.1e}")


if __name__ == "__main__":
    main()
