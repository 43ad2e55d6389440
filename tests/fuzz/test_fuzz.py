"""Damaged annotation files and images: each one trains with counted drops, or a message says what is wrong.

More of them: FUZZ=10000:20000 python -m pytest -m slow tests/fuzz
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.engine.test_bad_data_runs import CONFIG
from tests.fuzz.harness import run_case
from tests.fuzz.mutations import make_case

ROOT = Path(__file__).resolve().parents[2]
SMOKE, BLOCK, WHOLE = 40, 250, (0, 2000)
FOUND = (19, 87)  # ids that are lists of several lengths, or beyond 64 bits: the evaluator raised a traceback
START, END = map(int, os.environ["FUZZ"].split(":")) if "FUZZ" in os.environ else WHOLE
SCRIPT_SEEDS = range(5000, 5036)


def fuzz(seed: int, folder: Path) -> str:
    """How the case of a seed ends; every ninth goes through a step of training."""
    path = make_case(seed, folder)
    options = {"keep_empty": seed % 4 == 1, "box_masks": seed % 4 == 2}
    try:
        return run_case(path, folder / "images", options, step=seed % 9 == 0)
    except Exception as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("first", range(0, SMOKE, 10))
def test_a_few_damaged_data_sets(first, tmp_path):
    for seed in range(first, first + 10):
        fuzz(seed, tmp_path / str(seed))


@pytest.mark.parametrize("seed", FOUND)
def test_what_was_found_once(seed, tmp_path):
    fuzz(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(START, END, BLOCK))
def test_many_damaged_data_sets(first, tmp_path):
    ends: Counter[str] = Counter()
    for seed in range(first, min(first + BLOCK, END)):
        ends[fuzz(seed, tmp_path / str(seed))] += 1
    assert min(ends["trained"], ends["refused"]) > 0.1 * sum(ends.values()), ends  # it tests both


@pytest.mark.slow
def test_the_script_ends_with_0_or_2_and_no_traceback(tmp_path):
    codes: Counter[int] = Counter()
    for seed in SCRIPT_SEEDS:
        folder = tmp_path / str(seed)
        make_case(seed, folder)
        config = folder / "tiny.yaml"
        config.write_text(CONFIG.format(folder))
        files = [f"data.{split}_annotations={folder / 'annotations.json'}" for split in ("train", "val")]
        words = [str(config), *files, f"output={folder / 'run'}", "train.batch_size=2", "train.evaluate=false"]
        line = [sys.executable, str(ROOT / "scripts/train.py"), *words]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=300)
        told = done.stdout + done.stderr
        assert done.returncode in (0, 2) and "Traceback" not in told, f"seed {seed}, code {done.returncode}: {told}"
        assert done.returncode == 0 or f"error: {folder}" in done.stderr or "images cannot be used" in done.stderr, told
        codes[done.returncode] += 1
    assert min(codes[0], codes[2]) > 3, codes  # it tests both
