"""The range searches of the papers, which take the candidate range with the least error of the values themselves.

``percentile`` tries percentiles of the values at both ends, with the mean square error (PTQ4DiT, arXiv 2405.16005; the
code of RepQ-ViT, arXiv 2212.08254). ``lp`` shrinks minimum and maximum together by up to 79 %, with the error in the
norm L2.4 (PTQ4DM, arXiv 2211.15736; the code of Q-Diffusion, arXiv 2302.04304; after LAPQ, arXiv 1911.07190).

As in the authors' code, one search serves both weights (per output channel) and activations (per tensor). Their
weights have zero points; the ones here are symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ptq4dit_ao.core.clipping import Qparams
from ptq4dit_ao.core.qparams import fake_quantize

PERCENTILES = (0.999, 0.9999, 0.99999)
SHRINK = tuple(1 - i / 100 for i in range(80))


def search_range(
    values: Tensor, low: Tensor, high: Tensor, how: str, qparams: Qparams, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    """The range of each row of values with the least ``mean |Q(x) - x|^p``; the first one of equal candidates.

    Args:
        values: (R, n); a weight, or all values of some tokens as one row.
        low: (R,), smallest value of the whole tensor, not only of ``values``; only ``lp`` uses it.
        high: (R,), largest value of the whole tensor.
        how: a key of :data:`SEARCHES`.
        qparams: the quantizer's function from a range to scale and zero point.
        quant_min: smallest integer.
        quant_max: largest integer.

    Returns:
        Minimum and maximum, (R,) each.
    """
    candidates, p = SEARCHES[how]
    best = torch.full_like(low, torch.inf)
    chosen = low, high
    for ends in candidates(values, low, high):
        scale, zero_point = qparams(*ends)
        rounded = fake_quantize(values, scale.unsqueeze(1), zero_point.unsqueeze(1), quant_min, quant_max)
        error = rounded.sub_(values).abs_().pow_(p).mean(1)
        better = error < best
        best = error.where(better, best)
        chosen = ends[0].where(better, chosen[0]), ends[1].where(better, chosen[1])
    return chosen


Candidates = Callable[[Tensor, Tensor, Tensor], Iterator[tuple[Tensor, Tensor]]]


def _percentiles(values: Tensor, low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    # torch.quantile refuses more than 16 million values, NumPy does not.
    array = values.detach().cpu().numpy()
    fractions = [1 - p for p in PERCENTILES] + list(PERCENTILES)
    ends = torch.from_numpy(np.quantile(array, fractions, axis=1)).to(values)
    yield from zip(ends[: len(PERCENTILES)], ends[len(PERCENTILES) :], strict=True)


def _shrunk(values: Tensor, low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return ((low * ratio, high * ratio) for ratio in SHRINK)


SEARCHES: dict[str, tuple[Candidates, float]] = {"percentile": (_percentiles, 2.0), "lp": (_shrunk, 2.4)}
"""Candidate ranges and the exponent p of their error, by the name of the search."""
