"""Random arguments that the families share; functions take the generator first, then sizes with the batch first."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def noise(g: Generator, *shape: int) -> Tensor:
    """Standard normal values for latents, text embeddings and pooled projections."""
    return torch.randn(shape, generator=g)


def timesteps(g: Generator, batch: int, low: float = 20.0, high: float = 980.0) -> Tensor:
    """One timestep for each sample, (batch,) float32, distinct in batches of up to 64.

    The values are representable in bfloat16, so that models in bfloat16 and float32 get the same timesteps.
    """
    count = max(batch, 64)
    places = (torch.randperm(count, generator=g)[:batch] + 0.5) / count
    return (low + (high - low) * places).bfloat16().float()


def int_timesteps(g: Generator, batch: int) -> Tensor:
    """One of 1000 timesteps for each sample, (batch,) int64, distinct in batches of up to 960."""
    return 20 + torch.randperm(max(batch, 960), generator=g)[:batch] % 960


def mask(g: Generator, batch: int, length: int, *, least: int = 4) -> Tensor:
    """Mask with a prefix of random length of words (1), then padding (0), for each sample: (batch, length) int64."""
    words = torch.randint(least, length + 1, (batch, 1), generator=g)
    return (torch.arange(length) < words).long()
