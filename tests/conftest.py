"""Fixtures for all tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loce.checkpoint.load import FORMAT, stats_to_dict
from loce.config import load_config, to_dict
from loce.data.glyphs.make import GlyphOptions, make_glyphs
from loce.models.build import build_model
from loce.utils.classes import ClassStats, frequency_groups
from tests.deviations import TABLES, Row
from tests.tiny_runs import CONFIG, run

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that a test must give the same results on."""
    return torch.device(request.param)


def stats_of(classes: int) -> ClassStats:
    """Class facts of a long tail of so many classes: the first is in 200 images, the last in 1."""
    images = np.geomspace(200, 1, classes).round().astype(np.int64)
    return ClassStats(
        names=tuple(f"class {label}" for label in range(classes)),
        category_ids=np.arange(classes, dtype=np.int64) * 2 + 1,
        image_counts=images,
        instance_counts=images * 3,
        groups=frequency_groups(images),
        image_total=300,
    )


def random_run(path: Path, gain: float = 1.0) -> None:
    """A run folder `run` of a tiny model of random weights beside its recipe `tiny.yaml`; gain: of the class logits."""
    (path / "tiny.yaml").write_text(CONFIG.format(path))
    config = load_config([str(path / "tiny.yaml"), f"output={path / 'run'}"])
    torch.manual_seed(0)
    model = build_model(config, stats_of(6))
    model.roi_heads.classifier.fc_cls.weight.data *= gain
    classes = stats_to_dict(stats_of(6))
    content = {"format": FORMAT, "config": to_dict(config), "classes": classes, "model": model.state_dict()}
    (path / "run").mkdir()
    torch.save(content, path / "run/main.pt")


@pytest.fixture
def make_stats() -> Callable[[int], ClassStats]:
    """`stats_of`."""
    return stats_of


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Glyph-LVIS: 6 classes, 12 training images."""
    folder = tmp_path_factory.mktemp("glyphs")
    sizes = {"classes": 6, "train_images": 12, "val_images": 6, "size": 64, "smallest": 0.26, "largest": 0.4}
    make_glyphs(GlyphOptions(out=str(folder), workers=1, **sizes))
    return folder


@pytest.fixture(scope="session")
def config(glyphs: Path) -> Path:
    """A recipe for a tiny model on `glyphs`: 2 epochs of 3 iterations."""
    path = glyphs / "tiny.yaml"
    path.write_text(CONFIG.format(glyphs))
    return path


@pytest.fixture(scope="session")
def stage1(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of `config`, trained and evaluated; its neighbours are free for other runs."""
    folder = tmp_path_factory.mktemp("runs") / "stage1"
    run("train.py", config, f"output={folder}")
    return folder


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of `-n` gives its deviations to the one that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deviations"] = {name: table.plain() for name, table in TABLES.items()}


def pytest_configure(config: pytest.Config) -> None:
    """Deviations of the processes of `-n` are printed together."""
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(Processes())


class Processes:
    """What pytest-xdist calls when a test process ends."""

    def pytest_testnodedown(self, node: Any) -> None:
        for name, rows in getattr(node, "workeroutput", {}).get("deviations", {}).items():
            for stage, row in rows.items():
                TABLES[name].keep(stage, Row(**row))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tables of deviations after the tests' own summary."""
    for name, table in TABLES.items():
        if table.rows:
            terminalreporter.section(f"largest deviations from numbers of the {name}")
            terminalreporter.write_line(table.table())
