"""A finished table: its rows as they are stored, with its settings and environment."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ptq4dit_ao.evaluation.table.paper import METRICS, PaperFigures
from ptq4dit_ao.evaluation.table.settings import TableSettings
from ptq4dit_ao.lowering.backend import BACKENDS


@dataclass(frozen=True, kw_only=True)
class Row:
    """Result of one method at one width and one step count."""

    steps: int
    bits: str | None
    """Bit widths, such as ``w4a8``; None for the float model."""
    method: str
    model: str
    """Name of the quantized model, which rows may share."""
    figures: dict[str, Any]
    """Metrics of the row: an :class:`~ptq4dit_ao.evaluation.result.EvaluationRow` as JSON."""
    paper: tuple[float | None, ...] | None
    """Values of the paper for the same row, in the order of ``METRICS``."""
    seconds: dict[str, float]
    """Wall time of ``measure`` and, for a quantized model, of ``quantize``, which its rows share."""
    notes: tuple[str, ...]
    environment: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TableResult:
    """All rows of a table that could be computed."""

    settings: TableSettings
    model: str
    network: str | None
    """Name of the feature network for distances."""
    is_inception: bool
    """Whether the network is Inception, so that distances are called FID and sFID."""
    reference: str | None
    """Name of the reference set."""
    rows: tuple[Row, ...]
    failed: dict[str, str]
    """Name of a cell that failed -> reason."""
    paper: PaperFigures | None
    """Values of the paper; None if the table does not have the paper's setting."""
    environment: dict[str, object]

    @property
    def execution(self) -> str:
        """Execution of the quantized models, the same for the whole table."""
        backend = self.settings.backend
        if BACKENDS[backend].integer:
            return f"integer execution ({backend})"
        return "simulated (Q/DQ): integers computed in float"

    @property
    def seconds(self) -> float:
        """Wall time of all rows in seconds, with each quantization counted once."""
        quantized = {row.model: row.seconds.get("quantize", 0.0) for row in self.rows}
        return sum(quantized.values()) + sum(row.seconds["measure"] for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON."""
        data = {**dataclasses.asdict(self), "paper": None, "execution": self.execution}
        data |= {"command": self.settings.command, "seconds": self.seconds}
        data["settings"]["reference"] = self.settings.reference and str(self.settings.reference)
        if self.paper is not None:
            data["paper"] = {"solver": self.paper.solver, "columns": METRICS}
        return data
