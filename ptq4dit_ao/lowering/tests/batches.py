"""Inputs of the tiny DiT that tests lower."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_of(rows: int, channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Another batch for each number of rows."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, channels, 8, 8, generator=generator), torch.arange(rows) * 70, torch.arange(rows) % 10
