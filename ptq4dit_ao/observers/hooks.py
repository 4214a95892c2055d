"""Observers with a ``convert`` hook: before the first of them is converted, the model is balanced and folded.

``convert_pt2e`` visits weight observers first, so weight ranges must wait for the fold: weights are looked at then,
not during calibration. Activation ranges after balancing follow exactly from minimum and maximum per channel.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import ObserverBase

from ptq4dit_ao.errors import CalibrationError
from ptq4dit_ao.graph.pending import tensor_at
from ptq4dit_ao.observers.clock import TimestepClock
from ptq4dit_ao.observers.qdq import QuantSpec, insert_qdq
from ptq4dit_ao.observers.statistics import ChannelStatistics


class ConvertHook(Protocol):
    """What runs once, before the first observer of a prepared model is converted."""

    def before_convert(self, model: GraphModule) -> None: ...


class _HookedObserver(ObserverBase):
    """An observer that replaces itself by quantize/dequantize nodes, after the hook has run."""

    def __init__(self, spec: QuantSpec, hook: ConvertHook) -> None:
        super().__init__(dtype=spec.dtype)
        self.spec = spec
        self.hook = hook

    def convert(self, model: GraphModule, node: Node) -> None:
        """Called by ``convert_pt2e``."""
        self.hook.before_convert(model)
        source = node.args[0]
        assert isinstance(source, Node)
        scale, zero_point = self._qparams(model, source)
        insert_qdq(model, node, self.spec, scale, zero_point)

    def calculate_qparams(self, **kwargs: object) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("qparams depend on the fold; convert_pt2e computes them")

    def _qparams(self, model: GraphModule, source: Node) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class RangeObserver(_HookedObserver):
    """Minimum and maximum of a whole activation, for inputs that no balancing vector reaches."""

    def __init__(self, spec: QuantSpec, hook: ConvertHook, layer: str, clock: TimestepClock) -> None:
        super().__init__(spec, hook)
        self.layer, self.clock = layer, clock
        self.minimum, self.maximum = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def forward(self, x: Tensor) -> Tensor:
        low, high = torch.aminmax(x.detach())
        check_finite(low, high, x, self.layer, self.clock)
        self.minimum = torch.minimum(self.minimum, low.to("cpu", torch.float32))
        self.maximum = torch.maximum(self.maximum, high.to("cpu", torch.float32))
        return x

    def _qparams(self, model: GraphModule, source: Node) -> tuple[Tensor, Tensor]:
        if self.minimum > self.maximum:
            raise _not_calibrated(self.layer)
        return self.spec.qparams(self.minimum, self.maximum)


class SalienceObserver(_HookedObserver):
    """Minimum and maximum per (timestep, channel) of a balance site's input, (N, ..., C), N at ``batch_axis``.

    After the hook has set :attr:`balance` (C,), the range is ``min_j(min_j / b_j) .. max_j(max_j / b_j)``: exact,
    no second pass.
    """

    def __init__(
        self,
        spec: QuantSpec,
        hook: ConvertHook,
        layer: str,
        clock: TimestepClock,
        channels: int,
        batch_axis: int | None = 0,
    ) -> None:
        super().__init__(spec, hook)
        self.layer, self.clock, self.batch_axis = layer, clock, batch_axis
        self.statistics = ChannelStatistics(channels)
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        record_range(x.detach(), self.statistics, self.clock, self.layer, self.batch_axis)
        return x

    def _qparams(self, model: GraphModule, source: Node) -> tuple[Tensor, Tensor]:
        if len(self.statistics.timesteps) == 0:
            raise _not_calibrated(self.layer)
        b = torch.ones(self.statistics.channels) if self.balance is None else self.balance
        low = self.statistics.minimum.amin(0).to(torch.float64) / b
        high = self.statistics.maximum.amax(0).to(torch.float64) / b
        return self.spec.qparams(low.amin(), high.amax())


class WeightObserver(_HookedObserver):
    """Looks at the weight when converting, once, after the fold; costs nothing during calibration."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    def _qparams(self, model: GraphModule, source: Node) -> tuple[Tensor, Tensor]:
        weight = tensor_at(model, str(source.target)).detach()
        axis = self.spec.channel_axis
        rows = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).reshape(weight.shape[axis], -1)
        low, high = torch.aminmax(rows, dim=1)
        if not (low.isfinite().all() and high.isfinite().all()):
            raise CalibrationError(f"weight {source.target!r} has NaN or infinite values; it cannot be quantized")
        low, high = (low[0], high[0]) if axis is None else (low, high)
        return self.spec.qparams(low, high)


def record_range(
    x: Tensor, statistics: ChannelStatistics, clock: TimestepClock, layer: str, batch_axis: int | None
) -> None:
    """Take in a tensor (..., C) whose samples lie along ``batch_axis``; None if all samples share it.

    Raises:
        CalibrationError: it has NaN or infinite values, or its rows cannot be told apart.
    """
    x = x.unsqueeze(0) if batch_axis is None else x.movedim(batch_axis, 0)
    low, high = channel_range(x)
    check_finite(low, high, x, layer, clock)
    timesteps = clock.all() if batch_axis is None else clock.rows(len(low), layer)
    statistics.update(timesteps, low.expand(len(timesteps), -1), high.expand(len(timesteps), -1))


def channel_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum per (row, channel): (N, ..., C) -> two (N, C)."""
    rows = x.reshape(len(x), -1, x.shape[-1])
    return rows.amin(1), rows.amax(1)


def check_finite(low: Tensor, high: Tensor, x: Tensor, layer: str, clock: TimestepClock) -> None:
    """Raises CalibrationError, with layer and timesteps, if the range of ``x`` is not finite."""
    if low.isfinite().all() and high.isfinite().all():
        return
    bad = ~x.detach().reshape(len(x), -1).isfinite().all(1).cpu()
    known = clock.current is not None and len(x) % max(1, clock.current.shape[0] if clock.current.ndim else 1) == 0
    timesteps = sorted(set(clock.rows(len(x), layer)[bad].tolist())) if known else []
    when = f" at timestep {', '.join(f'{t:g}' for t in timesteps)}" if timesteps else ""
    raise CalibrationError(
        f"the input of {layer!r} has NaN or infinite values{when}, in {int(bad.sum())} of {len(bad)} rows; "
        "look at that calibration sample, or run the float model on it"
    )


def _not_calibrated(layer: str) -> CalibrationError:
    return CalibrationError(
        f"{layer!r} was never run: call the prepared model on calibration samples before convert_pt2e"
    )
