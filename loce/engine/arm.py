"""Arm of a training: model, optimiser, log and checkpoints of one recipe. An ordinary run has one, a pass several.

Arms of a pass share parts of their models (models/together.py). What an arm writes is a run folder like any other.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from loce.checkpoint.files import megabytes
from loce.checkpoint.load import Checkpoint, load_weights
from loce.checkpoint.save import Written, restore, save
from loce.config import Config, UserError, diff
from loce.data.annotations.lvis import LVISAnnotations
from loce.engine import divergence, validation
from loce.engine.averaging import WeightAverage, average_over_ranks, batch_statistics
from loce.engine.inference import Evaluated
from loce.engine.log import RunLog
from loce.engine.loop import Losses, Samples
from loce.models.build import build_model, build_optimizer, load_head_files
from loce.models.mask_rcnn import MaskRCNN
from loce.models.together import share, unshare_memory
from loce.utils import distributed
from loce.utils.classes import GROUPS, ClassStats
from loce.utils.errors import DivergedError, first_few
from loce.utils.yaml_text import show

# Options that give weights their meaning, and that no shape shows.
UNSEEN = ("model.mask_predictor", "model.rpn.anchor_scale", "model.roi.finest_scale", "model.roi.aligned")
SIZES = ("data.short_edges", "data.long_edge", "data.test_short_edge")
MASKS = "roi_heads.mask_head."
LAST_TRIES, LAST_WAIT = 20, 30.0  # of saving the last checkpoint; seconds between them


class Arm:
    """Model, optimiser and how many iterations are done, from `checkpoint` or from the weights of `train.init`.

    beside: arms of the same pass; it shares parts with those that stand where it does. UserError where the weights do
    not fit.
    """

    log: RunLog  # from `Trainer.open_log` on

    def __init__(
        self,
        config: Config,
        device: torch.device,
        annotations: LVISAnnotations,
        checkpoint: Path | None = None,
        beside: Sequence["Arm"] = (),
    ) -> None:
        self.config, self.stats, self.folder = config, annotations.stats, Path(config.output)
        self.step, self.resumed = 0, checkpoint is not None

        # Model; `notes` says what was loaded.
        torch.manual_seed(config.seed)
        self.model = build_model(config, self.stats, pretrained=checkpoint is None and not config.train.init)
        self.notes: list[str] = []
        if checkpoint is None:
            load_head_files(config, annotations, self.model)
            self.notes = load_initial_weights(config, self.model, self.stats) if config.train.init else []
        self.model.to(device)

        # The model's choices are keyed by image; a head's own random numbers differ between ranks.
        torch.manual_seed(config.seed * 1000003 + distributed.rank())
        state = None
        self.pending: dict[str, torch.Tensor] = {}  # losses of iterations done without their line in the log
        if checkpoint is not None:
            state, changes = restore(checkpoint, config, self.model, device)
            self.step, self.pending = state["iteration"], state["window"]
            self.notes = [f"going on from {checkpoint}", *changes]
        share(self.model, [arm.model for arm in beside if arm.step == self.step])

        # Average of the weights; optimiser and, with fp16, the scaler of the loss.
        self.average = WeightAverage(self.model, config.train.ema) if config.train.ema else None
        self.optimizer: torch.optim.Optimizer = build_optimizer(self.model, config.train)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
        if state is not None:
            if self.average:
                self.average.load(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:
                group["fused"] = True  # a checkpoint of before says None, and has one group
                group.setdefault("lr_scale", 1.0)
            self.scaler.load_state_dict(state["scaler"])

    def count_step(self) -> None:
        """One iteration more is done."""
        self.step += 1
        if self.average:
            self.average.update(self.step)

    def averaged(self) -> AbstractContextManager[None]:
        """In the block the model is what is evaluated: with the average of its weights, where there is one.

        Every rank must call.
        """
        self._average_over_ranks()
        return self.average.in_place() if self.average else nullcontext()

    def _average_over_ranks(self) -> None:
        """The same statistics of batch norms on all ranks."""
        own = batch_statistics(self.model)
        average_over_ranks([*own.values(), *(self.average.values[name] for name in own if self.average)])

    def write(self, lr: float) -> None:
        """A line of the log: also mean score and memory fill by group of the classes that training has, and of all."""
        roi, stats = self.model.roi_heads, self.stats
        values = {"mean_score": roi.tracker.scores[:-1].cpu()}  # sync: log line
        if roi.memory is not None:
            values["memory_fill"] = roi.memory.bank.fill.cpu()  # sync: log line
        masks = {group: torch.from_numpy(stats.group_mask(group) & (stats.instance_counts > 0)) for group in GROUPS}
        means = {f"{k}/{g}": float(v[m].mean()) for k, v in values.items() for g, m in masks.items() if m.any()}
        self.log.write(lr, {**means, **{f"{name}/classes": value for name, value in values.items()}})

    def snapshot(self) -> None:
        """A line of equilibrium.jsonl: mean score (four digits) and rows in this rank's memory of every class."""
        roi = self.model.roi_heads
        scores = roi.tracker.scores[:-1].tolist()  # sync: a snapshot
        values: dict[str, list[float]] = {"mean_score": [float(f"{score:.4g}") for score in scores]}
        if roi.memory is not None:
            values["memory"] = roi.memory.bank.counts.tolist()  # sync: a snapshot
        self.log.snapshot(self.step, values)

    def evaluated(self, name: str) -> Evaluated:
        """What an evaluation into the folder `name` of the run works on; in a block of `averaged`."""
        return Evaluated(self.model, self.config, self.folder / name, f"{self.folder} after {self.step} iterations")

    def diverged(
        self,
        batches: list[Samples],
        losses: list[Losses],
        lr: float,
        name_of: Callable[[int], str],
    ) -> str:
        """The end of a training whose next step is not finite: a summary; a report on disk says where it came from."""
        unshare_memory(self.model)  # the report stores the batch again
        found = (batches, losses, self.step + 1, lr, self.config.train.precision, name_of)
        summary = divergence.report(self.folder, self.model, *found)
        self.log.line(summary, shown=False)
        return summary

    def save(self, total: int, last: bool = False, written: Written | None = None) -> bool:
        """Write a checkpoint; False, with a warning, where the disk does not take it. Every rank must call.

        total: iterations of the whole training; last: nothing comes after it, so it is tried again for ten minutes,
        then UserError; written: files of the pass so far, which may be linked. DivergedError where a value is not
        finite.
        """
        self._average_over_ranks()
        numbers = [x for x in self.model.state_dict().values() if x.is_floating_point()]
        bad = ~torch.stack([x.isfinite().all() for x in numbers]).all()
        if distributed.all_reduce_sum(bad.float()).item():  # sync: a save
            raise DivergedError(
                "training diverged: a weight or a buffer is not finite; the checkpoints before are good"
            )
        self.log.sync()
        self.model.roi_heads.progress = self.step / total
        state = {"iteration": self.step, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        state |= {"ema": self.average.values} if self.average else {}
        best, pending = validation.best_checkpoint(self.folder), self.log.unwritten()
        for attempt in range(1 + LAST_TRIES if last else 1):
            if attempt:
                self.log.line(f"training is done, but not saved; the next try is in {LAST_WAIT:g} s")
                time.sleep(LAST_WAIT)
            saved = save(self.folder, self.config, self.stats, self.model, state, pending, best, written)
            if not saved.problems:
                self.log.line(f"checkpoint {saved.folder.name}: {megabytes(saved.bytes)} in {saved.seconds:.2f} s")
                return True
            self.log.line(
                f"WARNING: no checkpoint of iteration {self.step}: {'; '.join(saved.problems)}. The checkpoints before "
                "are untouched, training goes on; the next try is at the next checkpoint"
            )
        if last:
            raise UserError(
                f"{self.folder}: training is done, but its last checkpoint could not be saved. Make room on the disk "
                "and give the same command again: it goes on from the checkpoint before"
            )
        return False


def load_initial_weights(config: Config, model: MaskRCNN, stats: ClassStats) -> list[str]:
    """Take over the weights of `train.init`; lines that say what was loaded. UserError where frozen parts lack."""
    init = config.train.init
    start = Checkpoint.open(init)
    found = load_weights(start, model, stats, config.head.reset)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    lacking = sorted(frozen & set(found["new"]))
    if lacking:
        hint = "; a detector of boxes goes on with model.masks=false" * lacking[0].startswith(MASKS)
        raise UserError(
            f"train.init = {init}: has no {first_few(lacking)}, which would stay random: they are frozen{hint}"
        )
    counts = ", ".join(f"{len(names)} {what}" for what, names in found.items())
    averaged = f", averages over its training (train.ema={start.config.train.ema:g})" if start.averages else ""
    lines = [f"weights from {init}{averaged}: {counts}; {len(frozen)} tensors are frozen"]
    if start.unfinished:
        lines.append(f"WARNING: {start.path} is of an unfinished run: {start.iterations} iterations were done")
    # A mask head comes and goes with model.masks.
    if any(name.startswith(MASKS) for name in found["dropped"]):
        lines.append("the mask head of that checkpoint is left out (model.masks=false)")
    if any(name.startswith(MASKS) for name in found["new"]):
        lines.append(f"WARNING: {init} is a detector of boxes: the mask head starts anew (model.masks=true)")
    lines += [f"weights: {what}: {name}" for what in ("new", "dropped") for name in found[what]]
    unseen = UNSEEN if config.model.masks and start.config.model.masks else UNSEEN[1:]
    options = [f"{key}={show(value)}" for key, value in diff(config, start.config).items() if key in unseen]
    if options:
        lines.append(
            f"WARNING: {init} was made with {' '.join(options)}, this run says otherwise: its weights fit worse"
        )
    if start.state.get("iteration"):  # a run of ours: what it saw, and how it sorted the classes, is known
        sizes = [f"{key}={show(value)}" for key, value in diff(config, start.config).items() if key in SIZES]
        if sizes:
            lines.append(f"WARNING: {init} saw images at {' '.join(sizes)}, this run shows others")
        if moved := (start.classes.groups != stats.groups).sum():
            told = f"WARNING: {moved} of {len(stats)} classes are in other groups than in {init}"
            lines.append(f"{told}: APr, APc and APf are of others; give both the same data.rare_max, data.common_max")
    return lines


def memory_contents(model: MaskRCNN) -> str:
    """A line on what the feature memory holds."""
    assert model.roi_heads.memory is not None
    bank = model.roi_heads.memory.bank
    counts = bank.counts.cpu()
    return (
        f"feature memory: {int(counts.sum())} rows, {int((counts > 0).sum())} of {len(counts)} classes have some, "
        f"{sum(b.numel() * b.element_size() for b in bank.buffers()) / 2**20:.0f} MiB"
    )
