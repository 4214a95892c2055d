"""Bootstrap intervals (Efron 1979, the percentile form), seeded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
TAILS = (0.025, 0.975)
"""A 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(rows: int, statistic: Callable[[np.ndarray], float], *, seed: int = 0) -> Estimate:
    """A statistic of all rows, with the interval that it has on rows drawn with replacement.

    It shows how much the figure depends on which rows were drawn, if rows are independent. Equal seeds draw equal rows.

    Args:
        rows: how many there are.
        statistic: of the rows of these indices, (rows,) int64.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(rows, size=rows)) for _ in range(RESAMPLES)]
    low, high = np.quantile(values, TAILS, method="inverted_cdf")  # one of the values: infinite ones do not mix
    return Estimate(value=float(statistic(np.arange(rows))), low=float(low), high=float(high))


def bootstrap_mean(values: np.ndarray, *, seed: int = 0) -> Estimate:
    """The mean of (rows,) values, with its interval."""
    return bootstrap(len(values), lambda rows: float(values[rows].mean()), seed=seed)
