"""Random arguments shared by the families. The generator comes first, then the shape with the batch in front."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def noise(g: Generator, *shape: int) -> Tensor:
    """Standard normal values: latents, text embeddings, pooled projections."""
    return torch.randn(shape, generator=g)


def timesteps(g: Generator, batch: int, low: float = 20.0, high: float = 980.0) -> Tensor:
    """One time for each sample, all different.

    They are numbers of bfloat16, or a model in bfloat16 would be asked about other times than one in float32.
    """
    count = max(batch, 64)
    places = (torch.randperm(count, generator=g)[:batch] + 0.5) / count
    return (low + (high - low) * places).bfloat16().float()


def int_timesteps(g: Generator, batch: int) -> Tensor:
    """One step of 1000 for each sample, the first 960 all different."""
    return 20 + torch.randperm(max(batch, 960), generator=g)[:batch] % 960


def mask(g: Generator, batch: int, length: int, *, least: int = 4) -> Tensor:
    """Which tokens are words (1) and which padding (0): a prefix of words, its length drawn for each sample."""
    words = torch.randint(least, length + 1, (batch, 1), generator=g)
    return (torch.arange(length) < words).long()
