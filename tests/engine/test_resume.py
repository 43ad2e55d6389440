"""A run is a function of config, seed and number of ranks: killed at any moment, it goes on as the same run."""

import contextlib
import dataclasses
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loce.checkpoint import files as checkpoint_files
from loce.checkpoint import save as resume
from loce.checkpoint.load import Checkpoint, load_model, load_weights
from loce.config import Config, HeadConfig, SeesawOptions, UserError, dump, load_config
from loce.engine.preflight import check_resume, check_run_folder
from loce.models.build import build_model, build_optimizer
from loce.models.mask_rcnn import MaskRCNN
from tests.conftest import stats_of
from tests.tiny_runs import LOCE, ROOT, command, environment, main_file, metrics, run, same, same_run

# Runs a script that is killed (kill -9) when a file whose path ends like this is about to get its name.
KILLED = """
import os, runpy, signal, sys
place = sys.argv[1]
def hook(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(place):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
KEEP = ("train.log_every=2", "train.checkpoint_every=1", "train.evaluate=false")
PROCESSES = ["-m", "torch.distributed.run", "--standalone"]


def run_killed(place: str, script: str, *words: str | Path, processes: int = 1, folder: Path) -> None:
    """A run that is killed when `place` is about to be written."""
    (folder / "killed.py").write_text(KILLED)
    launch = [*PROCESSES, f"--nproc_per_node={processes}"] if processes > 1 else []
    line = [sys.executable, *launch, str(folder / "killed.py"), place, *command(script, *words)[1:]]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=300)
    assert done.returncode in (-signal.SIGKILL, 1), done.stdout + done.stderr
    assert "iter 2/3" in done.stdout, done.stdout + done.stderr


def words_of(memory: bool, config: Path, stage1: Path) -> tuple[str, ...]:
    """Script and words of a run with the feature memory or without."""
    return (
        ("finetune.py", str(config), *LOCE, f"train.init={stage1}", *KEEP)
        if memory
        else (
            "train.py",
            str(config),
            *KEEP,
        )
    )


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("memory", "workers", "processes"),
    [
        (True, 2, 1),
        pytest.param(True, 0, 1, marks=SLOW),
        pytest.param(False, 0, 1, marks=SLOW),
        pytest.param(False, 2, 1, marks=SLOW),
        pytest.param(True, 0, 2, marks=SLOW),
    ],
)
def test_killed_and_started_again_is_the_same_run(
    config: Path, stage1: Path, tmp_path: Path, memory: bool, workers: int, processes: int
) -> None:
    """Killed in the middle of an epoch, with a loss that waits for its line; the reference has no workers."""
    words = words_of(memory, config, stage1)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(*words, f"output={straight}", processes=processes)
    again = (*words, f"output={killed}", f"data.workers={workers}")
    run_killed("/000000002/main.pt", *again, processes=processes, folder=tmp_path)
    assert torch.load(main_file(killed).with_name("rank0.pt"), weights_only=True)["window"]["loss_cls"].shape == (1,)
    text = run(*again, processes=processes)
    assert "1 of 6 iterations are done" in text and "filling the feature memory" not in text
    same_run(killed, straight)
    assert [line["iteration"] for line in metrics(killed)] == [2, 3, 4, 6]


@pytest.mark.slow
def test_other_numbers_of_ranks_go_on(config: Path, stage1: Path, tmp_path: Path) -> None:
    words = words_of(True, config, stage1)
    folder = tmp_path / "run"
    run_killed("/000000003/main.pt", *words, f"output={folder}", processes=2, folder=tmp_path)
    assert "must be divisible by processes x train.accumulate" in run(*words, f"output={folder}", processes=3, code=1)
    text = run(*words, f"output={folder}", "train.keep_checkpoints=9")
    assert "2 processes before, 1 now: the batches stay the same" in text
    assert re.search(r"feature memory: is resharded; \d+ rows were left out", text)
    for path in (folder / "checkpoints").glob("00000000[56]/main.pt"):
        path.unlink()
    text = run(*words, f"output={folder}", "train.accumulate=2", processes=2)
    assert "1 processes before, 2 now" in text and "train.accumulate: 1 before, 2 now" in text
    assert [line["iteration"] for line in metrics(folder)] == [2, 3, 4, 6]


# In this process


@pytest.fixture
def tiny(config: Path, tmp_path: Path) -> Config:
    """The second stage of the tiny recipe, in a run folder of its own."""
    return load_config([str(config), *LOCE, "train.init=x", f"output={tmp_path / 'run'}"])


def job(config: Config, seed: int) -> tuple[MaskRCNN, torch.optim.SGD]:
    """A model with something in its memory, and an optimiser with momentum."""
    torch.manual_seed(seed)
    model = build_model(config, stats_of(6), pretrained=False)
    optimizer = build_optimizer(model, config.train)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    if model.roi_heads.memory is not None:
        bank = model.roi_heads.memory.bank
        bank.enqueue(torch.rand(300, *bank.features.shape[1:]), torch.randint(0, 6, (300,)), torch.rand(300, 4))
    return model, optimizer


def save(config: Config, iteration: int, seed: int = 0) -> tuple[MaskRCNN, resume.Saved]:
    model, optimizer = job(config, seed)
    state = {"iteration": iteration, "optimizer": optimizer.state_dict(), "scaler": {}}
    return model, resume.save(Path(config.output), config, stats_of(6), model, state, {"loss": torch.rand(3)})


@pytest.mark.parametrize("shared", [False, True])
def test_everything_comes_back(tiny: Config, shared: bool) -> None:
    config = dataclasses.replace(tiny, memory=dataclasses.replace(tiny.memory, shared=shared))
    model, saved = save(config, 7)
    expected = torch.rand(5)
    other, _ = job(config, 1)
    assert resume.newest(Path(config.output)) == saved.folder and not saved.problems
    state, lines = resume.restore(saved.folder, config, other, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected) and lines == []
    same(other.state_dict(), model.state_dict(), "model")
    assert state["iteration"] == 7 and state["window"]["loss"].shape == (3,)
    written = sum(path.stat().st_size for path in saved.folder.glob("*.pt"))
    assert saved.bytes == written and saved.seconds > 0


@pytest.mark.parametrize("shared", [False, True])
def test_a_checkpoint_of_before_parts_had_files_of_their_own(tiny: Config, shared: bool) -> None:
    config = dataclasses.replace(tiny, memory=dataclasses.replace(tiny.memory, shared=shared))
    model, saved = save(config, 7)
    parts = {name: torch.load(saved.folder / f"{name}.pt", weights_only=True) for name in ("main", "rank0", "frozen")}
    memory = torch.load(saved.folder / "memory0.pt", weights_only=True)
    old = {**parts["main"], "format": 2, "model": parts["main"]["model"] | parts["frozen"]["model"]}
    del old["frozen"]
    for name in ("frozen", "memory0"):
        (saved.folder / f"{name}.pt").unlink()
    rank0 = {**parts["rank0"], "memory": {} if shared else memory}
    checkpoint_files.write(saved.folder / "rank0.pt", rank0)
    checkpoint_files.write(saved.folder / "main.pt", {**old, "memory": memory if shared else {}})
    other, _ = job(config, 1)
    resume.restore(saved.folder, config, other, torch.device("cpu"))
    same(other.state_dict(), model.state_dict(), "model")


def test_counts_that_a_rank_keeps_for_itself_come_back(tiny: Config) -> None:
    """Seesaw without synchronisation: a rank goes on with its own counts, not with those of rank 0 in main.pt."""
    seesaw = HeadConfig(name="seesaw", seesaw=SeesawOptions(synchronise=False))
    config = dataclasses.replace(tiny, head=seesaw)
    model, saved = save(config, 7)
    own = torch.load(saved.folder / "rank0.pt", weights_only=True)
    own["head"]["counts"] += 5
    checkpoint_files.write(saved.folder / "rank0.pt", own)
    other, _ = job(config, 1)
    resume.restore(saved.folder, config, other, torch.device("cpu"))
    assert torch.equal(other.roi_heads.classifier.counts, model.roi_heads.classifier.counts + 5)


def test_the_memory_is_stored_without_its_empty_slots(tiny: Config) -> None:
    config = dataclasses.replace(tiny, memory=dataclasses.replace(tiny.memory, capacity=5000, dtype="bfloat16"))
    _, saved = save(config, 1)
    rows = 300 * (32 * 2 + 4 * 4)  # of 30,000 slots: 32 numbers in bf16 and 4 in fp32
    assert rows < (saved.folder / "memory0.pt").stat().st_size < 2 * rows


@pytest.mark.parametrize("shared", [False, True])
def test_of_two_ranks_one_goes_on(tiny: Config, shared: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """As if two ranks had written the checkpoint: what both stored is there, as far as it fits."""
    config = dataclasses.replace(tiny, memory=dataclasses.replace(tiny.memory, shared=shared))
    model, saved = save(config, 7)
    own = torch.load(saved.folder / "rank0.pt", weights_only=True)
    main = torch.load(saved.folder / "main.pt", weights_only=True)
    own["window"] = {"loss": own["window"]["loss"] + 1}
    checkpoint_files.write(saved.folder / "rank1.pt", own)
    if not shared:
        shutil.copy(saved.folder / "memory0.pt", saved.folder / "memory1.pt")
    checkpoint_files.write(saved.folder / "main.pt", {**main, "world_size": 2})
    other, _ = job(config, 1)
    state, lines = resume.restore(saved.folder, config, other, torch.device("cpu"))
    assert lines[0] == "2 processes before, 1 now: the batches stay the same, random numbers begin anew"
    before, after = model.roi_heads.memory.bank, other.roi_heads.memory.bank
    if shared:
        assert lines[1].startswith("feature memory: is shared and stays as it is; 0 rows")
        assert torch.equal(after.features, before.features)
    else:
        room = config.memory.capacity
        lost = int((2 * before.counts - room).clamp(min=0).sum())
        assert lost > 0 and lines[1].startswith(f"feature memory: is resharded; {lost} rows were left out")
        assert torch.equal(after.counts, (2 * before.counts).clamp(max=room))
    first = torch.load(saved.folder / "rank0.pt", weights_only=True)["window"]["loss"]
    assert torch.allclose(state["window"]["loss"], first + 0.5)
    assert torch.rand(1) != torch.rand(1)  # random numbers go on


@pytest.mark.parametrize("harm", ["rank0.pt", "memory0.pt", "frozen.pt", "main.pt", "checksums.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tiny: Config, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [save(tiny, iteration)[1].folder for iteration in (3, 6)]
    content = bytearray((folders[1] / harm).read_bytes())
    content[len(content) // 2] ^= 4
    (folders[1] / harm).write_bytes(content)
    assert resume.newest(Path(tiny.output)) == folders[0]
    text = capsys.readouterr().out
    assert f"WARNING: checkpoint {folders[1]} is damaged: " in text and harm in text
    with pytest.raises(UserError, match="damaged") if "0.pt" not in harm else contextlib.nullcontext():
        load_model(tiny.output)  # never takes another one than it is asked for
    (folders[0] / "rank0.pt").unlink()
    with pytest.raises(UserError, match="No checkpoint is left") as caught:
        resume.newest(Path(tiny.output))
    assert "rank0.pt is missing" in str(caught.value) and str(folders[1]) in str(caught.value)


def test_a_full_disk_keeps_the_old_checkpoint(tiny: Config) -> None:
    """The limit on a file's size stands for a full disk: no room for main.pt, room enough for what it replaces."""
    old = [save(tiny, iteration)[1].folder for iteration in (1, 2)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        _, saved = save(tiny, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(saved.problems) == 1 and "found no place" in saved.problems[0] and not saved.folder.exists()
    assert resume.newest(Path(tiny.output)) == old[1]
    assert not old[0].exists()  # gave its room up
    assert not save(tiny, 4)[1].problems


def test_no_state_outside_of_the_checkpoint(tiny: Config) -> None:
    """No module hides a tensor from the state that is saved."""
    model, other = job(tiny, 0)[0], job(tiny, 1)[0]
    for (name, module), twin in zip(model.named_modules(), other.modules(), strict=True):
        hidden = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        for key, value in hidden.items():
            assert not isinstance(value, torch.Tensor), f"{name}.{key} is in no checkpoint"
            assert type(vars(twin)[key]) is type(value)


@pytest.mark.slow
def test_a_finished_run_is_lengthened(config: Path, tmp_path: Path) -> None:
    """On purpose alone: it goes on as the longer run would, further drops come later, and what changes is said."""
    words = (config, f"output={tmp_path}/run", "train.evaluate=false", "train.warmup_iterations=9")
    text = run("train.py", *words, "train.epochs=1", "train.drops=[]")
    assert "WARNING: schedule: the warm-up takes 9 iterations, the training 3: the learning rate never gets" in text
    text = run("train.py", *words, "train.epochs=2", "train.drops=[1]")
    assert "train.epochs: 1 before, 2 now: drops after [1], no warm-up" in text and "3 of 6 iterations are done" in text
    run("train.py", config, f"output={tmp_path}/whole", *words[2:], "train.epochs=2", "train.drops=[1]")
    same_run(tmp_path / "run", tmp_path / "whole")


def test_what_a_longer_run_may_change(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(Config()))
    for train, message in (
        ({"epochs": 48}, ""),
        ({"epochs": 48, "drops": (16, 22, 40)}, ""),
        ({"epochs": 48, "drops": (32, 44)}, r"train.drops: \[16, 22\] there, \[32, 44\] now\n  \(a longer run keeps"),
        ({"epochs": 23}, "train.epochs: 24 there, 23 now"),
        ({"epochs": 48, "lr": 1.0}, "train.lr: 0.02 there, 1.0 now\n[^ ]"),
    ):
        changed = dataclasses.replace(Config().train, **train)
        with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
            check_run_folder(tmp_path, dataclasses.replace(Config(), train=changed))


def test_a_run_that_must_be_new_or_must_go_on(tmp_path: Path) -> None:
    check_resume("auto", tmp_path, None)
    check_resume("must", tmp_path, tmp_path / "000000001")
    check_resume("never", tmp_path, None)
    with pytest.raises(UserError, match=r"train\.resume = never: .* holds 000000001 and is not overwritten"):
        check_resume("never", tmp_path, tmp_path / "000000001")
    with pytest.raises(UserError, match=r"train\.resume = must: .* has no finished checkpoint"):
        check_resume("must", tmp_path, None)


def test_an_older_format_gives_its_weights_only(tiny: Config) -> None:
    model, saved = save(tiny, 1)
    main = torch.load(saved.folder / "main.pt", weights_only=True)
    checkpoint_files.finish(saved.folder, [], {**main, "format": 1})
    assert load_weights(Checkpoint.open(saved.folder), model, stats_of(6))["loaded"]
    with pytest.raises(UserError, match="written by an older loce"):
        resume.restore(saved.folder, tiny, model, torch.device("cpu"))


def test_a_disk_without_room_is_found_at_the_start(tiny: Config) -> None:
    huge = dataclasses.replace(tiny, memory=dataclasses.replace(tiny.memory, capacity=1))
    model, _ = job(huge, 0)
    resume.require_room([(Path(tiny.output), huge, model)])
    with torch.device("meta"):
        model.roi_heads.memory.bank.register_buffer("features", torch.empty(10**15))
    with pytest.raises(UserError, match=r"a checkpoint takes up to 400000\d\.\d GB, .* are free on its disk: free "):
        resume.require_room([(Path(tiny.output), huge, model)])
