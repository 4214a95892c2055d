"""Second moment, mean and a sample of a linear's inputs, which rounding and the search for b need."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4dit_ao._modes import own_modes

TOKENS = 2048
"""Maximum number of tokens that a sample keeps."""

_HASH = 2654435761
"""Factor of Knuth's multiplicative hash, which spreads consecutive numbers evenly over 32 bits."""


class TokenSample:
    """A sample of all tokens seen: those whose running numbers have the lowest hashes.

    The sample is spread evenly over batches, samples and positions, and is the same in every run.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        """Number of tokens seen."""
        self.tokens = torch.empty(0, channels)
        """Tokens kept, (n, C) float32."""
        self._priority = torch.empty(0, dtype=torch.int64)

    def update(self, rows: Tensor) -> None:
        """Add tokens, (N, C)."""
        priority = (torch.arange(self.count, self.count + len(rows)) * _HASH) % 2**32
        self.count += len(rows)
        best = priority.argsort()[:TOKENS]
        priority = torch.cat([self._priority, priority[best]])
        tokens = torch.cat([self.tokens.to(rows.device), rows[best.to(rows.device)].to(torch.float32)])
        lowest = priority.argsort()[:TOKENS]
        self.tokens, self._priority = tokens[lowest.to(tokens.device)], priority[lowest]


class Moments:
    """``E[x x^T]``, ``E[x]`` and a sample of all tokens seen, (..., C), in C^2 memory for any number of tokens."""

    def __init__(self, channels: int) -> None:
        self._second = torch.zeros(channels, channels)
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._sample = TokenSample(channels)

    @property
    def count(self) -> int:
        """Number of tokens seen."""
        return self._sample.count

    @property
    def tokens(self) -> Tensor:
        """Tokens kept, (n, C) float32."""
        return self._sample.tokens

    @property
    def second(self) -> Tensor:
        """Second moment ``E[x x^T]``, (C, C) float32."""
        return self._second / max(1, self.count)

    @property
    def mean(self) -> Tensor:
        """Mean ``E[x]``, (C,) float32."""
        return (self._sum / max(1, self.count)).to(torch.float32)

    @own_modes()
    def update(self, x: Tensor) -> None:
        """Add the tokens of a tensor (..., C)."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self._second = self._second.to(rows.device).addmm_(rows.T, rows)
        self._sum = self._sum.to(rows.device) + rows.sum(0, dtype=torch.float64)
        self._sample.update(rows)
