"""Reading a JSON file piece by piece against Python's own parser of the whole text: values, and places of mistakes."""

import io
import json
import random
from collections.abc import Iterator
from itertools import chain

import numpy as np
import pytest

from loce.data.annotations.json_stream import JsonStream

Error = tuple[str, int, int]


def random_value(rng: random.Random, depth: int = 0):
    kind = rng.randrange(7 if depth < 4 else 5)
    if kind == 0:
        return rng.choice([None, True, False, 0, -7, 10**15, 0.5, -1.25e-7])
    if kind < 3:
        return rng.randrange(10**6) / rng.choice([1, 3, 7])
    if kind < 5:
        return "".join(rng.choice('aé"\\ ,:{}[]\n€😀\u2028') for _ in range(rng.randrange(12)))
    if kind == 5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(6))]
    return {f"k{i}é": random_value(rng, depth + 1) for i in range(rng.randrange(4))}


def random_text(rng: random.Random) -> str:
    content = {f"member {i}": random_value(rng) for i in range(rng.randrange(5))}
    content["rows"] = [random_value(rng) for _ in range(rng.randrange(30))]
    objects = [{"id": i, "inner": random_value(rng), "more": [{}, {"a": "}, {"}]} for i in range(rng.randrange(30))]
    content["objects"] = objects
    if rng.random() < 0.2:
        return json.dumps(objects, ensure_ascii=False, indent=rng.choice([None, 1]))
    return json.dumps(content, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])) + rng.choice(["", " \n"])


def whole(stream: JsonStream):
    if stream.peek() == "[":
        found = list(chain.from_iterable(stream.elements()))
        stream.end()
        return found
    members = stream.members()
    return {k: list(chain.from_iterable(v)) if isinstance(v, Iterator) else v for k, v in members}


def found_by(text: str, block: int) -> tuple[object, Error | None]:
    """The value, or the mistake (message, line, character) that the stream finds in blocks of so many bytes."""
    stream = JsonStream(io.BytesIO(text.encode()), block)
    try:
        return whole(stream), None
    except json.JSONDecodeError as error:
        line, character, left = stream.place(error)
        assert left == max(0, len(text.rstrip()) - character)
        return None, (error.msg, line, character)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_values_are_those_of_the_whole_text(block):
    rng = random.Random(block)
    for _ in range(60):
        text = random_text(rng)
        assert found_by(text, block) == (json.loads(text), None)


def test_mistakes_are_found_where_the_whole_text_has_them():
    rng, wrong = random.Random(0), 0
    for _ in range(1500):
        text = random_text(rng)
        at = rng.randrange(1, len(text))
        text = rng.choice([text[:at], text[:at] + rng.choice('x"[]{}:,0\n') + text[at + rng.randrange(2) :]])
        try:
            expected: tuple[object, Error | None] = (json.loads(text), None)
        except json.JSONDecodeError as error:
            if "Illegal trailing comma" in error.msg:  # newer Pythons say so
                continue
            expected, wrong = (None, (error.msg, error.lineno, error.pos)), wrong + 1
        assert found_by(text, rng.choice([1, 5, 40, 4096])) == expected, text
    assert wrong > 1000


def test_only_a_part_of_the_file_is_held(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": [{"a": i, "b": "x" * 50} for i in range(20_000)], "end": 1.5}))
    with path.open("rb") as file:
        stream = JsonStream(file, 4096)
        parts = [
            (len(stream._text), len(p)) for _, rows in stream.members() if isinstance(rows, Iterator) for p in rows
        ]
    most, number = np.max(parts, axis=0)
    assert most < 3 * 4096 < path.stat().st_size / 50
    assert sum(rows for _, rows in parts) == 20_000 and 20 < number < 200  # many are parsed at once


def test_bytes_that_are_no_text_are_named_by_their_place():
    content = ('{"a": [' + "1, " * 500).encode() + b"\xff\xfe, 2]}"
    for block in (1, 10, 100_000):
        stream = JsonStream(io.BytesIO(content), block)
        with pytest.raises(UnicodeDecodeError) as error:
            whole(stream)
        assert error.value.start == content.index(b"\xff")


def test_a_byte_order_mark_is_no_text():
    assert found_by("\ufeff" + '{"a": [1]}', 2)[0] == {"a": [1]}
