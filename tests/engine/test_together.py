"""Several second stages in one pass: each bit for bit as its own run; stops, divergence and refusals."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from loce.checkpoint.load import Checkpoint, load_model
from loce.checkpoint.save import checkpoint_bytes
from loce.config import Config, UserError, load_config
from loce.engine.inference import evaluate_checkpoints
from loce.engine.passes import passes, read_recipes
from loce.engine.preflight import preflight
from loce.engine.ranks import process_group
from loce.engine.trainer import Trainer
from loce.utils import distributed
from loce.utils.errors import DivergedError
from tests.tiny_runs import ROOT, environment, main_file, metrics, run, same_run, train_here

CPU = torch.device("cpu")
FC = ("memory.enabled=true", "memory.capacity=20")
ROI = (*FC, "memory.level=roi")
GAUSSIAN = ("memory.enabled=true", "memory.kind=gaussian")
# Heads with and without state, both memory levels, banks that are shared and not, FCs that train.
ARMS = {
    "softmax": (),
    "ebl": ("head.name=equilibrium",),
    "mfs": FC,
    "loce": ("head.name=equilibrium", *FC),
    "prior": ("head.name=equilibrium", "indicator.kind=prior", *FC),
    "alpha": ("head.name=equilibrium", "indicator.momentum=0.5", *FC, "memory.classes_per_draw=2"),
    "fill 1": ("head.name=equilibrium", *FC, "memory.fill_instances=1"),
    "few": ("head.name=equilibrium", *FC, "memory.instances_per_class=1", "memory.dtype=bfloat16"),
    "roi": ("head.name=equilibrium", *ROI),
    "seesaw": ("head.name=seesaw", "head.reset=true", *FC),
    "eqlv2": ("head.name=eqlv2", "head.reset=true", *ROI),
    "bags": ("head.name=bags", "head.reset=true"),
    "FCs train": ("head.name=equilibrium", "train.freeze=backbone", *ROI),
    "gaussian": ("head.name=equilibrium", *GAUSSIAN),
    "bacl": ("head.name=fcbl", "head.reset=true", *GAUSSIAN, "memory.draw=confusion", "memory.features_per_class=12"),
    "regions": (*GAUSSIAN, "memory.source=regions", "memory.loss_weight=0.1"),
    "gaussian, FCs train": (*GAUSSIAN, "train.freeze=backbone"),
    "ebl, gaussian, FCs train": ("head.name=equilibrium", *GAUSSIAN, "train.freeze=backbone"),
}
OTHERS = ("acsl", "balanced_softmax", "disalign", "ecm", "eql", "fcbl", "fedloss", "gol", "gumbel", "iif", "ldam")
OTHERS = (*OTHERS, "logit_adjustment", "pcb", "reweighted")
SHARED = ("head.name=equilibrium", *FC, "memory.shared=true")
SECOND_STAGE = ("train.freeze=trunk", "train.clip_norm=0", "train.evaluate=false")


def recipe(config: Path, stage1: Path, output: Path, words: Sequence[str]) -> Config:
    given = {word.partition("=")[0]: word for word in [*SECOND_STAGE, f"train.init={stage1}", *words]}
    return load_config([str(config), f"output={output}", *given.values()])


@pytest.fixture(scope="module")
def alone(config: Path, stage1: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run folder of an arm that was trained by itself."""
    folder = tmp_path_factory.mktemp("alone")

    def trained(name: str) -> Path:
        if not (folder / name).exists():
            train_here([recipe(config, stage1, folder / name, ARMS[name])])
        return folder / name

    return trained


FEW = ("softmax", "ebl", "mfs", "loce", "fill 1", "roi", "seesaw", "FCs train", "bacl")


