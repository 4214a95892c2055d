"""Observers with a ``convert`` hook, which balances and folds the model before the first of them is converted.

Weight ranges depend on the fold, so weight observers read weights on conversion and not during calibration. Activation
ranges after balancing follow exactly from minimum and maximum per channel.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import ObserverBase

from ptq4dit_ao._modes import own_modes
from ptq4dit_ao.core import fake_quantize
from ptq4dit_ao.core.expansion import Codebook, Interval, fit_codebooks
from ptq4dit_ao.core.gptq import nearest_and_codebook
from ptq4dit_ao.core.int4 import INT4_MAX, INT4_MIN, pack_int4, unpack_int4
from ptq4dit_ao.core.per_token import fake_quantize_tokens
from ptq4dit_ao.errors import CalibrationError
from ptq4dit_ao.graph.expansions import expansions
from ptq4dit_ao.graph.names import LINEAR
from ptq4dit_ao.graph.pending import drop_unread, tensor_at
from ptq4dit_ao.observers.clock import TimestepClock
from ptq4dit_ao.observers.moments import Moments
from ptq4dit_ao.observers.per_token import complete, insert_per_token
from ptq4dit_ao.observers.qdq import QuantSpec, insert_bias, insert_qdq
from ptq4dit_ao.observers.statistics import ChannelStatistics


class ConvertHook(Protocol):
    """Protocol of the hook that observers call before they are converted."""

    def before_convert(self, model: GraphModule) -> None:
        """Finish a prepared model; only the first call, before any observer is converted, has an effect."""
        ...


class _HookedObserver(ObserverBase):
    """An observer that calls the hook, and then replaces itself by quantize/dequantize nodes."""

    def __init__(self, spec: QuantSpec, hook: ConvertHook) -> None:
        super().__init__(dtype=spec.dtype)
        self.spec = spec
        self.hook = hook

    @own_modes()
    def convert(self, model: GraphModule, node: Node) -> None:
        """Call the hook and replace the observer by quantize/dequantize nodes; called by ``convert_pt2e``."""
        self.hook.before_convert(model)
        source = node.args[0]
        assert isinstance(source, Node)
        self._convert(model, node, source)

    def calculate_qparams(self, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Raise NotImplementedError, because the parameters depend on the fold."""
        raise NotImplementedError("qparams depend on the fold; convert_pt2e computes them")

    def _convert(self, model: GraphModule, node: Node, source: Node) -> None:
        raise NotImplementedError


