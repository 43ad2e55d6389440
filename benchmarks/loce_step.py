"""What LOCE adds to a training step (Sec. 3.1-3.3), against the same work written with loops and a memory on the host.

    python benchmarks/loce_step.py [device=cuda] [rows=1024] ...

One step: jitter the boxes of 2 images, store the features, draw from the memory, update the mean score, loss and its
gradient with respect to the logits. RoI features and logits are given. The loops follow the official implementation's
way of working: a Python loop over classes and instances, a float32 memory of RoI features (C x 80 x 256 x 7 x 7,
4.5 GiB at LVIS v1; the system hands out its pages as they are written) in host memory, and a softmax whose logarithm
is taken afterwards. They are measured with those features ("official layout") and with the vectors that loce stores
("same features"), which isolates the loops. "plain cross-entropy" is what the step costs without LOCE: the loss of the
RoIs alone and its gradient; `over plain` compares what is added to it. The sides take turns in one process.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from loce.box_generator import choose_instances, dense_boxes, valid
from loce.config import read_options, run_script
from loce.equilibrium_loss import equilibrium_loss
from loce.mean_score import MeanScoreTracker, instance_scores
from loce.memory_bank import FeatureMemoryBank
from loce.utils.classes import IGNORED
from loce.utils.distributed import setup
from loce.utils.environment import environment
from loce.utils.files import write_text
from loce.utils.options import Count

IMAGES, IMAGE_SIZE, CAPACITY = 2, (800.0, 1333.0), 80
ROI_SHAPE = (256, 7, 7)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What LOCE adds to a training step, measured."""

    device: str = "auto"  # auto | cpu | cuda
    classes: Count = 1203
    rows: Count = 1024  # RoIs of the batch
    instances: Count = 13  # per image
    features: Count = 1024  # numbers in a vector after the shared FCs
    steps: Count = 20  # measured in each round
    rounds: Count = 9
    threads: Count = 1  # of PyTorch, on the CPU
    output: str = "benchmarks/results/loce_step.json"


@dataclass
class Step:
    """What one step is given: ground truth of each image, RoI labels and instances, logits of RoIs and memory rows."""

    boxes: list[Tensor]
    labels: list[Tensor]  # on the host, as a data loader leaves them
    row_labels: Tensor
    row_instances: Tensor
    logits: Tensor


def make_step(options: Options, seed: int, device: torch.device) -> Step:
    """Long-tailed classes, instances of all sizes, a quarter of the RoIs positive."""
    generator = torch.Generator().manual_seed(seed)
    label_weights = 1 / torch.arange(1.0, options.classes + 1)
    boxes, labels = [], []
    for _ in range(IMAGES):
        corners = torch.rand(options.instances, 2, 2, generator=generator).sort(dim=1).values
        boxes.append((corners * torch.tensor([IMAGE_SIZE[1], IMAGE_SIZE[0]])).reshape(-1, 4))
        labels.append(torch.multinomial(label_weights, options.instances, replacement=True, generator=generator))
    instances_N = torch.randint(IMAGES * options.instances, (options.rows,), generator=generator)
    instances_N[torch.arange(options.rows) % 4 > 0] = -1
    labels_N = torch.where(instances_N >= 0, torch.cat(labels)[instances_N], options.classes)
    logits_NL = torch.randn(options.rows + 32, options.classes + 1, generator=generator)
    on_device = [x.to(device) for x in (labels_N, instances_N, logits_NL)]
    return Step([b.to(device) for b in boxes], labels, *on_device)


