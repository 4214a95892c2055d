"""GPTQ: round a weight column by column, and compensate for each column's error in the columns after it.

The layer's error ``E |x (W_q - W)^T|^2 = tr((W_q - W) H (W_q - W)^T)`` depends on the inputs only through their second
moment ``H = E[x x^T]`` (Frantar et al. 2023, arXiv 2210.17323, algorithm 1). Balancing transforms H exactly,
``H' = diag(1/b) H diag(1/b)``. So statistics of the unbalanced model are enough to score a balancing vector and to
round the balanced weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ptq4dit_ao.core.expansion import Codebook
from ptq4dit_ao.errors import CalibrationError

DOUBLE = 2048
"""Maximum number of channels that are factored in float64. For more, float32 saves memory; damping hides its error."""

BLOCK = 128
"""Number of columns after which their errors are propagated to the rest of the weight in one product."""


def gptq(
    weight: Tensor, scale: Tensor, moment: Tensor, quant_min: int, quant_max: int, *, damping: float = 0.01
) -> Tensor:
    """Integers of a weight, quantized per output channel and symmetrically, with a small error of the layer's output.

    Columns are rounded in descending order of ``H_jj`` ("act-order"), so that all other columns can still compensate
    for the most important ones. A column that is never used (``H_jj`` = 0) is rounded to nearest.

    Args:
        weight: (C_out, C_in).
        scale: (C_out,), positive.
        moment: H, (C_in, C_in), positive semi-definite.
        quant_min: smallest integer.
        quant_max: largest integer.
        damping: term that is added to the diagonal of H, as a fraction of its mean.

    Returns:
        (C_out, C_in) int8.
    """
    integers, _ = gptq_and_scale(weight, scale.unsqueeze(0), moment, quant_min, quant_max, damping=damping)
    return integers


def gptq_and_scale(
    weight: Tensor, scales: Tensor, moment: Tensor, quant_min: int, quant_max: int, *, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Integers of a weight by :func:`gptq`, with the scale of each output channel that leaves its row the least error.

    Args:
        weight: (C_out, C_in).
        scales: candidate scales, (K, C_out), positive.
        moment: the same as for :func:`gptq`.
        quant_min: smallest integer.
        quant_max: largest integer.
        damping: the same as for :func:`gptq`.

    Returns:
        Integers, (C_out, C_in) int8, and scales, (C_out,) float32.
    """

    def clamped(_: int, position: Tensor) -> Tensor:
        return position.round().clamp_(quant_min, quant_max)

    columns = _Columns(weight, moment, damping)
    candidates = ((scale, columns.rounded(scale, clamped), None) for scale in scales.to(torch.float32))
    integers, scale, _ = _least(candidates)
    return columns.restored(integers), scale


def gptq_and_codebook(
    weight: Tensor, candidates: Iterable[tuple[Tensor, Codebook]], moment: Tensor, *, damping: float = 0.01
) -> tuple[Tensor, Tensor, Codebook]:
    """Integers of a weight that codebooks allow, with the candidate for each output channel that leaves least error.

    Args:
        weight: (C_out, C_in).
        candidates: scales, (C_out,) each, with their codebooks; at least one.
        moment: the same as for :func:`gptq`.
        damping: the same as for :func:`gptq`.

    Returns:
        Integers, (C_out, C_in) int8, scales, (C_out,) float32, and the codebook.
    """
    columns = _Columns(weight, moment, damping)
    integers, scale, codebook = _least(
        (scale, columns.rounded(scale, codebook.column), codebook) for scale, codebook in candidates
    )
    assert codebook is not None
    return columns.restored(integers), scale, codebook


