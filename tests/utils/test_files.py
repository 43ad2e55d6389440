"""What is written into files, and flat mappings compared."""

import json
import math

from loce.utils.files import json_text
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
