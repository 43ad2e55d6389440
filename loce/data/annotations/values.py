"""Tests for numbers, ids, flags and lists, of JSON's and of NumPy's types; arrays from many of JSON's own."""

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

FAR = 1 << 62


def is_whole(value: Any) -> bool:
    """A whole number of 64 bits; True and False are none."""
    return (type(value) is int or isinstance(value, np.integer)) and -(1 << 63) <= int(value) < 1 << 63


def is_number(value: Any) -> bool:
    """A finite number; True and False are none."""
    return (type(value) in (int, float) or isinstance(value, (np.integer, np.floating))) and -FAR < value < FAR


def is_flag(value: Any) -> bool:
    """0, 1, true or false."""
    return isinstance(value, (bool, np.bool_)) or (is_number(value) and value in (0, 1))


def as_list(value: Any) -> Any:
    """Tuples and NumPy's arrays as lists; anything else as it is."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


# Packing takes JSON's own types alone, since it is quick only so: TypeError, ValueError or OverflowError for all else.


def pack_whole(values: Sequence[Any]) -> np.ndarray:
    """(N,) int64."""
    require_types(values, int)
    return np.frombuffer(array("q", values), np.int64)


def pack_numbers(values: Sequence[Any]) -> np.ndarray:
    """(N,) float64; NaN and infinity are numbers here."""
    require_types(values, int, float)
    return np.frombuffer(array("d", values), np.float64)


def pack_rows(rows: Sequence[Any], width: int) -> np.ndarray:
    """(N, width) float64, of N lists of `width` numbers."""
    require_types(rows, list)
    if set(map(len, rows)) - {width}:
        raise ValueError(f"not {width} numbers each")
    return pack_numbers(list(chain.from_iterable(rows))).reshape(-1, width)


def require_types(values: Sequence[Any], *kinds: type) -> None:
    """TypeError where one of them is of another type, a subclass included."""
    if set(map(type, values)) - {*kinds}:
        raise TypeError(f"not all are of {kinds}")
