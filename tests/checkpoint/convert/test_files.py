"""Files that cannot be read, and scripts/convert.py."""

import datetime
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loce.checkpoint.convert import convert
from loce.config import UserError

ROOT = Path(__file__).resolve().parents[3]


def script(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/convert.py"), *map(str, words)], capture_output=True, text=True
    )


def test_a_file_that_needs_code_is_refused_with_a_way_out(tmp_path):
    torch.save({"state_dict": {}, "time": datetime.date.today()}, tmp_path / "source.pth")
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "source.pth")
    message = str(caught.value)
    assert "datetime.date" in message and "weights_only=False" in message and "trust" in message


def test_damaged_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match=r"there is no such file"):
        convert(tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("no checkpoint at all")
    with pytest.raises(UserError, match=r"damaged, or not written by torch.save"):
        convert(tmp_path / "text.pth")
    torch.save({"a": torch.rand(100)}, tmp_path / "whole.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:300])
    with pytest.raises(UserError, match=r"damaged, or not written by torch.save"):
        convert(tmp_path / "half.pth")
    torch.save([torch.rand(3)], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"holds a list, expected a dictionary of weights"):
        convert(tmp_path / "list.pth")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "numbers.pth")
    with pytest.raises(UserError, match=r"no dictionary of weights; epoch, lr are none"):
        convert(tmp_path / "numbers.pth")


def test_there_and_back(written, theirs, tmp_path):
    there = script(written(), tmp_path / "ours.pt", "mask_predictor=linear")
    assert there.returncode == 0, there.stderr
    assert f"wrote {tmp_path / 'ours.pt'}" in there.stdout
    back = script(tmp_path / "ours.pt", tmp_path / "back.pth", "--to", "mmdet")
    assert back.returncode == 0 and "360 tensors written" in back.stdout
    state = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert set(state) == set(theirs) and all(torch.equal(state[key], value) for key, value in theirs.items())


def test_mistakes_exit_with_2_and_no_traceback(tmp_path):
    existing = tmp_path / "existing.pt"
    existing.write_text("mine")
    for words, message in (
        ((), "usage: python scripts/convert.py SOURCE OUT"),
        (("a.pth", existing), "files are never overwritten"),
        (("a.pth", "b.pt"), "a.pth: there is no such file"),
        (("a.pth", "b.pt", "tto=mmdet"), "did you mean to?"),
        (("a.pth", existing / "b.pt"), "existing.pt: no files can be written there"),
        (("a.pth", "b.pt", "--to", "mmdet", "annotations=x.json"), "the classes stay as they are"),
    ):
        result = script(*words)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert existing.read_text() == "mine"


def test_help():
    result = script("--help")
    assert result.returncode == 0 and "source_classes" in result.stdout and "SOURCE" in result.stdout
