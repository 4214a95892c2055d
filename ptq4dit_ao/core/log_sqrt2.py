"""Quantization to powers of the square root of 2, for attention after softmax (RepQ-ViT, arXiv 2212.08254)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_sqrt2_fake_quantize(x: Tensor, scale: Tensor | float, bits: int) -> Tensor:
    """Quantize and dequantize values that are not negative: a simulation, no kernel computes with these integers.

    ``q = clamp(round(-2 log2(x / scale)), 0, 2^bits - 1)``, which stands for
    ``scale 2^-ceil(q / 2) (1 + (q mod 2) (sqrt(2) - 1))``: a shift, and one more factor for odd q. What is too small
    for the largest q becomes 0.
    """
    exact = (-2 * (x / scale).log2()).round()
    q = exact.clamp(0, 2**bits - 1)
    value = scale * torch.exp2(-(q / 2).ceil()) * (1 + (q % 2) * (math.sqrt(2) - 1))
    return value.where(exact < 2**bits, 0.0)
