"""Tests for numbers, ids, flags and lists, of JSON's and of NumPy's types."""

from typing import Any

import numpy as np

_FAR = 1 << 62


def is_whole(value: Any) -> bool:
    """A whole number of 64 bits; True and False are none."""
    return (type(value) is int or isinstance(value, np.integer)) and -(1 << 63) <= int(value) < 1 << 63


def is_number(value: Any) -> bool:
    """A finite number; True and False are none."""
    return (type(value) in (int, float) or isinstance(value, (np.integer, np.floating))) and -_FAR < value < _FAR


def is_flag(value: Any) -> bool:
    """0, 1, true or false."""
    return isinstance(value, (bool, np.bool_)) or (is_number(value) and value in (0, 1))


def as_list(value: Any) -> Any:
    """Tuples and NumPy's arrays as lists; anything else as it is."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value
