"""What an evaluation found."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ptq4dit_ao.metrics import Distances, Estimate, ImageErrors, PairedError


@dataclass(frozen=True, kw_only=True)
class SqnrEstimates:
    """What a :class:`~ptq4dit_ao.metrics.PairedError` says, in dB."""

    pooled: Estimate
    median: Estimate
    """Over timesteps."""
    per_timestep: tuple[tuple[float, Estimate], ...]
    rows: int

    @classmethod
    def of(cls, error: PairedError, seed: int) -> SqnrEstimates:
        return cls(
            pooled=error.sqnr_estimate(seed=seed),
            median=error.median_estimate(seed=seed),
            per_timestep=tuple(error.timestep_estimates(seed=seed).items()),
            rows=error.rows,
        )

    @property
    def worst(self) -> tuple[float, Estimate]:
        """The timestep with the lowest SQNR, and that."""
        return min(self.per_timestep, key=lambda entry: entry[1].value)


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """What is known of one model on one backend; None where there is nothing to compare it with."""

    model: str
    execution: str
    """``float``, ``simulated`` or ``integer``: what the quantized layers compute in."""
    backend: str | None = None
    proof: str | None = None
    """Which integer kernels ran."""
    eps: SqnrEstimates | None = None
    """Of the predicted noise, against the float model."""
    images: ImageErrors | None = None
    """Against what the float model draws from equal noise."""
    distances: Distances | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Figures of one run."""

    model: str
    rows: tuple[EvaluationRow, ...]
    network: str | None
    """What distances are measured in."""
    is_inception: bool
    """Only then are they called FID and sFID."""
    reference: str | None
    reference_images: int | None
    samples: int
    steps: int
    sampler: str
    guidance: float
    seed: int
    """Of noise and intervals."""
    eps_seed: int
    """Of the inputs on which the predicted noise was compared."""
    notes: tuple[str, ...]
    environment: dict[str, object]

    def to_dict(self) -> dict[str, Any]:
        """As JSON; figures that are not finite are None."""
        return {key: finite(value) for key, value in dataclasses.asdict(self).items()}


def finite(value: Any) -> Any:
    """As JSON takes it: what is not finite becomes None, wherever it stands."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
