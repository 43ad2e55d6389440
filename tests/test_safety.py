"""What comes from outside runs no code and writes nowhere else: checkpoints, archives, YAML, names of runs."""

import dataclasses
import os
import pickle
from pathlib import Path

import pytest
import torch

from loce.checkpoint.load import Checkpoint
from loce.checkpoint.save import restore, save
from loce.config import Config, UserError, load_config, run_folder
from loce.models.build import build_model, build_optimizer
from loce.utils.files import inside
from tests.conftest import stats_of
from tests.tiny_runs import ROOT

RECIPES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.name != "tables.yaml")
SMALL = {"fpn_channels": 8, "fc_features": 8, "mask_channels": 4, "mask_convs": 1}


def shrunk(recipe: Path, folder: Path) -> Config:
    """A recipe with a small backbone and narrow layers: what a checkpoint holds stays the same in kind."""
    config = load_config([str(recipe), f"output={folder / 'run'}"])
    model = dataclasses.replace(config.model, backbone="tiny", weights="none", norm="group", frozen_stages=0, **SMALL)
    return dataclasses.replace(config, model=model)


@pytest.mark.parametrize("recipe", RECIPES, ids=[str(path.relative_to(ROOT / "configs")) for path in RECIPES])
def test_checkpoints_of_every_recipe_load_without_code(recipe: Path, tmp_path: Path) -> None:
    config = shrunk(recipe, tmp_path)
    model = build_model(config, stats_of(6), pretrained=False)
    optimizer = build_optimizer(model, config.train)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    state = {"iteration": 1, "optimizer": optimizer.state_dict(), "scaler": torch.amp.GradScaler("cpu").state_dict()}
    saved = save(tmp_path / "run", config, stats_of(6), model, state, {"loss": torch.ones(2)})
    assert not saved.problems
    for file in saved.folder.glob("*.pt"):
        torch.load(file, weights_only=True)
    fresh = build_model(config, stats_of(6), pretrained=False)
    state, _ = restore(saved.folder, config, fresh, torch.device("cpu"))
    build_optimizer(fresh, config.train).load_state_dict(state["optimizer"])
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


class _Code:
    """Pickled, it runs a command when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("bare", [False, True])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, bare: bool) -> None:
    file, trace = tmp_path / "main.pt", tmp_path / "ran"
    content = {"format": 2, "config": {}, "classes": {}, "model": _Code(trace)}
    if bare:
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match="cannot be read, damaged or not a checkpoint"):
        Checkpoint.open(file)
    assert not trace.exists()
    torch.load(file, weights_only=False) if not bare else pickle.loads(file.read_bytes())
    assert trace.exists()  # it would have run


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/x", "", ".", "a/.."])
def test_a_name_that_leads_out_of_its_folder(name: str) -> None:
    with pytest.raises(UserError, match="is no name for a folder in runs: it leads out of it"):
        inside("runs", name)


@pytest.mark.parametrize("name", ["a", "a/b", "loce+train.lr=0.1", "..x", "x.."])
def test_a_name_in_its_folder(name: str) -> None:
    assert inside("runs", name) == Path("runs", name)


@pytest.mark.parametrize("name", ["...yaml", "..yaml"])
def test_a_config_whose_name_leads_out_of_runs(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("seed: 1\n")
    with pytest.raises(UserError, match="leads out of it"):
        load_config([str(tmp_path / name)])
    assert load_config([str(tmp_path / name), "output=x"]).output == "x"


def test_run_folders_of_usual_names() -> None:
    assert run_folder(Path("configs/glyphs/loce.yaml")) == Path("runs/glyphs/loce")
    assert run_folder(Path("elsewhere/x.1.yaml")) == Path("runs/x.1")
