"""A finished table: its rows as they lie on disk, and what they must be read with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ptq4dit_ao.evaluation.table.paper import METRICS, PaperFigures
from ptq4dit_ao.evaluation.table.settings import TableSettings
from ptq4dit_ao.lowering.backend import BACKENDS


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one width and one step count."""

    steps: int
    bits: str | None
    """None for the float model."""
    method: str
    model: str
    """Name of the quantized model, which rows may share."""
    figures: dict[str, Any]
    """An :class:`~ptq4dit_ao.evaluation.result.EvaluationRow` as JSON."""
    paper: tuple[float | None, ...] | None
    """What the paper reports for it: ``METRICS``."""
    seconds: dict[str, float]
    """``measure``, and of a quantized model ``quantize``, which its rows share."""
    notes: tuple[str, ...]
    environment: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TableResult:
    """All rows that could be had."""

    settings: TableSettings
    model: str
    network: str | None
    """What distances are measured in."""
    is_inception: bool
    """Only then are they called FID and sFID."""
    reference: str | None
    rows: tuple[Row, ...]
    failed: dict[str, str]
    """Name of a cell -> why there is none."""
    paper: PaperFigures | None
    """None if this is not its setting."""
    environment: dict[str, object]

    @property
    def execution(self) -> str:
        """What the quantized models compute in; one for the whole table."""
        backend = self.settings.backend
        if BACKENDS[backend].integer:
            return f"integer execution ({backend})"
        return "simulated (Q/DQ): integers computed in float"

    @property
    def seconds(self) -> float:
        """Of all rows, each quantization counted once."""
        quantized = {row.model: row.seconds.get("quantize", 0.0) for row in self.rows}
        return sum(quantized.values()) + sum(row.seconds["measure"] for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        data = {**dataclasses.asdict(self), "paper": None, "execution": self.execution}
        data |= {"command": self.settings.command, "seconds": self.seconds}
        data["settings"]["reference"] = self.settings.reference and str(self.settings.reference)
        if self.paper is not None:
            data["paper"] = {"solver": self.paper.solver, "columns": METRICS}
        return data