class Loce:
    """The step with this package's parts."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.classes = options.classes
        self.bank = FeatureMemoryBank(options.classes, (options.features,), CAPACITY).to(device)
        self.tracker = MeanScoreTracker(options.classes).to(device)

    def step(self, given: Step, features_BD: Tensor) -> Tensor:
        """The loss; `given.logits.grad` is set."""
        dense, stored = [], []
        for boxes_N4, labels_N in zip(given.boxes, given.labels, strict=True):
            rows = choose_instances(labels_N, 5).to(boxes_N4.device)
            dense_N164 = dense_boxes(boxes_N4[rows], IMAGE_SIZE)
            dense.append(dense_N164.flatten(0, 1))
            stored.append(torch.where(valid(dense_N164), labels_N.to(rows.device)[rows, None], IGNORED).flatten())
        boxes_B4 = torch.cat(dense)  # they stand for the regression targets, encoded elsewhere
        self.bank.enqueue(features_BD[: len(boxes_B4)], torch.cat(stored), boxes_B4)
        _, drawn_K, _ = self.bank.sample(self.tracker.scores)
        labels_N = torch.cat([given.row_labels, drawn_K])
        instances_N = F.pad(given.row_instances, (0, len(drawn_K)), value=-1)
        from_memory_N = torch.arange(len(labels_N), device=labels_N.device) >= len(given.row_labels)
        most = len(given.row_labels) // 4 + len(drawn_K)  # positives and memory rows: the detector scores no others
        rows = (~((instances_N >= 0) | from_memory_N)).to(torch.uint8).sort(stable=True).indices[:most]
        labels_M, own_M1 = labels_N[rows], labels_N[rows].clamp(0, self.classes)[:, None]
        p_M = given.logits.detach()[rows].softmax(1).gather(1, own_M1)[:, 0]
        instances = sum(map(len, given.labels))
        drawn = (torch.where(from_memory_N[rows], labels_M, IGNORED), p_M)
        self.tracker.update(*instance_scores(p_M, labels_M, instances_N[rows], instances), drawn)
        loss = equilibrium_loss(given.logits, labels_N, self.tracker.scores)
        loss.backward()
        return loss.detach()


class Loops:
    """The step with loops over classes and instances and a memory on the host."""

    def __init__(self, options: Options, device: torch.device, shape: tuple[int, ...]) -> None:
        self.classes, self.device = options.classes, device
        self.features = torch.zeros(options.classes, CAPACITY, *shape)
        self.targets = torch.zeros(options.classes, CAPACITY, 4, device=device)
        self.count, self.pointer = [0] * options.classes, [0] * options.classes
        self.scores = torch.full((options.classes + 1,), 0.01, device=device)
        bits = [[(pattern >> bit & 1) * 2.0 - 1 for bit in (3, 2, 1, 0)] for pattern in range(16)]
        self.signs = torch.tensor(bits, device=device)

    def step(self, given: Step, features_B: Tensor) -> Tensor:
        """The loss; `given.logits.grad` is set."""
        boxes, labels = self.generate(given)
        self.enqueue(features_B[: len(boxes)], labels, boxes)
        labels_K, _ = self.draw()
        labels_N = torch.cat([given.row_labels, torch.tensor(labels_K, dtype=torch.long, device=self.device)])
        logits_NL = given.logits[: len(labels_N)]
        self.track(logits_NL.detach().softmax(1), given, labels_K)
        shifted = logits_NL - logits_NL.max(1, keepdim=True).values
        weighted = self.scores * shifted.exp()
        p_N = weighted.gather(1, labels_N[:, None])[:, 0] / weighted.sum(1)
        loss = -p_N.log().sum() / len(labels_N)
        loss.backward()
        return loss.detach()

    def generate(self, given: Step) -> tuple[Tensor, list[int]]:
        """Sixteen boxes of each instance, one after the other, with one eta matrix for each image."""
        boxes: list[Tensor] = []
        labels: list[int] = []
        for boxes_N4, labels_N in zip(given.boxes, given.labels, strict=True):
            eta = torch.rand(16, 4).to(self.device)
            for box, label in zip(boxes_N4, labels_N.tolist(), strict=True):
                w, h = box[2] - box[0], box[3] - box[1]
                moved = box + self.signs * eta * torch.stack([w, h, w, h]) / 6
                moved[:, 0::2] = moved[:, 0::2].clamp(0, IMAGE_SIZE[1] - 1)
                moved[:, 1::2] = moved[:, 1::2].clamp(0, IMAGE_SIZE[0] - 1)
                boxes.append(moved)
                labels += [label] * 16
        return torch.cat(boxes), labels

    def enqueue(self, features_B: Tensor, labels: list[int], boxes_B4: Tensor) -> None:
        """The first 80 rows of each class of the batch, written at the class's pointer."""
        labels_B, host_B = torch.tensor(labels), features_B.cpu()
        for label in labels_B.unique().tolist():
            rows = (labels_B == label).nonzero()[:CAPACITY, 0]
            for features, source in ((self.features, host_B), (self.targets, boxes_B4)):
                chosen = source[rows.to(source.device)]
                first = min(len(rows), CAPACITY - self.pointer[label])
                features[label, self.pointer[label] : self.pointer[label] + first] = chosen[:first]
                features[label, : len(rows) - first] = chosen[first:]
            self.pointer[label] = (self.pointer[label] + len(rows)) % CAPACITY
            self.count[label] = min(self.count[label] + len(rows), CAPACITY)

    def draw(self, classes_drawn: int = 8, features_drawn: int = 4) -> tuple[list[int], tuple[Tensor, ...]]:
        """Labels of the drawn rows, then features and targets; a class with nothing stored is drawn and left out."""
        weight = 1 / (self.scores[: self.classes] + 1e-7)
        cumulative = (weight / weight.sum()).cumsum(0)
        labels, features, targets = [], [], []
        label = 0
        for u in sorted(torch.rand(classes_drawn).tolist()):  # one walk for all of them
            while label < self.classes - 1 and u > cumulative[label]:
                label += 1
            if self.count[label]:
                slots = torch.randint(self.count[label], (features_drawn,))
                features.append(self.features[label, slots].to(self.device))
                targets.append(self.targets[label, slots.to(self.device)])
                labels += [label] * features_drawn
        drawn = (torch.cat(features), torch.cat(targets)) if labels else ()
        return labels, drawn

    def track(self, p_NL: Tensor, given: Step, labels_K: list[int]) -> None:
        """The mean over the RoIs of each instance and of each drawn class, then one update for each class."""
        entries: dict[int, list[Tensor]] = {}
        for instance, label in enumerate(torch.cat(given.labels).tolist()):
            rows = (given.row_instances == instance).nonzero()[:, 0]
            if len(rows):
                entries.setdefault(label, []).append(p_NL[rows, label].mean())
        drawn_K = torch.tensor(labels_K, device=self.device)
        for label in sorted(set(labels_K)):
            rows = (drawn_K == label).nonzero()[:, 0] + len(given.row_labels)
            entries.setdefault(label, []).append(p_NL[rows, label].mean())
        scores = self.scores.clone()
        for label, values in entries.items():
            kept = 0.9 ** len(values)
            scores[label] = kept * scores[label] + (1 - kept) * torch.stack(values).mean()
        self.scores = scores


