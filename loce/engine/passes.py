"""Passes: which recipes can train in one, and the recipes of a command line. Imports no torch.

`finetune.py A.yaml "loce.yaml memory.enabled=false output=runs/ebl" key=value`: words without `=` are recipes, quoted
ones with words of their own; the other words are for all.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from loce.config import Config, UserError, diff, load_config, raise_problems
from loce.utils.yaml_text import show

MAY_DIFFER = ("head.", "indicator.", "memory.", "output")
TOGETHER = ("trunk", "backbone")  # values of train.freeze that may stand beside each other


def read_recipes(argv: Sequence[str]) -> list[Config]:
    """The runs that a command line describes, one or several that train in one pass. UserError with what is wrong."""
    recipes = [word for word in argv if _is_recipe(word)]
    if len(recipes) < 2:
        first = shlex.split(argv[0]) if len(argv) and recipes == [argv[0]] and not Path(argv[0]).exists() else argv[:1]
        return [load_config([*first, *argv[1:]])]
    words = [word for word in argv if word not in recipes]
    configs = [load_config([*_split(recipe), *words]) for recipe in recipes]
    require_one_pass(configs)
    return configs


def _is_recipe(word: str) -> bool:
    return Path(word).is_file() or ("=" not in word.partition(" ")[0] and not word.startswith("-"))


def _split(recipe: str) -> list[str]:
    return [recipe] if Path(recipe).is_file() else shlex.split(recipe)


def require_one_pass(configs: Sequence[Config]) -> None:
    """UserError, with the passes there could be, where these runs cannot train in one."""
    problems = [f"{config.output}: {reason}" for config in configs if (reason := alone(config))]
    first = configs[0]
    for config in configs[1:]:
        old, new = apart(config, first), apart(first, config)
        problems += [f"{key} = {show(old[key])} in {first.output}, {show(new[key])} in {config.output}" for key in new]
    if problems:
        parts = " | ".join(", ".join(configs[i].output for i in numbers) for numbers in passes(configs))
        raise UserError(
            f"these {len(configs)} runs cannot train in one pass, in which only head.*, indicator.*, memory.* and "
            "output may differ:\n  " + "\n  ".join([*problems, f"passes there could be: {parts}"])
        )
    folders = [Path(config.output).resolve() for config in configs]
    raise_problems(
        [
            f"output = {config.output}: two runs of the pass would write into it; give one of them another output=... "
            f'by quoting: "RECIPE.yaml output=FOLDER"'
            for number, config in enumerate(configs)
            if folders[number] in folders[:number]
        ]
    )


def apart(one: Config, other: Config) -> dict[str, object]:
    """Dotted key -> value in `other` of what keeps two runs from training in one pass."""
    found = {key: value for key, value in diff(one, other).items() if not key.startswith(MAY_DIFFER)}
    if one.memory.holds_out != other.memory.holds_out:  # they train on other images
        found["memory.adaptive.held_out"] = other.memory.holds_out
    if {one.train.freeze, other.train.freeze} <= {*TOGETHER}:
        found.pop("train.freeze", None)
    return found


def alone(config: Config) -> str:
    """Why a run cannot share its pass with any other; "" where it can."""
    train = config.train
    if train.freeze == "none":
        return "train.freeze = none: its own losses change the trunk"
    if train.clip_norm:
        return f"train.clip_norm = {train.clip_norm:g}: clipping by the norm of all gradients would mix the runs"
    if train.precision == "fp16":
        return "train.precision = fp16: one scale of the loss would mix the runs; bf16 needs none"
    if train.keep_checkpoints < 2:
        return "train.keep_checkpoints = 1: a pass that is killed while saving goes on from the one before"
    if train.wandb:
        return "train.wandb = true: Weights & Biases takes one run of a process at a time"
    if config.head.name == "balms":
        return "head.name = balms: its meta batch is of other images"
    return ""


def passes(configs: Sequence[Config]) -> list[list[int]]:
    """Positions of the runs, in as few passes as there can be, in their order."""
    found: list[list[int]] = []
    for number, config in enumerate(configs):
        for others in found if not alone(config) else ():
            if not alone(configs[others[0]]) and not apart(configs[others[0]], config):
                others.append(number)
                break
        else:
            found.append([number])
    return found
