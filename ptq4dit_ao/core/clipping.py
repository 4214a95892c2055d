"""Clipping: quantization ranges below minimum and maximum, where clipped tails cost less than a wider step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ptq4dit_ao.core.qparams import fake_quantize

WEIGHT_RATIOS = torch.linspace(1.0, 0.6, 9).tolist()
ACTIVATION_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)

Qparams = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Function of a quantizer, ``(minimum, maximum) -> (scale, zero_point)``."""


def clipped_weight_range(
    weight: Tensor, importance: Tensor, qparams: Qparams, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    """Clipped range of each output channel with the least ``sum_j E[x_j^2] (Q(w_j) - w_j)^2``.

    Args:
        weight: (C_out, C_in).
        importance: E[x_j^2], (C_in,).
        qparams: the quantizer's function from a range to scale and zero point.
        quant_min: smallest integer.
        quant_max: largest integer.

    Returns:
        Minimum and maximum, (C_out,) each.
    """
    low, high = torch.aminmax(weight, dim=1)
    best = torch.full_like(low, torch.inf)
    ratio = torch.ones_like(low)
    for r in WEIGHT_RATIOS:
        scale, zero_point = qparams(low * r, high * r)
        rounded = fake_quantize(weight, scale.unsqueeze(1), zero_point.unsqueeze(1), quant_min, quant_max)
        error = (rounded - weight).square_() @ importance.to(weight.dtype)
        better = error < best
        best, ratio = error.where(better, best), torch.where(better, r, ratio)
    return low * ratio, high * ratio


def clipped_activation_range(
    tokens: Tensor,
    low: float,
    high: float,
    weight: Tensor,
    qparams: Qparams,
    quant_min: int,
    quant_max: int,
    *,
    cutting: float = 1.0,
) -> tuple[float, float]:
    """Clipped range of an activation with the least error of the layer's output, ``|(Q(x) - x) W^T|^2``.

    Both ends are reduced by the same ratio first, then each end separately. The error of values outside the range can
    count more than that of rounding. It is not independent of the input, so that layers behind do not average it away.

    Args:
        tokens: (n, C_in).
        low: smallest value of the whole activation, not only of these tokens.
        high: largest value of the whole activation.
        weight: (C_out, C_in).
        qparams: the quantizer's function from a range to scale and zero point.
        quant_min: smallest integer.
        quant_max: largest integer.
        cutting: weight of the square error of values that are cut, 1 or more; that of rounding counts once.

    Returns:
        Minimum and maximum.
    """
    extra = cutting**0.5 - 1
    metric = weight.T @ weight if len(weight) > weight.shape[1] else None

    def error(low: float, high: float) -> float:
        scale, zero_point = qparams(torch.tensor(low), torch.tensor(high))
        noise = fake_quantize(tokens, scale, zero_point, quant_min, quant_max) - tokens
        if extra:
            ends = ((bound - zero_point) * scale for bound in (quant_min, quant_max))
            noise += extra * (tokens.clamp(*map(float, ends)) - tokens)
        if metric is not None:
            return float(((noise @ metric) * noise).sum())
        return float((noise @ weight.T).square_().sum())

    both = {r: error(low * r, high * r) for r in ACTIVATION_RATIOS}
    r = min(both, key=both.__getitem__)
    low, high, best = low * r, high * r, both[r]
    lower = {low * s: error(low * s, high) for s in ACTIVATION_RATIOS}
    if min(lower.values()) < best:
        low, best = min(lower.items(), key=lambda found: found[1])
    upper = {high * s: error(low, high * s) for s in ACTIVATION_RATIOS}
    if min(upper.values()) < best:
        high = min(upper, key=upper.__getitem__)
    return low, high
