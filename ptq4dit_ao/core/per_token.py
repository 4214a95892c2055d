"""Quantization per token: every row of C numbers has a range of its own, which is known at run time only.

A row x whose values lie in [low, high] is ``x = s u + m``: of n steps between its values, h = (n + 1) / 2 lie below
the middle m, ``s = (high - low) h / n`` and ``m = low + s``, so that u lies in [-1, 1]. The quantizer of u is static,
with a scale of 1 / h, and ``low`` and ``high`` are its outermost integers. Then

    ``x W^T = s (u W^T) + m sum_j W_j``.

A linear of dynamic inputs is thus one of static inputs between operations on rows. The middle, and not ``low``, is
taken out because the two terms would otherwise cancel, which costs digits in 16 bits. As u is at most 1, float16 does
not overflow. A row of equal values is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4dit_ao.core.qparams import fake_quantize

EPS = 2**-40
"""Least number that rows are divided by; the scale of a row of equal values is 0."""


def middle_and_scale(x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Middle and scale of each row, (..., C) -> two (..., 1) of at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) * (middle_step(steps) / steps)
    return low + scale, scale


def middle_step(steps: int) -> int:
    """Number of steps from the least value of a row to its middle."""
    return (steps + 1) // 2


def to_units(x: Tensor, middle: Tensor, scale: Tensor) -> Tensor:
    """The quantizer's input u, in [-1, 1]."""
    return (x - middle) / scale.clamp_min(EPS)


def fake_quantize_tokens(x: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Quantize and dequantize each row of ``x`` in its own range; shape and dtype stay."""
    steps = quant_max - quant_min
    (middle, scale), half = middle_and_scale(x, steps), middle_step(steps)
    u = fake_quantize(to_units(x, middle, scale), 1 / half, quant_min + half, quant_min, quant_max)
    return (u * scale + middle).to(x.dtype)
