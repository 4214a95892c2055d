"""CSB: channel-wise salience balancing (PTQ4DiT, eq. 6 to 9).

A linear ``X W^T`` equals ``(X diag(1/b)) (W diag(b))^T``. With ``b = sqrt(s(X) / s(W))``, activation and weight have
the same salience per channel, the geometric mean of the two.
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from ptq4dit_ao.errors import ArgumentError, check_type


def balance_vector(salience_x: Tensor, salience_w: Tensor, alpha: float = 0.5) -> Tensor:
    """Balancing vector ``b = s(X)^alpha / s(W)^(1-alpha)``: (C,) and (C,) -> (C,) float64, positive and finite.

    ``alpha`` = 0.5 is the paper's geometric mean (eq. 6). A dead channel (either salience zero or not finite) gets 1.

    Raises:
        ArgumentError: ``alpha`` is outside [0, 1].
    """
    check_type("alpha", alpha, Real, "a number from 0 to 1")
    if not 0.0 <= alpha <= 1.0:
        raise ArgumentError(f"alpha is {alpha}; it must lie in [0, 1] (0.5 is the paper's geometric mean)")
    sx, sw = salience_x.to(torch.float64), salience_w.to(torch.float64)
    alive = (sx > 0) & (sw > 0) & sx.isfinite() & sw.isfinite()
    sx, sw = sx.where(alive, 1.0), sw.where(alive, 1.0)
    # Logarithms keep extreme saliences from overflowing or underflowing.
    return (alpha * sx.log() - (1 - alpha) * sw.log()).exp()


def clip_balance(b: Tensor, max_scale: float) -> tuple[Tensor, Tensor]:
    """Clip ``b`` to [1/max_scale, max_scale]; return it and the mask of the clipped channels.

    The farther b is from 1, the more digits are lost when it is folded into 16-bit parameters. The bound limits that.

    Raises:
        ArgumentError: ``max_scale`` is below 1.
    """
    check_type("max_scale", max_scale, Real, "a number of at least 1")
    if not max_scale >= 1.0:
        raise ArgumentError(f"max_scale is {max_scale}; it must be at least 1 (1 switches balancing off)")
    clipped = b.clamp(1.0 / max_scale, max_scale)
    return clipped, clipped != b
