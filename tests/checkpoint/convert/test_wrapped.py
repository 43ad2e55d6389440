"""How people save models: under a member's name, behind a prefix, whole; read, or refused with advice that works."""

import argparse
import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from loce.checkpoint.convert import convert
from loce.checkpoint.load import Checkpoint
from loce.config import UserError
from tests.checkpoint.convert.test_files import script

BIAS = "roi_head.bbox_head.fc_cls.bias"


def same_as(content: dict, theirs: dict[str, torch.Tensor]) -> bool:
    return torch.equal(content["model"]["roi_heads.classifier.fc_cls.bias"], theirs[BIAS])


@pytest.mark.parametrize(
    ("prefix", "member", "beside"),
    [
        ("", "model", {"optimizer": {}, "lr_scheduler": {}, "epoch": 25}),
        ("", "model_state_dict", {"optimizer_state_dict": {"lr": 0.1}, "epoch": 3, "loss": 0.5}),
        ("", "detector", {"epoch": 1}),
        ("model.", "state_dict", {"pytorch-lightning_version": "2.4.0", "hyper_parameters": {"lr": 0.1}}),
        ("net.detector.", "state_dict", {}),
        ("_orig_mod.", "", {}),
        ("module._orig_mod.", "", {}),
        ("model._orig_mod.", "state_dict", {}),
    ],
)
def test_members_and_prefixes(theirs, tmp_path, prefix, member, beside):
    weights = {f"{prefix}{key}": value for key, value in theirs.items()}
    torch.save({member: weights, **beside} if member else weights, tmp_path / "source.pth")
    content, report = convert(tmp_path / "source.pth")
    assert same_as(content, theirs) and f"{len(theirs)} tensors, all of them used" in report[0]
    assert not beside or report[-1] == f"dropped on purpose: {', '.join(beside)}"


@pytest.mark.parametrize("path", ["state.model", "checkpoint.run.state_dict", "ema_state_dict"])
def test_members_of_members(theirs, tmp_path, path):
    content: dict = theirs
    for name in reversed(path.split(".")):
        content = {name: content, "epoch": 3}
    torch.save(content, tmp_path / "source.pth")
    found, report = convert(tmp_path / "source.pth")
    assert same_as(found, theirs) and report[-1] == "dropped on purpose: epoch"


def test_averages_that_mmdetection_keeps_beside_the_weights(theirs, tmp_path):
    copies = {f"ema_{key.replace('.', '_')}": value + 1 for key, value in theirs.items()}
    torch.save({"state_dict": {**theirs, **copies}}, tmp_path / "ema.pth")
    content, report = convert(tmp_path / "ema.pth")
    assert same_as(content, theirs) and report[-1].endswith(f"({len(theirs)} in all)")


def test_numpy_beside_the_weights_and_in_their_place(theirs, tmp_path):
    arrays = {key: value.numpy() for key, value in theirs.items()}
    torch.save(
        {"model": arrays, "best": np.float64(0.5), "step": np.int64(3), "ok": np.bool_(True)}, tmp_path / "np.pth"
    )
    content, report = convert(tmp_path / "np.pth")
    assert same_as(content, theirs) and report[-1] == "dropped on purpose: best, step, ok"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda bias: bias.to(torch.int8), rf"1 tensors hold no floating-point numbers.*{BIAS} \(torch.int8\)"),
        (lambda bias: bias.to_sparse(), rf"or are sparse.*{BIAS}"),
        (lambda bias: bias.to("meta"), rf"or without content: {BIAS}"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_weights_of_a_training(written, change, told):
    with pytest.raises(UserError, match=told):
        convert(written({BIAS: change(torch.rand(6))}))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x1f\x8b\x08", "gunzip"),
        (pickle.dumps({"model": {"a": 1}}, protocol=4), "is a pickle of Python"),
        (pickle.dumps({"model": {"a": 1}}, protocol=2), "is a pickle of Python"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_files_that_hold_something_else(content, told, tmp_path):
    """torch advises weights_only=False for most of them."""
    (tmp_path / "file.pth").write_bytes(content)
    for read in (convert, Checkpoint.open):
        with pytest.raises(UserError, match=told) as caught:
            read(tmp_path / "file.pth")
        assert "weights_only" not in str(caught.value) and str(tmp_path / "file.pth") in str(caught.value)


def test_folders_and_libraries_that_are_not_here(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"is a folder; give a file"):
        convert(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "w.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match=r"pip install safetensors") as caught:
        convert(tmp_path / "w.safetensors")
    assert "damaged" not in str(caught.value)


def test_wrappers_inside_and_weights_that_are_not_the_model_s(theirs, tmp_path):
    """torch.compile of one part, the counter of an averaged model, a loss with weights of its own."""
    weights = {f"module.{key.replace('backbone.', 'backbone._orig_mod.')}": value for key, value in theirs.items()}
    torch.save({**weights, "n_averaged": torch.tensor(3)}, tmp_path / "averaged.pth")
    content, report = convert(tmp_path / "averaged.pth")
    assert same_as(content, theirs) and report[-1] == "dropped on purpose: n_averaged"
    weights = {f"model.{key}": value for key, value in theirs.items()}
    torch.save({"state_dict": {**weights, "criterion.weight": torch.ones(2)}}, tmp_path / "lightning.pth")
    content, report = convert(tmp_path / "lightning.pth")
    assert same_as(content, theirs) and report[-1] == "dropped on purpose: criterion.weight"


def test_arguments_of_a_training_are_plain(theirs, tmp_path):
    """What torchvision's own reference training saves needs no code."""
    args = argparse.Namespace(lr=0.02, output_dir=Path("out"), device="cuda", lr_steps=[16, 22])
    beside = {"optimizer": {}, "lr_scheduler": {}, "args": args, "epoch": 25}
    torch.save({"model": theirs, **beside}, tmp_path / "model_25.pth")
    content, report = convert(tmp_path / "model_25.pth")
    assert same_as(content, theirs) and report[-1] == "dropped on purpose: optimizer, lr_scheduler, args, epoch"


def test_several_models(theirs, tmp_path):
    torch.save({"teacher": theirs, "student": theirs}, tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"there are 2 models in it, teacher, student: save one of them alone"):
        convert(tmp_path / "two.pth")
    torch.save({f"{name}.{key}": w for name in ("a", "b") for key, w in theirs.items()}, tmp_path / "joined.pth")
    with pytest.raises(UserError, match=r"several models in it, whose keys begin with a\., b\."):
        convert(tmp_path / "joined.pth")


def module_of(weights: dict[str, torch.Tensor]) -> nn.Module:
    """A module with this state dict."""
    root = nn.Module()
    for key, value in weights.items():
        place, *names = root, *key.split(".")
        for name in names[:-1]:
            if name not in dict(place.named_children()):
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        place.register_buffer(names[-1], value)
    return root


def follow(message: str, folder: Path) -> None:
    """Do what a message says, to the letter, in `folder`."""
    line = next(line for line in message.splitlines() if line.strip().startswith("python -c"))
    assert shlex.split(line)[-1] == "weights_only.pth"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(
        line, shell=True, check=True, cwd=folder, env={**os.environ, "PATH": path, "PYTHONPATH": str(folder)}
    )


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m, "epoch": 3}], ids=["bare", "member"])
def test_a_whole_model(theirs, tmp_path, wrap):
    torch.save(wrap(module_of(theirs)), tmp_path / "it's whole.pth")
    with pytest.raises(UserError, match=r"without running code from it \(torch.nn.modules.module.Module\)") as caught:
        convert(tmp_path / "it's whole.pth")
    follow(str(caught.value), tmp_path)
    assert same_as(convert(tmp_path / "weights_only.pth")[0], theirs)