class ActivationObserver(_HookedObserver):
    """Observer of one quantized activation, (N, ..., C): of its range, and of its moments if they are needed."""

    def __init__(
        self, spec: QuantSpec, hook: ConvertHook, layer: str, clock: TimestepClock, moments: Moments | None = None
    ) -> None:
        super().__init__(spec, hook)
        self.layer, self.clock, self.moments = layer, clock, moments
        self.tokens = 0
        """Number of tokens (rows of C numbers) that were observed."""
        self.chosen_range: tuple[float, float] | None = None
        """Quantization range chosen after balancing; None takes minimum and maximum."""
        self.balance: Tensor | None = None
        """Balancing vector that divides the activation after the fold, (C,) or broadcastable to it, float64."""
        self.offset: Tensor | None = None
        """Offset that is subtracted from the activation before it is divided, (C,) float64."""

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value, after balancing: scalars.

        Raises:
            CalibrationError: nothing was observed.
        """
        raise NotImplementedError

    def _count(self, x: Tensor) -> None:
        self.tokens += x.numel() // x.shape[-1]
        if self.moments is not None:
            self.moments.update(x.detach())

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the activation's quantization."""
        low, high = self.range() if self.chosen_range is None else map(torch.tensor, self.chosen_range)
        return self.spec.qparams(low, high)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The activation quantized and dequantized, of the shape and dtype of ``x``."""
        if self.spec.stays_float:
            return x
        if self.spec.dynamic:
            return fake_quantize_tokens(x, self.spec.quant_min, self.spec.quant_max)
        scale, zero_point = self.qparams()
        return fake_quantize(x, float(scale), int(zero_point), self.spec.quant_min, self.spec.quant_max)

    def _convert(self, model: GraphModule, node: Node, source: Node) -> None:
        if self.spec.stays_float:
            node.replace_all_uses_with(source)
            model.graph.erase_node(node)
        elif self.spec.dynamic:
            insert_per_token(model, node, self.spec)
        else:
            insert_qdq(model, node, self.spec, *self.qparams())


class RangeObserver(ActivationObserver):
    """Observer of minimum and maximum of a whole activation, for inputs that are not balanced."""

    def __init__(
        self, spec: QuantSpec, hook: ConvertHook, layer: str, clock: TimestepClock, moments: Moments | None = None
    ) -> None:
        super().__init__(spec, hook, layer, clock, moments)
        self.minimum, self.maximum = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def forward(self, x: Tensor) -> Tensor:
        """Update minimum, maximum and moments from an activation; return it unchanged."""
        low, high = torch.aminmax(x.detach())
        check_finite(low, high, x, self.layer, self.clock)
        self.minimum = torch.minimum(self.minimum, low.to("cpu", torch.float32))
        self.maximum = torch.maximum(self.maximum, high.to("cpu", torch.float32))
        self._count(x)
        return x

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value: scalars.

        Raises:
            CalibrationError: nothing was observed.
        """
        if self.minimum > self.maximum:
            raise not_calibrated(self.layer)
        return self.minimum, self.maximum


