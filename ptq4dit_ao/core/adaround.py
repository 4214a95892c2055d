"""AdaRound: weights that are rounded up or down by a learnable variable V (Nagel et al. 2020, arXiv 2004.10568).

``W_q = scale * clamp(floor(W / scale) + h(V))`` with ``h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)`` (eq. 22, 23). A
regularizer, ``1 - |2 h - 1|^beta``, drives every h to 0 or 1 as beta falls (eq. 24).
"""

from __future__ import annotations

import torch
from torch import Tensor

STRETCH, SHIFT = 1.2, -0.1
"""Stretch and shift of the sigmoid in h(V), by which h reaches 0 and 1 for finite V (eq. 23)."""

WARM_UP = 0.2
"""Fraction of the optimization at its start during which the regularizer is off."""

BETA = (20.0, 2.0)
"""First and last value of the regularizer's exponent beta."""


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Rectified sigmoid h(V) in [0, 1], elementwise (eq. 23)."""
    return (torch.sigmoid(v) * STRETCH + SHIFT).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The variable V for which the rectified sigmoid is h in [0, 1], elementwise."""
    return torch.logit((h - SHIFT) / STRETCH)


def exponent(progress: float) -> float | None:
    """The regularizer's exponent beta at a progress from 0 to 1; None while the regularizer is off."""
    if progress < WARM_UP:
        return None
    start, end = BETA
    return start + (end - start) * (progress - WARM_UP) / (1 - WARM_UP)


def undecided(h: Tensor, beta: float) -> Tensor:
    """The regularizer ``1 - |2 h - 1|^beta``, elementwise, which is 0 where h is 0 or 1 (eq. 24)."""
    return 1 - (2 * h - 1).abs().pow(beta)
