"""RepQ: per-channel quantization expressed as per-tensor quantization (RepQ-ViT, arXiv 2212.08254).

A per-channel quantizer gives channel j the scale ``d_j`` and zero point ``z_j``. The per-tensor quantizer has the mean
scale ``d`` and mean zero point ``z``. It yields the same integers if the activation becomes ``x' = x / r - o`` with
``r_j = d_j / d`` and ``o_j = d (z - z_j)``:

    round(x'_j / d) + z = round(x_j / d_j + z_j - z) + z = round(x_j / d_j) + z_j

This is exact, as z and z_j are integers. The paper writes ``o = -z_j d_j / r + z d``, which is equal as
``d_j / r_j = d``. The next linear undoes the change, ``W x = (W r) (x' + o)``: its columns are multiplied by r, and
``(W r) o`` is added to its bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Reparameterisation:
    """Ratio and offset per channel that make a per-tensor quantizer act like a per-channel one."""

    ratio: Tensor
    """Ratio r of each channel's scale to the common one, (C,) float64, positive."""
    low: Tensor
    """Value that integer 0 represents in each channel, ``-z_j d_j``, (C,)."""
    scale: float
    """Common scale d."""
    zero_point: int
    """Common zero point z."""

    def offset(self, ratio: Tensor) -> Tensor:
        """Offset o, (C,), for a ratio, (C,), by which integer 0 represents ``low`` even if the ratio was clipped."""
        return self.low / ratio + self.zero_point * self.scale

    def range(self, quant_min: int, quant_max: int) -> tuple[float, float]:
        """Quantization range that the common scale and zero point cover."""
        return (quant_min - self.zero_point) * self.scale, (quant_max - self.zero_point) * self.scale


def reparameterise(minimum: Tensor, maximum: Tensor, quant_min: int, quant_max: int) -> Reparameterisation:
    """The reparameterisation for the minimum and maximum of each channel, (C,) each.

    A channel's range need not contain 0, and its zero point may lie outside [quant_min, quant_max]. The common zero
    point is the mean, rounded and clamped to that range. A constant channel has no scale: its ratio is 1, and x' is 0.
    """
    minimum, maximum = minimum.to(torch.float64), maximum.to(torch.float64)
    varies = maximum > minimum
    scales = (maximum - minimum) / (quant_max - quant_min)
    zero_points = quant_min - (minimum / scales.where(varies, 1.0)).round()
    scale = float(scales[varies].mean()) if varies.any() else 1.0
    zero_point = float(zero_points[varies].mean().round()) if varies.any() else 0.0
    zero_point = int(min(max(zero_point, quant_min), quant_max))
    return Reparameterisation(
        ratio=(scales / scale).where(varies, 1.0),
        low=(-zero_points * scales).where(varies, minimum - zero_point * scale),
        scale=scale,
        zero_point=zero_point,
    )