class SalienceObserver(ActivationObserver):
    """Observer of minimum and maximum per timestep and channel of a site's input, (N, ..., C), N at ``batch_axis``.

    After the hook has set :attr:`balance` (C,), the range is ``min_j(min_j / b_j) .. max_j(max_j / b_j)``. It is exact
    and needs no second pass over the data. An :attr:`offset` (C,), if there is one, is subtracted first.
    """

    def __init__(
        self,
        spec: QuantSpec,
        hook: ConvertHook,
        layer: str,
        clock: TimestepClock,
        channels: int,
        batch_axis: int | None = 0,
        moments: Moments | None = None,
    ) -> None:
        super().__init__(spec, hook, layer, clock, moments)
        self.batch_axis = batch_axis
        self.statistics = ChannelStatistics(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Record ranges and moments of a site's input; return it unchanged."""
        record_range(x.detach(), self.statistics, self.clock, self.layer, self.batch_axis)
        self._count(x)
        return x

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value after balancing: scalars, float64.

        Raises:
            CalibrationError: nothing was observed.
        """
        if len(self.statistics.timesteps) == 0:
            raise not_calibrated(self.layer)
        return self.statistics.range(self.balance, self.offset)


class Rounded:
    """A rounded weight, which is kept next to the float one until conversion; 4-bit integers are stored packed.

    Args:
        integers: (C_out, C_in) int8.
        scale: (C_out,) float32.
        bias: (C_out,) float32, corrected for the change of the output's mean by rounding; None keeps the layer's own.
        codebook: integers that each element can take, for weights that expand from 4 bits.
    """

    def __init__(
        self, *, integers: Tensor, scale: Tensor, bias: Tensor | None = None, codebook: Codebook | None = None
    ) -> None:
        low, high = integers.aminmax()
        self._shape = integers.shape
        self._packed = bool(low >= INT4_MIN and high <= INT4_MAX)
        self._integers = pack_int4(integers) if self._packed else integers
        self.scale = scale
        self.bias = bias
        self.codebook = codebook

    @property
    def integers(self) -> Tensor:
        """Integers of the weight, (C_out, C_in) int8."""
        return unpack_int4(self._integers, self._shape) if self._packed else self._integers

    def allowed(self, spec: QuantSpec) -> Codebook | Interval:
        """Integers that each element can take, of a weight that is quantized by a spec."""
        return self.codebook or Interval(low=spec.quant_min, high=spec.quant_max)

    def weight(self) -> Tensor:
        """The dequantized weight, (C_out, C_in) float32."""
        return self.integers * self.scale.unsqueeze(1)


class WeightObserver(_HookedObserver):
    """Observer of a weight, which reads it once on conversion, after the fold; calibration costs nothing."""

    def __init__(self, spec: QuantSpec, hook: ConvertHook) -> None:
        super().__init__(spec, hook)
        self.rounded: Rounded | None = None
        """The result of rounding; None rounds the weight to nearest."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight unchanged."""
        return weight

    def qparams(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point that cover a weight.

        Raises:
            CalibrationError: the weight is not finite.
        """
        axis = self.spec.channel_axis
        rows = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).reshape(weight.shape[axis], -1)
        low, high = torch.aminmax(rows, dim=1)
        if not (low.isfinite().all() and high.isfinite().all()):
            raise CalibrationError(
                f"weight {name!r} has NaN or infinite values; look at the checkpoint, and the dtype it was cast to"
            )
        low, high = (low[0], high[0]) if axis is None else (low, high)
        return self.spec.qparams(low, high)

    def fake_quantize(self, name: str, weight: Tensor) -> Tensor:
        """The weight quantized and dequantized, of the shape and dtype of ``weight``."""
        if (rounded := self._rounded(name, weight)) is not None:
            return rounded.weight().to(weight.dtype)
        scale, zero_point = self.qparams(name, weight)
        if (axis := self.spec.channel_axis) is not None:
            shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
            scale, zero_point = scale.view(shape), zero_point.view(shape)
        return fake_quantize(weight, scale, zero_point, self.spec.quant_min, self.spec.quant_max).to(weight.dtype)

    def _rounded(self, name: str, weight: Tensor) -> Rounded | None:
        """The result of rounding; without one, the nearest allowed integers if the weight expands from 4 bits."""
        if self.rounded is not None or self.spec.expansion is None:
            return self.rounded
        self.qparams(name, weight)  # refuses a weight that is not finite
        weight = weight.to(torch.float32)
        importance = torch.ones_like(weight[0])
        candidates = fit_codebooks(weight, importance, self.spec.expansion, several=False)
        integers, scale, codebook = nearest_and_codebook(weight, candidates, importance)
        return Rounded(integers=integers, scale=scale, codebook=codebook)

    def _convert(self, model: GraphModule, node: Node, source: Node) -> None:
        readers = list(node.users)
        path, rounded = str(source.target), self.rounded
        if rounded is None:
            weight = tensor_at(model, path).detach()
            rounded = self._rounded(path, weight)
            if rounded is None:
                insert_qdq(model, node, self.spec, *self.qparams(path, weight))
            del weight
        if rounded is not None:
            if rounded.bias is not None:
                (linear,) = readers
                insert_bias(model, linear, rounded.bias)
            scale = rounded.scale if self.spec.channel_axis is not None else rounded.scale[0]
            zero_point = torch.zeros_like(scale, dtype=torch.int64)
            stored = insert_qdq(model, node, self.spec, scale, zero_point, rounded.integers)
            if self.spec.expansion is not None:
                expansions(model)[str(stored.target)] = self.spec.expansion
        for reader in readers:
            if reader.target is LINEAR:
                complete(model, reader)
        drop_unread(model)


def record_range(
    x: Tensor, statistics: ChannelStatistics, clock: TimestepClock, layer: str, batch_axis: int | None
) -> None:
    """Record the range of a tensor (..., C) whose samples lie along ``batch_axis``; None if all samples share it.

    Raises:
        CalibrationError: the tensor has NaN or infinite values, or its rows cannot be assigned to samples.
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
    """Raise CalibrationError, with layer and timesteps, if the range of ``x`` is not finite."""
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


def not_calibrated(layer: str) -> CalibrationError:
    """The exception of an observer that has observed nothing."""
    return CalibrationError(
        f"{layer!r} was never run: call the prepared model on calibration samples before convert_pt2e"
    )
