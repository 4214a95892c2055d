"""Integer products for quantized modules: one op, which ``torch.compile`` does not look into.

The op multiplies integers only. Quantization before it and whatever follows it are ordinary operations, so a compiler
fuses them with their neighbours.

======================  =================================  ===========
device                  kernel                             activations
======================  =================================  ===========
x86 with VNNI or AMX    oneDNN's linear, packed weights    uint8
any other               ``torch._int_mm``                  int8
======================  =================================  ===========
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ptq4dit_ao.lowering.machine import has_dot_product, has_onednn, no_x86

KERNELS = ("onednn::qlinear_pointwise", "aten::_int_mm")
"""Names of the integer kernels in torch's profiler."""

LEAST_ROWS, MULTIPLE = 17, 8
"""Least number of rows that ``_int_mm`` takes on CUDA, and the number that its columns must be a multiple of."""


def takes_unsigned(device: torch.device) -> bool:
    """Whether the kernel of a device takes uint8 activations; otherwise it takes int8."""
    return device.type == "cpu" and no_x86() is None and has_onednn() and has_dot_product()


@dataclass(frozen=True)
class _Packed:
    storage: weakref.ref[torch.UntypedStorage]
    version: int
    """Version of the plain weight that was packed."""
    weight: Tensor
    zero_point: Tensor


class PackedWeights:
    """Weights in oneDNN's layout, for as long as their plain form lives.

    A weight that was changed in place is packed again.
    """

    def __init__(self) -> None:
        self._found: dict[int, _Packed] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def of(self, weight: Tensor) -> _Packed:
        """The packed form of ``weight``, (C_out, C_in) int8."""
        storage = weight.untyped_storage()
        key, version = storage._cdata, 0 if weight.is_inference() else weight._version
        found = self._found.get(key)
        if found is not None and found.storage() is storage and found.version == version:
            return found
        with self._lock:
            packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
            forget = weakref.ref(storage, lambda _: self._found.pop(key, None))
            found = _Packed(forget, version, packed, torch.zeros(len(weight), dtype=torch.int32))
            self._found[key] = found
        return found


PACKED = PackedWeights()


def _onednn(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    packed = PACKED.of(weight)
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, packed.weight, scale, packed.zero_point, bias, 1.0, 0, dtype, "none", [], ""
    )
    return y


def int_mm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The op for int8 activations; sizes that the kernel does not take are padded with zeros."""
    rows, (c_out, c_in) = x.reshape(-1, x.shape[-1]), weight.shape
    columns, channels = -c_in % MULTIPLE, -c_out % MULTIPLE
    padded = functional.pad(rows, (0, columns, 0, max(0, LEAST_ROWS - len(rows))))
    product = torch._int_mm(padded, functional.pad(weight, (0, columns, 0, channels)).t())
    y = product[: len(rows), :c_out].to(torch.float32) * scale + bias
    return y.to(dtype).view(*x.shape[:-1], c_out)


def _linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return (_onednn if x.dtype == torch.uint8 else int_mm)(x, weight, scale, bias, dtype)


def _shaped(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


_LIBRARY = torch.library.Library("ptq4dit_ao", "DEF")
_LIBRARY.define(
    "linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor bias, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("linear_int8", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("ptq4dit_ao::linear_int8", _shaped, lib=_LIBRARY)

linear_int8 = torch.ops.ptq4dit_ao.linear_int8.default
"""``linear_int8(x, weight, scale, bias, dtype)``: ``(x @ weight.T) * scale + bias``, where x and weight are integers."""
