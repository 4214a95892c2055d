"""Uniform affine quantization: ``q = clamp(round(x / scale) + zero_point, quant_min, quant_max)``."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4dit_ao.errors import ArgumentError

FLOAT_BITS = 16
"""Bits of an activation that stays float, so that weights alone are quantized."""


def affine_qparams(
    minimum: Tensor,
    maximum: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool = False,
    eps: float = 2**-12,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover [minimum, maximum] and represent 0 exactly; any shape, elementwise.

    The conventions are those of torchao's observers, so that lowering treats both alike. An affine scale is
    ``(max - min) / (quant_max - quant_min)``. A symmetric scale is ``max|x| / ((quant_max - quant_min) / 2)``, with
    zero point 0 for signed ranges and the middle of the range for unsigned ones. ``scale >= eps``.

    Returns:
        ``(scale, zero_point)`` as float32 and int64.

    Raises:
        ArgumentError: the integer range is empty, or a bound is not finite.
    """
    if quant_min >= quant_max:
        raise ArgumentError(f"quant_min {quant_min} must be below quant_max {quant_max}")
    if not (minimum.isfinite().all() and maximum.isfinite().all()):
        raise ArgumentError("cannot quantize a range with NaN or infinite bounds; check the calibration data")
    low, high = minimum.to(torch.float64).clamp(max=0.0), maximum.to(torch.float64).clamp(min=0.0)
    if symmetric:
        scale = torch.maximum(-low, high) / ((quant_max - quant_min) / 2)
        middle = 0 if quant_min < 0 else (quant_min + quant_max + 1) // 2
        zero_point = torch.full_like(scale, middle)
    else:
        scale = (high - low) / (quant_max - quant_min)
        zero_point = quant_min - (low / scale.clamp(min=eps)).round()
    # Kernels multiply by the scale in float32.
    return scale.clamp(min=eps).to(torch.float32), zero_point.clamp(quant_min, quant_max).to(torch.int64)


def fake_quantize(x: Tensor, scale: Tensor | float, zero_point: Tensor | int, quant_min: int, quant_max: int) -> Tensor:
    """Quantize and dequantize ``x``, rounding half to even; ``scale`` and ``zero_point`` broadcast against ``x``."""
    q = (x / scale).round_().add_(zero_point).clamp_(quant_min, quant_max)
    return q.sub_(zero_point).mul_(scale)
