"""An annotation file opened from the cache is the one that was read, and nothing stale or broken is ever used."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from loce.data.annotations.cache import default_folder, open_annotations
from loce.data.annotations.lvis import LVISAnnotations


def assert_same(found, expected, place=""):
    assert type(found) is type(expected), place
    if dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name), f"{place}.{field.name}")
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype and found.shape == expected.shape, place
        np.testing.assert_array_equal(found, expected, err_msg=place)
    else:
        assert found == expected, place


@pytest.fixture
def path(glyphs):
    return glyphs / "annotations/train.json"


def test_the_second_time_nothing_is_parsed(path, tmp_path, monkeypatch):
    expected = open_annotations(path, folder=tmp_path, large=0)
    assert_same(expected, LVISAnnotations.open(path))
    monkeypatch.setattr(LVISAnnotations, "open", lambda *_: pytest.fail("read again"))
    found = open_annotations(path, folder=tmp_path, large=0)
    found = dataclasses.replace(found, dropped=type(expected.dropped)(found.dropped), absent=tuple(found.absent))
    assert_same(found, expected)
    assert isinstance(found.xywh.base, np.memmap) and not found.xywh.flags.writeable
    assert found.segmentations.runs(found.rows(0), *found.image_sizes[0])[0].sum() == found.image_sizes[0].prod()


def test_options_content_and_damage_are_noticed(path, tmp_path):
    copy, folder = tmp_path / "copy.json", tmp_path / "cache"
    copy.write_bytes(path.read_bytes())
    first = open_annotations(copy, folder=folder, large=0)
    assert first.path == str(copy)
    open_annotations(copy, 5, folder=folder, large=0)
    assert len(list(folder.iterdir())) == 2
    content = json.loads(copy.read_text())
    content["annotations"] = content["annotations"][:-1]
    copy.write_text(json.dumps(content))
    assert len(open_annotations(copy, folder=folder, large=0).labels) == len(first.labels) - 1
    for place in folder.iterdir():
        (place / "file.xywh.npy").write_bytes(b"broken")
        (place / "file.labels.npy").unlink()
    assert len(open_annotations(copy, folder=folder, large=0).labels) == len(first.labels) - 1
    for place in folder.iterdir():
        (place / "meta.json").unlink()
    assert len(open_annotations(copy, folder=folder, large=0).labels) == len(first.labels) - 1


def test_small_files_and_places_that_cannot_be_written(path, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home/loce/annotations"
    open_annotations(path)
    assert not (tmp_path / "home").exists()
    (tmp_path / "home").write_text("a file where the folder should be")
    assert len(open_annotations(path, large=0))
    assert "cannot be written" in "".join(capfd.readouterr())


def test_without_a_home_directory_nothing_is_kept_and_that_is_said(path, monkeypatch, capfd):
    """As in containers that know no name for the user."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda text: text)
    assert default_folder() is None
    assert_same(open_annotations(path, large=0), LVISAnnotations.open(path))
    assert "not kept for the next time: there is no home directory" in "".join(capfd.readouterr())
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_folder() == Path("/elsewhere/loce/annotations")
