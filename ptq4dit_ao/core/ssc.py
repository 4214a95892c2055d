"""SSC: Spearman's-rho-guided salience calibration (PTQ4DiT, eq. 10 to 12)."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor


def spearman(u: Tensor, v: Tensor) -> Tensor:
    """Spearman's rank correlation with average ranks for ties: (..., C) with (C,) -> (...) float64.

    A constant vector has no rank correlation. Its rho is set to 0, so that its timestep keeps a neutral weight.
    """
    ranks_u = _centred_ranks(u)
    ranks_v = _centred_ranks(v)
    norm = ranks_u.square().sum(-1).sqrt() * ranks_v.square().sum(-1).sqrt()
    return torch.where(norm > 0, (ranks_u * ranks_v).sum(-1) / norm.clamp(min=1e-300), 0.0)


def ssc_weights(salience_x: Tensor, salience_w: Tensor) -> tuple[Tensor, Tensor]:
    """Timestep weights ``eta_t = exp(-rho_t) / sum_tau exp(-rho_tau)`` (eq. 11).

    Balancing helps most at timesteps where the channels that are salient in the activations differ from those that are
    salient in the weights (low rho), so these timesteps weigh more.

    Args:
        salience_x: activation salience per timestep, (T, C).
        salience_w: weight salience, (C,).

    Returns:
        ``(eta, rho)``, both (T,) float64; eta sums to 1.
    """
    rho = spearman(salience_x, salience_w)
    return torch.softmax(-rho, 0), rho


def _centred_ranks(x: Tensor) -> Tensor:
    ranks = np.asarray(rankdata(x.detach().to("cpu", torch.float64).numpy(), axis=-1))
    centred = torch.from_numpy(ranks - ranks.mean(-1, keepdims=True))
    return centred.to(x.device)