def test_the_advice_keeps_names_and_configuration(theirs, tmp_path, annotation_file, monkeypatch):
    """Of a file of MMDetection 3.x: its log holds objects of mmengine."""
    (tmp_path / "engine_of_others.py").write_text("class Buffer:\n    def __init__(self):\n        self.log = [1]\n")
    monkeypatch.syspath_prepend(tmp_path)
    import engine_of_others  # type: ignore[import-not-found]

    names = ["cat", "dog", "ox", "ant", "bee"]
    meta = {"dataset_meta": {"classes": tuple(names)}, "cfg": "mask_head=dict(type='FCNMaskHead')", "iter": 9}
    hub = {"log_scalars": {"loss": engine_of_others.Buffer()}}
    torch.save({"meta": meta, "state_dict": theirs, "message_hub": hub}, tmp_path / "epoch_12.pth")
    with pytest.raises(UserError, match=r"engine_of_others\.Buffer") as caught:
        convert(tmp_path / "epoch_12.pth")
    follow(str(caught.value), tmp_path)
    content, report = convert(tmp_path / "weights_only.pth")
    assert content["classes"]["names"] == names and same_as(content, theirs)
    assert "mask predictor: linear, as the configuration in the file says" in report
    turned = annotation_file("turned.json", names[::-1])
    with pytest.raises(UserError, match=r"'cat' is class 0 in the checkpoint and class 4 in the annotations"):
        convert(tmp_path / "weights_only.pth", turned)


@pytest.mark.filterwarnings("ignore")
def test_torchscript(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(UserError, match=r"without running code from it \(torch.jit\)"):
        convert(tmp_path / "script.pt")


def test_a_class_of_the_script_itself(tmp_path):
    """No other script can read it, so nothing but that script can mend it."""
    (tmp_path / "theirs.py").write_text(
        "import torch\nclass Mine(torch.nn.Module):\n    pass\ntorch.save(Mine(), 'whole.pth')\n"
    )
    subprocess.run([sys.executable, "theirs.py"], cwd=tmp_path, check=True)
    with pytest.raises(UserError, match=r"an object of Mine, a class of the script(.|\n)*torch.save\(model.state_dict"):
        convert(tmp_path / "whole.pth")


def test_weights_that_are_not_finite(written, tmp_path):
    source = written(
        {BIAS: torch.full((6,), torch.nan), "roi_head.bbox_head.fc_reg.bias": torch.full((20,), torch.inf)}
    )
    done = script(source, tmp_path / "ours.pt")
    assert done.returncode == 2 and not (tmp_path / "ours.pt").exists()
    assert f"2 of 360 tensors have values that are not finite (nan, inf): {BIAS}" in done.stderr


def test_their_files_where_ours_are_meant(theirs, tmp_path):
    """train.init and checkpoint= name the converter, whatever lies in the file."""
    for name, content in {"bare": theirs, "whole": module_of(theirs)}.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=r"is converted by scripts/convert.py SOURCE.pth OUT.pt"):
            Checkpoint.open(tmp_path / name)
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(UserError, match=r"cannot be read, damaged or not a checkpoint"):
        Checkpoint.open(tmp_path / "pickle")