def nearest_and_codebook(
    weight: Tensor, candidates: Iterable[tuple[Tensor, Codebook]], importance: Tensor
) -> tuple[Tensor, Tensor, Codebook]:
    """Nearest integers that codebooks allow, with the candidate for each output channel that leaves least error.

    Args:
        weight: (C_out, C_in).
        candidates: scales, (C_out,) each, with their codebooks; at least one.
        importance: weight of each input channel in the squared error, (C_in,).

    Returns:
        Integers, (C_out, C_in) int8, scales, (C_out,) float32, and the codebook.
    """

    def rounded(scale: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
        positions = weight / scale.unsqueeze(1)
        integers = codebook.nearest(positions)
        error = (integers - positions).mul_(scale.unsqueeze(1)).square_() @ importance.to(weight)
        return integers.to(torch.int8).T, error

    integers, scale, codebook = _least((scale, rounded(scale, codebook), codebook) for scale, codebook in candidates)
    assert codebook is not None
    return integers.T.contiguous(), scale, codebook


def _least(
    candidates: Iterable[tuple[Tensor, tuple[Tensor, Tensor], Codebook | None]],
) -> tuple[Tensor, Tensor, Codebook | None]:
    """Integers (C_in, C_out), scale and codebook of the candidate with the least error, for each output channel."""
    remaining = iter(candidates)
    scale, (integers, least), codebook = next(remaining)
    for candidate, (rounded, error), other in remaining:
        better = error < least
        integers, scale = rounded.where(better, integers), candidate.where(better, scale)
        least = error.where(better, least)
        if codebook is not None and other is not None:
            codebook = other.where(better, codebook)
    return integers, scale, codebook


class _Columns:
    """The columns of a weight in the order in which they are rounded, and what each passes on to the later ones."""

    def __init__(self, weight: Tensor, moment: Tensor, damping: float) -> None:
        self._order = moment.diagonal().argsort(descending=True)
        # Row i of the upper factor of H^-1 has the weights by which later columns compensate for the error of column i.
        order = self._order
        factor = cholesky(lambda: factored(moment)[order.unsqueeze(1), order], damping, inverse=True)
        self._factor = factor.to(torch.float32)
        # Columns are stored as rows, so that each step reads and writes contiguous memory.
        self._weight = weight.to(torch.float32).T[order]

    def rounded(self, scale: Tensor, integers_of: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Integers (C_in, C_out), in this order, and the error (C_out,) of each output channel.

        Args:
            scale: (C_out,).
            integers_of: from a column's index and positions, (C_out,) in steps of the scale, to its integers.
        """
        w, factor, indices = self._weight.clone(), self._factor, self._order.tolist()
        integers, total = torch.empty_like(w, dtype=torch.int8), torch.zeros_like(scale)
        for start in range(0, len(w), BLOCK):
            end = min(start + BLOCK, len(w))
            block, errors = w[start:end], torch.empty_like(w[start:end])
            for i in range(end - start):
                q = integers_of(indices[start + i], block[i] / scale)
                integers[start + i] = q
                row = factor[start + i, start:end]
                torch.div(block[i] - q * scale, row[i], out=errors[i])
                block[i + 1 :].addr_(row[i + 1 :], errors[i], alpha=-1)
            w[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
            total += errors.square().sum(0)  # in the end the diagonal of (W_q - W) H (W_q - W)^T, with damped H
        return integers, total

    def restored(self, integers: Tensor) -> Tensor:
        """Integers (C_in, C_out) in this order as (C_out, C_in) in the weight's."""
        return integers[self._order.argsort()].T.contiguous()


def nearest(weight: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Integers of a weight, per output channel and symmetric, rounded to nearest: (C_out, C_in) int8."""
    return (weight / scale.to(weight.dtype).unsqueeze(1)).round_().clamp_(quant_min, quant_max).to(torch.int8)


def factored(moment: Tensor) -> Tensor:
    """A second moment in the dtype for factoring: float64, or float32 for more channels than :data:`DOUBLE`."""
    return moment.to(torch.float64 if len(moment) <= DOUBLE else torch.float32)


def cholesky(fresh: Callable[[], Tensor], damping: float, *, inverse: bool = False) -> Tensor:
    """The lower Cholesky factor of a damped second moment, computed in the moment's memory.

    A fraction of the diagonal's mean is added to the diagonal. Channels that are never used get the mean first. If
    rounding has made the moment indefinite, the fraction is increased tenfold until the factorization succeeds.

    Args:
        fresh: returns a new copy of the moment, which is overwritten.
        damping: the fraction of the mean.
        inverse: return the upper factor of the inverse instead.

    Raises:
        CalibrationError: the moment is not finite.
    """
    while True:
        h = fresh().mT  # the moment is symmetric, and LAPACK needs no copy of a column-major matrix
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
    """Compute the Cholesky factor in place; False if the matrix is not positive definite."""
    failed = torch.empty((), dtype=torch.int32, device=h.device)
    torch.linalg.cholesky_ex(h, upper=upper, out=(h, failed))
    return not failed
