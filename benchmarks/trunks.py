"""Parameters and multiply-adds of every trunk with its pyramid, and of a detector, against ResNet-50's.

    python benchmarks/trunks.py [height=800] [width=1344]

Nothing is computed: PyTorch's FlopCounterMode counts on the meta device (a multiply-add is two of its flops). Matrix
products and convolutions count; norms, activations and windows that are moved do not. One image, padded to
multiples of 32. Writes benchmarks/results/trunks.json and prints the table of docs/trunks.md.
"""

import json
import sys
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from loce.config import ModelConfig, read_options, run_script
from loce.models.backbone import TRUNKS, build_backbone
from loce.utils.files import write_text
from loce.utils.options import Count


@dataclass(frozen=True, kw_only=True)
class Options:
    """Size of the image, px."""

    height: Count = 800
    width: Count = 1344
    output: str = "benchmarks/results/trunks.json"


def measure(name: str, size: tuple[int, int]) -> dict[str, float]:
    """Millions of parameters, and 10^9 multiply-adds of a forward pass, of a trunk and of its pyramid."""
    norm = "group" if name == "tiny" else "layer" if TRUNKS[name].norm == "layer" else "batch"
    with torch.device("meta"):
        config = ModelConfig(backbone=name, weights="none", norm=norm, frozen_stages=0)  # type: ignore[arg-type]
        backbone, image = build_backbone(config).eval(), torch.empty(1, 3, *size)
        counts = []
        for part in (backbone.body, backbone):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                part(image)
            counts.append(counter.get_total_flops() / 2e9)
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (backbone.body, backbone.fpn)]
    return {"trunk_M": millions[0], "pyramid_M": millions[1], "trunk_G": counts[0], "pyramid_G": counts[1] - counts[0]}


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    found = {name: measure(name, (options.height, options.width)) for name in TRUNKS}
    write_text(options.output, json.dumps({"size": [options.height, options.width], **found}, indent=1) + "\n")
    base = found["resnet50"]["trunk_G"]
    print("| trunk | parameters, M | multiply-adds, G | against R-50 | with pyramid, G |\n|---|---:|---:|---:|---:|")
    for name, row in found.items():
        whole = row["trunk_G"] + row["pyramid_G"]
        print(f"| {name} | {row['trunk_M']:.1f} | {row['trunk_G']:.0f} | {row['trunk_G'] / base:.2f} | {whole:.0f} |")


if __name__ == "__main__":
    run_script(main)
