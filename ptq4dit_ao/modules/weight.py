"""``StaticInt8Weight``: the integer weight of an ``nn.Linear``, with the quantization of the linear's input.

``functional.linear(x, weight, bias)`` computes, with integers in the product,

    ``y = s_x s (clamp(round((x - o) p / s_x) + z) - z) W^T + bias``

where W are the integers, s the scale of each row, o the offset of the input (``pre_offset``), p = 1/b the balancing
vector (``pre_scale``), and s_x and z scale and zero point of the balanced input. The bias makes up for the offset. If
the weight is ``dynamic``, the same is computed for ``((x - o) p - m) / t``, with middle m and scale t of each row of
the input, and both are undone afterwards (:mod:`ptq4dit_ao.core.per_token`). If the input stays float (16 bits), so
does the product. The tensor is a parameter like any other: modules that hold it can be moved, copied, compiled and
extended by adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torchao.quantization import Int8Tensor, MappingType, PerTensor
from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
from torchao.utils import TorchAOBaseTensor

from ptq4dit_ao.core.expansion import EXPANDED_BITS
from ptq4dit_ao.core.per_token import middle_and_scale, to_units
from ptq4dit_ao.core.qparams import FLOAT_BITS
from ptq4dit_ao.errors import ArgumentError, LoweringError
from ptq4dit_ao.lowering.weight_only import multiply
from ptq4dit_ao.modules.kernels import PACKED, linear_int8, saturates, takes_unsigned

aten = torch.ops.aten

SIGNED = 128
"""Difference between the uint8 and the int8 form of an activation."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of inputs."""

UNCHANGEABLE = (
    "the integer weight of a quantized linear cannot be {}, because its scales and the range of its input were "
    "calibrated for these integers; {}"
)
ADAPTERS = "leave an adapter unfused (its scale can be set at any time), or fuse it into the float model and quantize"
WAYS_OUT = {
    "aten.cat": "leave q, k and v apart, or call fuse_qkv_projections on the float model before it is quantized",
    "aten.add_": ADAPTERS,
    "aten.add": ADAPTERS,
}
"""The way out of a refused operation on a weight."""


