"""Kill a training again and again, and see that nothing is lost: python scripts/chaos.py [kills=25 stops=10 ...].

Stage 1, LOCE and a pass of three second stages on two processes and a small Glyph set, once in peace and once with
`kill -9` and signals at random moments: in the set-up, while the memory is filled, in a step, in a save. The same
command goes on each time. In the end both must have the same checkpoints, bit for bit, and the same lines of
metrics.jsonl. Linux only.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loce.config import Count, Natural, UserError, read_options, run_script
from loce.utils.files import write_text

SCRIPTS = Path(__file__).resolve().parent
TIMES = ("images_per_second", "data_share", "peak_memory_gib")
GONE = 60.0  # seconds in which all processes must have ended
SMALL = {
    "data": "short_edges=[64] test_short_edge=64 workers=1",
    "model": "fpn_channels=16 fc_features=32 mask_channels=8 mask_convs=1",
    "model.rpn": "pre_nms_train=100 post_nms=50 batch_per_image=32",
    "model.roi": "batch_per_image=32",
    "train": "batch_size=4 drops=[1] log_every=3 checkpoint_every=2 evaluate=false",
}
MODEL = [f"{section}.{word}" for section, text in SMALL.items() for word in text.split()]
ARMS = {  # of the pass: two of them store the same
    "loce": [],
    "mfs": ["head.name=softmax"],
    "ebl": ["memory.enabled=false"],
}
HEAD = """# Chaos: trainings killed {kills} times and stopped {stops} times

`make test-chaos` (scripts/chaos.py, seed {seed}): {stages} on two gloo processes and a small Glyph set, with a
checkpoint every 2 iterations. Result: {result}

"iteration" is where the next start went on from (0: from the beginning); "gone" is how long it took until no process
was left.

| # | stage | what | where it was | iteration | gone, s |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Kill and stop a short training at random moments and compare it with one in peace."""

    out: str = "runs/chaos"  # folder for data and runs; what an earlier chaos left in it is deleted
    log: str = "runs/chaos/chaos.md"
    kills: Natural = 25  # kill -9: of a process, of torchrun, or of all at once
    stops: Natural = 10  # SIGTERM, SIGINT or SIGUSR1, to torchrun or to a process
    seed: Natural = 0
    stages: tuple[Literal["stage1", "loce", "pass"], ...] = ("stage1", "loce", "pass")  # that are struck
    images: Count = 24


