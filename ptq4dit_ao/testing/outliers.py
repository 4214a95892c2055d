"""Outlier channels that change nothing in float: the stress that balancing must undo."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def inject_outliers(
    model: nn.Module, *, channels: int = 4, low: float = 10.0, high: float = 30.0, seed: int = 0
) -> Any:
    """A copy of a diffusers ``DiTTransformer2DModel`` that computes the same with salient channels.

    In every block, ``channels`` random channels of both modulated inputs are multiplied by a factor in [low, high]
    (in the adaLN rows: shift by k, ``1 + scale`` by k) and divided again in the columns of q, k, v and FC1.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    blocks: Any = model.transformer_blocks
    for block in blocks:
        width = block.attn1.to_q.in_features
        attention = [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]
        for first_chunk, consumers in ((0, attention), (3, [block.ff.net[0].proj])):
            k = torch.ones(width)
            chosen = torch.randperm(width, generator=generator)[:channels]
            k[chosen] = low + (high - low) * torch.rand(channels, generator=generator)
            _scale_modulation(block.norm1.linear, first_chunk * width, k)
            for linear in consumers:
                linear.weight.div_(k.to(linear.weight))
    return model


def _scale_modulation(adaln: nn.Linear, start: int, k: Tensor) -> None:
    """Chunks (shift, scale) from row ``start``: ``shift * k`` and ``(1 + scale) * k - 1``."""
    k, width = k.to(adaln.weight), len(k)
    shift, scale = slice(start, start + width), slice(start + width, start + 2 * width)
    for rows in (shift, scale):
        adaln.weight[rows] *= k[:, None]
        adaln.bias[rows] *= k
    adaln.bias[scale] += k - 1
