"""Latency of several models, interleaved: each round runs every model once, so that disturbances affect all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ptq4dit_ao._progress import OnProgress, ignore


@dataclass(frozen=True, kw_only=True)
class LatencyResult:
    """Latency per call, in milliseconds."""

    median_ms: float
    low_ms: float
    """10th percentile of the latency."""
    high_ms: float
    """90th percentile of the latency."""
    rounds: int


@torch.no_grad()
def measure_latency(
    models: Mapping[str, Callable[..., object]],
    inputs: Sequence[Tensor],
    *,
    rounds: int = 10,
    warmup: int = 2,
    on_progress: OnProgress = ignore,
) -> dict[str, LatencyResult]:
    """Measure the latency of every model on the same inputs, in ``warmup`` untimed and ``rounds`` timed rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for i in range(warmup + rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model(*inputs)
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
        on_progress(i + 1, rounds + warmup)
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(seconds: list[float]) -> LatencyResult:
    low, median, high = np.percentile(np.array(seconds) * 1e3, [10, 50, 90])
    return LatencyResult(median_ms=float(median), low_ms=float(low), high_ms=float(high), rounds=len(seconds))
