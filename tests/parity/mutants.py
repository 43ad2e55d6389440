"""Does anything notice? One deliberate mistake at a time in a scratch copy, and the test that catches it.

python tests/parity/mutants.py [WORD ...]     all mistakes, or those with a WORD in their name; prints a Markdown table

Two columns: the first unit test that fails, and the first comparison with the official numbers that fails. Some
conventions cannot be seen in whole-model numbers, and a few only there: "-" means that all tests of that kind pass.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITES = {
    "unit test": [
        "tests/models",
        "tests/heads",
        *(f"tests/test_{name}.py" for name in ("mean_score", "equilibrium_loss", "memory_bank", "box_generator")),
    ],
    "official numbers": ["tests/parity"],
}


@dataclass(frozen=True)
class Mutant:
    """Replace `old`, which must stand in the file exactly once, by `new`."""

    name: str
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant("RoIAlign not aligned", "models/roi_heads.py", "stride, samples, aligned)", "stride, samples, False)"),
    Mutant("RoIAlign with 2 samples a bin", "models/roi_heads.py", "stride, samples, aligned)", "stride, 2, aligned)"),
    Mutant("level by rounding", "models/roi_heads.py", ".log2().floor()", ".log2().round()"),
    Mutant("anchors rounded to pixels", "models/rpn.py", "centres + cell_R4", "centres + cell_R4.round()"),
    Mutant("anchors at cell centres", "models/rpn.py", "centres + cell_R4", "centres + stride / 2 + cell_R4"),
    Mutant(
        "proposals without area removed",
        "models/rpn.py",
        "        return torch.cat(boxes)[order]",
        "        found = torch.cat(boxes)[order]\n"
        "        return found[(found[:, 2:] - found[:, :2]).amin(dim=1) > 1e-3]",
    ),
    Mutant(
        "anchors of the batch's padding count",
        "models/rpn.py",
        "matched_A.masked_fill(~_validity(shapes, padded_sizes[i], anchors_A4.device), BETWEEN)",
        "matched_A",
    ),
    Mutant(
        "RPN box loss divided by its positives",
        "models/rpn.py",
        "torch.stack(box).sum() / total}",
        "torch.stack(box).sum() / sum((self.match(anchors_A4, t) >= 0).sum() for t in truths)}",
    ),
    Mutant(
        "RPN box loss smooth",
        "models/rpn.py",
        "torch.where(valid_P[:, None], deltas_P4.float() - targets_P4, 0).abs().sum()",
        "F.smooth_l1_loss(deltas_P4[valid_P].float(), targets_P4[valid_P], reduction='sum', beta=1 / 9)",
    ),
    Mutant(
        "an image without positives counts none",
        "models/rpn.py",
        "positive_valid.sum().clamp(min=1) + negative_valid",
        "positive_valid.sum() + negative_valid",
    ),
    Mutant(
        "proposals: 1000 a level",
        "models/rpn.py",
        "sort(descending=True, stable=True).indices[: self.config.post_nms]",
        "sort(descending=True, stable=True).indices",
    ),
    Mutant(
        "IoU with one pixel more", "models/boxes.py", "(high_NM2 - low_NM2).clamp", "(high_NM2 - low_NM2 + 1).clamp"
    ),
    Mutant(
        "shrinking not clamped", "models/boxes.py", ".clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)", ".clamp(max=MAX_LOG_RATIO)"
    ),
    Mutant("boxes clipped to the last pixel", "models/boxes.py", "clamp(0, width), ", "clamp(0, width - 1), "),
    Mutant(
        "an earlier ground truth keeps its box",
        "models/boxes.py",
        "torch.where(last_N >= 0, last_N, matched_N)",
        "torch.where((last_N >= 0) & (matched_N < 0), last_N, matched_N)",
    ),
    Mutant("low-quality matches at any IoU", "models/boxes.py", "(best_G >= low_quality)", "(best_G >= 0)"),
    Mutant("no low-quality matches", "models/boxes.py", "(best_G >= low_quality)", "(best_G >= 2)"),
    Mutant(
        "ground truth behind the proposals",
        "models/roi_heads.py",
        "torch.cat([target.boxes, proposals_N4]), torch.cat([own_G, matched_N])",
        "torch.cat([proposals_N4, target.boxes]), torch.cat([matched_N, own_G])",
    ),
    Mutant(
        "box loss divided by positives",
        "models/roi_heads.py",
        "errors_M4.abs().sum() / rois.count",
        "errors_M4.abs().sum() / (rois.labels_N < self.num_classes).sum().clamp(min=1)",
    ),
    Mutant(
        "box loss counts unused slots",
        "models/roi_heads.py",
        "errors_M4.abs().sum() / rois.count",
        "errors_M4.abs().sum() / max(len(rois.labels_N), 1)",
    ),
    Mutant(
        "loss with the mean score of before",
        "models/roi_heads.py",
        "        self._update_mean_score(logits_NL, rois, instances, self._most(sampled, rois))\n"
        "        rois.indicator = self.indicator.clone()\n",
        "        rois.indicator = self.indicator.clone()\n"
        "        self._update_mean_score(logits_NL, rois, instances, self._most(sampled, rois))\n",
    ),
    Mutant("one decay per class", "mean_score.py", "self.momentum**count_L", "self.momentum ** count_L.clamp(max=1)"),
    Mutant(
        "memory rows not in the mean score",
        "mean_score.py",
        "memory_2L = torch.zeros_like(self.scores).expand(2, -1) if memory is None else self._sums(*memory)",
        "memory_2L = torch.zeros_like(self.scores).expand(2, -1)",
    ),
    Mutant("margins upside down", "equilibrium_loss.py", "logits + _log_score(", "logits - _log_score("),
    Mutant(
        "strong classes drawn",
        "memory_bank.py",
        "(mean_score[: len(counts)] + 1e-7).reciprocal()",
        "mean_score[: len(counts)]",
    ),
    Mutant(
        "drawn before stored",
        "models/roi_heads.py",
        '            if self.memory.config.source == "boxes":\n',
        "            images = [ImageSeed(t.seed, t.batch_index) for t in targets if t.sampled_class != META]\n"
        "            memory = self._draw(images)\n"
        "            self._draw = lambda _: memory\n"
        '            if self.memory.config.source == "boxes":\n',
    ),
    Mutant("jitter of a fifth", "box_generator.py", "[:, None] / 6", "[:, None] / 5"),
    Mutant(
        "soft mask targets",
        "models/mask_head.py",
        "return share_PSS >= 0.5",
        "return share_PSS",
    ),
    Mutant(
        "mask targets: half is outside",
        "models/mask_head.py",
        "return share_PSS >= 0.5",
        "return share_PSS > 0.5",
    ),
    Mutant(
        "mask weights not normalised",
        "models/mask_head.py",
        "weight_PD = F.normalize(weight_PD, dim=1)",
        "weight_PD = weight_PD",
    ),
    Mutant("mask temperature 10", "config.py", "mask_temperature: Positive = 20.0", "mask_temperature: Positive = 10"),
    Mutant("paste: corners aligned", "models/paste.py", "* side - 0.5", "* (side - 1)"),
    Mutant("paste: box rounded", "models/paste.py", "boxes_Q4[:, 2 + axis]", "boxes_Q4[:, 2 + axis].round()"),
    Mutant("score threshold reached", "models/detection.py", "scores_NC > config", "scores_NC >= config"),
    Mutant(
        "NMS at the threshold",
        "models/detection.py",
        "scores_K.double(), threshold)",
        "scores_K.double(), threshold - 1e-9)",
    ),
    Mutant(
        "NMS over all classes",
        "models/detection.py",
        "labels_K[:, None].double() *",
        "0 * labels_K[:, None].double() *",
    ),
    Mutant("background first", "heads/softmax.py", ".softmax(dim=1)[:, : self.num_classes]", ".softmax(dim=1)[:, 1:]"),
    Mutant(
        "batch norm learns statistics",
        "models/mask_rcnn.py",
        '== "frozen":\n            for',
        '== "never":\n            for',
    ),
)


def first_failure(folder: Path, tests: list[str]) -> str:
    """Name of the first test that fails in a copy of the project, "-" where all pass."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    words = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *tests]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    if run.returncode == 0:
        return "-"
    found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - |$)", run.stdout, re.MULTILINE)
    if not found:
        raise RuntimeError(f"pytest ended with {run.returncode}:\n{run.stdout[-3000:]}{run.stderr[-3000:]}")
    return found[1]


