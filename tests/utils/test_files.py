"""What is written into files, and flat mappings compared."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from loce.utils.errors import UserError
from loce.utils.files import csv_text, json_text, require_writable
from loce.utils.yaml_text import differing


def test_json_has_no_infinity_and_no_nan() -> None:
    found = {"a": [1.5, math.nan, (math.inf, "nan")], "b": {"c": -math.inf, "d": None, "e": True}}
    assert json_text(found) == '{"a": [1.5, null, [null, "nan"]], "b": {"c": null, "d": null, "e": true}}'
    assert json.loads(json_text(found, as_text=True)) == {
        "a": [1.5, "nan", ["inf", "nan"]],
        "b": {"c": "-inf", "d": None, "e": True},
    }


def test_differing_keys() -> None:
    assert differing({"a": 1, "b": 2}, {"b": 2, "a": 1}) == []
    assert differing({"a": 1, "b": 2}, {"c": 0, "b": 3}, {"a": 1, "b": 2}) == ["a", "b", "c"]


def test_a_folder_that_takes_no_files_is_known_before_it_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    require_writable(tmp_path / "new/deep")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for place, reason in (
        (tmp_path / "file", "Not a dir"),
        (tmp_path / "file/x", "Not a dir"),
        ("x" * 300, "too long"),
    ):
        with pytest.raises(UserError, match=f"no files can be written there .*{reason}.*another with output=") as error:
            require_writable(place)
        assert str(error.value).startswith(str(place))
    with pytest.raises(UserError):
        require_writable("/proc/new")  # where even an administrator makes nothing


def test_csv_has_short_numbers_and_no_nan() -> None:
    rows = [["name", "AP"], ["nan", np.float64(1 / 3)], ["a,b", math.nan], ["c", 3], [np.str_("d"), -1.0]]
    assert csv_text(rows) == 'name,AP\nnan,0.333333\n"a,b",\nc,3\nd,-1\n'
