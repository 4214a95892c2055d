"""Observer of the ranges of attention's operands: q, k, v and the probabilities."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ptq4dit_ao.observers.clock import TimestepClock
from ptq4dit_ao.observers.hooks import ActivationObserver, ConvertHook, check_finite, not_calibrated
from ptq4dit_ao.observers.qdq import QuantSpec


class AttentionObserver(ActivationObserver):
    """Observer of minimum and maximum of an operand of attention, separate along the axes that balancing may divide.

    Only v can be divided: a fold of the attention output divides its channels by b. As with
    :class:`~ptq4dit_ao.observers.SalienceObserver`, the range is then ``min_j(min_j / b_j) .. max_j(max_j / b_j)``.
    """

    def __init__(
        self, spec: QuantSpec, hook: ConvertHook, name: str, clock: TimestepClock, axes: Collection[int] = ()
    ) -> None:
        super().__init__(spec, hook, name, clock)
        self.axes = axes
        self.minimum, self.maximum = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def divide(self, b: Tensor) -> None:
        """Record that a fold divides the operand by b, float64, broadcastable to it and varying along ``axes`` only."""
        self.balance = b if self.balance is None else self.balance * b

    def forward(self, x: Tensor) -> Tensor:
        """Update minimum and maximum from an operand; return it unchanged."""
        over = [axis for axis in range(x.ndim) if axis not in self.axes]
        low, high = x.detach().amin(over, keepdim=True), x.detach().amax(over, keepdim=True)
        check_finite(low, high, x, self.layer, self.clock)
        self.minimum = torch.minimum(self.minimum, low.to("cpu", torch.float32))
        self.maximum = torch.maximum(self.maximum, high.to("cpu", torch.float32))
        return x

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value after division by the balancing vector: scalars, float64.

        Raises:
            CalibrationError: nothing was observed.
        """
        if (self.minimum > self.maximum).any():
            raise not_calibrated(self.layer)
        divisor = 1.0 if self.balance is None else self.balance
        return (self.minimum.double() / divisor).amin(), (self.maximum.double() / divisor).amax()
