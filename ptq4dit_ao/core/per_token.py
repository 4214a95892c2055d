"""Quantization per token: every row of C numbers has a range of its own, which is known at run time only.

A row x whose values lie in [low, high] is ``x = s u + m`` with the middle ``m = (low + high) / 2``, the scale
``s = (high - low) / n`` for n steps, and u in [-n/2, n/2]. The quantizer of u is static, with a scale of 1, and

    ``x W^T = s (u W^T) + m sum_j W_j``.

A linear of dynamic inputs is thus one of static inputs between operations on rows. The middle, and not ``low``, is taken
out because the two terms would otherwise cancel, which costs digits in 16 bits. A row of equal values is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4dit_ao.core.qparams import fake_quantize

EPS = 2**-40
"""Least scale, which a row of equal values has."""


def middle_and_scale(x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Middle and scale of each row, (..., C) -> two (..., 1) of at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return (low + high) * 0.5, ((high - low) * (1 / steps)).clamp_min(EPS)


def unit_zero_point(quant_min: int, quant_max: int) -> int:
    """Zero point of u: the integer that the middle of a row becomes."""
    return quant_min + (quant_max - quant_min + 1) // 2


def fake_quantize_tokens(x: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Quantize and dequantize each row of ``x`` in its own range; shape and dtype stay."""
    middle, scale = middle_and_scale(x, quant_max - quant_min)
    u = fake_quantize((x - middle) / scale, 1.0, unit_zero_point(quant_min, quant_max), quant_min, quant_max)
    return (u * scale + middle).to(x.dtype)
