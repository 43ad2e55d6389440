"""Training's reader, check-data and evaluation refuse the same files in the same words, and none hangs or crashes.

More of them: FUZZ=10000:20000 python -m pytest -m slow tests/fuzz/test_readers_agree.py
"""

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.evaluation.conftest import numpy_float  # noqa: F401  # a fixture
from tests.fuzz.agreement import check_agreement

FEW, BLOCK = 300, 100
START, END = map(int, os.environ["FUZZ"].split(":")) if "FUZZ" in os.environ else (FEW, 5000)


def check(first: int, last: int, folder: Path) -> None:
    ends: Counter[str] = Counter()
    for seed in range(first, last):
        try:
            ends[check_agreement(seed, folder)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert ends["refused"] > 0.1 * BLOCK and ends["bbox segm"] > 0.1 * BLOCK, ends  # it tests both


@pytest.mark.usefixtures("numpy_float")
@pytest.mark.parametrize("first", range(0, FEW, BLOCK))
def test_a_few_hundred_files(first: int, tmp_path: Path) -> None:
    check(first, first + BLOCK, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("numpy_float")
@pytest.mark.parametrize("first", range(START, END, BLOCK))
def test_thousands_of_files(first: int, tmp_path: Path) -> None:
    check(first, min(first + BLOCK, END), tmp_path)
