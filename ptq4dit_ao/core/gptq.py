"""GPTQ: round a weight column by column, and let the columns that follow make up for each error.

The layer's error ``E |x (W_q - W)^T|^2 = tr((W_q - W) H (W_q - W)^T)`` needs of the inputs only their second moment
``H = E[x x^T]`` (Frantar et al. 2023, arXiv 2210.17323, algorithm 1). Balancing transforms H exactly,
``H' = diag(1/b) H diag(1/b)``, so that a balancing vector can be judged, and its weight rounded, from statistics of the
model as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ptq4dit_ao.errors import CalibrationError

DOUBLE = 2048
"""Up to so many channels are factored in double precision; beyond, memory matters more than digits below damping."""

BLOCK = 128
"""Columns after which the errors are handed on to the rest of the weight at once."""


def gptq(
    weight: Tensor, scale: Tensor, moment: Tensor, quant_min: int, quant_max: int, *, damping: float = 0.01
) -> Tensor:
    """Integers of a weight, per output channel and symmetric, that keep the layer's output.

    Columns are taken by falling ``H_jj`` ("act-order"): those that matter most are rounded while all others can still
    make up for them. A column that is never used (``H_jj`` = 0) is rounded to nearest.

    Args:
        weight: (C_out, C_in).
        scale: (C_out,), positive.
        moment: H, (C_in, C_in), positive semi-definite.
        quant_min: smallest integer.
        quant_max: largest integer.
        damping: what is added to the diagonal of H, as a part of its mean.

    Returns:
        (C_out, C_in) int8.
    """
    integers, _ = gptq_and_scale(weight, scale.unsqueeze(0), moment, quant_min, quant_max, damping=damping)
    return integers


def gptq_and_scale(
    weight: Tensor, scales: Tensor, moment: Tensor, quant_min: int, quant_max: int, *, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The same, with each output channel's scale chosen of several by the error that its row is left with.

    Args:
        weight: as for :func:`gptq`, like all others.
        scales: (K, C_out).

    Returns:
        Integers, (C_out, C_in) int8, and scales, (C_out,) float32.
    """
    order = moment.diagonal().argsort(descending=True)
    # Row i of the upper factor of H^-1 holds what the error of column i costs the columns after it.
    factor = cholesky(lambda: factored(moment)[order.unsqueeze(1), order], damping, inverse=True).to(torch.float32)
    # Columns as rows, so that what a step reads and writes is contiguous.
    columns = weight.to(torch.float32).T[order]
    scale, *others = scales.to(torch.float32)
    integers, least = _round(columns.clone(), scale, factor, quant_min, quant_max)
    for candidate in others:
        rounded, error = _round(columns.clone(), candidate, factor, quant_min, quant_max)
        better = error < least
        integers, scale = rounded.where(better, integers), candidate.where(better, scale)
        least = error.where(better, least)
    return integers[order.argsort()].T.contiguous(), scale


def _round(w: Tensor, scale: Tensor, factor: Tensor, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """Integers (C_in, C_out) of w, which is overwritten, and the error (C_out,) of each output."""
    integers, total = torch.empty_like(w, dtype=torch.int8), torch.zeros_like(scale)
    for start in range(0, len(w), BLOCK):
        end = min(start + BLOCK, len(w))
        block, errors = w[start:end], torch.empty_like(w[start:end])
        for i in range(end - start):
            q = (block[i] / scale).round_().clamp_(quant_min, quant_max)
            integers[start + i] = q
            row = factor[start + i, start:end]
            torch.div(block[i] - q * scale, row[i], out=errors[i])
            block[i + 1 :].addr_(row[i + 1 :], errors[i], alpha=-1)
        w[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
        total += errors.square().sum(0)  # of all: (W_q - W) H (W_q - W)^T, with H as damped
    return integers, total


def nearest(weight: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Integers of a weight, per output channel and symmetric, each rounded by itself: (C_out, C_in) int8."""
    return (weight / scale.to(weight.dtype).unsqueeze(1)).round_().clamp_(quant_min, quant_max).to(torch.int8)


def factored(moment: Tensor) -> Tensor:
    """A second moment in the precision of its factors: float64, or float32 for more channels than :data:`DOUBLE`."""
    return moment.to(torch.float64 if len(moment) <= DOUBLE else torch.float32)


def cholesky(fresh: Callable[[], Tensor], damping: float, *, inverse: bool = False) -> Tensor:
    """The lower Cholesky factor of a second moment whose diagonal grows by a part of its mean, in the moment's place.

    Channels that are never used get the mean. Where rounding has made the moment indefinite, the part is ten times
    larger, until it is not.

    Args:
        fresh: a new copy of the moment, which is overwritten.
        damping: the part of the mean.
        inverse: give the upper factor of the inverse instead.

    Raises:
        CalibrationError: the moment is not finite.
    """
    while True:
        h = fresh().mT  # equal, and by columns: so LAPACK needs no copy
        diagonal = h.diagonal()
        if not diagonal.isfinite().all():
            raise CalibrationError("the second moment of a layer's input is not finite; look at the calibration set")
        used = diagonal > 0
        mean = diagonal[used].mean() if used.any() else torch.ones((), dtype=h.dtype, device=h.device)
        diagonal[~used] = mean
        diagonal += damping * mean
        if _factor_(h) and (not inverse or _factor_(torch.cholesky_inverse(h, out=h), upper=True)):
            return h
        damping *= 10


def _factor_(h: Tensor, *, upper: bool = False) -> bool:
    """Factor in place; False if it is indefinite."""
    failed = torch.empty((), dtype=torch.int32, device=h.device)
    torch.linalg.cholesky_ex(h, upper=upper, out=(h, failed))
    return not failed