class Run:
    """A script on two processes, in the background, that writes into these run folders."""

    def __init__(self, words: list[str], folders: list[Path]) -> None:
        self.mark, self.folders, self.file = uuid.uuid4().hex, folders, folders[0].with_suffix(".txt")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        self.process = subprocess.Popen(
            [*launch, *words],
            stdout=self.file.open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CHAOS": self.mark},
        )

    def text(self) -> str:
        """What it has said."""
        return self.file.read_text(errors="replace")

    def family(self) -> dict[int, str]:
        """Living processes: id -> rank; "" is torchrun, and of a rank there is one process that is its child."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "environ").read_text(errors="replace").split("\0")
                state = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if f"CHAOS={self.mark}" in words and state[0] != "Z":
                rank = next((word[5:] for word in words if word.startswith("RANK=")), "")
                found[int(folder.name)] = rank if int(state[1]) == self.process.pid or not rank else f"worker of {rank}"
        return found

    def saving(self) -> bool:
        """A checkpoint is being written right now."""
        newest = [max((run / "checkpoints").glob("[0-9]*"), default=None) for run in self.folders]
        names = {folder.name if folder else "" for folder in newest}
        return len(names) > 1 or any(folder and not (folder / "main.pt").exists() for folder in newest)

    def where(self) -> str:
        """The phase that it is in."""
        if self.saving():
            return "in a save"
        lines = [line for line in self.text().splitlines() if line.startswith(("epoch", "checkpoint", "filling"))]
        if not lines:
            return "set-up"
        if lines[-1].startswith("filling"):
            return "filling the memory"
        return f"after {' '.join(lines[-1].split()[:4])}" if lines[-1].startswith("epoch") else "after a save"

    def wait_for(self, moment: str, generator: random.Random) -> None:
        """Until that moment, or until the run ends."""
        delay, steps, started = generator.random(), generator.randint(1, 3), time.monotonic()
        rest = {"set-up": 0.0, "filling": 0.5, "step": 0.3, "save": 0.01}[moment] * delay
        while self.process.poll() is None:
            text = self.text()
            here = {
                "set-up": time.monotonic() - started > 5 * delay,
                "filling": "filling the feature memory" in text,
                "step": text.count("\nepoch") + text.count("\ncheckpoint") >= 2 * steps,
                "save": text.count("\ncheckpoint") >= steps and self.saving(),
            }
            if here[moment]:
                time.sleep(rest)
                return
            time.sleep(0.002)

    def gone(self) -> float:
        """Wait until no process is left; seconds. UserError where one stays."""
        started = time.monotonic()
        while self.process.poll() is None or self.family():
            if time.monotonic() - started > GONE:
                raise UserError(f"processes were left after {GONE:g} s: {self.family()}\n{self.text()}")
            time.sleep(0.05)
        return time.monotonic() - started


def strike(run: Run, kind: str, generator: random.Random) -> str:
    """Do it; what was done, "" where the run had ended before."""
    family = run.family()
    ranks = [pid for pid, rank in family.items() if rank in ("0", "1")]
    agent = run.process.pid
    if run.process.poll() is not None:
        return ""
    if kind == "stop":
        name = generator.choice(["SIGTERM", "SIGTERM", "SIGINT", "SIGUSR1"])
        target = generator.choice(ranks) if ranks and (name == "SIGUSR1" or generator.random() < 0.3) else agent
        os.kill(target, getattr(signal, name))
        return f"{name} to {'torchrun' if target == agent else f'rank {family[target]}'}"
    who = generator.choice(["rank", "rank", "torchrun", "all"]) if ranks else "all"
    targets = {"rank": [generator.choice(ranks or [agent])], "torchrun": [agent], "all": list(family)}[who]
    for pid in targets:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return f"kill -9 of {f'rank {family[targets[0]]}' if who == 'rank' else who}"


def reached(folders: list[Path]) -> int:
    """The newest iteration that all runs of a pass have a checkpoint of; -1 where there is none."""
    there = [{int(file.parent.name) for file in (run / "checkpoints").glob("*/main.pt")} for run in folders]
    return max(set.intersection(*there), default=-1)


def chaos(
    words: list[str],
    folders: list[Path],
    kinds: list[str],
    generator: random.Random,
) -> list[str]:
    """Run to the end with all these strikes on the way; rows of the table."""
    rows: list[str] = []
    filling, stage = "finetune" in words[0], folders[0].parent.name if len(folders) > 1 else folders[0].name
    while True:
        moments = ["set-up", "step", "step", "save", "save"]
        if filling and reached(folders) < 0:
            moments = ["filling", "filling", "set-up"] if len(rows) < 5 else ["step"]
        run = Run(words, folders)
        if not kinds:
            run.process.wait()
            if run.process.returncode:
                raise UserError(f"the run failed by itself:\n{run.text()}")
            return rows
        run.wait_for(generator.choice(moments), generator)
        where, done = run.where(), strike(run, kinds[0], generator)
        seconds = run.gone()
        if not done:
            raise UserError(f"the run ended before it was struck {len(kinds)} times more; train longer:\n{run.text()}")
        kinds.pop(0)
        rows.append(f"{stage} | {done} | {where} | {max(0, reached(folders))} | {seconds:.1f} |")
        print(f"{len(kinds)} left: {rows[-1]}", flush=True)


def differences(one: Any, other: Any, place: str) -> list[str]:
    """Where two nested containers of tensors differ, but for the names of folders."""
    import torch

    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [d for key in keys for d in differences(one.get(key), other.get(key), f"{place}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [
            d
            for i, pair in enumerate(zip(one, other, strict=True))
            for d in differences(pair[0], pair[1], f"{place}/{i}")
        ]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [place]
    return [] if one == other or place.endswith(("/config/output", "/config/train/init")) else [place]


def compare(peace: Path, struck: Path) -> list[str]:
    """What the last checkpoints and the logs of two runs differ in."""
    import torch

    found = []
    last = max((peace / "checkpoints").glob("*/main.pt")).parent
    for file in sorted(last.glob("*.pt")):
        other = struck / "checkpoints" / last.name / file.name
        if not other.is_file():
            return [f"{other} is missing"]
        here, there = (torch.load(path, map_location="cpu", weights_only=True) for path in (file, other))
        found += differences(here, there, f"{peace.name}/{file.name}")
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (peace, struck)]
    plain = [[{k: v for k, v in line.items() if k not in TIMES} for line in log] for log in logs]
    return found + ([] if plain[0] == plain[1] else [f"{peace.name}/metrics.jsonl"])


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    started, generator, out = time.monotonic(), random.Random(options.seed), Path(options.out)
    data = out / "data"
    size = [f"train_images={options.images}", "val_images=4", "classes=6", "size=64", "smallest=0.26", "largest=0.4"]
    subprocess.run([sys.executable, str(SCRIPTS / "make_glyphs.py"), f"out={data}", "workers=1", *size], check=True)
    # Both runs begin with the same data and empty folders; the strikes are shared out over the two stages.
    files = [f"data.train_annotations={data}/annotations/train.json", f"data.train_images={data}"]
    files += [f"data.val_annotations={data}/annotations/val.json", f"data.val_images={data}"]
    kinds = ["kill"] * options.kills + ["stop"] * options.stops
    generator.shuffle(kinds)
    shares: dict[str, list[str]] = {stage: kinds[n :: len(options.stages)] for n, stage in enumerate(options.stages)}
    per_epoch, rows, wrong = -(-options.images // 4), [], []
    for folder in (out / "peace", out / "chaos"):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    for stage in ("stage1", *(name for name in options.stages if name != "stage1")):
        strikes = shares.get(stage, [])
        epochs = f"train.epochs={max(2, -(-(8 * len(strikes) + 6) // per_epoch))}"
        folders = {}
        for side in ("peace", "chaos"):
            root, common = out / side / stage, [*files, *MODEL, epochs]
            if stage == "stage1":
                words, folders[side] = [str(SCRIPTS / "train.py"), "glyphs/stage1", f"output={root}"], [root]
            else:
                arms = ARMS if stage == "pass" else {"": []}
                recipes = [" ".join(["glyphs/loce", f"output={root / arm}", *own]) for arm, own in arms.items()]
                words, folders[side] = [str(SCRIPTS / "finetune.py"), *recipes], [root / arm for arm in arms]
                common.append(f"train.init={out}/peace/stage1")
            root.mkdir()
            if side == "peace" or strikes:
                rows += chaos([*words, *common], folders[side], list(strikes if side == "chaos" else ()), generator)
        for peace, struck in zip(folders["peace"], folders["chaos"], strict=True) if strikes else ():
            wrong += compare(peace, struck)
    # The log.
    minutes = (time.monotonic() - started) / 60
    equal = "the last checkpoints and all lines of the logs are equal"
    result = f"{f'NOT EQUAL: {wrong[:20]}' if wrong else equal}, {minutes:.0f} min."
    text = HEAD.format(
        kills=options.kills, stops=options.stops, seed=options.seed, stages=", ".join(options.stages), result=result
    )
    write_text(options.log, text + "".join(f"| {n} | {row}\n" for n, row in enumerate(rows, 1)))
    print(f"{result}\nwrote {options.log}")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