class StaticInt8Weight(TorchAOBaseTensor):
    """Integer weight (C_out, C_in) with the static quantization of its input.

    Args:
        qdata: integers, (C_out, C_in) int8.
        scale: scale of each row, (C_out,) float32.
        x_scale: scale of the input, () float32.
        x_zero_point: zero point of the input as uint8, () int32.
        row_sums: sum of each row's integers, (C_out,) int32.
        bits: bits of the integers.
        x_bits: bits of the input; 16 if it stays float, and the product is one of floats.
        dynamic: whether each row of the input is shifted and scaled first, in a range of its own.
        x_ndim: number of axes of the input; None if it is called with several.
        dtype: dtype that the weight has for the module around it.
        expansion: rule by which the integers expand from 4 bits, as text; None if they do not.
        pre_scale: vector that the input is multiplied by, (C_in,) float32; None for ones.
        pre_offset: vector that is subtracted from the input before, (C_in,) float32; None for zeros.
    """

    tensor_data_names = ["qdata", "scale", "x_scale", "x_zero_point", "row_sums"]  # noqa: RUF012  (read by torchao)
    optional_tensor_data_names = ["pre_scale", "pre_offset"]  # noqa: RUF012
    tensor_attribute_names = ["bits", "x_bits", "dynamic", "x_ndim", "dtype", "expansion"]  # noqa: RUF012

    qdata: Tensor
    scale: Tensor
    x_scale: Tensor
    x_zero_point: Tensor
    row_sums: Tensor
    pre_scale: Tensor | None
    pre_offset: Tensor | None
    bits: int
    x_bits: int
    dynamic: bool
    x_ndim: int | None
    expansion: str | None

    @staticmethod
    def __new__(cls: type[StaticInt8Weight], qdata: Tensor, *data: Any, **options: Any) -> StaticInt8Weight:
        """Make the tensor without its data."""
        dtype = qdata.dtype if isinstance(qdata, StaticInt8Weight) else _bind(*data, **options)["dtype"]
        made: StaticInt8Weight = torch.Tensor._make_wrapper_subclass(
            cls, qdata.shape, dtype=dtype, device=qdata.device, requires_grad=False
        )
        return made

    def __init__(self, qdata: Tensor, *data: Any, **options: Any) -> None:
        super().__init__()
        if isinstance(qdata, StaticInt8Weight):  # accelerate makes a parameter of a parameter's class
            names = (*self.tensor_data_names[1:], *self.optional_tensor_data_names, *self.tensor_attribute_names)
            self.qdata, parts = qdata.qdata, {name: getattr(qdata, name) for name in names if name != "dtype"}
        else:
            self.qdata, parts = qdata, _bind(*data, **options)
            del parts["dtype"]  # the tensor itself has it
        for name, value in parts.items():
            setattr(self, name, value)

    @classmethod
    def of(
        cls,
        qdata: Tensor,
        scale: Tensor,
        x_scale: float,
        x_zero_point: int,
        *,
        bits: int,
        x_bits: int,
        x_ndim: int | None,
        dtype: torch.dtype,
        dynamic: bool = False,
        expansion: str | None = None,
        pre_scale: Tensor | None = None,
        pre_offset: Tensor | None = None,
    ) -> StaticInt8Weight:
        """Make a weight from numbers, on the device of its integers."""
        return cls(
            qdata,
            scale.to(qdata.device, torch.float32),
            torch.tensor(x_scale, dtype=torch.float32, device=qdata.device),
            torch.tensor(x_zero_point, dtype=torch.int32, device=qdata.device),
            qdata.sum(1, dtype=torch.int32),
            bits,
            x_bits,
            dynamic,
            x_ndim,
            dtype,
            expansion,
            *(None if part is None else part.to(qdata.device, torch.float32) for part in (pre_scale, pre_offset)),
        )

    @classmethod
    def of_int8_tensor(cls, tensor: Int8Tensor) -> StaticInt8Weight:
        """Make a weight of torchao's tensor that has no zero points of its own, for a static range or a float input."""
        scale, zero_point = tensor.act_quant_scale, tensor.act_quant_zero_point
        return cls.of(
            tensor.qdata,
            tensor.scale.flatten().expand(len(tensor.qdata)),
            1.0 if scale is None else float(scale),
            SIGNED + (0 if zero_point is None else int(zero_point)),
            bits=8,
            x_bits=FLOAT_BITS if scale is None else 8,
            x_ndim=None if scale is None else scale.ndim,
            dtype=tensor.dtype,
            pre_scale=tensor.act_pre_scale,
        )

    def float_weight(self) -> Tensor:
        """The weight for inputs that are not balanced, (C_out, C_in), in its dtype."""
        return self._float_weight().to(self.dtype)

    def float_bias(self, bias: Tensor | None) -> Tensor | None:
        """The linear's bias for inputs that are not centred, (C_out,)."""
        if self.pre_offset is None or bias is None:
            return bias
        return (bias.to(torch.float32) - self._float_weight() @ self.pre_offset).to(bias.dtype)

    def _float_weight(self) -> Tensor:
        weight = self.qdata.to(torch.float32) * self.scale.unsqueeze(1)
        return weight if self.pre_scale is None else weight * self.pre_scale

    def dequantize(self, output_dtype: torch.dtype | None = None) -> NoReturn:  # type: ignore[override]
        """Raise ArgumentError: adapters ask for this when they are merged, and would lose the calibrated range."""
        raise ArgumentError(UNCHANGEABLE.format("dequantized for an adapter", ADAPTERS))

    def not_stock(self) -> str | None:
        """The reason why torchao's ``Int8Tensor`` cannot hold this weight; None if it can."""
        if self.pre_offset is not None:
            return "its input is centred (balance.center), and Int8Tensor has no offset"
        if self.dynamic:
            return "its input is quantized per token around the token's middle, and Int8Tensor's around 0"
        if self.x_bits == FLOAT_BITS:
            if self.pre_scale is None or self.dtype == torch.float32:
                return None
            return f"its input is balanced in float32 and stays {self.dtype}, and Int8Tensor multiplies in one dtype"
        if self.x_bits != 8:
            return f"its input has {self.x_bits} bits, and Int8Tensor's have 8"
        return "it is called with inputs of several ranks" if self.x_ndim is None else None

    def as_int8_tensor(self) -> Int8Tensor:
        """The weight as torchao's own tensor, which computes the same."""
        assert self.not_stock() is None
        stored = (self.qdata, self.scale.unsqueeze(1), [1, self.qdata.shape[1]], self.dtype)
        if self.x_bits == FLOAT_BITS:
            return Int8Tensor(*stored, act_pre_scale=self.pre_scale)
        assert self.x_ndim is not None
        one = (1,) * self.x_ndim
        return Int8Tensor(
            *stored,
            act_quant_scale=self.x_scale.reshape(one),
            act_quant_zero_point=(self.x_zero_point - SIGNED).to(torch.int8).reshape(one),
            act_pre_scale=self.pre_scale,
            act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerTensor(), mapping_type=MappingType.ASYMMETRIC),
        )

    def balance(self, x: Tensor) -> Tensor:
        """Balance an input, (..., C_in) floats to float32."""
        x = x.to(torch.float32)
        if self.pre_offset is not None:
            x = x - self.pre_offset
        return x if self.pre_scale is None else x * self.pre_scale

    def quantize(self, x: Tensor) -> Tensor:
        """Quantize a balanced input, (..., C_in) float32 to uint8 or int8, as the device's kernel takes it."""
        q = x * (1 / self.x_scale)
        q = q.round_().add_(self.x_zero_point).clamp_(0, 2**self.x_bits - 1)
        return q.to(torch.uint8) if takes_unsigned(x.device) else q.sub_(SIGNED).to(torch.int8)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation that a parameter needs; refuse those that would compute with the weight as a matrix."""
        if func not in cls._ATEN_OP_TABLE[cls]:
            name = str(func).rpartition(".")[0]
            way_out = WAYS_OUT.get(name, "use it in functional.linear, or take float_weight()")
            raise ArgumentError(UNCHANGEABLE.format(f"used in {name}", way_out))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        balanced = "" if self.pre_scale is None else ", balanced"
        inputs = f"A{self.x_bits}{' per token' if self.dynamic else ''}"
        return f"{type(self).__name__}({tuple(self.shape)}, W{self.stored_bits}{inputs}{balanced}, {self.device})"

    @property
    def stored_bits(self) -> int:
        """Bits of an element on disk."""
        return self.bits if self.expansion is None else EXPANDED_BITS


def _bind(
    scale: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    row_sums: Tensor,
    bits: int,
    x_bits: int,
    dynamic: bool,
    x_ndim: int | None,
    dtype: torch.dtype,
    expansion: str | None,
    pre_scale: Tensor | None = None,
    pre_offset: Tensor | None = None,
) -> dict[str, Any]:
    """The arguments of a weight after its integers, by name."""
    return dict(locals())


@StaticInt8Weight.implements(aten.linear.default)
@StaticInt8Weight.implements_torch_function(torch.nn.functional.linear)
def _linear(func: Callable[..., Any], types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ArgumentError(
            "a quantized linear has no gradients; run the module under torch.no_grad(), as pipelines do, and train "
            "adapters on the float model"
        )
    if not isinstance(weight, StaticInt8Weight):
        raise ArgumentError(UNCHANGEABLE.format("the input of another linear", ADAPTERS))
    if x.dtype not in DTYPES:
        raise ArgumentError(f"a quantized linear got an input of {x.dtype}; give float32, bfloat16 or float16")
    why = None if weight.x_bits == FLOAT_BITS else saturates(x.device, weight.x_bits, weight.bits)
    if why is not None:
        raise LoweringError(f"a quantized linear would compute wrong products: {why}, or use another device")
    rows = weight.balance(x)
    if weight.x_bits == FLOAT_BITS:
        return multiply(rows.to(x.dtype), weight.qdata, weight.scale, bias)
    if not weight.dynamic:
        return _multiply(weight, rows, bias, x.dtype)
    middle, scale = middle_and_scale(rows, 2**weight.x_bits - 1)
    shift = middle * (weight.scale * weight.row_sums)
    y = _multiply(weight, to_units(rows, middle, scale), None, torch.float32)
    return (y * scale + (shift if bias is None else shift + bias)).to(x.dtype)


def _multiply(weight: StaticInt8Weight, rows: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The integer linear of a balanced input."""
    zero_point = weight.x_zero_point if takes_unsigned(rows.device) else weight.x_zero_point - SIGNED
    parts = (weight.qdata, weight.scale, weight.row_sums)
    y: Tensor = linear_int8(weight.quantize(rows), weight.x_scale, zero_point, *parts, bias, dtype)
    return y