def copy_project(folder: Path) -> None:
    for name in ("loce", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "scripts"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)


def apply(mutant: Mutant, folder: Path) -> str:
    """Write the mistake into the copy; returns what the file held."""
    path = folder / "loce" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} stands {text.count(mutant.old)} times in {mutant.file}")
    path.write_text(text.replace(mutant.old, mutant.new))
    return text


def main() -> None:
    chosen = [m for m in MUTANTS if not sys.argv[1:] or any(word in m.name for word in sys.argv[1:])]
    print(f"| mistake | file | {' | '.join(SUITES)} |\n|---|---|{'---|' * len(SUITES)}")
    missed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        for mutant in chosen:
            text = apply(mutant, folder)
            caught = [first_failure(folder, tests) for tests in SUITES.values()]
            (folder / "loce" / mutant.file).write_text(text)
            print(f"| {mutant.name} | {mutant.file} | {' | '.join(caught)} |", flush=True)
            missed += [mutant.name] if set(caught) == {"-"} else []
        clean = [first_failure(folder, tests) for tests in SUITES.values()]
    print(f"\n{len(chosen) - len(missed)} of {len(chosen)} caught; missed: {', '.join(missed) or 'none'}")
    print(f"without a mistake all tests pass: {set(clean) == {'-'}}")
    sys.exit(bool(missed) or set(clean) != {"-"})


if __name__ == "__main__":
    main()
