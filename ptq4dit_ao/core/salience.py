"""Channel salience and its aggregation over timesteps (PTQ4DiT, section 3.2 and eq. 12)."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4dit_ao.choices import AGGREGATIONS, Aggregation
from ptq4dit_ao.core.ssc import ssc_weights
from ptq4dit_ao.errors import ArgumentError


def channel_salience(x: Tensor, channel_axis: int = -1) -> Tensor:
    """Channel salience ``s_j = max |x_j|`` over all axes but the channel's: any shape -> (C,)."""
    return x.movedim(channel_axis, -1).reshape(-1, x.shape[channel_axis]).abs().amax(0)


def aggregate_salience(salience_x: Tensor, salience_w: Tensor, how: Aggregation = "ssc") -> Tensor:
    """Reduce activation salience per timestep, (T, C), to one vector (C,).

    ``ssc`` is ``sum_t eta_t s(X^(t))`` with Spearman weights against ``salience_w`` (C,) (eq. 12). ``max`` is the
    maximum over timesteps, as in SmoothQuant. ``mean`` is the average over timesteps, as in plain CSB.

    Raises:
        ArgumentError: ``how`` is unknown.
    """
    s = salience_x.to(torch.float64)
    if how == "max":
        return s.amax(0)
    if how == "mean":
        return s.mean(0)
    if how == "ssc":
        eta, _ = ssc_weights(s, salience_w)
        return eta @ s
    raise ArgumentError(f"aggregation {how!r} is unknown; choose one of {', '.join(AGGREGATIONS)}")