@pytest.mark.parametrize("names", [FEW, pytest.param(tuple(ARMS), marks=pytest.mark.slow)], ids=["few", "all"])
def test_each_arm_is_as_its_own_run(
    config: Path, stage1: Path, alone: Callable[[str], Path], tmp_path: Path, names: tuple[str, ...]
) -> None:
    trainer = train_here([recipe(config, stage1, tmp_path / name, ARMS[name]) for name in names])
    for name in names:
        same_run(tmp_path / name, alone(name))
    models = {name: arm.model for name, arm in zip(names, trainer.arms, strict=True)}
    assert len({model.backbone for model in models.values()}) == len({model.rpn for model in models.values()}) == 1
    assert len({model.roi_heads.box_head for model in models.values()}) == (2 if names == FEW else 4)  # others train
    alike = [name for name in ("softmax", "ebl", "bags") if name in names]  # have no memory
    assert len({model.roi_heads.fc_reg for model in models.values()}) == len(names) - len(alike) + 1
    banks = {m.roi_heads.memory.bank for m in models.values() if m.roi_heads.memory is not None}
    # At level fc, filled with one, few and in bf16; at level roi; Gaussians of boxes, of regions, of FCs that train.
    assert len(banks) == (4 if names == FEW else 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], OTHERS),
        (["memory.enabled=true"], OTHERS),
        (["train.freeze=detector"], ("softmax", "equilibrium", "disalign", "seesaw")),
        (["train.precision=bf16", "train.accumulate=2"], ("equilibrium", "seesaw", "bags")),
        (["train.evaluate=true", "train.evaluate_every=1", "memory.enabled=true"], ("equilibrium", "softmax")),
    ],
    ids=["heads", "heads with memory", "detector", "bf16, accumulation", "evaluation between epochs"],
)
def test_heads_and_options(
    config: Path, stage1: Path, tmp_path: Path, words: list[str], names: tuple[str, ...]
) -> None:
    arms = {name: [f"head.name={name}", f"head.reset={str(name != 'disalign').lower()}", *words] for name in names}
    train_here([recipe(config, stage1, tmp_path / name, own) for name, own in arms.items()])
    for name, own in arms.items():
        train_here([recipe(config, stage1, tmp_path / "alone" / name, own)])
        same_run(tmp_path / name, tmp_path / "alone" / name)
        best = tmp_path / name / "best.json"
        assert not best.exists() or best.read_text() == (tmp_path / "alone" / name / "best.json").read_text()


STOPPED = ("fill 1", "roi", "ebl")