@StaticInt8Weight.implements(aten._to_copy.default)
def _to_copy(
    func: Callable[..., Any], types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> StaticInt8Weight:
    """Move all parts to a device. A dtype is that of the module around the weight: scales and ranges keep float32."""
    self: StaticInt8Weight = args[0]
    given = {name: value for name, value in kwargs.items() if name in ("device", "non_blocking", "pin_memory")}
    names, attributes = self.__tensor_flatten__()
    parts = {name: func(getattr(self, name), **given) for name in names}
    attributes |= {"dtype": kwargs.get("dtype") or self.dtype}
    copied: StaticInt8Weight = StaticInt8Weight.__tensor_unflatten__(parts, attributes, self.shape, self.stride())
    return copied


@StaticInt8Weight.implements(aten.copy_.default)
def _copy(
    func: Callable[..., Any], types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> StaticInt8Weight:
    """Load another weight of the same kind into this one."""
    self, source = args[:2]
    if not isinstance(self, StaticInt8Weight) or not isinstance(source, StaticInt8Weight):
        raise ArgumentError(
            UNCHANGEABLE.format("copied from or to a float weight", "load the checkpoint of a quantized module into it")
        )
    (names, mine), (others, theirs) = self.__tensor_flatten__(), source.__tensor_flatten__()
    same = names == others and {**mine, "dtype": None} == {**theirs, "dtype": None} and self.shape == source.shape
    if not same:
        raise ArgumentError(f"{source} cannot be loaded into {self}; load a checkpoint of the same quantized module")
    for name in names:
        getattr(self, name).copy_(getattr(source, name))
    PACKED.forget(self.qdata)  # versions do not count inside a tensor's own operations
    return self


@StaticInt8Weight.implements(aten.is_pinned.default)
def _is_pinned(func: Callable[..., Any], types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return bool(args[0].qdata.is_pinned())


@StaticInt8Weight.implements(aten._pin_memory.default)
def _pin_memory(
    func: Callable[..., Any], types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> StaticInt8Weight:
    pinned: StaticInt8Weight = args[0]._apply_fn_to_data(lambda part: part.pin_memory())
    return pinned