def plain_step(given: Step, _: Tensor) -> Tensor:
    """Eq. 1 for the RoIs alone, which any detector computes."""
    loss = F.cross_entropy(given.logits[: len(given.row_labels)], given.row_labels)
    loss.backward()
    return loss.detach()


def seconds_per_step(step: Callable[[Step, Tensor], Tensor], given: list[Step], features: Tensor) -> float:
    """Wall-clock time of one step, the device's queue included."""

    def finish() -> None:
        if features.is_cuda:
            torch.cuda.synchronize()

    finish()
    start = time.perf_counter()
    for each in given:
        each.logits.grad = None
        step(each, features)
    finish()
    return (time.perf_counter() - start) / len(given)


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    device = setup(options.device)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    given = [make_step(options, seed, device) for seed in range(options.steps)]
    for each in given:
        each.logits.requires_grad_()
    rows = IMAGES * options.instances * 16
    vectors, maps = torch.randn(rows, options.features, device=device), torch.randn(rows, *ROI_SHAPE, device=device)
    sides: dict[str, tuple[Callable[[Step, Tensor], Tensor], Tensor]] = {
        "plain cross-entropy": (plain_step, vectors),
        "loce": (Loce(options, device).step, vectors),
        "loops, same features": (Loops(options, device, (options.features,)).step, vectors),
        "loops, official layout": (Loops(options, device, ROI_SHAPE).step, maps),
    }
    for step, features in sides.values():
        seconds_per_step(step, given, features)  # warm-up; the memories are filled as far as they will be
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, (step, features) in sides.items():
            times[name].append(seconds_per_step(step, given, features))
    report(options, device, times)


def report(options: Options, device: torch.device, times: dict[str, list[float]]) -> None:
    """Print a table and write the JSON file."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    plain, own = medians["plain cross-entropy"], medians["loce"]
    ratios = {
        name: {"whole": medians[name] / own, "over plain": (medians[name] - plain) / (own - plain)} for name in times
    }
    print(f"{'per step, ' + str(device):<26}{'median ms':>10}{'min':>10}{'max':>10}{'/ loce':>10}{'over plain':>12}")
    for name, values in times.items():
        low, middle, high = (1e3 * x for x in (min(values), medians[name], max(values)))
        columns = f"{middle:10.2f}{low:10.2f}{high:10.2f}"
        print(f"{name:<26}{columns}{ratios[name]['whole']:10.1f}{ratios[name]['over plain']:12.1f}")
    result = {
        "benchmark": "loce_step",
        "environment": dict(line.split(": ", 1) for line in environment(device).splitlines()),
        "options": dataclasses.asdict(options),
        "seconds_per_step": times,
        "times_loce": ratios,
    }
    write_text(options.output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
