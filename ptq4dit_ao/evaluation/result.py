"""Results of an evaluation."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ptq4dit_ao.metrics import Distances, Estimate, ImageErrors, PairedError


@dataclass(frozen=True, kw_only=True)
class SqnrEstimates:
    """Estimates of a :class:`~ptq4dit_ao.metrics.PairedError`, in dB."""

    pooled: Estimate
    """SQNR of all rows by their summed energies."""
    median: Estimate
    """Median of the SQNR over timesteps."""
    per_timestep: tuple[tuple[float, Estimate], ...]
    """SQNR at each timestep, as (timestep, estimate)."""
    rows: int
    """Number of rows."""

    @classmethod
    def of(cls, error: PairedError, seed: int) -> SqnrEstimates:
        """Estimates of a paired error, with bootstrap intervals seeded by ``seed``."""
        return cls(
            pooled=error.sqnr_estimate(seed=seed),
            median=error.median_estimate(seed=seed),
            per_timestep=tuple(error.timestep_estimates(seed=seed).items()),
            rows=error.rows,
        )

    @property
    def worst(self) -> tuple[float, Estimate]:
        """The timestep with the lowest SQNR, and that SQNR."""
        return min(self.per_timestep, key=lambda entry: entry[1].value)


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """Results of one model on one backend. An entry is None if there is nothing to compare with."""

    model: str
    execution: str
    """Execution of the quantized layers: ``float``, ``simulated`` or ``integer``."""
    backend: str | None = None
    proof: str | None = None
    """Kernel proof of the lowered model as text."""
    eps: SqnrEstimates | None = None
    """SQNR of the predicted noise against the float model."""
    images: ImageErrors | None = None
    """Errors of the images against the float model's images from equal noise."""
    distances: Distances | None = None
    """Distances of the images from the reference set."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Results of one evaluation, with its settings."""

    model: str
    rows: tuple[EvaluationRow, ...]
    network: str | None
    """Name of the feature network for distances."""
    lpips: str | None
    """Name of the network of LPIPS, if that was measured."""
    is_inception: bool
    """Whether the network is Inception, so that distances are called FID and sFID."""
    reference: str | None
    """Name of the reference set."""
    reference_images: int | None
    """Number of images in the reference set."""
    samples: int
    steps: int
    sampler: str
    guidance: float
    seed: int
    """Seed of the images' noise and of the bootstrap intervals."""
    eps_seed: int
    """Seed of the inputs on which the predicted noise was compared."""
    notes: tuple[str, ...]
    environment: dict[str, object]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON, with None for numbers that are not finite."""
        return {key: finite(value) for key, value in dataclasses.asdict(self).items()}


def finite(value: Any) -> Any:
    """A JSON-safe copy of the value, with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
