"""RepQ: channels quantized each by itself, in the form of one quantizer for all (RepQ-ViT, arXiv 2212.08254).

Channel j alone would get scale ``d_j`` and zero point ``z_j``. All get ``d``, the mean of the scales, and ``z``, that
of the zero points, if the activation is ``x' = x / r - o`` instead, with ``r_j = d_j / d`` and ``o_j = d (z - z_j)``:

    round(x'_j / d) + z = round(x_j / d_j + z_j - z) + z = round(x_j / d_j) + z_j

exactly, as z and z_j are integers. In the paper's words ``o = -z_j d_j / r + z d``, as ``d_j / r_j = d``. The next
linear undoes it, ``W x = (W r) (x' + o)``: columns of W times r, and ``(W r) o`` more in the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Reparameterisation:
    """What makes all channels alike."""

    ratio: Tensor
    """r, (C,) float64, positive."""
    low: Tensor
    """What integer 0 stands for in each channel, ``-z_j d_j``: (C,)."""
    scale: float
    """d."""
    zero_point: int
    """z."""

    def offset(self, ratio: Tensor) -> Tensor:
        """o for a ratio, (C,); if it was bounded, integer 0 still stands for the same in all channels."""
        return self.low / ratio + self.zero_point * self.scale

    def range(self, quant_min: int, quant_max: int) -> tuple[float, float]:
        """What scale and zero point cover."""
        return (quant_min - self.zero_point) * self.scale, (quant_max - self.zero_point) * self.scale


def reparameterise(minimum: Tensor, maximum: Tensor, quant_min: int, quant_max: int) -> Reparameterisation:
    """From the range of each channel, (C,) each.

    A channel's own range need not hold 0, nor its zero point be an integer of the quantizer. The common zero point is
    one, so the mean is rounded, and bounded. A channel that never varies has no scale: its ratio is 1, and x' is 0.
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
