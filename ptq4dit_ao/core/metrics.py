"""Error measures of an approximation against its reference."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ptq4dit_ao.errors import ArgumentError


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB, ``10 log10(sum ref^2 / sum (ref - approx)^2)``.

    Equal tensors give ``inf``; a zero reference with an error gives ``-inf``.

    Raises:
        ArgumentError: the shapes differ.
    """
    if reference.shape != approximation.shape:
        raise ArgumentError(
            f"shapes differ: reference {tuple(reference.shape)}, got {tuple(approximation.shape)}; give two tensors of "
            "one shape"
        )
    ref = reference.detach().to(torch.float64)
    noise = (ref - approximation.detach().to(torch.float64)).square().sum().item()
    return float(energy_ratio_db(np.array(ref.square().sum().item()), np.array(noise)))


def energy_ratio_db(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Energy ratio ``10 log10(signal / noise)`` in dB, elementwise; ``inf`` without noise, ``-inf`` without signal."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(noise == 0, np.inf, 10 * (np.log10(signal) - np.log10(noise)))