def test_a_pass_that_was_stopped_goes_on_exactly(
    config: Path, stage1: Path, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    """Killed between the saves of two arms, too: the newest checkpoint that all have; one is finished by itself."""
    configs = [recipe(config, stage1, tmp_path / name, [*ARMS[name], "train.checkpoint_every=1"]) for name in STOPPED]
    train_here(configs, 3)
    newest = tmp_path / "fill 1/checkpoints/000000003"
    (newest / "main.pt").rename(newest / "main.pt.new")  # as before it was written
    trainer = train_here(configs, 4)
    assert (
        trainer.arms[0].notes[0] == f"going on from {tmp_path}/fill 1/checkpoints/000000002, 2 of 6 iterations are done"
    )
    train_here(configs[2:])
    trainer = train_here(configs)
    assert [arm.folder.name for arm in trainer.finished] == ["ebl"]
    for name in STOPPED:
        same_run(tmp_path / name, alone(name))


def test_what_runs_hold_in_common_is_written_once(
    config: Path, stage1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that do not train are one file of all checkpoints but the last; equal memories are one of each save."""
    folders = [tmp_path / name for name in ("loce", "mfs", "ebl")]
    configs = [recipe(config, stage1, folder, ARMS[folder.name]) for folder in folders]
    trainer = train_here(configs, 3)
    middle = [main_file(folder).parent for folder in folders]
    assert len({file.stat().st_ino for folder in folders for file in folder.glob("checkpoints/*/frozen.pt")}) == 1
    loce, mfs = ((folder / "memory0.pt").stat().st_ino for folder in middle[:2])
    assert loce == mfs != (folders[0] / "checkpoints/000000000/memory0.pt").stat().st_ino
    assert not (middle[2] / "memory0.pt").exists()
    # The header foretells what is there: two checkpoints each, of which none is the last yet.
    there = {file.stat().st_ino: file.stat().st_size for folder in folders for file in folder.glob("checkpoints/*/*")}
    frozen = (middle[0] / "frozen.pt").stat().st_size
    foretold = checkpoint_bytes([(arm.config, arm.model) for arm in trainer.arms], 2) - 3 * frozen
    assert 0.8 * sum(there.values()) < foretold < 1.2 * sum(there.values())

    # A folder stands for itself, wherever it is; of a file alone it is said what it lacks.
    shutil.copytree(folders[0], tmp_path / "copy")
    weights = load_model(tmp_path / "copy").state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in load_model(folders[0]).state_dict().items())
    shutil.copy(middle[0] / "main.pt", tmp_path / "alone.pt")
    with pytest.raises(UserError, match=r"in frozen\.pt, which does not lie beside it any more: copy this, too"):
        load_model(tmp_path / "alone.pt")

    # Where there are no hard links, everything is written.
    def refuse(*paths: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    train_here(configs)
    for folder in folders:
        assert {file.name for file in main_file(folder).parent.glob("*.pt")} >= {"main.pt", "rank0.pt"}
        assert not main_file(folder).with_name("frozen.pt").exists()
        assert Checkpoint.open(main_file(folder)).model.keys() >= dict(load_model(folder).named_parameters()).keys()


def test_the_others_go_on_without_one_that_diverges(
    config: Path, stage1: Path, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    """It is the first, which moves what all share; it shares its memory with another one."""
    names = ("loce", "mfs", "ebl")
    configs = [recipe(config, stage1, tmp_path / name, ARMS[name]) for name in names]
    with preflight(*configs) as found:
        trainer = Trainer(configs, CPU, found.annotations, found.checkpoints)
    trainer.open_log()
    trainer.fill_memory()
    trainer.fit(2)
    with torch.no_grad():
        trainer.arms[0].model.roi_heads.classifier.fc_cls.bias[0] = float("nan")
    trainer.fit()
    trainer.close_log()
    assert (
        len(trainer.diverged) == 1
        and "training diverged at iteration 3: not finite: loss_cls = nan" in trainer.diverged[0]
    )
    assert (tmp_path / "loce/nan_report/report.txt").is_file() and not (tmp_path / "mfs/nan_report").exists()
    assert "loce ends here, the others go on" in (tmp_path / "mfs/log.txt").read_text()
    assert len(metrics(tmp_path / "loce")) == 2
    for name in names[1:]:
        same_run(tmp_path / name, alone(name))


def test_when_all_diverge_the_training_ends(config: Path, stage1: Path, tmp_path: Path) -> None:
    configs = [recipe(config, stage1, tmp_path / name, [*ARMS[name], "train.lr=1e30"]) for name in ("mfs", "ebl")]
    with pytest.raises(DivergedError, match="iteration"):
        train_here(configs)
    assert all((tmp_path / name / "nan_report").is_dir() for name in ("mfs", "ebl"))


def test_words_of_a_command(config: Path, tmp_path: Path) -> None:
    common = ["train.init=x", *SECOND_STAGE]
    one, other = read_recipes([str(config), f"{config} memory.enabled=true output={tmp_path}/mfs", *common])
    assert one.output == "runs/tiny" and not one.memory.enabled and one.train.init == "x"
    assert other.output == f"{tmp_path}/mfs" and other.memory.enabled and other.train.freeze == "trunk"
    assert read_recipes([str(config), "seed=3"])[0].seed == 3
    assert read_recipes([f"{config} seed=3"])[0].seed == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=1"], "seed = 0 in a, 1 in b"),
        (["train.freeze=detector"], "train.freeze = trunk in a, detector in b"),
        (["train.clip_norm=1"], "b: train.clip_norm = 1: clipping by the norm of all gradients would mix the runs"),
        (["train.precision=fp16"], "b: train.precision = fp16"),
        (["output=./a"], "output = ./a: two runs of the pass would write into it"),
    ],
)
def test_what_cannot_share_is_refused(config: Path, words: list[str], message: str) -> None:
    given = {word.partition("=")[0]: word for word in ["output=b", *SECOND_STAGE, *words]}
    lines = [" ".join([str(config), "output=a", *SECOND_STAGE]), " ".join([str(config), *given.values()])]
    with pytest.raises(UserError) as error:
        read_recipes([*lines, "train.init=x"])
    assert message in str(error.value)
    assert "output" in words[0] or "passes there could be: a | b" in str(error.value)


def test_runs_are_sorted_into_few_passes(config: Path) -> None:
    given = [[], ["seed=1"], ["head.name=seesaw"], ["train.freeze=backbone"], ["train.freeze=none"], ["seed=1"]]
    configs = []
    for words in given:
        every = {word.partition("=")[0]: word for word in [*SECOND_STAGE, *words]}
        configs.append(load_config([str(config), "train.init=x", *every.values()]))
    assert passes(configs) == [[0, 2, 3], [1, 5], [4]]


def test_the_command(config: Path, stage1: Path, tmp_path: Path) -> None:
    """Evaluated as runs of their own; each says which others ran beside it."""
    words = [f"train.init={stage1}", *SECOND_STAGE[:2]]
    recipes = [f"{config} output={tmp_path}/ebl head.name=equilibrium", f"{config} output={tmp_path}/softmax"]
    text = run("finetune.py", *recipes, *words)
    for name, other in (("ebl", "softmax"), ("softmax", "ebl")):
        assert (tmp_path / name / "eval/metrics.json").is_file()
        log = (tmp_path / name / "log.txt").read_text()
        assert f"in one pass with {tmp_path}/{other}: images/s and minutes are the pass's" in log
        assert "with the others" in log and "6/6 iterations done" in log
    assert text.count("epoch 1/2 iter 1/3") == 1


def test_evaluation_together_finds_what_each_finds_alone(
    config: Path, stage1: Path, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    """Runs whose RPN and mask head are the same, one whose FCs trained, and stage 1, which shares the backbone only."""
    names = ("loce", "ebl", "FCs train")
    for name in names:
        shutil.copytree(alone(name), tmp_path / name)
    shutil.copytree(stage1, tmp_path / "stage1", ignore=shutil.ignore_patterns("eval"))
    folders = [tmp_path / name for name in (*names, "stage1")]
    evaluate_checkpoints(folders, None, ["eval.errors=false"], "cpu", resamples=0)
    for folder in folders:
        evaluate_checkpoints([folder], tmp_path / "alone", ["eval.errors=false"], "cpu", resamples=0)
        files = sorted(path.relative_to(folder / "eval") for path in (folder / "eval").rglob("*") if path.is_file())
        assert {str(file) for file in files} > {"metrics.json", "mean_scores.csv", "origin.txt"}
        for file in files:
            assert (folder / "eval" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file
        shutil.rmtree(tmp_path / "alone")
    with pytest.raises(UserError, match=r"has another data\.test_short_edge than the first; evaluate it by itself"):
        words = [f"output={tmp_path}/other", "data.test_short_edge=48", "train.evaluate=false"]
        train_here([load_config([str(config), *words])])
        evaluate_checkpoints([stage1, tmp_path / "other"], None, [], "cpu")


def one_diverges(words: Sequence[str]) -> None:
    """A pass in which, after two iterations, the last rank alone has a bad weight in the first arm."""
    configs = read_recipes(words)
    with process_group("cpu") as device:
        with preflight(*configs) as found:
            trainer = Trainer(configs, device, found.annotations, found.checkpoints)
        trainer.open_log()
        trainer.fill_memory()
        trainer.fit(2)
        if distributed.rank() == distributed.world_size() - 1:
            with torch.no_grad():
                trainer.arms[0].model.roi_heads.classifier.fc_cls.bias[0] = float("nan")
        trainer.fit()
        trainer.close_log()
        assert [arm.folder.name for arm in trainer.arms] == [Path(config.output).name for config in configs[1:]]


@pytest.mark.slow
def test_two_ranks_and_an_arm_that_diverges_on_one(config: Path, stage1: Path, tmp_path: Path) -> None:
    """The others are as their own runs on two ranks, bit for bit: a sum of two has one order."""
    arms = {"loce": ARMS["loce"], "mfs": ARMS["mfs"], "ebl": ARMS["ebl"], "shared": SHARED}
    words = [f"train.init={stage1}", *SECOND_STAGE]
    recipes = [" ".join([str(config), f"output={tmp_path}/{name}", *own]) for name, own in arms.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line = [*launch, "-m", "tests.engine.test_together", *recipes, *words]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"WARNING: {tmp_path}/loce ends here, the others go on: training diverged at iteration 3" in done.stdout
    report = json.loads((tmp_path / "loce/nan_report/report.json").read_text())
    assert len(report["ranks"]) == 2 and "its bias has some, too" in report["ranks"][1]["first_bad_layer"]
    for name in list(arms)[1:]:
        run("finetune.py", config, f"output={tmp_path}/alone/{name}", *arms[name], *words, processes=2)
        same_run(tmp_path / name, tmp_path / "alone" / name)


@pytest.mark.slow
def test_four_ranks_are_as_one(config: Path, stage1: Path, tmp_path: Path) -> None:
    """To rounding: sums over images and ranks are in another order. Ranks share the memory, as one has it."""
    arms, words = {"ebl": ARMS["ebl"], "shared": SHARED}, [f"train.init={stage1}", *SECOND_STAGE]
    for ranks in (1, 4):
        recipes = [" ".join([str(config), f"output={tmp_path}/{ranks}/{name}", *own]) for name, own in arms.items()]
        run("finetune.py", *recipes, *words, processes=ranks)
    for name in arms:
        for line, expected in zip(metrics(tmp_path / "4" / name), metrics(tmp_path / "1" / name), strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        one, four = (torch.load(main_file(tmp_path / n / name), weights_only=True) for n in ("1", "4"))
        for key, value in one["model"].items():
            torch.testing.assert_close(four["model"][key], value, rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    one_diverges(sys.argv[1:])
