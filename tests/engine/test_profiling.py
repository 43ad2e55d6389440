"""The profile of a step: its time is dealt out to parts, and the backward pass to where its forward pass was."""

import json

import pytest
import torch

from loce.config import load_config
from loce.engine import profiling

SMALL = ["model.roi.batch_per_image=32", "model.fc_features=64", "model.mask_channels=32"]


@pytest.mark.parametrize("recipe", ["glyphs/stage1.yaml", "glyphs/loce.yaml"])
def test_parts_of_a_step(recipe, tmp_path):
    config = load_config([recipe, *SMALL])
    model = profiling.made_up_model(config, 20, torch.device("cpu"))
    before = model.roi_heads.fc_reg.weight.clone()
    samples = profiling.random_samples(2, (96, 128), 3, 20)
    step = profiling.make_step(model, config)
    parts = profiling.profile_steps(model, step, samples, 1, tmp_path / "trace.json")
    frozen = recipe == "glyphs/loce.yaml"
    for name in ("backbone and pyramid", "RoIAlign"):
        assert parts[name].forward > 0
        assert (parts[name].backward == 0) == frozen, name  # the trunk of stage 2 has no backward pass
    assert parts["mask head"].backward > 0 and parts["classifier"].backward > 0
    assert ("memory: draw" in parts) == frozen
    assert all(parts[name].backward == 0 for name in ("sampling of regions", "proposals and their NMS", "mean score"))
    assert parts["RPN head, everywhere, no gradient"].backward == 0 < parts["RPN matching, sampling, losses"].backward
    table = profiling.table(parts).splitlines()
    assert len(table) > 8 and table[-1].startswith("| all |")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert torch.equal(model.roi_heads.fc_reg.weight, before)  # a profile trains nothing
