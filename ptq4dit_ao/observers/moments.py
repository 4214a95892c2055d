"""Second moment, mean and a sample of a linear's inputs: what rounding and the search for b need beside min and max."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4dit_ao._modes import own_modes

TOKENS = 2048
"""Tokens that are kept."""

_HASH = 2654435761
"""Knuth's multiplicative hash; spreads consecutive numbers evenly over 32 bits."""


class TokenSample:
    """Some of the tokens seen: those whose running number hashes lowest.

    So they are spread evenly over batches, samples and positions, and are the same in every run.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        """Tokens seen."""
        self.tokens = torch.empty(0, channels)
        """Tokens kept, (n, C) float32."""
        self._priority = torch.empty(0, dtype=torch.int64)

    def update(self, rows: Tensor) -> None:
        """Take in tokens, (N, C)."""
        priority = (torch.arange(self.count, self.count + len(rows)) * _HASH) % 2**32
        self.count += len(rows)
        best = priority.argsort()[:TOKENS]
        priority = torch.cat([self._priority, priority[best]])
        tokens = torch.cat([self.tokens.to(rows.device), rows[best.to(rows.device)].to(torch.float32)])
        lowest = priority.argsort()[:TOKENS]
        self.tokens, self._priority = tokens[lowest.to(tokens.device)], priority[lowest]


class Moments:
    """``E[x x^T]``, ``E[x]`` and some tokens of everything seen, (..., C); memory C^2, however many there are."""

    def __init__(self, channels: int) -> None:
        self._second = torch.zeros(channels, channels)
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._sample = TokenSample(channels)

    @property
    def count(self) -> int:
        """Tokens seen."""
        return self._sample.count

    @property
    def tokens(self) -> Tensor:
        """Tokens kept, (n, C) float32."""
        return self._sample.tokens

    @property
    def second(self) -> Tensor:
        """``E[x x^T]``, (C, C) float32."""
        return self._second / max(1, self.count)

    @property
    def mean(self) -> Tensor:
        """``E[x]``, (C,) float32."""
        return (self._sum / max(1, self.count)).to(torch.float32)

    @own_modes()
    def update(self, x: Tensor) -> None:
        """Take in a tensor (..., C)."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self._second = self._second.to(rows.device).addmm_(rows.T, rows)
        self._sum = self._sum.to(rows.device) + rows.sum(0, dtype=torch.float64)
        self._sample.update(rows)
