"""AdaRound: a weight rounded up or down by a variable that gradients can move (Nagel et al. 2020, arXiv 2004.10568).

``W_q = scale * clamp(floor(W / scale) + h(V))`` with ``h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)`` (eq. 22, 23). A
regularizer, ``1 - |2 h - 1|^beta``, drives every h to 0 or 1 as beta falls (eq. 24).
"""

from __future__ import annotations

import torch
from torch import Tensor

STRETCH, SHIFT = 1.2, -0.1
"""h reaches 0 and 1 for finite V."""

WARM_UP = 0.2
"""The part of the time in which h is free."""

BETA = (20.0, 2.0)
"""Where the regularizer's exponent starts, and ends."""


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V), in [0, 1]."""
    return (torch.sigmoid(v) * STRETCH + SHIFT).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """V for h in [0, 1]."""
    return torch.logit((h - SHIFT) / STRETCH)


def exponent(progress: float) -> float | None:
    """beta after a part of the time, 0 to 1; None while the regularizer is off."""
    if progress < WARM_UP:
        return None
    start, end = BETA
    return start + (end - start) * (progress - WARM_UP) / (1 - WARM_UP)


def undecided(h: Tensor, beta: float) -> Tensor:
    """``1 - |2 h - 1|^beta``, elementwise: 0 where h is 0 or 1."""
    return 1 - (2 * h - 1).abs().pow(beta)
