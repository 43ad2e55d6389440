"""How far our numbers are from those of others: checked against a tolerance, and kept for a table at the end."""

from dataclasses import asdict, dataclass

import numpy as np
import torch


@dataclass
class Row:
    """Largest deviation of one stage so far; `of`: the largest official magnitude."""

    deviation: float
    tolerance: float
    unit: str
    of: float


class Deviations:
    """The table: stage -> Row."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def close(self, stage: str, ours: object, official: object, tolerance: float, relative: bool = False) -> None:
        """Assert that no number deviates by more than `tolerance` (relative: times the official magnitude)."""
        ours, official = (np.asarray(torch.as_tensor(x).detach().cpu(), np.float64) for x in (ours, official))
        assert ours.shape == official.shape, f"{stage}: shape {ours.shape}, official {official.shape}"
        error = np.abs(ours - official) / (np.abs(official) if relative else 1)
        self.within(stage, float(error.max()), tolerance, "relative" if relative else "", float(np.abs(official).max()))

    def equal(self, stage: str, ours: object, official: object) -> None:
        """Assert that all numbers are the same."""
        self.close(stage, ours, official, 0.0)

    def within(self, stage: str, deviation: float, tolerance: float, unit: str = "", of: float = float("nan")) -> None:
        """Assert a deviation that was measured elsewhere."""
        self.keep(stage, Row(deviation, tolerance, unit, of))
        assert deviation <= tolerance, f"{stage}: deviates by {deviation:.3g} {unit}, tolerance {tolerance:.3g}"

    def keep(self, stage: str, found: Row) -> None:
        """Add a row, or the larger numbers of two."""
        row = self.rows.setdefault(stage, found)
        row.deviation, row.of = max(row.deviation, found.deviation), max(row.of, found.of)

    def plain(self) -> dict[str, dict[str, object]]:
        """What a test process sends to the one that prints."""
        return {stage: asdict(row) for stage, row in self.rows.items()}

    def table(self) -> str:
        """Markdown."""
        lines = ["| stage | largest deviation | tolerance | of at most |", "|---|---|---|---|"]
        for stage, row in self.rows.items():
            of = "" if np.isnan(row.of) else f"{row.of:.3g}"
            unit = f" {row.unit}" if row.unit else ""
            allowed = "exact" if row.tolerance == 0 else f"{row.tolerance:.2g}{unit}"
            lines.append(f"| {stage} | {row.deviation:.2g}{unit} | {allowed} | {of} |")
        return "\n".join(lines)


TABLES = {"official LOCE": Deviations(), "authors of newer methods": Deviations()}
