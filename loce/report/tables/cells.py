"""Cells of Markdown tables: percents, speed, schedule in a few words."""

import statistics
from collections.abc import Sequence

from loce.config import Config
from loce.report.tables.rows import UNKNOWN, Records
from loce.report.tables.statistics import Estimate


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["|".join(["", *(f" {cell} " if cell else " " for cell in cells), ""]) for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def percent(values: Sequence[float]) -> str:
    """Mean of a metric in percent, and its standard deviation where there are several values; "-" of no classes."""
    if min(values) < 0:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def estimated(found: Estimate | None) -> str:
    """ "28.1 ± 0.3"; without a deviation where there is one seed, "-" of no classes."""
    if found is None:
        return "-"
    return f"{found.mean:.1f} ± {found.deviation:.1f}" if found.seeds > 1 else f"{found.mean:.1f}"


def with_interval(found: Estimate | None) -> str:
    """ "28.1 [27.2, 29.0]"; "-" of no classes."""
    return f"{found.mean:.1f} [{found.low:.1f}, {found.high:.1f}]" if found else "-"


def published(values: Sequence[float]) -> list[str]:
    """Numbers of a publication; "-" where there is none."""
    return ["-" if value == UNKNOWN else f"{value:.1f}" for value in values]


def in_short(values: Sequence[float]) -> str:
    """Numbers of COLUMNS: "28.1 / 17.0 (0.7, 17.9, 29.4)"."""
    box, mask, *groups = published(values)
    return f"{box} / {mask} ({', '.join(groups)})"


def schedule(config: Config) -> str:
    """Where a run starts, what it trains and for how long."""
    train = config.train
    if not train.init:
        return f"end to end, {train.epochs} epochs"
    parts = {"none": "all", "backbone": "all but backbone", "trunk": "all but trunk", "detector": "classifier only"}
    return f"{train.init} + {train.epochs} epochs, {parts[train.freeze]}"


def speed(records: Records) -> str:
    """Mean training speed and most memory of a row's runs; "-" where no record has them."""
    known = [record for record in records if "images_per_second" in record]
    if not known:
        return "-"
    mean = statistics.mean(record["images_per_second"] for record in known)
    return f"{mean:.0f} images/s, {max(record['peak_memory_gib'] for record in known):.1f} GiB"
