"""Saving and exact resuming: everything that training depends on; a kill at any moment or a full disk loses nothing.

A checkpoint is a folder `checkpoints/000001500/`:
main.pt        model, averages, optimiser, scaler, position, config, classes. The sampler has no state: its batches
               follow from config, data, epoch and position
rank<r>.pt     of each process: random state, what its head keeps for itself, losses that wait for their line in the log
memory<r>.pt   a process's feature memory, or the first one's where it is shared: one file of all runs of a pass that
               store the same
frozen.pt      weights that do not train: one file of all checkpoints of a pass but the last, whose main.pt is whole
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loce.checkpoint import files
from loce.checkpoint.load import (
    FORMAT,
    GOES_ON,
    MEMORY_PREFIX,
    Checkpoint,
    load_file,
    memory_of,
    memory_state,
    stats_to_dict,
)
from loce.checkpoint.memory import merge, pack, reshard, unpack
from loce.config import Config, UserError, diff, to_dict
from loce.gaussian_memory import GaussianMemory
from loce.models.mask_rcnn import MaskRCNN
from loce.utils import distributed
from loce.utils.classes import ClassStats
from loce.utils.progress import print_line
from loce.utils.yaml_text import show

BY_SHARE = ("ldam", "pcb")  # heads whose loss goes by the share of the training that is done

Parts = dict[str, tuple[Any, Callable[[], dict[str, Any]]]]  # file name -> what stands for its content, and content
Written = dict[Any, dict[str, Any]]  # what stands for the content of a file -> what is known of the file


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The random state of this process, on the host and on its device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Inverse of `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@dataclasses.dataclass(frozen=True)
class Saved:
    """Outcome of a save; the same on all ranks but for `seconds`. problems: what the disk did not take; none: saved."""

    folder: Path
    problems: list[str]
    bytes: int
    seconds: float


def save(
    run: Path,
    config: Config,
    stats: ClassStats,
    model: MaskRCNN,
    state: dict[str, Any],
    window: dict[str, Tensor],
    best: Path | None = None,
    written: Written | None = None,
) -> Saved:
    """Write a checkpoint at `state["iteration"]`; every rank must call. Then delete what is older than the last few.

    state: what else training depends on (optimiser, scaler, averages, position), plain containers and tensors; window:
    losses of this rank that wait for their line in the log; best: a checkpoint that is kept, too; written: files that
    may be linked, those of the pass so far. Where the disk is full, all but the newest and the best of the older ones
    make room, once. What does not fit then leaves no file behind; nothing is raised, so that training can go on.
    """
    started = time.monotonic()
    folder, rank = run / "checkpoints" / f"{state['iteration']:09d}", distributed.rank()
    # What this rank keeps for itself.
    head = model.roi_heads.classifier
    own = {
        "rng": rng_state(next(model.parameters()).device),
        "head": {name: head.get_buffer(name) for name in head.of_rank},
        "window": window,
    }
    parts: Parts = {f"rank{rank}.pt": (None, lambda: own)}
    if model.roi_heads.memory is not None and not (config.memory.shared and rank):
        bank = model.roi_heads.memory.bank
        parts[f"memory{rank}.pt"] = ((id(bank), folder.name), lambda: pack(bank))
    # What all have in common. The last checkpoint is what people copy and use: it is whole.
    frozen = frozen_weights(config, model) if model.roi_heads.progress < 1 else {}
    if frozen and not rank:
        parts[files.FROZEN] = (tuple(p.data_ptr() for p in frozen.values()), lambda: {"model": frozen})
    weights = model.state_dict()
    main = {
        "format": FORMAT,
        "config": to_dict(config),
        "classes": stats_to_dict(stats),
        "world_size": distributed.world_size(),
        "progress": model.roi_heads.progress,  # share of the iterations that are done
        "model": {k: v for k, v in weights.items() if k not in frozen and not k.startswith(MEMORY_PREFIX)},
        "frozen": bool(frozen),
        **state,
    }
    # A full disk: older checkpoints make room, once.
    written = {} if written is None else written
    every = _write_all(folder, parts, main, written)
    if any(file.get("full") for file in every) and _make_room(run, folder, best):
        every = _write_all(folder, parts, main, written)
    problems = [file["problem"] for file in every if "problem" in file]
    if distributed.is_main() and not problems:
        try:
            files.tidy(run, folder, config.train.keep_checkpoints, best)
        except OSError as error:
            print_line(f"WARNING: an old checkpoint could not be deleted: {error}")
    size = sum(file.get("bytes", 0) for file in every if "linked" not in file)
    return Saved(folder, problems, size, time.monotonic() - started)


def frozen_weights(config: Config, model: MaskRCNN) -> dict[str, Tensor]:
    """What of a model does not train in the second stage, by name; {} in the first, where it is little."""
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return {} if config.train.freeze == "none" else frozen


def _write_all(
    folder: Path,
    parts: Parts,
    main: dict[str, Any],
    written: Written,
) -> list[dict[str, Any]]:
    """What was written, or was not, by all ranks, on every rank; `main.pt` last, and only after all others."""
    if distributed.is_main():
        files.start(folder)
    distributed.barrier()
    own = []
    for name, (holds, content) in parts.items():
        linked = files.link(folder / name, written[holds]) if holds in written else {}
        own.append(linked or files.write(folder / name, content()))
        if holds is not None and "problem" not in own[-1]:
            written[holds] = {**own[-1], "path": str(folder / name)}
    every = [file for text in distributed.gather_texts(json.dumps(own)) for file in json.loads(text)]
    if distributed.is_main():
        failed = any("problem" in file for file in every)
        last = [] if failed else [files.finish(folder, every, main)]
        if failed or "problem" in last[0]:
            with contextlib.suppress(OSError):
                files.discard(folder)
    else:
        last = []
    return every + list(json.loads(distributed.broadcast_text(json.dumps(last))))


def _make_room(run: Path, folder: Path, best: Path | None) -> bool:
    """Delete all but the newest of the checkpoints there are; was there one to delete?"""
    freed = False
    if distributed.is_main() and (there := files.finished(run)):
        with contextlib.suppress(OSError):
            freed = files.tidy(run, there[0], 1, best)
    return bool(distributed.broadcast_text("freed" if freed else ""))


def checkpoint_bytes(runs: Sequence[tuple[Config, MaskRCNN]], count: int = 1) -> int:
    """What `count` checkpoints of each run of a pass take at most, the last one among them, feature memories full."""
    total, once = 0, set()
    for config, model in runs:
        memory, frozen = memory_state(model), frozen_weights(config, model)
        # What trains has a momentum, or two moments, and an average.
        trained = [p for p in model.parameters() if p.requires_grad]
        trained *= (2 if config.train.optimizer == "adamw" else 1) + bool(config.train.ema)
        rest = [tensor for name, tensor in model.state_dict().items() if name not in memory and name not in frozen]
        size, fixed, stored = _bytes([*rest, *trained]), _bytes(frozen.values()), _bytes(memory.values())
        total += count * size + fixed  # the last one is whole
        # What is one file for all.
        copies = 1 if config.memory.shared else distributed.world_size()
        for part, needed in ((frozen, fixed if count > 1 else 0), (memory, count * copies * stored)):
            total += needed if (holds := tuple(x.data_ptr() for x in part.values())) not in once else 0
            once.add(holds)
    return total


def require_room(runs: Sequence[tuple[Path, Config, MaskRCNN]]) -> None:
    """UserError where the disk of runs has no room for one checkpoint more of each, their feature memories full."""
    disks: dict[int, list[tuple[Path, Config, MaskRCNN]]] = {}
    for run in runs:
        disks.setdefault(os.stat(_there(run[0])).st_dev, []).append(run)
    for some in disks.values():
        folder, most, free = some[0][0], checkpoint_bytes([run[1:] for run in some]), free_bytes(some[0][0])
        if free < most:
            what = "a checkpoint takes" if len(some) == 1 else f"checkpoints of {len(some)} runs take"
            raise UserError(
                f"output = {folder}: {what} up to {files.megabytes(most)}, {files.megabytes(free)} are free on "
                f"its disk: free {files.megabytes(most - free)}, or choose a folder on another disk with output=..."
            )


def free_bytes(run: Path) -> int:
    """What is free on the disk of a run folder, which may not be there yet."""
    return shutil.disk_usage(_there(run)).free


def _there(run: Path) -> Path:
    """The run folder or, before it is made, the folder that it will be in."""
    return next(folder for folder in (run.absolute(), *run.absolute().parents) if folder.exists())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def newest_of_all(runs: Sequence[Path]) -> list[Path | None]:
    """The checkpoints that the runs of a pass go on from, the same on all ranks: `newest` where that is alike in all.

    Else, of those that are not finished, the newest that all have, or None for all: a pass that is killed while it
    saves has one more of some. UserError where that would set a run back by more than a checkpoint.
    """
    found = [newest(run) for run in runs]
    if len({path and path.name for path in found}) == 1:
        return found
    going = [n for n, path in enumerate(found) if path is None or Checkpoint.open(path, checked=True).unfinished]
    held = [files.finished(runs[n]) if distributed.is_main() else [] for n in going]
    undamaged = [[folder.name for folder in folders if not files.damage(folder)] for folders in held]  # newest first
    there = json.loads(distributed.broadcast_text(json.dumps(undamaged)))
    common = next((name for name in there[0] if all(name in names for names in there)), "") if there else ""
    for run, names in zip((runs[n] for n in going), there, strict=True):
        ahead = [name for name in names if name > (common or f"{0:09d}")]
        if len(ahead) > 1:
            stands = "\n".join(f"  {runs[n]}: {(there[i] or ['no checkpoint'])[0]}" for i, n in enumerate(going))
            raise UserError(
                f"these runs stand at different iterations and have no newer checkpoint in common; {run} would lose "
                f"{len(ahead)} of its own. Train them apart, by commands of their own, or delete those behind:\n"
                f"{stands}"
            )
    for n, names in zip(going, there, strict=True):
        name = common or (f"{0:09d}" if f"{0:09d}" in names else "")
        found[n] = runs[n] / "checkpoints" / name if name else None
    return found


def newest(run: Path) -> Path | None:
    """The newest undamaged checkpoint of a run, the same on all ranks; None where there is none at all.

    Damaged ones are named on the screen. UserError where there are some, and all are damaged.
    """
    distributed.barrier()  # no rank writes before all have checked what is there
    found, bad = "", []
    for folder in files.finished(run) if distributed.is_main() else []:
        if not (problem := files.damage(folder)):
            found = str(folder)
            break
        bad.append(f"checkpoint {folder} is damaged: {problem}")
        print_line(f"WARNING: {bad[-1]}; looking for the one before")
    found, bad = json.loads(distributed.broadcast_text(json.dumps([found, bad])))
    if bad and not found:
        raise UserError("\n".join([*bad, f"No checkpoint is left; delete {run} to start from the beginning"]))
    return Path(found) if found else None


def restore(
    folder: Path,
    config: Config,
    model: MaskRCNN,
    device: torch.device,
) -> tuple[dict[str, Any], list[str]]:
    """Load model, memory and random state of this rank.

    Returns what `save` was given as `state`, with this rank's `window`, and lines on what is not as it was. With
    another number of processes the memories are resharded and new random numbers begin.
    """
    main = Checkpoint.open(folder / files.MAIN, checked=True)
    if main.state["format"] not in GOES_ON:
        raise UserError(
            f"{folder} was written by an older loce and has too little in it to go on from; start anew with another "
            f"output=... (train.init={folder} takes its weights over)"
        )
    model.load_state_dict({**memory_state(model), **main.model})

    # This rank's own state, where the ranks are the same; else all of them, to be shared out.
    before, now = main.state["world_size"], distributed.world_size()
    wanted = [distributed.rank()] if before == now else range(before)
    own = [load_file(folder / f"rank{rank}.pt", checked=True) for rank in wanted]
    lines = []
    if before == now:
        set_rng_state(own[0]["rng"], device)
        model.roi_heads.classifier.load_state_dict(own[0]["head"], strict=False)
    else:
        fresh = np.random.SeedSequence([config.seed, main.state["iteration"], distributed.rank()])
        torch.manual_seed(int(fresh.generate_state(1, np.uint64)[0]))
        lines.append(f"{before} processes before, {now} now: the batches stay the same, random numbers begin anew")
        lines += [f"head: the {name} of process 0 are on every process" for name in model.roi_heads.classifier.of_rank]

    # What follows from the options stays the same; the feature memory goes to the ranks that there are.
    changed = diff(main.config.train, config.train, "train.")
    parts, epochs = main.config.train.accumulate, main.config.train.epochs
    if "train.accumulate" in changed:
        lines.append(f"train.accumulate: {parts} before, {config.train.accumulate} now: the batches stay the same")
    if "train.epochs" in changed:
        drops = f"drops after {show(list(config.train.drops))}, " if "train.drops" in changed else "no further drop, "
        drops = drops if config.train.schedule == "step" else "the learning rate follows the longer cosine, "
        moved = "; its loss goes by the share of the longer training" if config.head.name in BY_SHARE else ""
        lines.append(f"train.epochs: {epochs} before, {config.train.epochs} now: {drops}no warm-up{moved}")
    if model.roi_heads.memory is not None:
        bank = model.roi_heads.memory.bank
        packs = [memory_of(main, rank, checked=True) for rank in ([0] if config.memory.shared else wanted)]
        packed, lost = packs[0], 0
        if before != now and not config.memory.shared:
            if isinstance(bank, GaussianMemory):
                packed = merge(packs)
            else:
                packed, lost = reshard(packs, bank.capacity, distributed.rank(), now)
        if before != now:
            ring = config.memory.kind == "ring"
            how = "is resharded" if ring else "is that of all processes together, on each of them"
            how = "is shared and stays as it is" if config.memory.shared else how
            left_out = f"; {lost} rows were left out, the oldest where a class had too many" if ring else ""
            lines.append(f"feature memory: {how}{left_out}")
        unpack(packed, bank)
    # Losses that wait for the log: this rank's own, or the mean over the ranks there were.
    window = own[0]["window"]
    if len(own) > 1:
        window = {name: torch.stack([part["window"][name].float() for part in own]).mean(0) for name in window}
    return {**main.state, "window": window}, lines
