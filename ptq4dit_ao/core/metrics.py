"""Paired error measures."""

from __future__ import annotations

import math

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
        raise ArgumentError(f"shapes differ: reference {tuple(reference.shape)}, got {tuple(approximation.shape)}")
    ref = reference.detach().to(torch.float64)
    noise = (ref - approximation.detach().to(torch.float64)).square().sum().item()
    signal = ref.square().sum().item()
    if noise == 0.0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal > 0 else -math.inf
