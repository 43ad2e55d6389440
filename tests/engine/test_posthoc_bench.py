"""Post-hoc bench: what is found from stored regions is what inference finds; the store's columns; the whole command."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from loce.checkpoint.load import Checkpoint
from loce.config import EvalConfig, TemperatureOptions, UserError
from loce.data.build import val_annotations, val_dataset
from loce.engine.class_facts import calibrate
from loce.engine.posthoc_bench import GRIDS, bench, choose_grids
from loce.engine.region_store import keep, read_regions, store_regions
from loce.evaluation.annotations import FederatedFilter
from loce.posthoc import ClassFacts, calibration


@pytest.fixture
def copied(stage1: Path, tmp_path: Path) -> Path:
    """The run folder of `stage1`, a copy."""
    shutil.copytree(stage1 / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


@pytest.mark.parametrize("words", [(), *(grid.settings[2] for grid in GRIDS.values())], ids=["plain", *GRIDS])
def test_stored_regions_give_what_inference_finds(copied: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    """Bit for bit, where logits are numbers that fp16 has."""
    checkpoint = Checkpoint.open(copied)
    config = checkpoint.config_with(["eval.score_threshold=0.01", *words])
    model = checkpoint.detector(config).eval()
    exact = model.roi_heads.classifier.forward
    model.roi_heads.classifier.forward = lambda x: exact(x).half().float()
    val = val_annotations(config)
    place = (config.data.val_images, [0, 1, 2], tmp_path / "regions", "test", (1000, 1000))
    files = store_regions(model, config, val, *place)
    calibrate(model, config, copied)
    samples = [val_dataset(config, val)[index] for index in range(3)]
    wanted = [model.detect(*([s[key]] for key in ("image", "scale", "size")))[0] for s in samples]
    regions = read_regions(files[0], len(model.stats))
    found = regions.detections(regions.scores(model.roi_heads.scores), config.eval, val.stats.category_ids)
    boxes = torch.cat([one["boxes"] for one in wanted]).numpy()
    assert len(boxes)
    assert np.array_equal(found.scores, torch.cat([one["scores"] for one in wanted]).numpy())
    assert np.array_equal(found.category_ids, val.stats.category_ids[torch.cat([one["labels"] for one in wanted])])
    assert np.array_equal(found.boxes[:, :2], boxes[:, :2])
    assert np.array_equal(found.boxes[:, 2:], boxes[:, 2:] - boxes[:, :2])
    assert found.image_ids.tolist() == [
        s["image_id"] for s, one in zip(samples, wanted, strict=True) for _ in one["rles"]
    ]


def test_stored_regions_without_a_cap(copied: Path, tmp_path: Path) -> None:
    """For AP-fixed and AP-pool: all of the classes that count, and the place of each among all detections."""
    config = Checkpoint.open(copied).config_with(["eval.protocol=[lvis,fixed,pool]", "eval.detections=20"])
    model = Checkpoint.open(copied).detector(config).eval()
    exact = model.roi_heads.classifier.forward
    model.roi_heads.classifier.forward = lambda x: exact(x).half().float()
    val = val_annotations(config)
    allowed = FederatedFilter(val).allowed
    place = (config.data.val_images, [0, 1, 2], tmp_path / "regions", "test", (1000, 1000))
    file = store_regions(model, config, val, *place)[0]
    ids = val.stats.category_ids
    regions = read_regions(file, len(ids))
    found = regions.detections(regions.scores(model.roi_heads.scores), config.eval, ids, allowed)
    wanted = []
    for sample in (val_dataset(config, val)[index] for index in range(3)):
        columns = ([sample[key]] for key in ("image", "scale", "size"))
        wanted += model.detect(*columns, [torch.from_numpy(allowed(sample["image_id"]))])
    assert np.array_equal(found.ranks, torch.cat([one["ranks"] for one in wanted]))
    assert np.array_equal(found.scores, torch.cat([one["scores"] for one in wanted]))
    assert len(found) > 60 and (found.ranks == 20).any()


def saved(folder: Path, **columns: np.ndarray) -> Path:
    np.savez(folder / "regions_000000.npz", **columns)
    return folder / "regions_000000.npz"


def test_classes_that_are_left_out_keep_their_share(tmp_path: Path) -> None:
    """Plain scores of the kept classes are those of all logits; the best regions and classes are kept, in order."""
    generator = torch.Generator().manual_seed(0)
    logits, boxes = (3 * torch.randn(size, generator=generator) for size in ((9, 8), (9, 7, 4)))
    columns = {name: value.numpy() for name, value in keep(boxes, logits.half().float(), (5, 3)).items()}
    file = saved(tmp_path, image_ids=np.array([4]), regions=np.array([5]), **columns)
    regions = read_regions(file, 7)
    odds = logits[:, :7].logsumexp(dim=1) - logits[:, 7]
    rows = sorted(odds.argsort(descending=True)[:5].tolist())
    plain = logits.half().float().softmax(dim=1)[rows]
    kept = regions.whole_logits.softmax(dim=1).gather(1, regions.classes)
    torch.testing.assert_close(kept, plain.gather(1, regions.classes), rtol=1e-4, atol=1e-6)
    for row, classes in zip(rows, regions.classes.tolist(), strict=True):
        assert classes == sorted(logits[row, :7].argsort(descending=True)[:3].tolist())
        assert torch.equal(regions.boxes[rows.index(row)], boxes[row][classes])


@pytest.mark.parametrize("name", ["fracal", "temperature"])
def test_stored_sigmoids_are_calibrated_as_in_inference(tmp_path: Path, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, boxes = 3 * torch.randn((9, 7), generator=generator), torch.rand((9, 7, 4), generator=generator)
    columns = {name: value.numpy() for name, value in keep(boxes, logits, (9, 7), sigmoid=True).items()}
    regions = read_regions(saved(tmp_path, image_ids=np.array([4]), regions=np.array([9]), **columns), 7)
    counts = np.arange(1, 8)
    facts = ClassFacts(image_counts=counts, instance_counts=counts, images=20, dimension=np.linspace(1, 2, 7))
    change = calibration(EvalConfig(posthoc=name, temperature=TemperatureOptions(t=2.0)), facts, sigmoid=True)
    assert torch.equal(regions.scores(change), change(logits.half().float()))
    assert not torch.equal(regions.scores(change), regions.scores(torch.sigmoid))


def test_columns_of_any_detector(tmp_path: Path) -> None:
    """One box a region, a logit of every class: the least that a file may hold."""
    logits = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]], np.float32)
    boxes = np.array([[0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]], np.float32)
    file = saved(tmp_path, image_ids=np.array([7, 8]), regions=np.array([2, 1]), boxes=boxes, logits=logits)
    regions = read_regions(file, 2)
    found = regions.detections(regions.scores(torch.sigmoid), EvalConfig(score_threshold=0.6), np.array([11, 12]))
    assert found.image_ids.tolist() == [7, 7, 8, 8] and found.category_ids.tolist() == [12, 11, 11, 12]
    assert found.boxes is not None and found.boxes[0].tolist() == [20, 0, 9, 9]
    softmax = saved(
        tmp_path, image_ids=np.array([7]), regions=np.array([3]), boxes=boxes, logits=logits, background=np.zeros(3)
    )
    assert read_regions(softmax, 2).whole_logits.shape == (3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regions": np.array([2])}, "regions add up to 2, boxes have 3 rows"),
        ({"boxes": np.zeros((3, 3))}, "boxes are"),
        ({"classes": np.full((3, 2), 5)}, "classes go up to 5 of 2"),
        ({"logits": np.zeros((3, 4))}, "without classes there is a logit of each of the 2"),
        ({"logits": np.full((3, 2), np.nan)}, "not finite"),
    ],
)
def test_columns_that_do_not_fit(tmp_path: Path, change: dict, message: str) -> None:
    columns = {
        "image_ids": np.array([7]),
        "regions": np.array([3]),
        "boxes": np.zeros((3, 4)),
        "logits": np.zeros((3, 2)),
    }
    with pytest.raises(UserError, match=message):
        read_regions(saved(tmp_path, **{**columns, **change}), 2)
    (tmp_path / "regions_000000.npz").write_bytes(b"PK half a file")
    with pytest.raises(UserError, match="is no file of regions"):
        read_regions(tmp_path / "regions_000000.npz", 2)


def test_grids_are_changed_by_words() -> None:
    words = ["eval.norcal.gamma=[0.5, 0.7]", "eval.logn.images=4", "eval.nms=0.4"]
    grids, others = choose_grids(["norcal", "norcal_instances", "logn"], words)
    assert others == ["eval.nms=0.4"] and grids["norcal"].values == (0.5, 0.7)
    assert grids["norcal_instances"].settings[1] == (
        *("eval.posthoc=norcal", "eval.norcal.counts=instances"),
        "eval.norcal.gamma=0.7",
    )
    assert "eval.logn.images=4" in grids["logn"].settings[0]
    with pytest.raises(UserError, match="methods: norcall not known"):
        choose_grids(["norcall"], [])


def test_the_bench(copied: Path) -> None:
    """The table, the sweep, and a store that is used again; methods that a head cannot have are left out, with why."""
    words = ["eval.fracal.exponent=[0, 2]", "eval.logn.strength=[1]", "eval.logn.images=4", "eval.score_threshold=0.01"]
    said = bench(copied, ["fracal", "logn"], words, tune=1, resamples=20)
    rows = [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("|")]
    assert rows == ["method", "---", "plain", "fracal", "logn"]
    columns = [name.strip() for name in said.splitlines()[3].split("|")[1:-1]]
    assert columns[:5] == ["method", "AP", "APr", "APc", "APf"] and columns[-1] == "setting"
    assert columns[5:9] == ["AP fixed", "APr fixed", "AP pool", "APr pool"]
    assert columns[9:-1] == ["ECE", "ECEr", "ECEc", "ECEf"]
    assert "which the detector was trained on" in said
    assert said.splitlines()[-1].startswith(f"python scripts/evaluate.py checkpoint={copied} eval.score_threshold=0.01")
    assert (copied / "posthoc" / "bench" / "table.md").read_text() == said + "\n"
    with (copied / "posthoc" / "bench" / "sweep.csv").open() as file:
        sweep = list(csv.DictReader(file))
    assert [row["setting"] for row in sweep][:2] == ["", "eval.posthoc=fracal eval.fracal.exponent=0"]
    files = {file: file.stat().st_mtime_ns for file in copied.glob("posthoc/regions_*/*")}
    assert len(files) == 2
    bench(copied, ["norcal"], words[3:], tune=1, resamples=20)
    assert {file: file.stat().st_mtime_ns for file in copied.glob("posthoc/regions_*/*")} == files
    with pytest.raises(UserError, match="leave it out"):
        bench(copied, [], ["eval.posthoc=norcal"])
    with pytest.raises(UserError, match="reads scores in its own way"):
        bench(copied, ["norcal"], ["head.name=norcal"])
