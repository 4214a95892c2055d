"""The range of what attention multiplies: q, k, v and the probabilities."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ptq4dit_ao.observers.clock import TimestepClock
from ptq4dit_ao.observers.hooks import ActivationObserver, ConvertHook, check_finite, not_calibrated
from ptq4dit_ao.observers.qdq import QuantSpec


class AttentionObserver(ActivationObserver):
    """Minimum and maximum of an operand of attention, apart along the axes on which balancing may divide it.

    That is v, whose channels a fold of the attention output divides by b: as with
    :class:`~ptq4dit_ao.observers.SalienceObserver` the range after it is ``min_j(min_j / b_j) .. max_j(max_j / b_j)``.
    """

    def __init__(
        self, spec: QuantSpec, hook: ConvertHook, name: str, clock: TimestepClock, axes: Collection[int] = ()
    ) -> None:
        super().__init__(spec, hook, name, clock)
        self.axes = axes
        self.minimum, self.maximum = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def divide(self, b: Tensor) -> None:
        """Record that a fold divides the operand by b, float64, which broadcasts to it and differs on ``axes``."""
        self.balance = b if self.balance is None else self.balance * b

    def forward(self, x: Tensor) -> Tensor:
        over = [axis for axis in range(x.ndim) if axis not in self.axes]
        low, high = x.detach().amin(over, keepdim=True), x.detach().amax(over, keepdim=True)
        check_finite(low, high, x, self.layer, self.clock)
        self.minimum = torch.minimum(self.minimum, low.to("cpu", torch.float32))
        self.maximum = torch.maximum(self.maximum, high.to("cpu", torch.float32))
        return x

    def range(self) -> tuple[Tensor, Tensor]:
        if (self.minimum > self.maximum).any():
            raise not_calibrated(self.layer)
        divisor = 1.0 if self.balance is None else self.balance
        return (self.minimum.double() / divisor).amin(), (self.maximum.double() / divisor).amax()
