"""A disk that fills up while two ranks train: they go on, the old checkpoint stays, and later ones are saved again."""

import re
from pathlib import Path

import pytest

from tests.tiny_runs import LOCE, command, in_namespace

# A small disk that is filled after two steps, also with what an old checkpoint gives up, until one finds no room.
SCRIPT = """
mount -t tmpfs -o size=8m tmpfs {disk} || exit 99
(
  until grep -qs "iter 2/3" {disk}/run/log.txt; do sleep 0.01; done
  until grep -qs "WARNING: no checkpoint" {out}; do cat /dev/zero >> {disk}/ballast; sleep 0.01; done
  rm {disk}/ballast
) > /dev/null 2>&1 &
{train} > {out} 2>&1
code=$?
cat {out}
ls -A {disk}/run/checkpoints/*
cp -r {disk}/run {disk}.copy
exit $code
"""


@pytest.mark.slow
def test_two_ranks_on_a_disk_that_fills_up(config: Path, stage1: Path, tmp_path: Path) -> None:
    disk, out = tmp_path / "disk", tmp_path / "out.txt"
    disk.mkdir()
    words = (*LOCE, f"train.init={stage1}", f"output={disk}/run", "train.evaluate=false", "train.checkpoint_every=1")
    train = command("finetune.py", config, *words, "train.epochs=6", processes=2)
    done = in_namespace(SCRIPT.format(disk=disk, out=out, train=" ".join(train)))
    text = done.stdout
    assert done.returncode == 0, text + done.stderr
    failed = re.findall(r"WARNING: no checkpoint of iteration (\d+): .*No space left on device", text)
    assert failed and "of them found no place" in text and "training goes on" in text
    saved = [int(number) for number in re.findall(r"^checkpoint (\d+): ", text, re.M)]
    assert saved[-1] == 18 and not set(saved) & {int(number) for number in failed}
    assert ".tmp" not in text.split("iterations done")[-1]  # no file of an attempt is left
    lines = (tmp_path / "disk.copy" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 18
