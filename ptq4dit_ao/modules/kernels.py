"""Integer products for quantized modules: one op, which ``torch.compile`` does not look into.

The op multiplies integers, and scales the product. Quantization before it and whatever follows it are ordinary
operations, so a compiler fuses them with their neighbours.

======================  =================================  ===========
device                  kernel                             activations
======================  =================================  ===========
x86 with VNNI or AMX    oneDNN's linear, packed weights    uint8
any other               ``torch._int_mm``                  int8
======================  =================================  ===========
"""

from __future__ import annotations

import functools
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptq4dit_ao.lowering.machine import OVERFLOWS, has_dot_product, has_onednn, no_x86

KERNELS = ("onednn::qlinear_pointwise", "aten::_int_mm")
"""Names of the integer kernels in torch's profiler."""

OP = "ptq4dit_ao::linear_int8"
"""Name of the op in torch's profiler."""

LEAST_ROWS, MULTIPLE = 17, 8
"""Least number of rows that ``_int_mm`` takes on CUDA, and the number that its columns must be a multiple of."""


def takes_unsigned(device: torch.device) -> bool:
    """Whether the kernel of a device takes uint8 activations; otherwise it takes int8."""
    return device.type == "cpu" and no_x86() is None and has_onednn() and has_dot_product()


def saturates(device: torch.device, x_bits: int, bits: int) -> str | None:
    """The reason why the kernel of a device would silently compute wrong products; None if it would not."""
    if device.type != "cpu" or no_x86() is not None or has_dot_product() or x_bits + bits < 16:
        return None
    return OVERFLOWS


@dataclass(frozen=True)
class _Packed:
    version: int
    """Version of the plain weight that was packed."""
    weight: Tensor
    zero_point: Tensor


class PackedWeights:
    """Weights in oneDNN's layout, for as long as their plain form lives.

    A weight that was changed in place is packed again.
    """

    def __init__(self) -> None:
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._found: dict[int, dict[tuple[object, ...], _Packed]] = {}
        """By storage, and by the place of the weight in it."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, list(self._found.values())))

    def of(self, weight: Tensor) -> _Packed:
        """The packed form of ``weight``, (C_out, C_in) int8."""
        storage = weight.untyped_storage()
        key, place = storage._cdata, (weight.storage_offset(), weight.shape, weight.stride())
        version = 0 if weight.is_inference() else weight._version
        if (found := self._known(storage, key, place, version)) is not None:
            return found
        with self._lock:
            if (found := self._known(storage, key, place, version)) is not None:  # another thread has packed it
                return found
            packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
            made = _Packed(version, packed, torch.zeros(len(weight), dtype=torch.int32))
            if key not in self._storages or self._storages[key]() is not storage:
                self._found[key] = {}
                self._storages[key] = weakref.ref(storage, functools.partial(self._drop, key))
            self._found.setdefault(key, {})[place] = made
            return made

    def _known(
        self, storage: torch.UntypedStorage, key: int, place: tuple[object, ...], version: int
    ) -> _Packed | None:
        owner = self._storages.get(key)
        found = None if owner is None or owner() is not storage else self._found.get(key, {}).get(place)
        return found if found is not None and found.version == version else None

    def _drop(self, key: int, owner: object) -> None:
        if self._storages.get(key) is owner:  # a later storage may have the same address
            del self._storages[key]
            self._found.pop(key, None)

    def forget(self, weight: Tensor) -> None:
        """Forget the packed form of a weight that was changed where its version does not tell."""
        self._found.pop(weight.untyped_storage()._cdata, None)


PACKED = PackedWeights()


def _kernel(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    scale: Tensor,
    row_sums: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The linear ``x_scale scale ((x - x_zero_point) weight^T) + bias`` with integers in the parentheses.

    Args:
        x: activations, (..., C_in) uint8 or int8, as :func:`takes_unsigned` says.
        x_scale: their scale, () float32.
        x_zero_point: their zero point, () int32.
        weight: integers, (C_out, C_in) int8.
        scale: scale of each row, (C_out,) float32.
        row_sums: sum of each row of the weight, (C_out,) int32.
        bias: (C_out,), or None.
        dtype: dtype of the output.
    """
    bias = None if bias is None else bias.to(torch.float32)
    if x.dtype == torch.int8:
        product = _int_mm(x.reshape(-1, x.shape[-1]), weight) - x_zero_point * row_sums
        y = product.to(torch.float32) * (x_scale * scale)
        return (y if bias is None else y + bias).to(dtype).view(*x.shape[:-1], len(weight))
    packed = PACKED.of(weight)
    result: Tensor = torch.ops.onednn.qlinear_pointwise.tensor(
        x, x_scale, x_zero_point, packed.weight, scale, packed.zero_point, bias, 1.0, 0, dtype, "none", [], ""
    )
    return result


def _int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """Integer product ``x weight^T``, int32; sizes that the kernel does not take are padded with zeros."""
    rows, (c_out, c_in) = len(x), weight.shape
    columns, channels = -c_in % MULTIPLE, -c_out % MULTIPLE
    padded = functional.pad(x, (0, columns, 0, max(0, LEAST_ROWS - rows)))
    return torch._int_mm(padded, functional.pad(weight, (0, columns, 0, channels)).t())[:rows, :c_out]


def _shaped(x: Tensor, *operands: Any) -> Tensor:
    weight, dtype = operands[2], operands[-1]
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


_LIBRARY = torch.library.Library("ptq4dit_ao", "DEF")
_LIBRARY.define(
    "linear_int8(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor scale, Tensor row_sums, "
    "Tensor? bias, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("linear_int8", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake(OP, _shaped, lib=_LIBRARY)

linear_int8 = torch.ops.ptq4dit_ao.linear_int8.default
"""The op, with the arguments of :func:`_kernel`."""
