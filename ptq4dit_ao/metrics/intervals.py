"""Bootstrap intervals (Efron 1979, the percentile method), seeded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
"""Number of bootstrap resamples."""
TAILS = (0.025, 0.975)
"""Quantiles that bound a 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(rows: int, statistic: Callable[[np.ndarray], float], *, seed: int = 0) -> Estimate:
    """Statistic of all rows, with its percentile interval over resamples with replacement.

    The interval shows how much the value depends on the choice of rows, if rows are independent. Equal seeds give equal
    resamples.

    Args:
        rows: number of rows.
        statistic: a function of row indices, (rows,) int64.
        seed: seed of the resamples.
    """
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(rows, size=rows)) for _ in range(RESAMPLES)]
    low, high = np.quantile(values, TAILS, method="inverted_cdf")  # infinite values cannot be interpolated
    return Estimate(value=float(statistic(np.arange(rows))), low=float(low), high=float(high))


def bootstrap_mean(values: np.ndarray, *, seed: int = 0) -> Estimate:
    """Mean of (rows,) values, with its interval."""
    return bootstrap(len(values), lambda rows: float(values[rows].mean()), seed=seed)
